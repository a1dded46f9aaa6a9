"""Images of your own in one NumPy file: `--dataset npz:FILE` with x_train, y_train, x_test and y_test.

Images are uint8, [N, C, H, W] or [N, H, W, C] with 1 or 3 channels (the former where both readings are possible);
labels are integers [N] from 0 on. Write such a file with `numpy.savez(FILE, x_train=..., y_train=..., ...)`. Pickled
arrays are refused.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from bdcore import DataError, Dataset, DatasetPlugin, Labelled, PluginConfig, hookimpl

_KEYS = ("x_train", "y_train", "x_test", "y_test")
_CHANNELS = (1, 3)

_Array = NDArray[Any]


class Npz(DatasetPlugin):
    """Arrays from one .npz file."""

    name = "npz"

    class Config(PluginConfig):
        """Options of .npz files."""

        limit: int | None = Field(None, ge=1, description="how many training images to keep, the first; default all")

    config: Config

    def load(self, argument: str | None) -> Dataset:
        """Both parts of the file named by `argument`, checked; classes = the largest label + 1."""
        if not argument:
            raise DataError(f"npz needs a file: write --dataset npz:FILE, a .npz with {', '.join(_KEYS)}")
        path = Path(argument).expanduser()
        arrays = _read(path)
        for part in ("train", "test"):
            _check_part(path, part, arrays[f"x_{part}"], arrays[f"y_{part}"])
        shapes = arrays["x_train"].shape[1:], arrays["x_test"].shape[1:]
        if shapes[0] != shapes[1]:
            raise DataError(f"{path}: images of x_train are {list(shapes[0])}, those of x_test {list(shapes[1])}")
        for name in ("x_train", "y_train"):
            arrays[name] = arrays[name][: self.config.limit]
        classes = _count_classes(path, arrays["y_train"], arrays["y_test"])
        return Dataset(
            f"npz:{path.stem}",
            train=_labelled(arrays["x_train"], arrays["y_train"]),
            test=_labelled(arrays["x_test"], arrays["y_test"]),
            classes=classes,
        )


def _read(path: Path) -> dict[str, _Array]:
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        with path.open("rb") as content:
            if not zipfile.is_zipfile(content):
                raise DataError(f"{path} is not a .npz file, or is cut short: write one with numpy.savez")
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in _KEYS if key not in file.files]
            if missing:
                raise DataError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(file.files) or 'nothing'}")
            return {key: _read_array(path, file, key) for key in _KEYS}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_array(path: Path, file: Any, key: str) -> _Array:
    try:
        array = file[key]
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(f"{path}: {key} is damaged ({error}): write the file again") from error
    except ValueError as error:
        raise DataError(f"{path}: {key} cannot be read, pickled objects are refused: {error}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: {key} is not an array: write the file with numpy.savez")
    return array


def _check_part(path: Path, part: str, x: _Array, y: _Array) -> None:
    if x.dtype != np.uint8:
        advice = f"; for values in [0, 1] store (x_{part} * 255).round().astype('uint8')" if x.dtype.kind == "f" else ""
        raise DataError(f"{path}: x_{part} must be uint8 with values 0 to 255, it is {x.dtype}{advice}")
    if x.ndim != 4 or (x.shape[1] not in _CHANNELS and x.shape[3] not in _CHANNELS):
        raise DataError(
            f"{path}: x_{part} must be [N, C, H, W] or [N, H, W, C] with 1 or 3 channels, its shape is {list(x.shape)}"
        )
    if y.dtype.kind not in "iu":
        raise DataError(f"{path}: y_{part} must hold integers, it is {y.dtype}")
    if y.ndim != 1:
        raise DataError(f"{path}: y_{part} must be [N], one class number an image, its shape is {list(y.shape)}")
    if x.size == 0:
        raise DataError(f"{path}: x_{part} is empty, its shape is {list(x.shape)}")
    if len(x) != len(y):
        raise DataError(f"{path}: x_{part} has {len(x)} images and y_{part} {len(y)} labels")
    if y.min() < 0:
        raise DataError(f"{path}: y_{part} has label {y.min()}; classes are numbered from 0")


def _count_classes(path: Path, train: _Array, test: _Array) -> int:
    unknown = np.setdiff1d(test, train)
    if len(unknown):
        raise DataError(f"{path}: y_test has label {unknown[0]}, of which y_train has no sample")
    classes = int(train.max()) + 1
    if classes < 2:
        raise DataError(f"{path}: y_train has no label but 0; a classifier needs two classes")
    if classes > len(train):
        raise DataError(
            f"{path}: y_train has label {classes - 1} with {len(train)} samples in all; number the classes 0, 1, 2, ..."
        )
    return classes


def _labelled(x: _Array, y: _Array) -> Labelled:
    planar = x if x.shape[1] in _CHANNELS else x.transpose(0, 3, 1, 2)
    return Labelled(torch.from_numpy(np.ascontiguousarray(planar)), torch.from_numpy(y.astype(np.int64)))


@hookimpl
def bdcore_dataset() -> type[DatasetPlugin]:
    """The class behind the name `npz`."""
    return Npz
