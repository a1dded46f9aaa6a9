"""Handwritten digits: the 1,797 real 8 x 8 scans that scikit-learn carries, scaled to 3 x 32 x 32.

Alpaydin, Kaynak: "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (1998); the part that
`sklearn.datasets.load_digits` bundles. Nothing is downloaded. The split, 1,437 for training and 360 for test with equal
shares of each class, is the same in every run.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import interpolate

from bdcore import DataError, Dataset, DatasetPlugin, Labelled, hookimpl

_SIDE = 32
_TEST_SAMPLES = 360


class Digits(DatasetPlugin):
    """Ten classes of real handwriting, small enough for any machine."""

    name = "digits"
    # A mirrored digit is no digit.
    train_defaults: ClassVar[Mapping[str, object]] = {"flip": False, "epochs": 20, "batch_size": 64}

    def load(self, argument: str | None) -> Dataset:
        """Both parts, uint8 [N, 3, 32, 32]; takes no argument."""
        if argument is not None:
            raise DataError(f"digits takes no argument, got {argument!r}: write --dataset digits")
        scans, targets = load_digits(return_X_y=True)
        ink = torch.from_numpy(scans.astype(np.float32)).reshape(-1, 1, 8, 8)  # whole numbers, 0 to 16
        # Interpolated before it is scaled to 255: so far every value is exact, and so rounds alike on every machine.
        large = interpolate(ink, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False, antialias=False)
        images = (large * 255 / 16).round().to(torch.uint8).repeat(1, 3, 1, 1)
        labels = torch.from_numpy(targets.astype(np.int64))
        train, test = train_test_split(
            np.arange(len(labels)), test_size=_TEST_SAMPLES, stratify=targets, random_state=0
        )
        return Dataset(
            "digits",
            train=Labelled(images[torch.from_numpy(train)], labels[torch.from_numpy(train)]),
            test=Labelled(images[torch.from_numpy(test)], labels[torch.from_numpy(test)]),
            classes=10,
        )


@hookimpl
def bdcore_dataset() -> type[DatasetPlugin]:
    """The class behind the name `digits`."""
    return Digits
