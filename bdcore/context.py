"""Where and how a stage computes: device, precision, seed, a folder for checkpoints, progress."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch


class Meter:
    """What a stage has cost so far: images forwarded, and wall seconds since it began.

    Checkpoints carry both, so that a resumed stage also counts what it did before it was interrupted.
    """

    def __init__(self) -> None:
        self.images = 0
        self._zero = perf_counter()

    @property
    def seconds(self) -> float:
        """Wall seconds, those before an interruption included."""
        return perf_counter() - self._zero

    def resume(self, images: int, seconds: float) -> None:
        """Go on from what a checkpoint had counted."""
        self.images = images
        self._zero = perf_counter() - seconds


@dataclass(frozen=True)
class Progress:
    """How far a training phase has come.

    Args:
        phase: the name given to `fit`, for instance "purify".
        epoch, epochs: finished and planned epochs.
        figures: means over the epoch, for instance {"loss": 0.31}.
        images_per_second: samples drawn a second in this epoch.
        seconds_left: estimate for the rest of the phase.
    """

    phase: str
    epoch: int
    epochs: int
    figures: dict[str, float]
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Context:
    """What a plugin may use besides its input; it leads to no data.

    Args:
        device: where to compute.
        precision: bf16 (autocast) or fp32.
        seed: this stage's own: its random numbers are none of another stage's.
        folder: for checkpoints of this stage; None keeps none.
        report: called after every epoch.
        warn: called with what the user should know and what does not stop the run.
        meter: images and seconds spent.
        compile: whether training may use torch.compile.
        phases: names that `fit` has used in this stage, each of which may have one checkpoint.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    folder: Path | None = None
    report: Callable[[Progress], None] = lambda progress: None
    warn: Callable[[str], None] = lambda message: None
    meter: Meter = field(default_factory=Meter)
    compile: bool = False
    phases: set[str] = field(default_factory=set[str], repr=False)

    def generator(self, *names: str | int) -> torch.Generator:
        """A CPU generator that depends on the seed and `names` alone, so every device gets the same numbers."""
        return torch.Generator().manual_seed(derive_seed(self.seed, *names))


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed from `seed` and `names` by SHA-256, so that every purpose has a stream of its own."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
