"""CIFAR-10: 60,000 colour photographs of ten classes, 32 x 32.

Krizhevsky: "Learning Multiple Layers of Features from Tiny Images" (2009). Read, and on request downloaded, by
torchvision, which checks each file against its published checksum before it opens it.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import platformdirs
import torch
from pydantic import Field
from torchvision.datasets import CIFAR10

from bdcore import DataError, Dataset, DatasetPlugin, Labelled, PluginConfig, hookimpl


class Cifar10(DatasetPlugin):
    """CIFAR-10 in its official split."""

    name = "cifar10"
    # Crops are left out: poison is in the data before it is augmented, and a crop may cut the trigger off.
    train_defaults: ClassVar[Mapping[str, object]] = {"flip": True, "lr": 0.2}

    class Config(PluginConfig):
        """Options of CIFAR-10."""

        download: bool = Field(False, description="fetch the 163 MiB from the authors' site where they are missing")
        limit: int | None = Field(None, ge=1, description="how many training images to keep, the first; default all")

    config: Config

    def load(self, argument: str | None) -> Dataset:
        """Both parts, uint8 [N, 3, 32, 32].

        `argument` is the folder that holds `cifar-10-batches-py`; by default `data` in the folder that $BDCORE_CACHE
        names, else in the platform's cache folder.
        """
        root = Path(argument).expanduser() if argument else _cache_folder() / "data"
        train = self._part(root, train=True)
        if self.config.limit is not None:
            train = train.select(torch.arange(min(self.config.limit, len(train))))
        return Dataset("cifar10", train=train, test=self._part(root, train=False), classes=10)

    def _part(self, root: Path, train: bool) -> Labelled:
        try:
            with warnings.catch_warnings():
                # Python 2 wrote the files; NumPy 2.4.0 to 2.4.4 warn of an outdated argument in such pickles.
                warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
                part = CIFAR10(root, train=train, download=self.config.download)
        except (RuntimeError, OSError) as error:
            raise DataError(self._failure(root, error)) from error
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        return Labelled(images, torch.from_numpy(np.asarray(part.targets, dtype=np.int64)))

    def _failure(self, root: Path, error: Exception) -> str:
        if self.config.download:
            return f"CIFAR-10 could not be downloaded to {root}: {error}"
        state = "is damaged" if (root / CIFAR10.base_folder).exists() else "is not there"
        return (
            f"CIFAR-10 {state} in {root} (folder {CIFAR10.base_folder}): name the folder that holds it with --dataset "
            "cifar10:ROOT; `bdcore run` downloads it with --set dataset.download=true"
        )


def _cache_folder() -> Path:
    return Path(os.environ.get("BDCORE_CACHE") or platformdirs.user_cache_dir("bdcore"))


@hookimpl
def bdcore_dataset() -> type[DatasetPlugin]:
    """The class behind the name `cifar10`."""
    return Cifar10
