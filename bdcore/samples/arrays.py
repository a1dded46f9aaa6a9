"""Images in a .npz file, as `numpy.savez` writes it."""

import os
import zipfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bdcore.artifacts import Labelled
from bdcore.errors import DataError
from bdcore.samples.pictures import Arrays, Found

_CHANNELS = (1, 3)
_PAIRS = (("x", "y"), ("x_train", "y_train"))

_Array = NDArray[Any]


def read_npz(path: Path, parts: Sequence[tuple[str, str]]) -> list[Labelled]:
    """Images and labels from a .npz file, every one checked.

    Args:
        path: the file.
        parts: names of arrays, (images, labels). Images are uint8, [N, C, H, W] or [N, H, W, C] with 1 or 3 channels
            (the former where both readings are possible); labels are integers [N] from 0 on.

    Returns:
        For each pair images uint8 [N, C, H, W], contiguous, and labels int64 [N].

    Raises:
        DataError: where the file or an array is missing, damaged or of another form. Pickled arrays are refused.
    """
    arrays = _read(path, [key for pair in parts for key in pair])
    checked = [
        (_planar(path, images, arrays[images]), _classes(path, labels, arrays[labels], images, len(arrays[images])))
        for images, labels in parts
    ]
    return [Labelled(torch.from_numpy(images), torch.from_numpy(labels)) for images, labels in checked]


def find(path: Path) -> Found:
    """The images `x` with the labels `y`, or else `x_train` with `y_train`; the labels may be missing."""
    held = _names(path)
    images, labels = next((pair for pair in _PAIRS if pair[0] in held), _PAIRS[0])
    if images not in held:
        raise DataError(f"{path} lacks images, as x or x_train; it holds {', '.join(held) or 'nothing'}")
    arrays = _read(path, [key for key in (images, labels) if key in held])
    pixels = _planar(path, images, arrays[images])
    numbers = _classes(path, labels, arrays[labels], images, len(pixels)) if labels in held else None
    return Found(f"npz:{path.stem}", Arrays(pixels), None if numbers is None else torch.from_numpy(numbers))


def _names(path: Path) -> list[str]:
    if not os.path.isfile(path):
        raise DataError(f"there is no file {path}: name a .npz file, which numpy.savez writes")
    with _opened(path) as file:
        return list(file.files)


def _read(path: Path, keys: Sequence[str]) -> dict[str, _Array]:
    held = _names(path)
    missing = [key for key in keys if key not in held]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(held) or 'nothing'}")
    with _opened(path) as file:
        return {key: _read_array(path, file, key) for key in keys}


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    try:
        with path.open("rb") as content:
            if not zipfile.is_zipfile(content):
                raise DataError(f"{path} is not a .npz file, or is cut short: write one with numpy.savez")
            content.seek(0)
            with np.load(content, allow_pickle=False) as file:
                yield file
    except DataError:
        raise
    except Exception as error:  # a damaged archive makes its readers raise anything
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_array(path: Path, file: Any, key: str) -> _Array:
    try:
        array = file[key]
    except ValueError as error:
        raise DataError(f"{path}: {key} cannot be read, pickled objects are refused: {error}") from error
    except MemoryError as error:
        raise DataError(f"{path}: {key} is larger than memory, or damaged: {error}") from error
    except Exception as error:  # as above
        raise DataError(f"{path}: {key} is damaged ({error}): write the file again") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: {key} is not an array: write the file with numpy.savez")
    return array


def _planar(path: Path, name: str, x: _Array) -> NDArray[np.uint8]:
    """The images `x` as uint8 [N, C, H, W], checked."""
    if x.dtype != np.uint8:
        advice = f"; for values in [0, 1] store ({name} * 255).round().astype('uint8')" if x.dtype.kind == "f" else ""
        raise DataError(f"{path}: {name} must be uint8 with values 0 to 255, it is {x.dtype}{advice}")
    if x.ndim != 4 or (x.shape[1] not in _CHANNELS and x.shape[3] not in _CHANNELS):
        raise DataError(
            f"{path}: {name} must be [N, C, H, W] or [N, H, W, C] with 1 or 3 channels, its shape is {list(x.shape)}"
        )
    if x.size == 0:
        raise DataError(f"{path}: {name} is empty, its shape is {list(x.shape)}")
    return np.ascontiguousarray(x if x.shape[1] in _CHANNELS else x.transpose(0, 3, 1, 2))


def _classes(path: Path, name: str, y: _Array, images: str, count: int) -> NDArray[np.int64]:
    """The labels `y` as int64, checked."""
    if y.dtype.kind not in "iu":
        raise DataError(f"{path}: {name} must hold integers, it is {y.dtype}")
    if y.ndim != 1:
        raise DataError(f"{path}: {name} must be [N], one class number an image, its shape is {list(y.shape)}")
    if len(y) != count:
        raise DataError(f"{path}: {images} has {count} images and {name} {len(y)} labels")
    if y.min() < 0:
        raise DataError(f"{path}: {name} has label {y.min()}; classes are numbered from 0")
    return y.astype(np.int64)
