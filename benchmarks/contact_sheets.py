"""Pictures of what attacks do to images: `python -m benchmarks.contact_sheets [--dataset npz:cifar10.npz]`.

Every attack is prepared and makes its triggered test images as in an ordinary run with these options, from whose cache
it is answered. The folder gets NAME.png for each attack (images, the same with the trigger, the difference times ten)
and attacks.png, one image under all of them side by side.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bdcore.analysis.pictures import comparison, contact_sheet, grid
from bdcore.config import resolve
from bdcore.errors import BdcoreError
from bdcore.pipeline import poisoned
from bdcore.plugins import Host

ATTACKS = (
    "badnets", "blended", "trojan", "sig", "label_consistent", "feature_collision",
    "latent", "dynamic", "wanet", "composite", "dfst",
)  # fmt: skip

SETTINGS = ("train.epochs=12", "train.lr=0.2", "train.flip=true")
"""How the classifiers are trained that some attacks need, unless --set says otherwise."""

Sheet = tuple[Tensor, Tensor]  # clean and triggered, uint8 [N, C, H, W]


def main() -> None:
    """Draw them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10", metavar="NAME[:ARGUMENT]", help="as of `bdcore run`")
    parser.add_argument("--attacks", default=",".join(ATTACKS), metavar="A,B", help="default: all")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), metavar="DIR", help="default: docs/images")
    parser.add_argument("--device", metavar="auto|cpu|cuda[:N]", help="default: auto")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `bdcore run`")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="columns of a sheet, default 8")
    parser.add_argument("--place", type=int, default=6, metavar="N", help="test image under all attacks, default 6")
    given = parser.parse_args()
    try:
        draw(given)
    except BdcoreError as error:
        print(f"contact_sheets: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def draw(given: argparse.Namespace) -> None:
    """Write a sheet for every attack as it is there, and last the one of all."""
    given.out.mkdir(parents=True, exist_ok=True)
    host, columns = Host(), dict[str, Sheet]()
    asked = {setting.partition("=")[0] for setting in given.set}
    settings = [*(setting for setting in SETTINGS if setting.partition("=")[0] not in asked), *given.set]
    for name in given.attacks.split(","):
        config = resolve(host, plugins=(name,), dataset=given.dataset, device=given.device, settings=settings)
        dataset, made = poisoned(config, host)
        assert made.triggered is not None
        if made.triggered.source is None:
            print(f"{name}: its images are made of no single one each, so there is nothing to set beside them")
            continue
        clean, triggered = dataset.test.images[made.triggered.source], made.triggered.images
        first = slice(given.images)
        contact_sheet(clean[first], triggered[first]).save(given.out / f"{name}.png")
        print(given.out / f"{name}.png", flush=True)
        # The image that was asked for, or the first one where the attack leaves that out.
        at = int((made.triggered.source == given.place).byte().argmax())
        columns[name] = clean[at : at + 1], triggered[at : at + 1]
    overview(columns).save(given.out / "attacks.png")
    print(given.out / "attacks.png")


def overview(columns: dict[str, Sheet], across: int = 6) -> Image.Image:
    """One sheet of the first image of every attack, the names above, so many side by side."""
    names = list(columns)
    bands = [_band({name: columns[name] for name in names[at : at + across]}) for at in range(0, len(names), across)]
    sheet = Image.new("RGB", (max(band.width for band in bands), sum(band.height for band in bands)), "white")
    top = 0
    for band in bands:
        sheet.paste(band, (0, top))
        top += band.height
    return sheet


def _band(columns: dict[str, Sheet]) -> Image.Image:
    clean, triggered = (torch.cat([sheet[part][:1] for sheet in columns.values()]) for part in (0, 1))
    rows: Sequence[Sequence[Image.Image]] = comparison(clean, triggered)
    captions = [name.replace("_", "\n") for name in columns]
    return grid(rows, ("clean", "triggered", "difference x 10"), captions)


if __name__ == "__main__":
    main()
