"""Interrupting a training at an epoch of choice, and folders that last as long as a check."""

import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from bdcore.context import Progress


class Interrupted(KeyboardInterrupt):
    """What ^C raises, recognisable as the kit's own."""


def interrupted_after(epochs: int) -> Callable[[Progress], None]:
    """A report that raises `Interrupted` when it is called for the epoch of this number, counted from 1."""
    told: list[Progress] = []

    def report(progress: Progress) -> None:
        told.append(progress)
        if len(told) == epochs:
            raise Interrupted

    return report


def often_saved() -> AbstractContextManager[Any]:
    """Inside, fit writes a checkpoint after every epoch, however short."""
    return mock.patch("bdcore.training.loop._SECONDS_BETWEEN_CHECKPOINTS", 0.0)


@contextmanager
def temporary_cache(folder: Path) -> Generator[None]:
    """Inside, runs keep their finished stages in `folder`."""
    with mock.patch.dict(os.environ, {"BDCORE_CACHE": str(folder)}):
        yield
