"""model_contrastive_loss beside the usual code of model-contrastive learning: similarities, then a cross-entropy."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdcore.ops import model_contrastive_loss
from benchmarks.contest import BOTH, COMPILED, EAGER, FORWARD, OURS, Contest

TEMPERATURE = 0.5
SIZES = [(batch, 1, width) for batch in (64, 256, 1024, 4096) for width in (64, 512, 2048)]
ANCHOR_ALONE = [(256, 1, 64), (1024, 1, 512), (4096, 1, 2048)]

ours = partial(model_contrastive_loss, temperature=TEMPERATURE, reduction="mean")


def usual(anchor: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
    """The loss as PyTorch's functions give it."""
    near = F.cosine_similarity(anchor, positive, dim=1)
    far = F.cosine_similarity(anchor.unsqueeze(1), negatives, dim=2)
    logits = torch.cat([near.unsqueeze(1), far], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


@pytest.mark.parametrize("contestant", [OURS, EAGER, COMPILED])
@pytest.mark.parametrize(
    ("batch", "negatives", "width", "direction", "wanted"),
    [(*size, direction, 3) for size in [*SIZES, (256, 8, 512)] for direction in (FORWARD, BOTH)]
    + [(*size, BOTH, 1) for size in ANCHOR_ALONE],
)
def test_model_contrastive_loss(
    contest: Contest, batch: int, negatives: int, width: int, direction: str, wanted: int, contestant: str
) -> None:
    """Gradients of all three tensors, or of the anchor alone, as where the others come from a frozen model."""

    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator(contest.device).manual_seed(0)
        shapes = ((batch, width), (batch, width), (batch, negatives, width))
        tensors = tuple(torch.randn(shape, generator=generator, device=contest.device) for shape in shapes)
        for tensor in tensors[:wanted]:
            tensor.requires_grad_()
        return tensors

    case = f"{batch} x {width}" + (f", {negatives} negatives" if negatives > 1 else "")
    case += ", anchor alone" if wanted == 1 else ""
    bars = {COMPILED: 2.0} | ({"bound": 0.9} if batch * width >= 4096 * 2048 else {})
    functions = {OURS: ours, EAGER: usual}
    contest(case, direction, contestant, functions, inputs, cpu_bars=bars if direction == BOTH else None)
