"""The classes that plugins subclass: one for data sets, one for attacks, one for defenses, one for observers.

A plugin module holds such a class and a hook that returns it:

    class MyDefense(Defense):
        name = "mine"
        needs = frozenset({"model", "clean"})

        class Config(PluginConfig):
            epochs: int = Field(5, ge=1, le=1000, description="passes over the clean set")

        def __call__(self, given, context):
            ...
            return Outcome(model=purified)

    @hookimpl
    def bdcore_defense():
        return MyDefense
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from bdcore.artifacts import Architecture, Dataset, DefenseInput, Labelled, Need, Outcome, Triggered
from bdcore.context import Context
from bdcore.training.recipe import Recipe


class PluginConfig(BaseModel):
    """Options of a plugin, set with `--set NAME.KEY=VALUE`: frozen, no unknown keys; describe and bound each field."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Plugin:
    """What all kinds share: a name, options, and an instance a run."""

    name: ClassVar[str]
    Config: ClassVar[type[PluginConfig]] = PluginConfig

    def __init__(self, config: PluginConfig) -> None:
        self.config: Any = config  # an instance of the class's own Config; a subclass may annotate it as that

    def files(self) -> tuple[Path, ...]:
        """Files that the options name and the result depends on: their content is part of what a result is cached by.

        A data set's own files need not be listed; its content is.
        """
        return ()


class DatasetPlugin(Plugin, ABC):
    """A data set. `train_defaults` are training options that suit it; what the user sets wins over them."""

    train_defaults: ClassVar[Mapping[str, object]] = {}

    @abstractmethod
    def load(self, argument: str | None) -> Dataset:
        """Load both parts as uint8 tensors.

        Args:
            argument: what the user wrote after the colon in `--dataset NAME:ARGUMENT`, for instance a path.

        Raises:
            DataError: with one clear sentence, where there is nothing to load or its form is wrong.
        """


class AttackConfig(PluginConfig):
    """Options that every attack has."""

    target: int = Field(default=0, ge=0, description="class that the attacker wants triggered images to be given")
    poison_rate: float = Field(default=0.1, ge=0, le=1, description="share of the training set that is poisoned")


@dataclass(frozen=True)
class AttackInput:
    """What an attacker knows, read-only.

    Args:
        train: the training set before it is poisoned, on the CPU.
        classes: the number of classes.
        arch: the victim's architecture.
        recipe: how the victim is trained.
        model: where the attack says `surrogate = True`, a classifier of that architecture, trained on `train` by that
            recipe from another seed than the victim's; in eval mode.
        order: places of the eligible training samples, int64 [K], in the order drawn: the first `count` of them are
            those that the host will poison. It fills this in.
    """

    train: Labelled
    classes: int
    arch: Architecture
    recipe: Recipe
    model: nn.Module | None = None
    order: Tensor | None = None


class Attack(Plugin, ABC):
    """An attack: how a trigger is put into images, which labels poisons get, which samples may be taken.

    The host calls `prepare` once, then picks `count` of the eligible training samples and replaces them by `poison` and
    `relabel`; the test set that carries the trigger is `triggered`.
    """

    Config: ClassVar[type[PluginConfig]] = AttackConfig
    surrogate: ClassVar[bool] = False
    """Whether `prepare` is to be given a classifier trained on the clean training set."""
    controls_training: ClassVar[bool] = False
    """Whether `prepare` trains the victim and returns it. The poisoned training set, made with the final trigger, is
    then what a defense that trains anew is given."""

    def prepare(self, given: AttackInput, context: Context) -> nn.Module | None:
        """Train or compute what the trigger depends on and keep it in attributes; by default there is nothing.

        Returns:
            The trained victim where the attack controls training, else None.
        """
        return None

    @abstractmethod
    def stamp(self, images: Tensor, context: Context) -> Tensor:
        """Put the trigger into images, in one batch.

        Args:
            images: uint8 [B, C, H, W]; not altered.
            context: its generator is the same for training and test images of a run.

        Returns:
            uint8 [B, C, H, W], on the device of `images`.
        """

    @abstractmethod
    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        """The classes that triggered images of the given true classes shall be given, int64 [B]."""

    def eligible(self, labels: Tensor, classes: int) -> Tensor:
        """Which training samples may be poisoned, bool [N]: by default those whose label the attack changes."""
        return self.relabel(labels, classes) != labels

    def count(self, labels: Tensor, classes: int) -> int:
        """How many of the training samples with these labels are poisoned: by default `round(poison_rate * N)`."""
        return round(self.config.poison_rate * len(labels))

    def poison(self, images: Tensor, labels: Tensor, context: Context) -> Tensor:
        """What training samples become, uint8 [B, C, H, W], given their true labels: by default they are stamped."""
        return self.stamp(images, context)

    def counted(self, labels: Tensor, classes: int) -> Tensor:
        """Which test samples are triggered and counted, bool [N]: by default those whose label `relabel` changes. The
        host asks before anything is trained, and refuses to work where there is none."""
        return self.relabel(labels, classes) != labels

    def triggered(self, test: Labelled, classes: int, context: Context) -> Triggered:
        """The test samples that the attack counts, with the trigger."""
        targets = self.relabel(test.labels, classes)
        counted = self.counted(test.labels, classes).nonzero()[:, 0]
        images = self.stamp(test.images[counted], context)
        return Triggered(images, test.labels[counted], targets[counted], counted)


class CleanLabelConfig(AttackConfig):
    """Options of attacks that change images of the target class and leave their labels."""

    class_rate: float | None = Field(
        None, gt=0, le=1, description="share of the target class's samples that are poisoned, in place of poison_rate"
    )


class CleanLabelAttack(Attack):
    """An attack on images of the target class, whose labels stay."""

    Config: ClassVar[type[PluginConfig]] = CleanLabelConfig

    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        """The target class, which the poisoned training samples have already."""
        return torch.full_like(labels, self.config.target)

    def eligible(self, labels: Tensor, classes: int) -> Tensor:
        """The samples of the target class."""
        return labels == self.config.target

    def count(self, labels: Tensor, classes: int) -> int:
        """`class_rate` of the target class where it is given, else `poison_rate` of all."""
        if self.config.class_rate is None:
            return super().count(labels, classes)
        return round(self.config.class_rate * int(self.eligible(labels, classes).sum()))


class Defense(Plugin, ABC):
    """A defense: called with what it declared in `needs`, returns an Outcome."""

    needs: ClassVar[frozenset[Need]] = frozenset({"model", "clean"})

    def oracles(self) -> tuple[str, ...]:
        """What the options hand to this defense that a defender would not know, e.g. ("target",); it is recorded."""
        return ()

    @abstractmethod
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        """Defend. Raises DefenseError where no honest answer is possible; returns within the threat model only."""

    def inspect(self, given: DefenseInput, context: Context) -> Outcome:
        """Say whether there is a backdoor, and defend no further: what `bdcore scan` asks for. An Outcome with a
        verdict, and the triggers that it rests on; by default all of the defense is done."""
        return self(given, context)


class Observer(Plugin):
    """Looks on: its methods marked with `@hookimpl`, named after the hooks that observe, are called as a run goes on.

    It is chosen as other plugins are, with `--plugin NAME`, changes no number, and is no part of the record or of what
    results are cached by. An error of `bdcore_run_started`, or as it is made, ends the run before any work; a later one
    is a warning, and the observer hears no more. It is told of a failure only of runs that it was told have started.
    """
