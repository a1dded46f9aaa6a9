"""How a plugin behaves while it works: what it prints, which random state it moves, what it costs."""

import io
import os
import random
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch

from bdcore.errors import DefenseError, PluginError, UsageError
from bdcore.machine import peak_memory_bytes, reset_peak_memory, return_freed_memory
from bdcore.plugins import explain
from bdcore.testing.findings import ConformanceError, NotApplicable, broken

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Budget:
    """What a plugin may take with the settings that its author gives for checks: wall seconds, and GiB of memory more
    than before."""

    seconds: float
    memory_gib: float


@dataclass
class Conduct:
    """What was seen while a plugin worked.

    Args:
        printed: what went to stdout and stderr, of Python and of compiled code.
        moved: the random generators of the process whose state is another than before.
        seconds: wall time.
        memory_gib: peak of the process above its size before.
        error: what it raised, if anything.
    """

    printed: str = ""
    moved: list[str] = field(default_factory=list[str])
    seconds: float = 0.0
    memory_gib: float = 0.0
    error: Exception | None = None


def observed(work: Callable[[], object]) -> Conduct:
    """Call `work` and watch; an exception of it is kept, not raised."""
    seen = Conduct()
    states = _random_states()
    return_freed_memory()  # else a plugin could take what earlier work left, unseen
    reset_peak_memory(_CPU)
    before = peak_memory_bytes(_CPU)
    began = perf_counter()
    with _captured() as text:
        try:
            work()
        except Exception as error:
            seen.error = error
    seen.seconds = perf_counter() - began
    seen.memory_gib = (peak_memory_bytes(_CPU) - before) / 2**30
    seen.printed = "".join(text)
    seen.moved = [name for name, state in _random_states().items() if state != states[name]]
    return seen


def check_no_prints(seen: Conduct) -> None:
    """Nothing is written to stdout or stderr."""
    if seen.printed.strip():
        raise broken(
            "nothing is written to stdout or stderr: stdout belongs to results, which may be JSON",
            f"{len(seen.printed)} characters were written, which begin {seen.printed.strip()[:200]!r}",
            "take prints and progress bars out: fit reports every epoch by itself, facts worth keeping go into the "
            "Outcome's notes, and what the user should know goes to context.warn(...).",
        )


def check_no_global_random(seen: Conduct) -> None:
    """The random generators of the process are left as they were."""
    if seen.moved:
        raise broken(
            "the random generators of the process (of torch, NumPy and Python) are as they were before",
            f"the state of {' and '.join(seen.moved)} is another",
            "draw from context.generator('a name') and hand it on (generator=...); leave out manual_seed and calls "
            "without a generator. Inside the loss that fit is given torch.rand and the like are right: fit seeds "
            "and restores.",
        )


def check_budget(seen: Conduct, budget: Budget) -> str:
    """Time and memory stay below what the author allows; returns both."""
    if seen.seconds > budget.seconds:
        raise broken(
            f"at most {budget.seconds:g} seconds on the kit's small world",
            f"it took {seen.seconds:.1f} seconds",
            "give smaller settings for checks (settings={'epochs': 1}), work in batches in place of loops over images, "
            "or allow more with seconds=...",
        )
    if seen.memory_gib > budget.memory_gib:
        raise broken(
            f"at most {budget.memory_gib:g} GiB more than before on the kit's small world",
            f"it took {seen.memory_gib:.2f} GiB more",
            "work in batches (forward_batches), keep figures and not activations, or allow more with memory_gib=...",
        )
    return f"{seen.seconds:.2f} s, {seen.memory_gib:.2f} GiB"


def reason(error: Exception, plugin: type) -> str:
    """`error` in one line, with its last place inside the plugin."""
    return explain(error, plugin.__module__)


@contextmanager
def honest_refusals(plugin: type) -> Generator[None]:
    """Inside, an error meant for users says that the check does not apply; any other one is a finding."""
    try:
        yield
    except (ConformanceError, NotApplicable):
        raise
    except PluginError as error:
        advice = "see the end of the line above."
        raise broken("what it returns is as the contract says", str(error), advice) from error
    except (DefenseError, UsageError) as error:
        raise NotApplicable(f"refused: {error}") from error
    except Exception as error:
        raise broken(
            "it works, or refuses with DefenseError, UsageError or DataError and one sentence for the user",
            reason(error, plugin),
            "handle this form of input, or refuse it at the beginning with such an error: what is wrong, what to do.",
        ) from error


def stir_global_random() -> None:
    """Move all random generators of the process, so that whoever draws from them draws other numbers than before."""
    torch.rand(7)
    np.random.rand(7)  # noqa: NPY002 - the state that others' legacy calls share is the one to move
    random.random()


def _random_states() -> dict[str, object]:
    states: dict[str, object] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy.random": str(np.random.get_state()),  # noqa: NPY002
        "random": random.getstate(),
    }
    if torch.cuda.is_initialized():
        states["torch.cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    return states


@contextmanager
def _captured() -> Generator[list[str]]:
    """What is written inside, by Python or to the file descriptors 1 and 2; it is listed when the block has ended."""
    texts: list[str] = []
    written = io.StringIO()
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(descriptor) for descriptor in (1, 2)]
        try:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
            with redirect_stdout(written), redirect_stderr(written):
                yield texts
        finally:
            for descriptor, old in zip((1, 2), kept, strict=True):
                os.dup2(old, descriptor)
                os.close(old)
            file.seek(0)
            texts += [written.getvalue(), file.read().decode(errors="replace")]
