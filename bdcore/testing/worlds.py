"""Small real data and victims for checks: scikit-learn's handwritten digits in any form, poisoned by BadNets.

Everything here follows from its arguments and is made once a process.
"""

from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

from bdcore.artifacts import Architecture, Dataset, Labelled, Poisoned, Victim
from bdcore.context import Context
from bdcore.contract import Attack
from bdcore.plugins import Host
from bdcore.stages.data import architecture, clean_set
from bdcore.stages.poison import poison
from bdcore.stages.train import train
from bdcore.training import Recipe

MODEL = "wrn10_1"

_TINTS = torch.tensor([1.0, 0.8, 0.6])
"""Brightness of the channels of colour images: they shall not be alike."""


@dataclass(frozen=True)
class Form:
    """What images a world has: channels, height and width, number of classes (up to 20), training samples."""

    shape: tuple[int, int, int] = (1, 8, 8)
    classes: int = 10
    samples: int = 400
    epochs: int = 10

    def __str__(self) -> str:
        return f"{self.samples} images of {'x'.join(map(str, self.shape))} in {self.classes} classes"


FORMS = {
    "two_classes": Form(classes=2, samples=120),
    "thirteen_classes": Form(classes=13, samples=260),
    "colour_32x32": Form(shape=(3, 32, 32), samples=120, epochs=4),
    "colour_40x24": Form(shape=(3, 40, 24), samples=120, epochs=4),
}
"""Other images than the first ones that a plugin is shown, by the names of the checks."""


@dataclass(frozen=True)
class World:
    """All that a plugin could be handed: clean data, what BadNets made of them, and a victim of either."""

    dataset: Dataset
    poisoned: Poisoned
    victim: Victim
    clean: Labelled


@cache
def digits(form: Form, seed: int) -> Dataset:
    """Digits in this form: `form.samples` to train, half as many to test, no image twice, every class in both.

    Classes from 10 on are the first ones in negative.
    """
    scans, targets = load_digits(return_X_y=True)
    _, first = np.unique(scans, axis=0, return_index=True)
    first = np.sort(first)
    ink = torch.from_numpy((scans[first].reshape(-1, 1, 8, 8) * 15).astype(np.uint8))
    labels = torch.from_numpy(targets[first].astype(np.int64))
    ink, labels = torch.cat([ink, 255 - ink]), torch.cat([labels, labels + 10])
    channels, *size = form.shape
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order] < form.classes]
    # In turns over the classes, so that small sets hold all of them.
    turn = torch.zeros(len(order), dtype=torch.int64)
    for label in range(form.classes):
        members = labels[order] == label
        turn[members] = torch.arange(int(members.sum()))
    chosen = order[turn.argsort(stable=True)][: form.samples * 3 // 2]
    large = interpolate(ink[chosen].float(), size=tuple(size), mode="bilinear")
    tints = _TINTS.repeat(-(-channels // 3))[:channels].view(1, -1, 1, 1)
    data = Labelled((large * tints).round().to(torch.uint8), labels[chosen])
    places = torch.arange(len(chosen))
    train, test = data.select(places[: form.samples]), data.select(places[form.samples :])
    return Dataset("digits", train, test, form.classes)


@cache
def world(form: Form, seed: int = 0, target: int = 0) -> World:
    """Digits of which a fifth is poisoned by BadNets towards `target`, and a victim trained on them.

    The defender's clean set is a fifth of the training set as it was before.
    """
    dataset = digits(form, seed)
    badnets = cast(type[Attack], Host().load("badnets").cls)
    attack = badnets(badnets.Config.model_validate({"target": target, "poison_rate": 0.2}))
    poisoned = poison(dataset, attack, Context(seed=seed))
    victim = _trained(poisoned.train, form, seed)
    return World(dataset, poisoned, victim, clean_set(dataset, 0.2, Context(seed=seed)))


@cache
def surrogate(form: Form) -> Victim:
    """A classifier that an attacker trained on the clean digits."""
    return _trained(digits(form, 0).train, form, seed=1)


def arch_of(data: Labelled, form: Form) -> Architecture:
    """The architecture of every classifier here, for such data."""
    return architecture(MODEL, data, form.classes)


def _trained(data: Labelled, form: Form, seed: int) -> Victim:
    recipe = Recipe(epochs=form.epochs, batch_size=64, lr=0.1)
    return train(data, arch_of(data, form), recipe, Context(seed=seed))
