"""`bdcore defend`: purify somebody's own model, or train a clean one on data that may be poisoned."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from bdcore.cli.own import DATA, subject_options
from bdcore.cli.scan import figure_of, named, seen
from bdcore.cli.standard_output import kept_clear


@click.command(
    "defend",
    epilog=f"""{DATA}

\b
Examples:
  bdcore defend --plugin mcldef --model net.pt --arch resnet18 --clean folder:photos --out purified.pt
  bdcore defend --plugin mcldef --plugin finetune --model net.safetensors --arch mynet:make --clean npz:clean.npz
  bdcore defend --plugin abl --arch preact_resnet18 --suspect folder:downloaded --size 32 --out clean.safetensors""",
)
@click.option(
    "--plugin",
    "plugins",
    multiple=True,
    required=True,
    metavar="NAME",
    help="A defense; repeat it for several, each of which gets the model as it is. `bdcore plugins` lists them.",
)
@subject_options
@click.option("--suspect", metavar="DATA", help="The training set that may be poisoned, for a defense that needs it.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where the purified model goes, in the form in which it came; of several defenses FILE-NAME. A report goes "
    "to a folder beside it.  [default: named after the model]",
)
def command(as_json: bool, plugins: tuple[str, ...], **asked: Any) -> None:
    """Hand your own model or data to a defense, and write what it returns.

    There is no attack and no test set here: what a defense achieves is measured on your clean images, which it has
    seen, and by the trigger that it recovered. The model that you name stays as it is.
    """
    with kept_clear():
        from bdcore.cli.display import shown
        from bdcore.inspection import ask, defend_own, folder_of
        from bdcore.plugins import Host

        host = Host()
        request = ask(host, "defend", plugins=plugins, **asked)
        with shown(host):
            record = defend_own(request, host)
    if as_json:
        click.echo(json.dumps(record, indent=2))
        return
    for line in describe(record, folder_of(request)):
        click.echo(line)


def describe(record: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """The record of a defense in plain words."""
    model, clean = record["model"], record["clean"]
    if clean is not None:
        yield seen(model, clean)
    for defense in record["defenses"]:
        yield from _describe_defense(defense, record, folder)
    yield f"Report: {folder / 'report.html'}"


def _describe_defense(defense: Mapping[str, Any], record: Mapping[str, Any], folder: Path) -> Iterator[str]:
    name, verdict = defense["name"], defense["verdict"]
    if verdict is not None:
        towards = "" if verdict["target"] is None else f" towards class {named(verdict)}"
        yield f"{name}: the model is {f'backdoored{towards}' if verdict['backdoored'] else 'not backdoored'}."
    if defense["isolation"] is not None:
        yield _describe_isolation(name, defense["isolation"], record, folder)
    for trigger in defense["triggers"]:
        if trigger["asr"] is not None:
            left = "" if trigger["asr_after"] is None else f", of the purified one {trigger['asr_after']:.1%}"
            picture = folder / record["figures"][figure_of(record, trigger)]
            yield (
                f"{name}: a change worth {trigger['size']:.1f} pixels sends {trigger['asr']:.1%} of the images to "
                f"class {named(trigger)} of the model as it came{left}: {picture}"
            )
    if defense["model"] is None:
        yield f"{name}: nothing was changed, so no model was written."
        return
    before, after = record["model"]["clean_accuracy"], defense["clean_accuracy"]
    if after is not None:
        change = "" if before is None else f" (before: {before:.1%})"
        yield f"{name}: gets {after:.1%} of the clean images right{change}; it has seen them, so test it on others."
    elif defense["agreement"] is not None:
        yield f"{name}: answers {defense['agreement']:.1%} of the clean images as the model did."
    yield f"{name}: wrote {defense['model']['path']}"


def _describe_isolation(name: str, isolation: Mapping[str, Any], record: Mapping[str, Any], folder: Path) -> str:
    """Not that these are poisoned: a method that sets a fixed share aside does so of clean data too."""
    where = isolation["list"] or record["artifacts"][f"{name}-suspects"]["path"]
    return (
        f"{name}: set aside {isolation['isolated']:,} of {record['suspect']['images']:,} training images as the most "
        f"suspicious, of clean data perhaps as many; look at these first: {folder / where}"
    )
