"""blend_trigger beside the arithmetic written out: (1 - m) x + m p over whole batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from bdcore.ops import blend_trigger
from benchmarks.contest import BOTH, COMPILED, EAGER, FORWARD, OURS, Contest

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Case:
    """A batch of images and what is blended into it.

    Args:
        name: the table's second column.
        batch, side: images [batch, 3, side, side].
        image_dtype: of the images.
        out_dtype: of the result; a floating-point result of uint8 images is normalised.
        directions: FORWARD, and BOTH where pattern and mask have gradients, as in trigger inversion.
        triggers: how many, each over whole images; of several each image has its own.
        patch: side of the trigger if it does not cover the images but lies at a place of each image's own.
        channels_last: memory format of the images.
    """

    name: str
    batch: int
    side: int
    image_dtype: torch.dtype
    out_dtype: torch.dtype
    directions: tuple[str, ...] = (FORWARD,)
    triggers: int = 1
    patch: int | None = None
    channels_last: bool = False

    @property
    def normalised(self) -> bool:
        """Whether the result is (y - mean) / std."""
        return self.image_dtype == torch.uint8 and self.out_dtype.is_floating_point


CASES = [
    Case("uint8, 256 x 3 x 32 x 32", 256, 32, torch.uint8, torch.uint8),
    Case("uint8, 256 x 3 x 32 x 32, patches of 3 x 3", 256, 32, torch.uint8, torch.uint8, patch=3),
    Case("uint8 to fp32, 256 x 3 x 32 x 32", 256, 32, torch.uint8, torch.float32, (FORWARD, BOTH)),
    Case("fp32, 256 x 3 x 32 x 32", 256, 32, torch.float32, torch.float32, (FORWARD, BOTH)),
    Case("fp32, 256 x 3 x 32 x 32, 10 triggers", 256, 32, torch.float32, torch.float32, (FORWARD, BOTH), triggers=10),
    Case("uint8, 128 x 3 x 224 x 224", 128, 224, torch.uint8, torch.uint8),
    Case("uint8 to fp32, 128 x 3 x 224 x 224", 128, 224, torch.uint8, torch.float32, (FORWARD, BOTH)),
    Case("uint8 to bf16, 128 x 3 x 224 x 224", 128, 224, torch.uint8, torch.bfloat16),
    Case(
        "uint8 to bf16, channels-last, 128 x 224 x 224 x 3", 128, 224, torch.uint8, torch.bfloat16, channels_last=True
    ),
    Case("fp32, 128 x 3 x 224 x 224", 128, 224, torch.float32, torch.float32, (FORWARD, BOTH)),
]


def usual(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """The same in PyTorch's own operations."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))

    def blend(images: Tensor, pattern: Tensor, mask: Tensor, index: Tensor | None = None) -> Tensor:
        m, p = (mask, pattern) if index is None else (mask[index], pattern[index])
        if case.out_dtype == torch.uint8:
            return ((1 - m) * images + m * (255 * p)).round().to(torch.uint8)
        x = images / 255 if case.image_dtype == torch.uint8 else images
        y = (1 - m) * x + m * p
        return ((y - mean) / std if case.normalised else y).to(case.out_dtype)

    return blend


def usual_patches(images: Tensor, pattern: Tensor, mask: Tensor, offset: Tensor) -> Tensor:
    """A patch at a place of each image's own, through an index of its pixels."""
    batch, rows, columns = len(images), *pattern.shape[2:]
    within = partial(torch.arange, device=images.device)
    b, c = within(batch).view(-1, 1, 1, 1), within(3).view(1, -1, 1, 1)
    i = offset[:, :1, None, None] + within(rows).view(1, 1, -1, 1)
    j = offset[:, 1:, None, None] + within(columns)
    blended = (1 - mask) * images[b, c, i, j] + mask * (255 * pattern)
    stamped = images.clone()
    stamped[b, c, i, j] = blended.round().to(torch.uint8)
    return stamped


def ours(case: Case) -> Callable[..., Tensor]:
    """One call."""
    normalisation: dict[str, Sequence[float]] = {"mean": MEAN, "std": STD} if case.normalised else {}
    options = {**normalisation, "out_dtype": case.out_dtype}
    where = "index" if case.patch is None else "offset"

    def blend(images: Tensor, pattern: Tensor, mask: Tensor, *chosen: Tensor) -> Tensor:
        return blend_trigger(images, pattern, mask, **dict(zip([where], chosen, strict=False)), **options)

    return blend


@pytest.mark.parametrize("contestant", [OURS, EAGER, COMPILED])
@pytest.mark.parametrize(
    ("case", "direction"),
    [pytest.param(case, way, id=f"{case.name}-{way}") for case in CASES for way in case.directions],
)
def test_blend_trigger(contest: Contest, case: Case, direction: str, contestant: str) -> None:
    """Gradients are those of pattern and mask: the images are a data set's."""

    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator(contest.device).manual_seed(0)
        shape, side = (case.batch, 3, case.side, case.side), case.patch or case.side
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        rand = partial(torch.rand, generator=generator, device=contest.device)
        choose = partial(torch.randint, generator=generator, device=contest.device)
        images = rand(shape)
        if case.image_dtype == torch.uint8:
            images = (256 * images).to(torch.uint8)
        trigger = [rand((case.triggers, channels, side, side)) for channels in (3, 1)]
        chosen = []
        if case.triggers > 1:
            chosen = [choose(0, case.triggers, (case.batch,))]
        if case.patch is not None:
            chosen = [choose(0, case.side - case.patch + 1, (case.batch, 2))]
        for tensor in trigger:
            tensor.requires_grad_(direction == BOTH)
        return (images.contiguous(memory_format=layout), *trigger, *chosen)

    bars = {COMPILED: 1.5} if case.side == 32 else {"bound": 0.85} if case.image_dtype == torch.uint8 else {}
    functions = {OURS: ours(case), EAGER: usual(case, contest.device) if case.patch is None else usual_patches}
    contest(
        case.name,
        direction,
        contestant,
        functions,
        inputs,
        cpu_bars=bars if direction == case.directions[-1] else None,
        tolerance=1e-2 if case.out_dtype == torch.bfloat16 else 1e-5,
    )
