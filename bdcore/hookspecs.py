"""The contract with plugins. Adding a hook or an argument is a minor version, removing one a major."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from bdcore.context import Progress
    from bdcore.contract import Attack, DatasetPlugin, Defense, Observer

hookspec = pluggy.HookspecMarker("bdcore")
hookimpl = pluggy.HookimplMarker("bdcore")


@hookspec
def bdcore_dataset() -> "type[DatasetPlugin]":
    """Return the data-set class that the entry point's name selects."""
    raise AssertionError("a specification, never called")


@hookspec
def bdcore_attack() -> "type[Attack]":
    """Return the attack class that the entry point's name selects."""
    raise AssertionError("a specification, never called")


@hookspec
def bdcore_defense() -> "type[Defense]":
    """Return the defense class that the entry point's name selects."""
    raise AssertionError("a specification, never called")


@hookspec
def bdcore_observer() -> "type[Observer]":
    """Return the observer class that the entry point's name selects."""
    raise AssertionError("a specification, never called")


@hookspec
def bdcore_run_started(config: Mapping[str, Any], run_id: str, folder: Path) -> None:
    """Observe that a run begins, with its resolved configuration, its name, and the folder it will be written to."""


@hookspec
def bdcore_epoch_finished(stage: str, progress: "Progress") -> None:
    """Observe a finished epoch of `stage` ("surrogate", "poison", "train" or "defend NAME")."""


@hookspec
def bdcore_stage_finished(stage: str, cached: bool, seconds: float) -> None:
    """Observe a finished stage, and whether the cache answered for it."""


@hookspec
def bdcore_warning(message: str) -> None:
    """Observe something that the user should know and that did not stop the run."""


@hookspec
def bdcore_run_finished(record: Mapping[str, Any]) -> None:
    """Observe that a run ended, with its record."""


@hookspec
def bdcore_run_failed(error: BaseException) -> None:
    """Observe that a run failed."""
