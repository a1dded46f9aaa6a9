"""Which normalisation a foreign network was trained with: a state dict does not say."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from bdcore.artifacts import Architecture, Labelled
from bdcore.context import Context
from bdcore.errors import UsageError, unknown_name
from bdcore.models import Classifier
from bdcore.stages.evaluate import answers

NAMED: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0,), (1.0,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5,), (0.5,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
}
"""Means and spreads of images in [0, 1] that training scripts commonly use, one value for all channels or one each."""


def parse(text: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What `--normalize` says: a name of `NAMED`, or "MEAN,.../STD,..." with one value or one a channel.

    Returns:
        (mean, std), one value a channel.

    Raises:
        UsageError: it is neither, a number is no number, or the count is neither 1 nor `channels`.
    """
    mean, std = read(text)
    if len(mean) not in (1, channels) or len(std) not in (1, channels):
        raise UsageError(
            f"--normalize {text}: {len(mean)} means and {len(std)} spreads for images of {channels} channels."
        )
    return _each(mean, channels), _each(std, channels)


def read(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means and spreads as `--normalize` writes them, for any number of channels; raises as `parse` does."""
    if text in NAMED:
        mean, std = NAMED[text]
    elif "/" in text:
        try:
            mean, std = (tuple(float(number) for number in part.split(",")) for part in text.split("/", 1))
        except ValueError as error:
            raise UsageError(f"--normalize {text}: {error}; write MEAN,.../STD,..., for instance 0.5/0.25.") from error
        if not all(0 < spread < float("inf") for spread in std) or not all(abs(one) < float("inf") for one in mean):
            raise UsageError(f"--normalize {text}: means must be finite and spreads above 0.")
    else:
        raise UsageError(f"{unknown_name('normalisation', text, NAMED)} Or write MEAN,.../STD,..., as 0.5/0.25.")
    return mean, std


def normalise(model: Classifier, arch: Architecture, mean: tuple[float, ...], std: tuple[float, ...]) -> Architecture:
    """Let `model` normalise by `mean` and `std` (one value a channel of `arch`); the architecture that says so."""
    repeat = model.mean.shape[1] // arch.shape[0]  # a network for colour takes a grey image three times
    model.mean.copy_(torch.tensor(mean * repeat).view_as(model.mean))
    model.std.copy_(torch.tensor(std * repeat).view_as(model.std))
    return replace(arch, mean=mean, std=std)


def likeliest(model: Classifier, arch: Architecture, data: Labelled, context: Context) -> tuple[Architecture, str]:
    """Let `model`, on the device, normalise as in that named way which gets most of `data` right, the first of equals.

    Returns:
        The architecture that says so, and the name.
    """
    channels = arch.shape[0]
    right: dict[str, int] = {}
    for name, (mean, std) in NAMED.items():
        if len(mean) in (1, channels):
            normalise(model, arch, _each(mean, channels), _each(std, channels))
            predicted = answers(model, data.images, context)
            right[name] = int((predicted == data.labels).sum())
    best = max(right, key=lambda name: right[name])
    mean, std = NAMED[best]
    return normalise(model, arch, _each(mean, channels), _each(std, channels)), best


def _each(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values * channels if len(values) == 1 else values
