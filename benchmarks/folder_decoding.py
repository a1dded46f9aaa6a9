"""Seconds in which `read_samples` decodes a folder of JPEG files, beside torchvision's usual way, and its second start.

The peer is `ImageFolder` with `Resize`, `CenterCrop` and `PILToTensor`, through a `DataLoader` with two workers, its
batches put together to one tensor. Both give the same pixels, which is checked first.
"""

import argparse
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from bdcore import read_samples
from benchmarks import report

FIRST = "bdcore, first start"
SECOND = "bdcore, second start"
PEER = "ImageFolder and DataLoader(num_workers=2)"
CLASSES = 10


class Seconds(NamedTuple):
    """Until the tensor is there, until all of it is read, and processor time of all cores together."""

    ready: float
    read: float
    cpu: float


def main() -> None:
    """Write the images, time the three in turn, several rounds of it, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2_000, metavar="N")
    parser.add_argument("--stored", type=int, default=256, metavar="PIXELS", help="height and width of the files")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS", help="height and width wanted")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        write_images(root, given.images, given.stored)
        times = timed(root, Path(folder), given.size, given.rounds)

    usual = median(taken.read for taken in times[PEER])
    rows: list[dict[str, str]] = []
    for name, taken in times.items():
        read = [each.read for each in taken]
        rows.append(
            {
                "way": name,
                "seconds to the tensor, median": f"{median(each.ready for each in taken):.3g}",
                "to every pixel read": f"{median(read):.3g}",
                "lowest": f"{min(read):.3g}",
                "highest": f"{max(read):.3g}",
                "of all cores": f"{median(each.cpu for each in taken):.3g}",
                "images/s": f"{given.images / median(read):,.0f}",
                "times faster than torchvision's way": f"{usual / median(read):.2f}",
            }
        )
    title = f"Decoding {given.images:,} JPEG files of {given.stored} x {given.stored} to {given.size} x {given.size}"
    notes = [
        f"Median of {given.rounds} rounds; the three take turns, each in a process of its own, imports not counted.",
        f"{os.cpu_count()} cores. The files are in the page cache; their images are random, with the spectrum of "
        "photographs; quality 90.",
        "The first start writes the decoded images to disk, with a checksum; the second finds and maps them, and pages "
        "come in as they are read. Reading is looking for the brightest.",
        "Rates and ratios are of the time until every pixel is read. `of all cores` is processor time, which other "
        "work on the machine hardly lengthens.",
        "The pixels of both ways are equal.",
    ]
    report.write(
        "folder_decoding",
        title,
        {"Seconds": rows},
        notes,
        seconds={name: [each._asdict() for each in taken] for name, taken in times.items()},
    )


def timed(root: Path, folder: Path, size: int, rounds: int) -> dict[str, list[Seconds]]:
    """Seconds of each way and round."""
    seconds: dict[str, list[Seconds]] = {FIRST: [], SECOND: [], PEER: []}
    for number in range(rounds):
        cache = folder / f"cache {number}"
        for name, way in {FIRST: by_bdcore, SECOND: by_bdcore, PEER: by_torchvision}.items():
            taken = alone(way, root, size, {"BDCORE_CACHE": str(cache)})
            seconds[name].append(taken)
            print(f"round {number + 1}: {name}: {taken.read:.3f} s", file=sys.stderr)
    os.environ["BDCORE_CACHE"] = str(folder / "cache 0")
    if not torch.equal(by_bdcore(root, size), by_torchvision(root, size)):
        raise SystemExit("the two ways give other pixels: there is nothing to compare")
    return seconds


def by_bdcore(root: Path, size: int) -> Tensor:
    """All images, uint8 [N, 3, size, size]."""
    return read_samples(f"folder:{root}", size=(size, size)).images


def by_torchvision(root: Path, size: int) -> Tensor:
    """All images, uint8 [N, 3, size, size]."""
    form = Compose([Resize(size), CenterCrop(size), PILToTensor()])
    # Here the default would be to start workers anew, as this process was, which takes seconds.
    loader = DataLoader(ImageFolder(root, form), batch_size=100, num_workers=2, multiprocessing_context="fork")
    return torch.cat([images for images, _ in loader])


def alone(way: Callable[[Path, int], Tensor], root: Path, size: int, environment: Mapping[str, str]) -> Seconds:
    """Seconds of `way` in a process of its own, to the tensor and to its brightest pixel."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_time, way, root, size, environment).result()


def _time(way: Callable[[Path, int], Tensor], root: Path, size: int, environment: Mapping[str, str]) -> Seconds:
    os.environ.update(environment)
    torch.set_num_threads(1)
    began, used = perf_counter(), _cpu()
    images = way(root, size)
    ready = perf_counter() - began
    images.amax().item()
    return Seconds(ready, perf_counter() - began, _cpu() - used)


def _cpu() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def write_images(root: Path, count: int, side: int) -> None:
    """JPEG files, with the fall of power with frequency that photographs have."""
    rows, columns = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)
    fall = 1 / np.maximum(np.hypot(rows, columns), 1 / side)
    random = np.random.default_rng(0)
    drawn = list[np.ndarray]()
    for _ in range(min(count, 20)):
        waves = np.fft.irfft2(np.fft.rfft2(random.standard_normal((3, side, side))) * fall, s=(side, side))
        waves += 0.5 * waves.mean(0)  # the channels of a photograph are alike
        drawn.append(128 + 48 * (waves - waves.mean((1, 2), keepdims=True)) / waves.std())
    for index in range(count):  # the waves have no border, so each shift of them is a picture of its own
        pixels = np.roll(drawn[index % len(drawn)], random.integers(0, side, 2), axis=(1, 2))
        path = root / f"{index % CLASSES}" / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy()).save(path, quality=90)


if __name__ == "__main__":
    main()
