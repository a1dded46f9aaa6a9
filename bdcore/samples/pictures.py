"""Images before they are brought to one form: files, arrays, or the items of a data set."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bdcore.artifacts import fingerprint
from bdcore.samples.decoding import Form

# Pillow also opens formats that run other programs (PostScript) or that hold no pictures of the usual kind.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")


class Pictures(ABC):
    """Images that are opened by place, from several threads at once."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """The image at `index`; of a file only the header is read yet. Raises whatever the file makes Pillow raise."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call it in an error."""

    @abstractmethod
    def select(self, index: NDArray[np.int64]) -> "Pictures":
        """Those at `index`, in this order."""

    @abstractmethod
    def key(self) -> Any:
        """JSON that changes when the pixels do."""

    def as_they_are(self, form: Form) -> Tensor | None:
        """All as one tensor where they are in memory and in that form already, else None."""
        del form


@dataclass(frozen=True)
class Found:
    """What a text named; the images are not decoded yet. Args as of `Samples`."""

    name: str
    pictures: Pictures
    labels: Tensor | None
    classes: tuple[str, ...] = ()
    skipped: int = 0

    def select(self, index: NDArray[np.int64]) -> "Found":
        """The samples at `index`."""
        labels = None if self.labels is None else self.labels[torch.from_numpy(index)]
        return replace(self, pictures=self.pictures.select(index), labels=labels)


@dataclass(frozen=True)
class Files(Pictures):
    """Image files by path."""

    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        """Pillow's image, of which only the header is read."""
        Image.init()
        return Image.open(self.paths[index], formats=[name for name in _FORMATS if name in Image.OPEN])

    def name(self, index: int) -> str:
        """The path."""
        return self.paths[index]

    def select(self, index: NDArray[np.int64]) -> "Files":
        """Those files."""
        return Files([self.paths[place] for place in index])

    def key(self) -> Any:
        """Paths, sizes and times of modification."""
        return [stamp(path) for path in self.paths]


@dataclass(frozen=True)
class Arrays(Pictures):
    """uint8 [N, C, H, W] in memory, C = 1 or 3."""

    pixels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.pixels)

    def open(self, index: int) -> Image.Image:
        """One of them, grey or RGB."""
        pixels = self.pixels[index]
        return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))

    def name(self, index: int) -> str:
        """Its place."""
        return f"image {index}"

    def select(self, index: NDArray[np.int64]) -> "Arrays":
        """A copy of those."""
        return Arrays(self.pixels[index])

    def key(self) -> Any:
        """The content's SHA-256."""
        return fingerprint({"images": torch.from_numpy(self.pixels)})

    def as_they_are(self, form: Form) -> Tensor | None:
        """All of them, where they are of that form."""
        _, channels, height, width = self.pixels.shape
        same = form.size in (None, (height, width)) and form.channels in (None, channels)
        return torch.from_numpy(np.require(self.pixels, requirements=["C", "W"])) if same else None


@dataclass(frozen=True)
class Items(Pictures):
    """Items of a data set that keeps where its files are to itself; `origin` is their key."""

    item: Callable[[int], Image.Image]
    places: NDArray[np.int64]
    origin: Any

    def __len__(self) -> int:
        return len(self.places)

    def open(self, index: int) -> Image.Image:
        """The item's image."""
        return self.item(int(self.places[index]))

    def name(self, index: int) -> str:
        """Its place in the data set."""
        return f"item {self.places[index]}"

    def select(self, index: NDArray[np.int64]) -> "Items":
        """Those items."""
        return replace(self, places=self.places[index])

    def key(self) -> Any:
        """The data set's key, and the places in it."""
        return [self.origin, self.places.tolist()]


def stamp(path: str) -> tuple[str, int, int]:
    """What tells whether a file is the same: path, bytes, nanoseconds. A file that is not there has a stamp as well, so
    that it is reported with all that cannot be read."""
    try:
        found = os.stat(path)
    except OSError:
        return path, -1, -1
    return path, found.st_size, found.st_mtime_ns
