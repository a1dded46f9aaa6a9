"""Image files of your own: `--dataset folder:DIR` with DIR/train/CLASS/* and DIR/test/CLASS/*.

Files of any usual kind, at any depth below the folder of their class. Class folders that are all named by whole numbers
mean these numbers, others are numbered in the order of their names. Decoded once, into a memory-mapped file in the
cache.
"""

import os
from pathlib import Path

import torch
from pydantic import Field

from bdcore import DataError, Dataset, DatasetPlugin, Labelled, PluginConfig, Samples, hookimpl, read_samples


class Folder(DatasetPlugin):
    """Images from a folder a class."""

    name = "folder"

    class Config(PluginConfig):
        """Options of folders."""

        size: int | None = Field(
            None,
            ge=1,
            le=4096,
            description="height and width in pixels that images are scaled to, the shorter side, and cropped to; by "
            "default their own, which then must be alike",
        )

    config: Config

    def load(self, argument: str | None) -> Dataset:
        """Both parts below the folder named by `argument`, uint8 [N, 1, H, W] where all images are grey, else
        [N, 3, H, W]; classes = the largest label + 1."""
        if not argument:
            raise DataError(
                "folder needs a folder: write --dataset folder:DIR, with DIR/train/CLASS/* and DIR/test/CLASS/*"
            )
        root = Path(os.path.expanduser(argument))
        if not os.path.isdir(root):
            raise DataError(
                f"there is no folder {root}: name the one that holds train/CLASS and test/CLASS, with --dataset "
                "folder:DIR"
            )
        lacking = [part for part in ("train", "test") if not os.path.isdir(root / part)]
        if lacking:
            raise DataError(f"{root} has no folder {' or '.join(lacking)}: images belong in train/CLASS and test/CLASS")
        train, test = self._part(root / "train"), self._part(root / "test")
        if train.images.shape[1] != test.images.shape[1]:  # one part has no colours
            train, test = (
                part if part.images.shape[1] == 3 else self._part(root / where, 3)
                for part, where in ((train, "train"), (test, "test"))
            )
        shapes = list(train.images.shape[1:]), list(test.images.shape[1:])
        if shapes[0] != shapes[1]:
            raise DataError(
                f"{root}: images of train are {shapes[0]}, those of test {shapes[1]}: bring them to one size with "
                "--set dataset.size=224"
            )
        return _joined(root, train, test)

    def _part(self, folder: Path, channels: int | None = None) -> Samples:
        size = None if self.config.size is None else (self.config.size, self.config.size)
        return read_samples(f"folder:{folder}", size=size, channels=channels)


def _joined(root: Path, train: Samples, test: Samples) -> Dataset:
    if train.labels is None or test.labels is None:
        part = "train" if train.labels is None else "test"
        raise DataError(f"{root / part} has images but no class folders: put them in {part}/CLASS")
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"{root}: train and test differ in their classes: only one of them has {', '.join(odd[:5])}"
            f"{' ...' if len(odd) > 5 else ''}"
        )
    unknown = test.labels[~torch.isin(test.labels, train.labels)]
    if len(unknown):
        raise DataError(f"{root}: test has images of class {int(unknown.min())}, of which train has none")
    if len(train.classes) < 2:
        raise DataError(f"{root}: there is no class but {', '.join(train.classes)}; a classifier needs two")
    return Dataset(
        f"folder:{os.path.basename(os.path.abspath(root))}",
        train=Labelled(train.images, train.labels),
        test=Labelled(test.images, test.labels),
        classes=len(train.classes),
    )


@hookimpl
def bdcore_dataset() -> type[DatasetPlugin]:
    """The class behind the name `folder`."""
    return Folder
