"""Options that `bdcore scan` and `bdcore defend` share: somebody's own model and images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

DATA = """\b
DATA is one of
  folder:DIR           one folder of images for each class, or images alone
  npz:FILE             x, uint8 [N, C, H, W] or [N, H, W, C], and y, classes
  NAME[/SPLIT][:ROOT]  a data set of torchvision that is there, as CIFAR10:data"""


def subject_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what is looked at and where it is computed."""
    for option in reversed(
        [
            click.option(
                "--model",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="The model: .safetensors, .pt or .pth. Nothing in it is executed.",
            ),
            click.option(
                "--arch",
                metavar="NAME|MODULE:FUNCTION",
                help="Its network: a name of torchvision's or bdcore's, timm:NAME, or your own code that "
                "returns one; options after commas. Not needed for models that bdcore wrote.",
            ),
            click.option("--clean", metavar="DATA", help="Images that you trust, about fifty or more."),
            click.option(
                "--size",
                metavar="N|HxW",
                help="Bring images to this size: the shorter side, then the centre.  [default: as they are]",
            ),
            click.option(
                "--normalize",
                metavar="NAME|MEAN/STD",
                help="How the network's input was normalised: none, imagenet, half, cifar10, cifar100, mnist, "
                "or means and spreads as 0.5,0.5,0.5/0.2,0.2,0.2.  [default: what suits the clean images best]",
            ),
            click.option(
                "--images",
                type=click.IntRange(1),
                default=2500,
                show_default=True,
                metavar="N",
                help="Take so many clean images at most, evenly over the classes.",
            ),
            click.option(
                "--set",
                "settings",
                multiple=True,
                metavar="NAME.OPTION=VALUE",
                help="An option of a plugin. May be repeated.",
            ),
            click.option(
                "--seed", type=int, metavar="N", help="Seed from which everything random follows.  [default: 0]"
            ),
            click.option("--device", metavar="auto|cpu|cuda[:N]", help="Where to compute.  [default: auto]"),
            click.option("--precision", metavar="auto|fp32|bf16", help="Of training.  [default: auto]"),
            click.option(
                "--json", "as_json", is_flag=True, help="Print the record as JSON, and nothing else, on stdout."
            ),
        ]
    ):
        command = option(command)
    return command
