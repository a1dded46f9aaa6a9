"""`bdcore report`: runs as one HTML page."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import click


@click.command(
    "report",
    epilog="""\b
Examples:
  bdcore report runs/digits-badnets-wrn16_1-mcldef-seed0-d178a0c4
  bdcore report runs/* --out comparison.html
  bdcore report runs/mine --png figures""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="The page.  [default: report.html, in the run folder or, of several runs, here]",
)
@click.option(
    "--png",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Also write the figures, each as DIR/NAME.png.",
)
def command(runs: tuple[Path, ...], out: Path | None, png: Path | None) -> None:
    """Show runs on one HTML page that needs no network and nothing beside it.

    RUN is a run folder or its record.json; several are compared.
    """
    from bdcore.analysis.page import render
    from bdcore.analysis.runs import read_run

    read = [read_run(path) for path in runs]
    target = out or (read[0].folder / "report.html" if len(read) == 1 else Path("report.html"))
    _check(target, png)
    page = render(read)
    # A lone surrogate, which JSON may hold, has no place in UTF-8.
    files = {target: page.html.encode("utf-8", "replace")}
    if png is not None:
        files |= {png / f"{_file_name(name)}.png": drawing.png for name, drawing in page.drawings.items()}
    _write(files)
    click.echo(f"Report: {target}")
    if png is not None:
        click.echo(f"Figures: {len(files) - 1} in {png}")


def _check(target: Path, png: Path | None) -> None:
    """Raise, before any work, where the results cannot be written."""
    from bdcore.errors import UsageError

    if target.is_dir():
        raise UsageError(f"--out {target} is a folder: name a file in it, for instance {target / 'report.html'}.")
    if target.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {target}: the page is HTML, so its name must end with .html.")
    if png is not None and png.exists() and not png.is_dir():
        raise UsageError(f"--png {png} is no folder: name one, which is made where it is missing.")


def _file_name(name: str) -> str:
    """A figure's name without what is no letter, number or sign that a file's name may hold anywhere."""
    return "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in name)[:100].lstrip(".")


def _write(files: Mapping[Path, bytes]) -> None:
    """Write all files or, where one fails, leave none that was not there."""
    from bdcore.errors import StoreError
    from bdcore.store import write_bytes

    written: list[Path] = []
    made: list[Path] = []
    try:
        for path, content in files.items():
            absent = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(
                    f"cannot make the folder {path.parent}: {error.strerror}. Choose another place with --out or --png."
                ) from error
            made += absent
            new = not path.exists()
            write_bytes(path, content)
            written += [path] if new else []
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        for folder in made:
            with suppress(OSError):  # somebody else has begun to use it
                folder.rmdir()
        raise
