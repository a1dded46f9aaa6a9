"""The checks of an attack. Each takes an `Attacking` and raises what it finds; what it returns is a remark."""

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdcore.artifacts import Dataset, Labelled, Poisoned, Triggered, fingerprint
from bdcore.context import Context, Progress
from bdcore.contract import Attack, AttackInput
from bdcore.stages.poison import poison, prepare
from bdcore.testing.conduct import (
    Budget,
    Conduct,
    check_budget,
    check_no_global_random,
    check_no_prints,
    honest_refusals,
    observed,
    reason,
    stir_global_random,
)
from bdcore.testing.findings import NotApplicable, broken
from bdcore.testing.installed import check_config_round_trip, check_contract, config_of
from bdcore.testing.resuming import Interrupted, interrupted_after, often_saved
from bdcore.testing.worlds import FORMS, MODEL, Form, arch_of, digits, surrogate
from bdcore.training import Recipe

_SEED = 3
_RECIPE = Recipe(epochs=2, batch_size=64)

_ROUNDING = 1
"""Levels of 255 by which a network's trigger may differ between batch sizes and memory layouts."""


@dataclass(frozen=True)
class Made:
    """What an attack made of a world: itself, prepared; the victim if it trains that; the poisoned data."""

    attack: Attack
    victim: nn.Module | None
    poisoned: Poisoned
    altered: tuple[str, ...]


@dataclass
class Attacking:
    """An attack under test: the class, the settings that its author gives, and the images that it is shown first."""

    cls: type[Attack]
    settings: Mapping[str, Any]
    form: Form
    trigger_varies: bool
    budget: Budget
    epochs: list[Progress] = field(default_factory=list[Progress], init=False, compare=False)

    def made(self, form: Form | None = None, context: Context | None = None) -> Made:
        """Prepare a new instance and poison with it, as the host does, on copies of a world."""
        form, context = form or self.form, context or Context(seed=_SEED)
        attack = self.cls(config_of(self.cls, self.settings))
        dataset = _own(digits(form, 0))
        model = copy.deepcopy(surrogate(form).model).to(context.device) if self.cls.surrogate else None
        given = AttackInput(dataset.train, dataset.classes, arch_of(dataset.train, form), _RECIPE, model)
        before = _prints(dataset, model)
        victim = prepare(dataset, attack, given, context)
        poisoned = poison(dataset, attack, context)
        after = _prints(dataset, model)
        return Made(attack, victim, poisoned, tuple(name for name in before if before[name] != after[name]))

    @cached_property
    def first(self) -> tuple[Made | None, Conduct]:
        """Preparing and poisoning the first world, watched."""
        made: list[Made] = []
        context = Context(seed=_SEED, report=self.epochs.append)
        digits(self.form, 0)  # what the kit itself does is not the attack's
        if self.cls.surrogate:
            surrogate(self.form)
        seen = observed(lambda: made.append(self.made(context=context)))
        return (made[0] if made else None), seen

    @cached_property
    def unsteady(self) -> list[str]:
        """What differs between two runs with one seed, the random state of the process being another."""
        made = self.worked()
        stir_global_random()
        return _differences(made, self.made())

    def steady(self) -> Made:
        """As `first`, where another run ends alike; else nothing can be learnt from comparing."""
        if self.unsteady:
            raise NotApplicable("the same seed does not give the same result: see the check `same_seed`")
        return self.worked()

    def worked(self) -> Made:
        """As `first`, where it ended well; else there is nothing to look at."""
        made, _ = self.first
        if made is None:
            raise NotApplicable("it does not work on the first world: see the check `poisons`")
        return made


def check_poisons(tested: Attacking) -> str:
    """It prepares and poisons within its contract, and what it does can be seen."""
    made, seen = tested.first
    if made is None:
        assert seen.error is not None
        raise broken(
            f"poisons on the kit's first world ({tested.form}, model {MODEL})",
            reason(seen.error, tested.cls),
            "mend it; where it refuses for a good reason, choose settings or shape with which it works: "
            "every other check builds on this one.",
        ) from seen.error
    train, poisoned = digits(tested.form, 0).train, made.poisoned
    changed = (poisoned.train.images != train.images).flatten(1).any(1)
    unseen = int((poisoned.poisoned & ~changed).sum())
    total = int(poisoned.poisoned.sum())
    if unseen == total:
        raise broken(
            "images that carry the trigger differ from those without",
            f"all {total} poisoned images are as they were",
            "look at what stamp returns; values are uint8 from 0 to 255, not fractions of 1.",
        )
    return f"{total} poisons, {unseen} of them without a change"


