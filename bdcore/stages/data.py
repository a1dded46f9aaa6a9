"""Load the data set, and set the defender's clean samples aside."""

import torch
from sklearn.model_selection import train_test_split

from bdcore.artifacts import Architecture, Dataset, Labelled
from bdcore.context import Context
from bdcore.contract import DatasetPlugin
from bdcore.errors import UsageError


def load(plugin: DatasetPlugin, argument: str | None) -> Dataset:
    """The data set that `plugin` loads from `argument`."""
    return plugin.load(argument)


def clean_set(dataset: Dataset, fraction: float, context: Context) -> Labelled:
    """The defender's clean samples: `fraction` of the training set as it was before any poisoning, in equal shares of
    every class (stratified), a copy.

    Raises:
        UsageError: where that is less than one sample a class, or cannot be drawn in equal shares.
    """
    labels = dataset.train.labels
    count = round(fraction * len(labels))
    present = len(labels.unique())
    if count >= len(labels):
        return dataset.train.select(torch.arange(len(labels)))
    if count < present:
        raise UsageError(
            f"run.clean_fraction={fraction:g} of {len(labels)} training samples is {count}, less than one a class "
            f"({present} classes). Use at least {present / len(labels):.4f}."
        )
    seed = int(torch.randint(0, 2**31 - 1, (), generator=context.generator("clean")))
    try:
        chosen, _ = train_test_split(
            torch.arange(len(labels)).numpy(), train_size=count, stratify=labels.numpy(), random_state=seed
        )
    except ValueError as error:  # a class of one sample, or fewer samples left over than classes
        raise UsageError(
            f"run.clean_fraction={fraction:g} of {len(labels)} training samples cannot be drawn in equal shares of "
            f"every class: {error} Use another fraction."
        ) from error
    return dataset.train.select(torch.from_numpy(chosen).sort().values)


def architecture(name: str, train: Labelled, classes: int) -> Architecture:
    """The architecture `name` for such data, normalised by the training set's own mean and spread of each channel."""
    _, channels, height, width = train.images.shape
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, spreads = list[float](), list[float]()
    for channel in range(channels):
        share = torch.bincount(train.images[:, channel].reshape(-1), minlength=256).double()
        share /= share.sum()
        mean = float((share * levels).sum())
        means.append(round(mean, 6))
        spreads.append(round(max(float((share * (levels - mean) ** 2).sum()) ** 0.5, 1 / 255), 6))
    return Architecture(name, classes, (channels, height, width), tuple(means), tuple(spreads))
