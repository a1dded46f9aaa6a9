"""The checks of a defense. Each takes a `Defended` and raises what it finds; what it returns is a remark."""

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdcore.artifacts import Dataset, DefenseInput, Labelled, Outcome, Victim
from bdcore.config import Chosen, resolve
from bdcore.context import Context, Progress
from bdcore.contract import Defense, PluginConfig
from bdcore.errors import BdcoreError, PluginError, ThreatModelError
from bdcore.models import build, metered
from bdcore.pipeline import run
from bdcore.stages.defend import defend
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
from bdcore.testing.installed import HostWith, check_config_round_trip, check_contract, config_of, watched_files
from bdcore.testing.resuming import Interrupted, interrupted_after, often_saved, temporary_cache
from bdcore.testing.worlds import FORMS, MODEL, Form, World, world

_SEED = 3


@dataclass
class Defended:
    """A defense under test: the class, the settings that its author gives, and the images that it is shown first."""

    cls: type[Defense]
    settings: Mapping[str, Any]
    form: Form
    budget: Budget
    epochs: list[Progress] = field(default_factory=list[Progress], init=False, compare=False)

    @property
    def config(self) -> PluginConfig:
        """The author's settings as options."""
        return config_of(self.cls, self.settings)

    def outcome(self, given: DefenseInput, context: Context) -> Outcome:
        """What a new instance returns, unchecked."""
        with metered(context.meter):
            return self.cls(self.config)(given, context)

    def plain(self, context: Context | None = None) -> Outcome:
        """What it returns on copies of the first world."""
        one = world(self.form)
        return self.outcome(given(self.cls, one), context or Context(seed=_SEED))

    @cached_property
    def first(self) -> tuple[Outcome | None, Conduct]:
        """One run on the first world, watched."""
        outcomes: list[Outcome] = []
        context = Context(seed=_SEED, report=self.epochs.append)
        world(self.form)  # what the kit itself does is not the defense's
        seen = observed(lambda: outcomes.append(self.plain(context)))
        return (outcomes[0] if outcomes else None), seen

    @cached_property
    def refusal(self) -> BdcoreError | None:
        """What the host says against one run on the first world, if anything."""
        one = world(self.form)
        try:
            defend(self.cls(self.config), one.victim, one.clean, one.poisoned.train, Context(seed=_SEED))
        except (PluginError, ThreatModelError) as error:
            return error
        except Exception:
            return None  # `first` has met it as well, or it fails at times only, which `same_seed` is about
        return None

    @cached_property
    def unsteady(self) -> list[str]:
        """What differs between two runs with one seed, the random state of the process being another."""
        outcome, _ = self.worked()
        stir_global_random()
        return differences(outcome, self.plain())

    def steady(self) -> Outcome:
        """As `first`, where another run ends alike; else nothing can be learnt from comparing."""
        if self.unsteady:
            raise NotApplicable("the same seed does not give the same result: see the check `same_seed`")
        return self.worked()[0]

    def worked(self) -> tuple[Outcome, Conduct]:
        """As `first`, where it ended well; else there is nothing to compare with."""
        outcome, seen = self.first
        if seen.error is not None or outcome is None or isinstance(self.refusal, PluginError):
            raise NotApplicable("it does not work on the first world: see the check `outcome`")
        return outcome, seen


def given(cls: type[Defense], one: World) -> DefenseInput:
    """What the host would hand over of a world: what is declared, as copies."""
    arch = one.victim.arch
    return DefenseInput(
        classes=arch.classes,
        model=copy.deepcopy(one.victim.model) if "model" in cls.needs else None,
        clean=_own(one.clean) if "clean" in cls.needs else None,
        suspect=_own(one.poisoned.train) if "suspect" in cls.needs else None,
        arch=arch if "arch" in cls.needs else None,
    )


def tensors(outcome: Outcome) -> dict[str, Tensor]:
    """Every tensor of an outcome, by name."""
    found = dict(outcome.model.state_dict()) if outcome.model is not None else {}
    for number, trigger in enumerate(outcome.triggers):
        found |= {f"trigger{number}.{name}": value for name, value in trigger.tensors().items()}
    if outcome.suspects is not None:
        found["suspects.index"] = outcome.suspects.index
        if outcome.suspects.scores is not None:
            found["suspects.scores"] = outcome.suspects.scores
    return found


def differences(one: Outcome, other: Outcome) -> list[str]:
    """What differs between two outcomes, in bits; notes of times are left out."""
    ours, theirs = tensors(one), tensors(other)
    found = sorted(ours.keys() ^ theirs.keys())
    found += [name for name in ours.keys() & theirs.keys() if not _same(ours[name], theirs[name])]
    if one.verdict != other.verdict:
        found.append("verdict")
    keys = {key for key in (*one.notes, *other.notes) if not key.endswith("seconds")}
    found += sorted(f"note {key!r}" for key in keys if one.notes.get(key) != other.notes.get(key))
    return found