def check_inputs_unchanged(tested: Attacking) -> None:
    """Images, labels and the surrogate come back as they were."""
    made = tested.worked()
    data, context = _own(digits(tested.form, 0)).train, Context(seed=_SEED)
    attack, classes = made.attack, tested.form.classes
    altered = [f"{name} (in prepare)" for name in made.altered]
    calls: dict[str, Callable[[], object]] = {
        "stamp": lambda: attack.stamp(data.images, context),
        "poison": lambda: attack.poison(data.images, data.labels, context),
        "relabel": lambda: attack.relabel(data.labels, classes),
        "eligible": lambda: attack.eligible(data.labels, classes),
        "count": lambda: attack.count(data.labels, classes),
        "triggered": lambda: attack.triggered(data, classes, context),
    }
    with honest_refusals(tested.cls):
        for method, call in calls.items():
            before = data.images.clone(), data.labels.clone()
            call()
            for name, was, now in zip(("images", "labels"), before, (data.images, data.labels), strict=True):
                if not torch.equal(was, now):
                    altered.append(f"{name} (in {method})")
                    now.copy_(was)
    if altered:
        raise broken(
            "what is handed over is only read",
            f"altered were {', '.join(altered)}",
            "begin with images.clone() or compute a new tensor; train copies of models.",
        )


def check_stamp(tested: Attacking) -> None:
    """The form of what stamp returns; the same for every memory layout."""
    attack = tested.worked().attack
    images = digits(tested.form, 0).test.images[:6].clone()
    layouts = {
        "rows in order": images,
        "channels-last": images.contiguous(memory_format=torch.channels_last),
        "columns before rows": images.transpose(2, 3).contiguous().transpose(2, 3),
    }
    with honest_refusals(tested.cls):
        results = {name: attack.stamp(given.clone(), Context(seed=_SEED)) for name, given in layouts.items()}
    first = results["rows in order"]
    for layout, result in results.items():
        if (result.dtype, result.shape, result.device) != (images.dtype, images.shape, images.device):
            raise broken(
                f"{images.dtype} {list(images.shape)} on {images.device}, as the images that stamp was given",
                f"{result.dtype} {list(result.shape)} on {result.device} (images given {layout})",
                "end with .round().clamp(0, 255).to(torch.uint8), and .to(images.device) where a network computed it.",
            )
        if not _alike(first, result):
            raise broken(
                "the same trigger whatever the images' memory layout",
                f"images given {layout} are stamped otherwise",
                "use shapes and indices, not strides: .reshape for .view, no .data_ptr or as_strided.",
            )


def check_batch_of_one(tested: Attacking) -> None:
    """An image alone gets the same trigger as in a batch."""
    attack = tested.worked().attack
    images = digits(tested.form, 0).test.images[:5].clone()
    with honest_refusals(tested.cls):
        together = attack.stamp(images.clone(), Context(seed=_SEED))
        alone = torch.cat([attack.stamp(image.clone(), Context(seed=_SEED)) for image in images.split(1)])
    if alone.shape != together.shape:
        raise broken(
            f"uint8 {list(images[:1].shape)} for a batch of one image",
            f"five of them are {list(alone.shape)} together",
            "do not squeeze(): a batch of one keeps its first dimension.",
        )
    if not tested.trigger_varies and not _alike(together, alone):
        raise broken(
            "an image alone gets the same trigger as in a batch",
            f"they differ by up to {int((together.int() - alone.int()).abs().max())} of 255",
            "let the trigger depend on the seed and the image alone: no statistics over the batch, networks in eval "
            "mode. Where it is drawn for each image of a batch on purpose, say trigger_varies=True.",
        )


def check_same_seed(tested: Attacking) -> None:
    """The same seed gives the same poisons, whatever the random state of the process."""
    with honest_refusals(tested.cls):
        found = tested.unsteady
    if found:
        raise broken(
            "prepared and poisoned twice with the same seed, it ends with the same bytes",
            f"different are {', '.join(found)}",
            "draw every random number from context.generator('a name'), a new one in every call; look for torch.rand, "
            "numpy.random, and attributes that change from call to call.",
        )


def check_relabel(tested: Attacking) -> None:
    """relabel gives each label by itself a class of the data set."""
    attack, classes = tested.worked().attack, tested.form.classes
    labels = torch.arange(classes).repeat(2)
    with honest_refusals(tested.cls):
        wanted = attack.relabel(labels, classes)
        alone = torch.cat([attack.relabel(label, classes) for label in labels.split(1)])
    if not torch.equal(wanted, alone):
        raise broken(
            "a label's new class follows from that label and the options alone",
            f"{labels.tolist()} become {wanted.tolist()} together, {alone.tolist()} one by one",
            "compute it element by element, for instance torch.full_like(labels, self.config.target).",
        )
    if wanted.dtype != torch.int64 or not bool(((wanted >= 0) & (wanted < classes)).all()):
        raise broken(
            f"int64 from 0 to {classes - 1}",
            f"{wanted.dtype} {wanted.tolist()}",
            "take self.config.target as it is: the host refuses one that is no class of the data set.",
        )


