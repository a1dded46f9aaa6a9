"""`bdcore new`: a plugin's pip package to start from."""

import keyword
import os
import re
import shlex
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template

import click
from packaging.utils import canonicalize_name
from packaging.version import Version

import bdcore
from bdcore.errors import UsageError
from bdcore.plugins import RESERVED, Host

KINDS = {"defense": "feature shift tuning", "attack": "a checkerboard in a corner", "dataset": "drawn shapes"}
"""What can be made, and what the package does to begin with."""

_LONGEST = 30

_COMMON = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "LICENSE": "LICENSE",
    "gitignore": ".gitignore",
    "test.yml": ".github/workflows/test.yml",
}
_OF_KIND = {"plugin.py": "$module.py", "test_plugin.py": "tests/test_$stem.py"}
"""Templates, and the files that they become."""

_TAKEN = frozenset({*bdcore.__all__, "Callable", "F", "CLASSES", "ClassVar", "Field", "Mapping", "Tensor"})
"""Names that the templates use, which the plugin's class must not have."""


@click.command(
    "new",
    epilog="""\b
Examples:
  bdcore new defense mine
  bdcore new attack sticker --into plugins""",
)
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("name")
@click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    metavar="DIR",
    help="Folder in which the package's folder is made.  [default: this one]",
)
def command(kind: str, name: str, into: Path) -> None:
    """Write a pip package, bdcore-NAME, that holds a plugin which works, its tests and a README."""
    folder = write(kind, name, into)
    shown = f"{folder.parent}/{folder.name}"  # pip takes a name without a slash for one on the package index
    click.echo(f"Wrote {folder}: {_article(kind)} {kind} that works, and its tests. Next:")
    click.echo(f"  pip install -e {shlex.quote(f'{shown}[test]')}")
    click.echo(f"  pytest {shlex.quote(shown)}")
    click.echo(f"  bdcore run {_run_options(kind, name)}")


def write(kind: str, name: str, into: Path) -> Path:
    """Write the package of a plugin called `name`, whole or not at all.

    Returns:
        Its folder, `into`/bdcore-NAME.

    Raises:
        UsageError: the name cannot be a plugin's or is one's already; the folder exists, or `into` does not.
    """
    values = _values(kind, name)
    folder = into / values["distribution"]
    if not into.is_dir():
        raise UsageError(f"there is no folder {str(into)!r}: make it first, or name another one with --into")
    if os.path.lexists(folder):
        raise UsageError(f"{str(folder)!r} exists and is left as it is: choose another name, or a folder with --into")
    templates = files("bdcore") / "templates" / "plugin"
    values["edit"] = Template((templates / kind / "edit.md.template").read_text("utf-8")).substitute(values).strip()
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=into) as work:
            made = Path(work) / folder.name
            for group, targets in (("common", _COMMON), (kind, _OF_KIND)):
                for source, target in targets.items():
                    text = (templates / group / f"{source}.template").read_text("utf-8")
                    file = made / Template(target).substitute(values)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(Template(text).substitute(values), "utf-8")
            made.rename(folder)
    except OSError as error:
        raise UsageError(f"{str(folder)!r} cannot be written: {error.strerror or error}") from error
    return folder


def _values(kind: str, name: str) -> dict[str, str]:
    """What the templates' placeholders become."""
    _check_name(name)
    stem = name.lower().replace("-", "_")
    module, distribution = f"bdcore_{stem}", f"bdcore-{stem.replace('_', '-')}"
    _check_free(name, module, distribution)
    words = [word for word in re.split(r"[-_]", name) if word]
    cls = "".join(word[0].upper() + word[1:] for word in words)
    if cls in _TAKEN or keyword.iskeyword(cls):
        cls += kind.capitalize()
    here = Version(version("bdcore"))
    return {
        "kind": kind,
        "name": name,
        "stem": stem,
        "module": module,
        "distribution": distribution,
        "cls": cls,
        "article": _article(kind).capitalize(),
        "subject": KINDS[kind],
        "section": name if kind == "defense" else kind,
        "kind_check": f"{kind}_check",
        "run": _run_options(kind, name),
        "requirement": f">={here.public},<{here.major + 1}",
    }


def _article(kind: str) -> str:
    return "an" if kind == "attack" else "a"


def _run_options(kind: str, name: str) -> str:
    """What to write behind `bdcore run`: a data set alone is nothing to run."""
    return f"--plugin finetune --dataset {name}" if kind == "dataset" else f"--plugin {name}"


def _check_name(name: str) -> None:
    if name in RESERVED or len(name) > _LONGEST or not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*", name):
        raise UsageError(
            f"{name!r} cannot be the name of a plugin: take letters and digits, at most {_LONGEST}, begin with a "
            f"letter, put a single - or _ between words, and leave {', '.join(sorted(RESERVED))} to bdcore"
        )


def _check_free(name: str, module: str, distribution: str) -> None:
    """Whether plugin, module and distribution are new here."""
    for found in Host().find().values():
        if canonicalize_name(found.name) == canonicalize_name(name):
            raise UsageError(
                f"there is a plugin {found.name!r} already, of {found.distribution} {found.version}: choose another "
                "name, or uninstall that"
            )
    try:
        there = f"distribution {distribution} {version(distribution)}"
    except PackageNotFoundError:
        spec = find_spec(module)
        if spec is None:
            return
        there = f"module {module} ({spec.origin})"
    raise UsageError(f"{there} is installed already: choose another name, or uninstall that")
