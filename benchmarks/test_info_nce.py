"""info_nce beside the usual code: normalise, multiply, cross-entropy; and Liger-Kernel's fusion of the last two.

Its work is that of the matrix products, D operations for each byte of the matrix it does not store: the bound by bytes
is far below what arithmetic takes, and says little here.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdcore.ops import info_nce
from benchmarks.contest import BOTH, COMPILED, EAGER, FORWARD, LIGER, OURS, Contest

TEMPERATURE = 0.1
SIZES = [(64, 64, 64), (256, 256, 512), (1024, 1024, 2048), (4096, 4096, 128), (256, 65536, 128)]


def usual(anchor: Tensor, keys: Tensor, positive_index: Tensor) -> Tensor:
    """With the matrix of all similarities."""
    similarities = F.normalize(anchor, dim=1) @ F.normalize(keys, dim=1).T
    return F.cross_entropy(similarities / TEMPERATURE, positive_index)


def liger(anchor: Tensor, keys: Tensor, positive_index: Tensor) -> Tensor:
    """The keys as the weights of a last layer, whose logits are made piece by piece."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    scaled = F.normalize(anchor, dim=1) / TEMPERATURE
    return liger_fused_linear_cross_entropy(scaled, F.normalize(keys, dim=1), positive_index)


@pytest.mark.parametrize("contestant", [OURS, EAGER, COMPILED, LIGER])
@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize(("batch", "keys", "width"), SIZES)
def test_info_nce(contest: Contest, batch: int, keys: int, width: int, direction: str, contestant: str) -> None:
    """Gradients of anchors and keys, each anchor's positive among the keys."""

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(contest.device).manual_seed(0)
        vectors = [torch.randn((rows, width), generator=generator, device=contest.device) for rows in (batch, keys)]
        anchor, others = (tensor.requires_grad_(direction == BOTH) for tensor in vectors)
        return anchor, others, torch.arange(batch, device=contest.device)

    functions = {OURS: partial(info_nce, temperature=TEMPERATURE, reduction="mean"), EAGER: usual, LIGER: liger}
    bars = {} if direction == BOTH else None
    contest(f"{batch} x {keys} x {width}", direction, contestant, functions, inputs, cpu_bars=bars, tolerance=1e-4)