def check_triggered(tested: Attacking) -> None:
    """The triggered test set has true labels, and the classes that relabel wants."""
    made, test = tested.worked(), digits(tested.form, 0).test
    shown = made.poisoned.triggered
    assert shown is not None
    advice = "return Triggered(images, labels, targets, source) in one order; leave out what is of its target already."
    wanted = made.attack.relabel(shown.labels, tested.form.classes)
    if not torch.equal(wanted, shown.targets):
        raise broken("targets are what relabel wants of the true labels", "they are others", advice)
    if bool((shown.targets == shown.labels).any()):
        count = int((shown.targets == shown.labels).sum())
        raise broken(
            "only images whose true class is not the target's count as successes",
            f"{count} of {len(shown.labels)} triggered images are of their target class already",
            advice,
        )
    if shown.source is not None and not torch.equal(test.labels[shown.source], shown.labels):
        raise broken("labels[i] is the class of the test image source[i]", "they do not fit", advice)


def check_form(form: Form) -> Callable[[Attacking], None]:
    """A check that it works on such images, or refuses."""

    def check(tested: Attacking) -> None:
        tested.worked()
        with honest_refusals(tested.cls):
            tested.made(form)

    return check


def check_cuda(tested: Attacking) -> None:
    """It prepares and poisons on a GPU in bf16, or refuses."""
    if not torch.cuda.is_available():
        raise NotApplicable("no GPU")
    tested.worked()
    with honest_refusals(tested.cls):
        tested.made(context=Context(device=torch.device("cuda"), precision="bf16", seed=_SEED))


def check_resume(tested: Attacking) -> None:
    """Interrupted after an epoch of prepare and run again, it ends with the bytes of one that was not interrupted."""
    made = tested.steady()
    epochs = len(tested.epochs)
    if not epochs:
        raise NotApplicable("it trains nothing through fit, so there is nothing to resume")
    with tempfile.TemporaryDirectory() as folder, often_saved(), honest_refusals(tested.cls):
        stop = interrupted_after(epochs // 2 + 1)
        try:
            tested.made(context=Context(seed=_SEED, folder=Path(folder), report=stop))
        except Interrupted:
            again = tested.made(context=Context(seed=_SEED, folder=Path(folder)))
        else:
            raise broken(
                "an interruption (^C in the report of an epoch) ends prepare",
                "it went on",
                "catch Exception at most, never BaseException or KeyboardInterrupt.",
            )
        found = _differences(made, again)
    if found:
        raise broken(
            f"interrupted after epoch {epochs // 2 + 1} of {epochs} and run again, it ends with the same bytes",
            f"different are {', '.join(found)}",
            "keep all state that lives through epochs in parameters and buffers of the module that fit is given; "
            "plain attributes and lists are not in its checkpoints. Give every phase of fit its own name.",
        )


CHECKS: dict[str, Callable[[Attacking], str | None]] = {
    "contract": lambda tested: check_contract(tested.cls, "attack", tested.settings),
    "poisons": check_poisons,
    "inputs_unchanged": check_inputs_unchanged,
    "stamp": check_stamp,
    "batch_of_one": check_batch_of_one,
    "same_seed": check_same_seed,
    "relabel": check_relabel,
    "triggered": check_triggered,
    **{name: check_form(form) for name, form in FORMS.items()},
    "cuda": check_cuda,
    "resume": check_resume,
    "config_round_trip": lambda tested: check_config_round_trip(
        tested.cls, "attack", config_of(tested.cls, tested.settings)
    ),
    "no_prints": lambda tested: check_no_prints(tested.first[1]),
    "no_global_random": lambda tested: check_no_global_random(tested.first[1]),
    "budget": lambda tested: check_budget(tested.first[1], tested.budget),
}
"""By name, in the order in which they are best read."""


def _own(data: Dataset) -> Dataset:
    train, test = (Labelled(part.images.clone(), part.labels.clone()) for part in (data.train, data.test))
    return Dataset(data.name, train, test, data.classes)


def _prints(dataset: Dataset, model: nn.Module | None) -> dict[str, str]:
    parts = {
        "training images": {"": dataset.train.images},
        "training labels": {"": dataset.train.labels},
        "test images": {"": dataset.test.images},
        "test labels": {"": dataset.test.labels},
        "the surrogate": dict(model.state_dict()) if model is not None else {},
    }
    return {name: fingerprint(tensors) for name, tensors in parts.items()}


def _differences(one: Made, other: Made) -> list[str]:
    """What differs between two attacks on the same world, in bits."""

    def parts(made: Made) -> dict[str, str]:
        shown: Triggered | None = made.poisoned.triggered
        victim = made.victim.state_dict() if made.victim is not None else {}
        return {
            "the choice of the samples": fingerprint({"": made.poisoned.poisoned}),
            "the poisoned training set": made.poisoned.fingerprint,
            "the triggered test set": fingerprint(shown.tensors() if shown is not None else {}),
            "the victim": fingerprint(victim),
        }

    ours, theirs = parts(one), parts(other)
    return [name for name in ours if ours[name] != theirs[name]]


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and int((one.int() - other.int()).abs().max()) <= _ROUNDING
