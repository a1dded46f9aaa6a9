"""Seconds of a training epoch on 50,000 random images of CIFAR-10's shape, through bdcore's own training loop."""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bdcore import Architecture, Labelled, Recipe
from bdcore.context import Context
from bdcore.machine import processor_name
from bdcore.stages.train import train

MODELS = ("wrn16_1", "preact_resnet18")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def main() -> None:
    """Train each model for some epochs and write what each epoch took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", metavar="DEVICE")
    parser.add_argument("--images", type=int, default=50_000, metavar="N")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="timed, after one to warm up")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    given = parser.parse_args()
    device = torch.device(given.device)
    rows = []
    for model in MODELS:
        rows.append(measure(model, device, given.images, given.epochs))
        print(rows[-1], file=sys.stderr)
        given.output.write_text(json.dumps(rows), encoding="utf-8")


def measure(model: str, device: torch.device, images: int, epochs: int) -> dict[str, Any]:
    """A row: seconds of each epoch but the first, in bf16, as a run trains its victim."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = Labelled(pixels, torch.randint(0, 10, (images,), generator=generator))
    speeds: list[float] = []
    # The host reads every epoch's mean loss, so an epoch's time holds all that the device did in it.
    context = Context(device=device, precision="bf16", report=lambda done: speeds.append(done.images_per_second))
    recipe = Recipe(epochs=1 + epochs, batch_size=128, lr=0.02, crop=4, flip=True)
    train(data, Architecture(model, 10, (3, 32, 32), MEAN, STD), recipe, context)
    seconds = [images / speed for speed in speeds[1:]]
    return {
        "model": model,
        "device": processor_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "images": images,
        "seconds": seconds,
        "median": median(seconds),
        "images_per_second": images / median(seconds),
    }


if __name__ == "__main__":
    main()