def check_outcome(tested: Defended) -> None:
    """It works on the first world and returns a well-formed Outcome that says something."""
    outcome, seen = tested.first
    shown = f"on the kit's first world ({tested.form}, model {MODEL}, backdoored towards class 0)"
    if seen.error is not None:
        raise broken(
            f"an Outcome {shown}",
            reason(seen.error, tested.cls),
            "mend it; where it refuses for a good reason, choose settings or shape with which it works: "
            "every other check builds on this one.",
        ) from seen.error
    if isinstance(tested.refusal, PluginError):
        advice = "see the end of the line above."
        raise broken("an Outcome that the host accepts", str(tested.refusal), advice) from tested.refusal
    assert outcome is not None
    if not tensors(outcome) and outcome.verdict is None:
        raise broken(
            "an Outcome that holds a model, a verdict, triggers or suspects",
            "all of them are missing",
            "return what the defense found; raise DefenseError where it has no honest answer.",
        )


def check_inputs_unchanged(tested: Defended) -> None:
    """Model, clean and suspect samples come back as they were, and the model returned is not the one handed over."""
    tested.worked()
    if isinstance(tested.refusal, ThreatModelError):
        raise broken(
            "what is handed over is only read",
            str(tested.refusal),
            "train copy.deepcopy(given.model), change clones; take gradients through frozen_copy(given.model).",
        ) from tested.refusal


def check_inspect(tested: Defended) -> None:
    """Where a defense has an `inspect` of its own, it returns a verdict."""
    if tested.cls.inspect is Defense.inspect:
        raise NotApplicable("it has no `inspect` of its own")
    if tested.cls(tested.config).oracles():
        raise NotApplicable("the settings tell it what there is to find")
    tested.worked()
    one = world(tested.form)
    with honest_refusals(tested.cls):
        outcome = tested.cls(tested.config).inspect(given(tested.cls, one), Context(seed=_SEED))
        if outcome.verdict is None:
            raise broken("an Outcome with a verdict", "inspect returned none", "return Outcome(verdict=Verdict(...)).")


def check_same_seed(tested: Defended) -> None:
    """The same seed gives the same bytes, whatever the random state of the process."""
    with honest_refusals(tested.cls):
        found = tested.unsteady
    if found:
        raise broken(
            "two runs with the same seed end with the same bytes",
            f"different are {_some(found)}",
            "draw every random number from context.generator('a name'); look for torch.rand, numpy.random, set() order "
            "and times. Where a time is a note, let its name end with 'seconds'.",
        )


def check_one_sample(tested: Defended) -> None:
    """It works with a single clean and a single suspect sample, or refuses."""
    one = world(tested.form)
    first = torch.arange(1)
    with honest_refusals(tested.cls):
        _defend(tested, one.victim, one.clean.select(first), one.poisoned.train.select(first))


def check_form(form: Form) -> Callable[[Defended], None]:
    """A check that it works on such images, or refuses."""

    def check(tested: Defended) -> None:
        one = world(form)
        with honest_refusals(tested.cls):
            _defend(tested, one.victim, one.clean, one.poisoned.train)

    return check


def check_cuda(tested: Defended) -> None:
    """It works on a GPU in bf16, or refuses."""
    if not torch.cuda.is_available():
        raise NotApplicable("no GPU")
    one = world(tested.form)
    context = Context(device=torch.device("cuda"), precision="bf16", seed=_SEED)
    with honest_refusals(tested.cls):
        _defend(tested, one.victim, one.clean, one.poisoned.train, context)


