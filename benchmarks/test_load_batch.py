"""load_batch beside its steps one by one: gather, pad, window, mirror, blend, scale, normalise, channels-last.

The peers are given where to cut and whether to mirror, drawn beforehand: their time does not include drawing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdcore.ops import load_batch
from benchmarks.contest import COMPILED, EAGER, FORWARD, OURS, Contest, size_of

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SEED = 1


@dataclass(frozen=True)
class Case:
    """A resident set and the batches that are made of it.

    Args:
        name: the table's second column.
        samples, side: the set, [samples, 3, side, side].
        batch: rows of a batch.
        out_dtype: of the batch.
        crop: pixels of padding.
        channels_last: memory format of the set.
        poisoned: whether every tenth row gets a trigger over the whole image.
    """

    name: str
    samples: int
    side: int
    batch: int
    out_dtype: torch.dtype
    crop: int
    channels_last: bool = False
    poisoned: bool = False


CASES = [
    Case("128 x 3 x 32 x 32 to fp32", 50_000, 32, 128, torch.float32, 4),
    Case("128 x 3 x 32 x 32 to bf16", 50_000, 32, 128, torch.bfloat16, 4),
    Case("128 x 3 x 32 x 32 to fp32, set channels-last", 50_000, 32, 128, torch.float32, 4, channels_last=True),
    Case("128 x 3 x 32 x 32 to fp32, every tenth poisoned", 50_000, 32, 128, torch.float32, 4, poisoned=True),
    Case("512 x 3 x 32 x 32 to fp32", 50_000, 32, 512, torch.float32, 4),
    Case("64 x 3 x 224 x 224 to fp32", 1_000, 224, 64, torch.float32, 28),
    Case("64 x 3 x 224 x 224 to bf16", 1_000, 224, 64, torch.bfloat16, 28),
]


@cache
def resident(samples: int, side: int, device: torch.device) -> Tensor:
    """A set of noise, NCHW."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(0, 256, (samples, 3, side, side), dtype=torch.uint8, generator=generator, device=device)


def drawn(case: Case, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What load_batch draws for these rows, (top, left, mirrored), read off a set whose pixels name their place."""
    side, crop, half = case.side, case.crop, case.side // 2
    numbers = torch.arange(1, side + 1, dtype=torch.uint8, device=images.device)
    places = torch.stack([numbers.view(-1, 1).expand(side, side), numbers.expand(side, side), numbers.diag() * 0])
    batch = load_batch(places.expand_as(images).contiguous(), index, seed=SEED, crop=crop, flip=True).long()
    row, column, next_column = batch[:, 0, half, half], batch[:, 1, half, half], batch[:, 1, half, half + 1]
    mirrored = next_column < column
    seen = torch.where(mirrored, side - 1 - half, half)
    return row - 1 - half + crop, column - 1 - seen + crop, mirrored


def usual(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """The steps in PyTorch's own operations, each over the whole batch, in uint8 as long as that is possible."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))

    def steps(images: Tensor, index: Tensor, top: Tensor, left: Tensor, mirrored: Tensor, *trigger: Tensor) -> Tensor:
        batch, side = images[index], case.side
        windows = F.pad(batch, (case.crop,) * 4).unfold(2, side, 1).unfold(3, side, 1)
        batch = windows[torch.arange(len(batch), device=device), :, top, left]
        batch = torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(3), batch)
        x = batch.contiguous(memory_format=torch.channels_last) / 255
        if trigger:
            pattern, mask, chosen = trigger
            x = torch.lerp(x, pattern, mask * (chosen >= 0).view(-1, 1, 1, 1))
        return ((x - mean) / std).to(case.out_dtype)

    return steps


def ours(case: Case) -> Callable[..., Tensor]:
    """One call."""
    options = {"seed": SEED, "crop": case.crop, "flip": True, "mean": MEAN, "std": STD, "out_dtype": case.out_dtype}

    def load(images: Tensor, index: Tensor, *given: Tensor) -> Tensor:
        trigger = dict(zip(("pattern", "mask", "trigger"), given[3:], strict=False))
        return load_batch(images, index, **options, **trigger)

    return load


@pytest.mark.parametrize("contestant", [OURS, EAGER, COMPILED])
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_load_batch(contest: Contest, case: Case, contestant: str) -> None:
    """Random rows of the set; the bound counts those rows, not the set."""
    device = contest.device
    images = resident(case.samples, case.side, device)
    index = torch.randperm(case.samples, generator=torch.Generator().manual_seed(0))[: case.batch].to(device)
    given = [images, index, *drawn(case, images, index)]
    if case.channels_last:
        given[0] = images.contiguous(memory_format=torch.channels_last)
    if case.poisoned:
        pattern = torch.rand((1, 3, case.side, case.side), generator=torch.Generator().manual_seed(0)).to(device)
        chosen = torch.where(torch.arange(case.batch, device=device) % 10 == 0, 0, -1)
        given += [pattern, torch.full_like(pattern[:, :1], 0.2), chosen]
    pixels = case.batch * 3 * case.side**2
    contest(
        case.name,
        FORWARD,
        contestant,
        {OURS: ours(case), EAGER: usual(case, device)},
        lambda: tuple(given),
        cpu_bars={EAGER: 5.0},
        moved=pixels * (1 + case.out_dtype.itemsize) + size_of(index, *given[5:]),
        tolerance=1e-2 if case.out_dtype == torch.bfloat16 else 1e-5,
    )
