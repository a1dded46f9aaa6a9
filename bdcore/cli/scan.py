"""`bdcore scan`: is this model backdoored, towards which class, by what trigger?"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from bdcore.cli.own import DATA, subject_options
from bdcore.cli.standard_output import kept_clear

BACKDOORED = 3
"""Exit code where a backdoor was found."""


@click.command(
    "scan",
    epilog=f"""{DATA}

\b
Examples:
  bdcore scan --model net.pt --arch resnet18 --clean folder:photos
  bdcore scan --model net.pt --arch mynet:make --clean npz:clean.npz --normalize imagenet
  bdcore scan --model runs/mine/victim.safetensors --clean folder:photos --json

\b
Exit codes: 0 no backdoor found, 3 backdoored, 1 no answer, 2 wrong use.""",
)
@subject_options
@click.option("--plugin", "plugins", multiple=True, metavar="NAME", help="The defense that judges.  [default: mcldef]")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where record, pictures and report go.  [default: runs/NAME, named after the scan]",
)
def command(as_json: bool, plugins: tuple[str, ...], **asked: Any) -> int:
    """Look for a backdoor in a model, with a few clean images.

    The model and its images stay as they are. A class that a far smaller trigger leads to than to the others is taken
    for a backdoor's target; the trigger is drawn, and tried on your images.
    """
    with kept_clear():
        from bdcore.cli.display import shown
        from bdcore.inspection import ask, folder_of, scan
        from bdcore.plugins import Host

        host = Host()
        request = ask(host, "scan", plugins=plugins or ("mcldef",), **asked)
        with shown(host):
            record = scan(request, host)
    if as_json:
        click.echo(json.dumps(record, indent=2))
    else:
        for line in describe(record, folder_of(request)):
            click.echo(line)
    return BACKDOORED if record["verdict"]["backdoored"] else 0


def describe(record: Mapping[str, Any], folder: Path) -> list[str]:
    """The record of a scan in plain words, the verdict first."""
    verdict, model, clean = record["verdict"], record["model"], record["clean"]
    sure = "" if verdict["confidence"] is None else f" (confidence {verdict['confidence']:.0%})"
    if verdict["backdoored"]:
        towards = "" if verdict["target"] is None else f", towards class {named(verdict)}"
        lines = [f"BACKDOORED{towards}{sure}: {model['path']}"]
    else:
        lines = [f"no backdoor found{sure}: {model['path']}"]
    lines.append(seen(model, clean))
    for trigger in record["triggers"]:
        if trigger["asr"] is not None:
            lines.append(
                f"A change worth {trigger['size']:.1f} pixels sends {trigger['asr']:.1%} of the images of other "
                f"classes to class {named(trigger)}: {folder / record['figures'][figure_of(record, trigger)]}"
            )
    if verdict["evidence"]:
        order = sorted(range(len(verdict["evidence"])), key=lambda one: -verdict["evidence"][one])[:3]
        lines.append(
            "Evidence, in deviations below the median class: "
            + ", ".join(f"class {one} {verdict['evidence'][one]:.1f}" for one in order)
        )
    lines.append(reliability(record["calibration"]))
    lines.append(f"Report: {folder / 'report.html'}")
    return lines


def named(one: Mapping[str, Any]) -> str:
    """A class by its number, and its name where it has another one."""
    return str(one["target"]) if one["class_name"] is None else f"{one['target']} ({one['class_name']})"


def seen(model: Mapping[str, Any], clean: Mapping[str, Any]) -> str:
    """What was looked at, and whether it fits together."""
    right = "" if model["clean_accuracy"] is None else f", of which the model gets {model['clean_accuracy']:.1%} right"
    return (
        f"Looked at {model['arch']['name']} with {clean['images']:,} images of {clean['classes']} classes{right}; "
        f"normalisation: {model['normalisation']}."
    )


def figure_of(record: Mapping[str, Any], trigger: Mapping[str, Any]) -> str:
    """The name of the picture of a recovered trigger."""
    return next(name for name in record["figures"] if name.endswith(f"-class{trigger['target']}"))


def reliability(calibration: Mapping[str, Any] | None) -> str:
    """What the confidence rests on."""
    if calibration is None:
        return "No confidence is given: this plugin with these options was not calibrated on models of known truth."
    clean = calibration["clean"]
    backdoored = calibration["models"] - clean
    hits, alarms = calibration["true_positives"] * backdoored, calibration["false_positives"] * clean
    return (
        f"The confidence is calibrated on {calibration['models']} models of known truth ({calibration['on']}): "
        f"{hits:.0f} of {backdoored} backdoored ones were found, {alarms:.0f} of {clean} clean ones accused; AUROC "
        f"{calibration['auroc']:.2f}, Brier score {calibration['brier']:.3f}. Elsewhere it is an extrapolation, and "
        "triggers that cover the whole image or differ from image to image may be missed."
    )