def check_resume(tested: Defended) -> None:
    """Interrupted after an epoch and run again, it ends with the bytes of a run that was not interrupted."""
    outcome = tested.steady()
    epochs = len(tested.epochs)
    if not epochs:
        raise NotApplicable("it trains nothing through fit, so there is nothing to resume")
    with tempfile.TemporaryDirectory() as folder, often_saved(), honest_refusals(tested.cls):
        stop = interrupted_after(epochs // 2 + 1)
        try:
            tested.plain(Context(seed=_SEED, folder=Path(folder), report=stop))
        except Interrupted:
            again = tested.plain(Context(seed=_SEED, folder=Path(folder)))
        else:
            raise broken(
                "an interruption (^C in the report of an epoch) ends the defense",
                "it went on",
                "catch Exception at most, never BaseException or KeyboardInterrupt.",
            )
        found = differences(outcome, again)
    if found:
        raise broken(
            f"interrupted after epoch {epochs // 2 + 1} of {epochs} and run again, it ends with the same bytes",
            f"different are {_some(found)}",
            "keep all state that lives through epochs in parameters and buffers of the module that fit is given; "
            "plain attributes and lists are not in its checkpoints. Give every phase of fit its own name.",
        )


def check_undeclared(tested: Defended) -> None:
    """What it did not declare changes nothing."""
    undeclared = [need for need in ("model", "clean", "suspect") if need not in tested.cls.needs]
    if not undeclared:
        raise NotApplicable("it declares model, clean and suspect")
    outcome = tested.steady()
    one, other = world(tested.form), world(tested.form, seed=1, target=1)
    parts = {need: other if need in undeclared else one for need in ("clean", "suspect")}
    model = build(one.victim.arch, 99).eval() if "model" in undeclared else one.victim.model
    with honest_refusals(tested.cls):
        again = _defend(tested, Victim(model, one.victim.arch), parts["clean"].clean, parts["suspect"].poisoned.train)
    found = differences(outcome, again)
    if found:
        raise broken(
            f"another {' and '.join(undeclared)}, which it does not declare in `needs`, changes nothing",
            f"different are {_some(found)}",
            "use `given` and `context` alone, and declare in `needs` what the method is allowed to know.",
        )


def check_no_files(tested: Defended) -> None:
    """In a real run it opens no file of the run but those in its own checkpoint folder. What
    compiled code opens is not seen."""
    tested.worked()
    seen: list[Path] = []
    folders: list[Path] = []

    def call(self: Defense, handed: DefenseInput, context: Context) -> Outcome:
        folders.extend([context.folder] if context.folder else [])
        with watched_files(seen):
            return tested.cls.__call__(self, handed, context)

    watched = type(tested.cls.__name__, (tested.cls,), {"__call__": call, "__module__": tested.cls.__module__})
    with tempfile.TemporaryDirectory() as folder, temporary_cache(Path(folder) / "cache"):
        root = Path(folder).resolve()
        host = HostWith(watched, "defense")
        settings = ["train.epochs=2", "run.clean_fraction=0.1"]
        config = resolve(
            host, plugins=["badnets", tested.cls.name], model=MODEL, device="cpu", precision="fp32",
            dataset=f"npz:{_saved(world(tested.form).dataset, root / 'data.npz')}", settings=settings, out=root / "out",
        )  # fmt: skip
        chosen = Chosen(config.defenses[0].plugin, tested.config)
        try:
            run(replace(config, defenses=(chosen,)), host)
        except BdcoreError as error:
            if not folders:  # else the defense has failed, which other checks tell; what it opened is seen all the same
                raise NotApplicable(f"the run ended before the defense: {error}") from error
        foreign = [path for path in seen if path.is_relative_to(root)]
        foreign = [path for path in foreign if not any(path.is_relative_to(own.absolute()) for own in folders)]
    if foreign:
        raise broken(
            "no file of the run is opened while the defense works, but for checkpoints in context.folder",
            f"opened were {_some([str(path.relative_to(root)) for path in foreign])}",
            "use `given` and `context` alone: what else lies there is the attacker's secret.",
        )


def _defend(
    tested: Defended, victim: Victim, clean: Labelled, suspect: Labelled, context: Context | None = None
) -> Outcome:
    """As the host calls it. That it does not work at all, or alters its input, are findings of other checks."""
    tested.worked()
    try:
        return defend(tested.cls(tested.config), victim, clean, suspect, context or Context(seed=_SEED))
    except ThreatModelError as error:
        raise NotApplicable("it breaks the threat model: see the check `inputs_unchanged`") from error


def _saved(data: Dataset, path: Path) -> Path:
    """`data` as the data set npz reads it."""
    train, test = data.train, data.test
    np.savez(
        path,
        x_train=train.images.numpy(),
        y_train=train.labels.numpy(),
        x_test=test.images.numpy(),
        y_test=test.labels.numpy(),
    )
    return path


def _own(data: Labelled) -> Labelled:
    return Labelled(data.images.clone(), data.labels.clone())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


CHECKS: dict[str, Callable[[Defended], str | None]] = {
    "contract": lambda tested: check_contract(tested.cls, "defense", tested.settings),
    "outcome": check_outcome,
    "inputs_unchanged": check_inputs_unchanged,
    "inspect": check_inspect,
    "same_seed": check_same_seed,
    "one_sample": check_one_sample,
    **{name: check_form(form) for name, form in FORMS.items()},
    "cuda": check_cuda,
    "resume": check_resume,
    "config_round_trip": lambda tested: check_config_round_trip(tested.cls, "defense", tested.config),
    "undeclared_inputs": check_undeclared,
    "no_files": check_no_files,
    "no_prints": lambda tested: check_no_prints(tested.first[1]),
    "no_global_random": lambda tested: check_no_global_random(tested.first[1]),
    "budget": lambda tested: check_budget(tested.worked()[1], tested.budget),
}
"""By name, in the order in which they are best read."""
