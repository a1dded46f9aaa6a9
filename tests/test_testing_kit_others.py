"""The kit finds what is wrong with an attack or a data set: each breaks one promise and fails its check alone."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdcore import (
    Attack,
    AttackInput,
    Context,
    DataError,
    Dataset,
    DatasetPlugin,
    Labelled,
    PluginConfig,
    Recipe,
    Triggered,
    build,
    fit,
)
from bdcore.testing import ATTACK_CHECKS, DATASET_CHECKS, ConformanceError, check_attack, check_dataset


def found(error: ConformanceError) -> set[str]:
    """The checks that failed; each says what was expected, what happened and what to do."""
    parts = str(error).split("\n\n")
    for part in parts:
        assert re.search(r"\nexpected: .+\nhappened: .+\nto do: .+", part), part
    return {re.findall(r"fails the check `(\w+)`", part)[0] for part in parts}


class Corner(Attack):
    """Whitens a corner."""

    name = "corner"

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        stamped = images.clone()
        stamped[:, :, :2, :2] = 255
        return stamped

    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        return torch.full_like(labels, self.config.target)


class Plain(Corner):
    Config = PluginConfig


class Invisible(Corner):
    def stamp(self, images: Tensor, context: Context) -> Tensor:
        return images.clone()


class Fractions(Corner):
    def stamp(self, images: Tensor, context: Context) -> Tensor:
        return images / 255


class Trainer(Corner):
    controls_training = True


class InPlace(Corner):
    def stamp(self, images: Tensor, context: Context) -> Tensor:
        images[:, :, :2, :2] = 255
        return images


class Surrogate(Corner):
    surrogate = True

    def prepare(self, given: AttackInput, context: Context) -> None:
        assert given.model is not None
        next(given.model.parameters()).data += 1


class Strides(Corner):
    def stamp(self, images: Tensor, context: Context) -> Tensor:
        return super().stamp(images, context) if images.is_contiguous() else 255 - images


class Squeezing(Corner):
    def stamp(self, images: Tensor, context: Context) -> Tensor:
        return super().stamp(images, context)[0] if len(images) == 1 else super().stamp(images, context)


class Averaging(Corner):
    def stamp(self, images: Tensor, context: Context) -> Tensor:
        return ((images.float() + images.float().mean(0)) / 2).to(torch.uint8)


class Unseeded(Corner):
    def prepare(self, given: AttackInput, context: Context) -> None:
        generator = torch.Generator()
        generator.seed()
        self.shade = int(torch.randint(2**62, (), generator=generator)) % 251

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        stamped = super().stamp(images, context)
        stamped[:, :, 3, 3] = self.shade
        return stamped


class ByBatch(Corner):
    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        return super().relabel(labels, classes) if len(labels) > 1 else labels.clone()


class CountsAll(Corner):
    def triggered(self, test: Labelled, classes: int, context: Context) -> Triggered:
        return Triggered(self.stamp(test.images, context), test.labels, self.relabel(test.labels, classes))


class Mixed(Corner):
    def triggered(self, test: Labelled, classes: int, context: Context) -> Triggered:
        made = super().triggered(test, classes, context)
        assert made.source is not None
        return Triggered(made.images, made.labels, made.targets, made.source.flip(0))


class NeedsTen(Corner):
    def prepare(self, given: AttackInput, context: Context) -> None:
        F.one_hot(given.train.labels, 10)


class NeedsSquares(Corner):
    def stamp(self, images: Tensor, context: Context) -> Tensor:
        _ = images + images.transpose(2, 3)
        return super().stamp(images, context)


class Forgetful(Trainer):
    """Its count is in no checkpoint."""

    epochs = 0

    def prepare(self, given: AttackInput, context: Context) -> nn.Module:
        victim = build(given.arch, context.generator("init").initial_seed()).train()

        def after(epoch: int, figures: dict[str, float]) -> bool:
            self.epochs += 1
            return False

        def loss(batch: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(victim(batch["images"]), batch["labels"])

        columns = {"images": given.train.images[:40], "labels": given.train.labels[:40]}
        fit("victim", victim, columns, loss, Recipe(epochs=2), context, after)
        return victim

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        stamped = super().stamp(images, context)
        stamped[:, :, 3, 3] = 50 * self.epochs
        return stamped


class Printing(Corner):
    def prepare(self, given: AttackInput, context: Context) -> None:
        print("preparing")


class Seeding(Corner):
    def prepare(self, given: AttackInput, context: Context) -> None:
        torch.manual_seed(0)


def test_a_sound_attack_passes_every_check():
    results = check_attack(Corner)
    skipped = {name for name, status in results.items() if not status.startswith("passed")}
    assert skipped <= {"cuda", "resume"}
    assert set(results) == set(ATTACK_CHECKS)
    assert results["poisons"] == "passed: 40 poisons, 0 of them without a change"


@pytest.mark.parametrize(
    ("cls", "checks", "said"),
    [
        (Plain, {"contract"}, "class Config\\(AttackConfig\\)"),
        (Invisible, {"poisons"}, "all 40 poisoned images are as they were"),
        (Fractions, {"poisons"}, "must return uint8"),
        (Trainer, {"poisons"}, "must return the trained victim"),
        (InPlace, {"inputs_unchanged"}, r"images \(in stamp\)"),
        (Surrogate, {"inputs_unchanged"}, r"the surrogate \(in prepare\)"),
        (Strides, {"stamp"}, "stamped otherwise"),
        (Squeezing, {"batch_of_one"}, "do not squeeze"),
        (Averaging, {"batch_of_one"}, "they differ by up to"),
        (Unseeded, {"same_seed"}, "the poisoned training set, the triggered test set"),
        (ByBatch, {"relabel"}, "one by one"),
        (CountsAll, {"triggered"}, "20 of 200 triggered images"),
        (Mixed, {"triggered"}, "they do not fit"),
        (NeedsTen, {"thirteen_classes"}, "Class values must be smaller"),
        (NeedsSquares, {"colour_40x24"}, "RuntimeError"),
        (Forgetful, {"resume"}, "the poisoned training set"),
        (Printing, {"no_prints"}, "begin 'preparing'"),
        (Seeding, {"no_global_random"}, "state of torch"),
    ],
)
def test_a_broken_attack_fails_its_check_alone(cls: type[Attack], checks: set[str], said: str):
    with pytest.raises(ConformanceError, match=said) as caught:
        check_attack(cls)
    assert found(caught.value) == checks


def test_a_trigger_that_varies_on_purpose_is_said_to():
    assert check_attack(Averaging, check="batch_of_one", trigger_varies=True) == {"batch_of_one": "passed"}


def test_an_attack_that_refuses_what_it_is_shown_first_is_told_to_choose_settings():
    with pytest.raises(ConformanceError, match=r"wants class 10.*\nto do: .*choose settings or shape"):
        check_attack(Corner, {"target": 10}, check="poisons")


class Noise(DatasetPlugin):
    """Noise in three classes."""

    name = "noise"

    def load(self, argument: str | None) -> Dataset:
        if argument is not None:
            raise DataError("noise takes no argument")
        return self.made()

    def made(self, **parts: Any) -> Dataset:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (60, 1, 8, 8), generator=generator, dtype=torch.uint8)
        labels = torch.arange(60) % 3
        train, test = Labelled(images[:40], labels[:40]), Labelled(images[40:], labels[40:])
        return Dataset("noise", parts.get("train", train), parts.get("test", test), parts.get("classes", 3))


class Bare(Noise):
    class Config(PluginConfig):
        samples: int = Field(3, description="how many")


class Missing(Noise):
    def load(self, argument: str | None) -> Dataset:
        raise DataError("there is no file noise.bin")


class Dark(Noise):
    def made(self, **parts: Any) -> Dataset:
        sound = super().made()
        return super().made(train=Labelled(sound.train.images // 255, sound.train.labels))


class ChannelsLast(Noise):
    def made(self, **parts: Any) -> Dataset:
        sound = super().made()
        return super().made(
            train=Labelled(sound.train.images.permute(0, 2, 3, 1), sound.train.labels),
            test=Labelled(sound.test.images.permute(0, 2, 3, 1), sound.test.labels),
        )


class FromOne(Noise):
    def made(self, **parts: Any) -> Dataset:
        sound = super().made()
        return super().made(
            train=Labelled(sound.train.images, sound.train.labels + 1),
            test=Labelled(sound.test.images, sound.test.labels + 1),
        )


class Foreign(Noise):
    def made(self, **parts: Any) -> Dataset:
        sound = super().made()
        return super().made(test=Labelled(sound.test.images, sound.test.labels + 1))


class Leaking(Noise):
    def made(self, **parts: Any) -> Dataset:
        sound = super().made()
        images = torch.cat([sound.train.images[:1], sound.test.images[1:]])
        return super().made(test=Labelled(images, sound.test.labels))


class Shuffled(Noise):
    def made(self, **parts: Any) -> Dataset:
        sound, generator = super().made(), torch.Generator()
        generator.seed()
        return super().made(train=sound.train.select(torch.randperm(40, generator=generator)))


class Deaf(Noise):
    def load(self, argument: str | None) -> Dataset:
        return self.made()


class Tracebacks(Noise):
    def load(self, argument: str | None) -> Dataset:
        return super().load(argument if argument is None else open(argument).read())


class Misspelt(Noise):
    train_defaults = {"learning_rate": 0.1}  # noqa: RUF012


class Shouting(Noise):
    def made(self, **parts: Any) -> Dataset:
        print("loading")
        return super().made()


def test_a_sound_data_set_passes_every_check():
    results = check_dataset(Noise)
    assert all(status.startswith("passed") for status in results.values())
    assert set(results) == set(DATASET_CHECKS)
    assert results["form"] == "passed: 40 + 20 images of [1, 8, 8] in 3 classes"


@pytest.mark.parametrize(
    ("cls", "checks", "said"),
    [
        (Bare, {"contract"}, "samples may be anything"),
        (Missing, {"form"}, "there is no file noise.bin"),
        (Dark, {"form"}, "the brightest one is 1"),
        (ChannelsLast, {"form"}, r"\[8, 8, 1\]"),
        (FromOne, {"classes"}, r"missing are \[0\], too many are \[3\]"),
        (Foreign, {"classes"}, r"\[3\] are in the test set alone"),
        (Leaking, {"no_overlap"}, r"1 of 20 are, to the byte \(5.00%\)"),
        (Shuffled, {"deterministic"}, "it is another one"),
        (Deaf, {"argument_errors"}, "it loads something"),
        (Tracebacks, {"argument_errors"}, "FileNotFoundError"),
        (Misspelt, {"train_defaults", "config_round_trip"}, "learning_rate"),
        (Shouting, {"no_prints"}, "begin 'loading'"),
    ],
)
def test_a_broken_data_set_fails_its_check_alone(cls: type[DatasetPlugin], checks: set[str], said: str):
    with pytest.raises(ConformanceError, match=said) as caught:
        check_dataset(cls)
    assert found(caught.value) == checks


def test_known_duplicates_may_be_allowed_and_are_told():
    told = check_dataset(Leaking, check="no_overlap", overlap=0.05)["no_overlap"]
    assert told == "passed: 5.00% of the test images are training images too"
