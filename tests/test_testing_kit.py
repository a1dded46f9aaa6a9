"""The kit finds what is wrong with a defense: one that breaks one promise fails the check for it, no other, and is told
what to do."""

import copy
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from bdcore import Context, Defense, DefenseError, DefenseInput, Labelled, Outcome, PluginConfig, Recipe, fit
from bdcore.errors import UsageError
from bdcore.testing import (
    ATTACK_CHECKS,
    DATASET_CHECKS,
    DEFENSE_CHECKS,
    ConformanceError,
    attacks,
    check_defense,
    datasets,
    defenses,
)
from bdcore.testing.installed import watched_files


def found(error: ConformanceError) -> set[str]:
    """The checks that failed; each says what was expected, what happened and what to do."""
    parts = str(error).split("\n\n")
    for part in parts:
        assert re.search(r"\nexpected: .+\nhappened: .+\nto do: .+", part), part
    return {re.findall(r"fails the check `(\w+)`", part)[0] for part in parts}


class Sound(Defense):
    """Fine-tunes for two epochs."""

    name = "sound"

    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        return Outcome(model=self.tuned(copy.deepcopy(given.model), given.clean, context))

    def tuned(self, model: nn.Module | None, clean: Labelled | None, context: Context) -> nn.Module:
        assert model is not None
        assert clean is not None

        def loss(batch: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(model(batch["images"]).float(), batch["labels"])

        def after(epoch: int, figures: dict[str, float]) -> bool:
            return self.after(epoch, figures)

        columns = {"images": clean.images, "labels": clean.labels}
        fit("tune", model, columns, loss, Recipe(epochs=2, lr=0.01, schedule="constant"), context, after)
        return model

    def after(self, epoch: int, figures: dict[str, float]) -> bool:
        return False


class Unbounded(Sound):
    class Config(PluginConfig):
        share: float = Field(0.5, description="share of something")


class Misnamed(Sound):
    name = "record"


class Crashing(Sound):
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        raise ValueError("no idea")


class Silent(Sound):
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        return Outcome()


class WrongModel(Sound):
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        return Outcome(model=nn.Identity())


class Refusing(Sound):
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        raise DefenseError("not today")


class Altering(Sound):
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        return Outcome(model=copy.deepcopy(self.tuned(given.model, given.clean, context)))


class Undecided(Sound):
    def inspect(self, given: DefenseInput, context: Context) -> Outcome:
        return Outcome()


class Unseeded(Sound):
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        generator = torch.Generator()
        generator.seed()
        return Outcome(super().__call__(given, context).model, notes={"x": float(torch.rand((), generator=generator))})


class NeedsTwo(Sound):
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        assert given.clean is not None
        _ = given.clean.images[1]
        return super().__call__(given, context)


class NeedsSix(Sound):
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        _ = torch.eye(given.classes)[5]
        return super().__call__(given, context)


class NeedsTen(Sound):
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        assert given.clean is not None
        F.one_hot(given.clean.labels, 10)
        return super().__call__(given, context)


class NeedsSquares(Sound):
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        assert given.clean is not None
        images = given.clean.images
        _ = images + images.transpose(2, 3)
        return super().__call__(given, context)


class NeedsGrey(Sound):
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        assert given.clean is not None
        given.clean.images.expand(-1, 1, -1, -1)
        return super().__call__(given, context)


class RefusesColour(Sound):
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        assert given.clean is not None
        if given.clean.images.shape[1] > 1:
            raise UsageError("grey images only: convert them")
        return super().__call__(given, context)


class Forgetful(Sound):
    """Its count is in no checkpoint."""

    count = 0

    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        return Outcome(super().__call__(given, context).model, notes={"epochs": self.count})

    def after(self, epoch: int, figures: dict[str, float]) -> bool:
        self.count += 1
        return False


class OneWay(Sound):
    class Config(PluginConfig):
        share: float = Field(0.5, ge=0, description="share of something")

        @field_validator("share", mode="before")
        @classmethod
        def _percent(cls, value: object) -> float:
            return float(str(value).removesuffix("%")) / 100


class Peeking(Sound):
    """Looks for the training set in the frames of its callers."""

    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        frame, seen = sys._getframe(), 0
        while frame is not None:
            if isinstance(frame.f_locals.get("suspect"), Labelled):
                seen = int(frame.f_locals["suspect"].images.sum())
            frame = frame.f_back
        return Outcome(super().__call__(given, context).model, notes={"seen": seen})


class Snooping(Sound):
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        if context.folder is not None and context.folder.parent.name == "work":
            list(context.folder.parents[1].iterdir())
        return super().__call__(given, context)


class Printing(Sound):
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        print("epoch 1")
        return super().__call__(given, context)


class PrintingBelow(Sound):
    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        os.write(2, b"epoch 1\n")
        return super().__call__(given, context)


class Seeding(Sound):
    draw: ClassVar[Any]

    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        type(self).draw()
        return super().__call__(given, context)


class SeedsTorch(Seeding):
    draw = staticmethod(lambda: torch.manual_seed(0))


class SeedsNumpy(Seeding):
    draw = staticmethod(lambda: np.random.seed(0))  # noqa: NPY002


class SeedsPython(Seeding):
    draw = staticmethod(lambda: random.seed(0))


class Slow(Sound):
    calls = 0

    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        type(self).calls += 1
        time.sleep(2.1 if type(self).calls == 1 else 0)
        return super().__call__(given, context)


class Hungry(Sound):
    calls = 0

    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        type(self).calls += 1
        torch.ones(2**27 if type(self).calls == 1 else 1)  # 0.5 GiB
        return super().__call__(given, context)


def test_a_sound_one_passes_every_check():
    results = check_defense(Sound, seconds=30)
    assert {name for name, status in results.items() if not status.startswith("passed")} <= {"cuda", "inspect"}
    assert set(results) == set(DEFENSE_CHECKS)


@pytest.mark.parametrize(
    ("cls", "checks", "said"),
    [
        (Unbounded, {"contract"}, "share may be anything"),
        (Misnamed, {"contract"}, "cannot be the name of a plugin"),
        (Crashing, {"outcome"}, r"ValueError: no idea \(at .*test_testing_kit.py"),
        (Silent, {"outcome"}, "all of them are missing"),
        (WrongModel, {"outcome"}, "a model of another form"),
        (Refusing, {"outcome"}, "not today"),
        (Altering, {"inputs_unchanged"}, "altered its input `model`"),
        (Undecided, {"inspect"}, "inspect returned none"),
        (Unseeded, {"same_seed"}, "different are note 'x'"),
        (NeedsTwo, {"one_sample"}, "IndexError"),
        (NeedsSix, {"two_classes"}, "IndexError"),
        (NeedsTen, {"thirteen_classes"}, "Class values must be smaller"),
        (NeedsSquares, {"colour_40x24"}, "RuntimeError"),
        (NeedsGrey, {"colour_32x32", "colour_40x24"}, "RuntimeError"),
        (Forgetful, {"resume"}, "different are note 'epochs'"),
        (OneWay, {"config_round_trip"}, "became"),
        (Peeking, {"undeclared_inputs"}, "different are note 'seen'"),
        (Snooping, {"no_files"}, "opened were"),
        (Printing, {"no_prints"}, "begin 'epoch 1'"),
        (PrintingBelow, {"no_prints"}, "begin 'epoch 1'"),
        (SeedsTorch, {"no_global_random"}, "state of torch is"),
        (SeedsNumpy, {"no_global_random"}, "state of numpy.random is"),
        (SeedsPython, {"no_global_random"}, "state of random is"),
        (Slow, {"budget"}, "at most 2 seconds"),
        (Hungry, {"budget"}, "at most 0.25 GiB"),
    ],
)
def test_a_broken_one_fails_its_check_alone(cls: type[Defense], checks: set[str], said: str):
    with pytest.raises(ConformanceError, match=said) as caught:
        check_defense(cls, seconds=2 if cls is Slow else 60, memory_gib=0.25)
    assert found(caught.value) == checks


def test_an_honest_refusal_is_skipped_with_its_reason():
    results = check_defense(RefusesColour)
    assert {name: results[name] for name in ("colour_32x32", "colour_40x24")} == dict.fromkeys(
        ("colour_32x32", "colour_40x24"), "skipped: refused: grey images only: convert them"
    )
    assert results["two_classes"] == "passed"


def test_colour_can_be_what_it_is_shown_first():
    assert check_defense(RefusesColour, check="outcome") == {"outcome": "passed"}
    with pytest.raises(ConformanceError, match="grey images only"):
        check_defense(RefusesColour, check="outcome", shape=(3, 8, 8))


def test_what_python_opens_or_lists_is_seen_while_it_is_watched(tmp_path: Path):
    file, seen = tmp_path / "a", list[Path]()
    file.write_text("before")
    with watched_files(seen):
        file.read_text()
        list(tmp_path.iterdir())
    os.listdir(tmp_path.parent)
    assert [path for path in seen if path.is_relative_to(tmp_path.parent)] == [file, tmp_path]


def test_wrong_settings_and_names_are_told():
    with pytest.raises(ConformanceError, match="correct settings="):
        check_defense(Sound, {"epochs": 1}, check="contract")
    with pytest.raises(UsageError, match="Did you mean no_prints"):
        check_defense(Sound, check="no_print")


@pytest.mark.parametrize(
    ("told", "kit"),
    [(DEFENSE_CHECKS, defenses), (ATTACK_CHECKS, attacks), (DATASET_CHECKS, datasets)],
    ids=["defenses", "attacks", "datasets"],
)
def test_the_listed_checks_are_those_that_run(told: dict[str, str], kit: Any):
    assert set(told) == set(kit.CHECKS)


def test_the_pytest_plugin_imports_nothing_heavy():
    program = (
        "import sys, pytest, bdcore.testing.fixtures; print({'torch', 'numpy', 'pydantic', 'sklearn'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "set()\n"
