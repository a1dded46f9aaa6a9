"""The conformance kit: does a plugin keep what its contract promises?

With pytest, where bdcore is installed, one line gives one named test a check:

    from bdcore_mine import Mine

    def test_conformance(defense_check):
        defense_check(Mine, settings={"epochs": 1})

`attack_check` and `dataset_check` are the same for attacks and data sets; `pytest -k no_prints` runs one check alone.
A check that fails says what was expected, what happened, and what to do. One that does not apply, as that on a GPU
where there is none, is skipped with its reason. So is one on images that the plugin refuses with a DefenseError, a
UsageError or a DataError: an honest refusal is no fault.

`check_defense`, `check_attack` and `check_dataset` do the same without pytest. Plugins are shown scikit-learn's digits,
first 400 of 1 x 8 x 8 in 10 classes with the model wrn10_1; defenses meet a model that BadNets has backdoored towards
class 0. Give settings that make the plugin quick, and with which it works there.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from bdcore.testing.findings import ConformanceError, NotApplicable

if TYPE_CHECKING:
    from bdcore.contract import Attack, DatasetPlugin, Defense

__all__ = [
    "ATTACK_CHECKS",
    "DATASET_CHECKS",
    "DEFENSE_CHECKS",
    "ConformanceError",
    "check_attack",
    "check_dataset",
    "check_defense",
]

_EVERY = {
    "contract": "the class is declared as the host wants it; options have defaults, descriptions and bounds",
    "config_round_trip": "options come back the same from JSON, and from a run's record",
    "no_prints": "nothing is written to stdout or stderr",
    "no_global_random": "the random generators of the process are left as they were",
    "budget": "time and memory stay below what the author allows",
}

_FORMS = {
    "two_classes": "it works with 2 classes, or refuses",
    "thirteen_classes": "it works with 13 classes, or refuses",
    "colour_32x32": "it works with images of 3 x 32 x 32, or refuses",
    "colour_40x24": "it works with images of 3 x 40 x 24, or refuses",
    "cuda": "it works on a GPU, where there is one",
}

DEFENSE_CHECKS: Mapping[str, str] = {
    **_EVERY,
    **_FORMS,
    "outcome": "it works, and returns a well-formed Outcome that says something",
    "inputs_unchanged": "model, clean and suspect samples come back as they were",
    "inspect": "an `inspect` of its own returns a verdict",
    "same_seed": "the same seed gives the same bytes, whatever the random state of the process",
    "one_sample": "it works with a single clean and a single suspect sample, or refuses",
    "resume": "interrupted after an epoch and run again, it ends with the same bytes",
    "undeclared_inputs": "what it did not declare in `needs` changes nothing",
    "no_files": "in a real run it opens no file but its own checkpoints",
}
"""The checks of a defense by name, and what each is about."""

ATTACK_CHECKS: Mapping[str, str] = {
    **_EVERY,
    **_FORMS,
    "poisons": "it prepares and poisons: as many samples as it counts, visibly, and no other one",
    "inputs_unchanged": "images, labels and the surrogate come back as they were",
    "stamp": "stamp keeps dtype, shape and device, whatever the memory layout",
    "batch_of_one": "an image alone gets the same trigger as in a batch",
    "same_seed": "the same seed gives the same poisons, whatever the random state of the process",
    "relabel": "relabel gives each label by itself a class of the data set",
    "triggered": "the triggered test set has the true labels, and the classes that relabel wants",
    "resume": "interrupted after an epoch of prepare and run again, it ends with the same bytes",
}
"""The checks of an attack by name, and what each is about."""

DATASET_CHECKS: Mapping[str, str] = {
    **_EVERY,
    "form": "both parts hold uint8 images of one shape, over the whole range of brightness",
    "classes": "labels run from 0 to classes - 1, each is in the training set, and none is in the test set alone",
    "no_overlap": "no test image is among the training images",
    "deterministic": "loaded twice, it is the same to the byte, whatever the random state of the process",
    "argument_errors": "an argument that it cannot use is a DataError",
    "train_defaults": "train_defaults are options of training",
}
"""The checks of a data set by name, and what each is about."""

Tested = TypeVar("Tested")


def check_defense(
    cls: "type[Defense]",
    settings: Mapping[str, Any] | None = None,
    *,
    check: str | None = None,
    shape: tuple[int, int, int] = (1, 8, 8),
    seconds: float = 60.0,
    memory_gib: float = 2.0,
) -> dict[str, str]:
    """Check a defense, a dozen short runs of it.

    Args:
        cls: the class.
        settings: its options for the checks, as quick as can be: they run it on a few hundred small images. A target
            class that has to be told is 0.
        check: the name of one of `DEFENSE_CHECKS`; None for all of them.
        shape: channels, height and width of the images that it is shown first.
        seconds, memory_gib: what one run may take at most, beyond the memory in use before.

    Returns:
        "passed" or "skipped", with a remark, by check.

    Raises:
        ConformanceError: naming every check that fails.
    """
    from bdcore.testing.conduct import Budget
    from bdcore.testing.defenses import CHECKS, Defended
    from bdcore.testing.worlds import Form

    tested = Defended(cls, dict(settings or {}), Form(shape), Budget(seconds, memory_gib))
    return _run("defense", cls, CHECKS, tested, check)


def check_attack(
    cls: "type[Attack]",
    settings: Mapping[str, Any] | None = None,
    *,
    check: str | None = None,
    shape: tuple[int, int, int] = (1, 8, 8),
    trigger_varies: bool = False,
    seconds: float = 60.0,
    memory_gib: float = 2.0,
) -> dict[str, str]:
    """Check an attack. An attack that trains the victim does it in two epochs.

    Args:
        cls: the class.
        settings: its options for the checks; a clean-label attack on 400 images in 10 classes can poison at most 40, a
            poison rate of 0.1.
        check: the name of one of `ATTACK_CHECKS`; None for all of them.
        shape: channels, height and width of the images that it is shown first.
        trigger_varies: the trigger is drawn for each image of a batch, so that an image alone gets another one.
        seconds, memory_gib: what preparing and poisoning may take at most, beyond the memory in use before.

    Returns:
        "passed" or "skipped", with a remark, by check.

    Raises:
        ConformanceError: naming every check that fails.
    """
    from bdcore.testing.attacks import CHECKS, Attacking
    from bdcore.testing.conduct import Budget
    from bdcore.testing.worlds import Form

    tested = Attacking(cls, dict(settings or {}), Form(shape), trigger_varies, Budget(seconds, memory_gib))
    return _run("attack", cls, CHECKS, tested, check)


def check_dataset(
    cls: "type[DatasetPlugin]",
    settings: Mapping[str, Any] | None = None,
    *,
    check: str | None = None,
    argument: str | None = None,
    overlap: float = 0.0,
    seconds: float = 60.0,
    memory_gib: float = 2.0,
) -> dict[str, str]:
    """Check a data set.

    Args:
        cls: the class.
        settings: its options for the checks.
        check: the name of one of `DATASET_CHECKS`; None for all of them.
        argument: what stands after the colon in `--dataset NAME:ARGUMENT`; None where it takes none.
        overlap: share of the test images that may be training images too, to the byte, in [0, 1].
        seconds, memory_gib: what loading may take at most, beyond the memory in use before.

    Returns:
        "passed" or "skipped", with a remark, by check.

    Raises:
        ConformanceError: naming every check that fails.
    """
    from bdcore.testing.conduct import Budget
    from bdcore.testing.datasets import CHECKS, Loading

    tested = Loading(cls, dict(settings or {}), argument, overlap, Budget(seconds, memory_gib))
    return _run("dataset", cls, CHECKS, tested, check)


_LATEST: dict[str, Any] = {}
"""What was tested last, by kind, so that checks made one by one share the runs that they look at."""


def _run(
    kind: str, cls: type, checks: Mapping[str, Callable[[Tested], str | None]], tested: Tested, only: str | None
) -> dict[str, str]:
    """Run the checks, or one of them, on what is tested."""
    if only is not None and only not in checks:
        from bdcore.errors import UsageError, unknown_name

        raise UsageError(unknown_name("check", only, checks))
    if _LATEST.setdefault(kind, tested) != tested:
        _LATEST[kind] = tested
    tested = _LATEST[kind]
    results: dict[str, str] = {}
    failures: list[str] = []
    for name in checks if only is None else [only]:
        try:
            if name != "contract":
                _contract_first(checks["contract"], tested)
            remark = checks[name](tested)
            results[name] = f"passed: {remark}" if remark else "passed"
        except NotApplicable as reason:
            results[name] = f"skipped: {reason}"
        except ConformanceError as finding:
            failures.append(f"{kind} {getattr(cls, 'name', cls.__name__)!r} fails the check `{name}`\n{finding}")
    if failures:
        raise ConformanceError("\n\n".join(failures))
    return results


def _contract_first(contract: Callable[[Tested], str | None], tested: Tested) -> None:
    try:
        contract(tested)
    except ConformanceError as finding:
        raise NotApplicable("it is not declared as it should be: see the check `contract`") from finding
