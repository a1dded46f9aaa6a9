"""Read images by one line of text: `folder:DIR`, `npz:FILE` or the name of a torchvision data set."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdcore.errors import DataError
from bdcore.samples import arrays, folders, torchvision_sets
from bdcore.samples.decoding import Form
from bdcore.samples.mapped import stored
from bdcore.samples.pictures import Files, Found


@dataclass(frozen=True)
class Samples:
    """Images, with labels where these are known.

    Args:
        name: for people, for instance `folder:photos`.
        images: uint8 [N, C, H, W], contiguous, on the CPU; it may be backed by a file, of which writing to the tensor
            alters nothing.
        labels: int64 [N], or None.
        classes: names of the classes by number; empty where they have none.
        skipped: how many files and folders beside the images were left out: hidden ones and what is no image.
        paths: of each image's file, below the folder as it was named; empty where images are not files of their own.
    """

    name: str
    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    skipped: int = 0
    paths: tuple[str, ...] = ()


def read_samples(
    text: str,
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Read images and bring them to one form.

    Files are decoded once, in parallel, into a memory-mapped store in the cache folder ($BDCORE_CACHE), which is found
    again by the files' paths, sizes and times of modification and by the form asked for. They are turned as their EXIF
    orientation says; 16-bit grey is scaled to 8 bits, 16-bit colours keep their upper 8; of an animation the first
    frame counts; what is transparent is laid over white; CMYK and other colour spaces become RGB as Pillow converts
    them. Floating-point pixels, whose range is unknown, cannot be read.

    Args:
        text: where the images are.
            `folder:DIR`: DIR has a folder a class, with images in it at any depth, or images alone, which then are
            unlabelled. Folders that are all named by whole numbers mean these class numbers, others are numbered in
            the order of their names. Hidden files and other files than images are passed over; links are followed.
            `npz:FILE`: arrays x (and y), or x_train (and y_train), as `read_npz` takes them.
            `NAME[/PART][:ROOT]`: torchvision's data set NAME, of which the files are in ROOT (default `./data`); PART
            is `train` or `test`, or what the class calls `split` (default: its own, the training part). Nothing is
            downloaded.
        size: (height, width) in pixels, at least 1. The image is scaled, bilinear and antialiased, until it just covers
            this, and its centre cut out, as torchvision's `Resize` and `CenterCrop` do; an image of this very size is
            left as it is. By default the images' own, which then must be alike.
        channels: 1 or 3; by default 1 if all images are grey by their form, else 3. Colours become grey as ITU-R 601
            weighs them.
        limit: at most so many images, drawn evenly over the classes; what is drawn for a lower limit is part of what
            is drawn for a higher one.
        seed: of that draw.
        progress: called with how many images of how many are decoded, at most 20 times a second; not at all where
            nothing must be decoded.

    Raises:
        DataError: where there is nothing to read or it cannot be brought to one form, with what to do.
        StoreError: where the cache cannot be written or read.
    """
    form = Form.checked(size, channels)
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} images leaves none: give at least 1")
    found = _find(text)
    if limit is not None and limit < len(found.pictures):
        found = found.select(draw(found.labels, len(found.pictures), limit, seed))
    images = found.pictures.as_they_are(form)
    if images is None:
        images = stored(found.pictures, form, found.name, progress)
    paths = tuple(found.pictures.paths) if isinstance(found.pictures, Files) else ()
    return Samples(found.name, images, found.labels, found.classes, found.skipped, paths)


def draw(labels: Tensor | None, count: int, limit: int, seed: int) -> NDArray[np.int64]:
    """Places of `limit` of `count` samples, ascending, drawn evenly: the classes' numbers of samples differ by more
    than one only where a class has no more. Unlabelled samples are as if of one class."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator).numpy()
    if labels is None:
        return np.sort(order[:limit])
    # The classes take turns, in a drawn order of their own: first one sample of each, then the second, and so on.
    numbers, shuffled = np.unique(labels.numpy()[order], return_inverse=True)
    by_class = np.argsort(shuffled, kind="stable")
    sizes = np.bincount(shuffled)
    turn = np.empty(count, np.int64)
    turn[by_class] = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = torch.randperm(len(numbers), generator=generator).numpy()[shuffled]
    return np.sort(order[np.lexsort((place, turn))[:limit]])


def _find(text: str) -> Found:
    kind, _, argument = text.partition(":")
    if kind in ("folder", "npz") and not argument:
        raise DataError(f"{text!r} names no {'folder' if kind == 'folder' else 'file'}: write {kind}:PATH")
    if kind == "folder":
        return folders.find(Path(os.path.expanduser(argument)))
    if kind == "npz":
        return arrays.find(Path(os.path.expanduser(argument)))
    path = os.path.expanduser(text)
    if os.path.exists(path) and not torchvision_sets.is_name(text):
        kind = "folder" if os.path.isdir(path) else "npz"
        raise DataError(f"{text!r} is a path, but not what kind it is of: write {kind}:{text}")
    return torchvision_sets.find(text)
