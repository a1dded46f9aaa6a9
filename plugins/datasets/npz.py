"""Images of your own in one NumPy file: `--dataset npz:FILE` with x_train, y_train, x_test and y_test.

Images are uint8, [N, C, H, W] or [N, H, W, C] with 1 or 3 channels (the former where both readings are possible);
labels are integers [N] from 0 on. Write such a file with `numpy.savez(FILE, x_train=..., y_train=..., ...)`. Pickled
arrays are refused.
"""

import os
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from bdcore import DataError, Dataset, DatasetPlugin, PluginConfig, hookimpl, read_npz

_PARTS = (("x_train", "y_train"), ("x_test", "y_test"))


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
            keys = ", ".join(key for pair in _PARTS for key in pair)
            raise DataError(f"npz needs a file: write --dataset npz:FILE, a .npz with {keys}")
        path = Path(os.path.expanduser(argument))
        train, test = read_npz(path, _PARTS)
        shapes = list(train.images.shape[1:]), list(test.images.shape[1:])
        if shapes[0] != shapes[1]:
            raise DataError(f"{path}: images of x_train are {shapes[0]}, those of x_test {shapes[1]}")
        if self.config.limit is not None:
            train = train.select(torch.arange(min(self.config.limit, len(train))))
        classes = _count_classes(path, train.labels, test.labels)
        return Dataset(f"npz:{path.stem}", train=train, test=test, classes=classes)


def _count_classes(path: Path, train: Tensor, test: Tensor) -> int:
    unknown = test[~torch.isin(test, train)]
    if len(unknown):
        raise DataError(f"{path}: y_test has label {int(unknown.min())}, of which y_train has no sample")
    classes = int(train.max()) + 1
    if classes < 2:
        raise DataError(f"{path}: y_train has no label but 0; a classifier needs two classes")
    if classes > len(train):
        raise DataError(
            f"{path}: y_train has label {classes - 1} with {len(train)} samples in all; number the classes 0, 1, 2, ..."
        )
    return classes


@hookimpl
def bdcore_dataset() -> type[DatasetPlugin]:
    """The class behind the name `npz`."""
    return Npz
