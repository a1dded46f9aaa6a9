"""The classes that plugins subclass: one for data sets, one for attacks, one for defenses.

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
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from bdcore.artifacts import Dataset, DefenseInput, Need, Outcome
from bdcore.context import Context


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

    target: int = Field(0, ge=0, description="class that the attacker wants triggered images to be given")
    poison_rate: float = Field(0.1, ge=0, le=1, description="share of the training set that is poisoned")


class Attack(Plugin, ABC):
    """A data-poisoning attack: how a trigger is put into images, which labels poisons get, which samples may be taken.

    The host picks `round(poison_rate * N)` of the eligible training samples, stamps and relabels them; at test time it
    stamps the samples whose label `relabel` changes (for a single target: all other classes).
    """

    Config: ClassVar[type[PluginConfig]] = AttackConfig

    @abstractmethod
    def stamp(self, images: Tensor, context: Context) -> Tensor:
        """Put the trigger into images, in one batch.

        Args:
            images: uint8 [B, C, H, W]; not altered.
            context: its generator is the same for training and test images of a run.

        Returns:
            uint8 [B, C, H, W].
        """

    @abstractmethod
    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        """The classes that triggered images of the given true classes shall be given, int64 [B]."""

    def eligible(self, labels: Tensor, classes: int) -> Tensor:
        """Which training samples may be poisoned, bool [N]: by default those whose label the attack changes."""
        return self.relabel(labels, classes) != labels


class Defense(Plugin, ABC):
    """A defense: called with what it declared in `needs`, returns an Outcome."""

    needs: ClassVar[frozenset[Need]] = frozenset({"model", "clean"})

    def oracles(self) -> tuple[str, ...]:
        """What the options hand to this defense that a defender would not know, e.g. ("target",); it is recorded."""
        return ()

    @abstractmethod
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        """Defend. Raises DefenseError where no honest answer is possible; returns within the threat model only."""
