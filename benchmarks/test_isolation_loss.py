"""isolation_loss beside the cross-entropies of PyTorch and Liger-Kernel, bent as Anti-Backdoor Learning does it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdcore.ops import isolation_loss
from benchmarks.contest import BOTH, COMPILED, EAGER, FORWARD, LIGER, OURS, Contest

GAMMA = 0.5
SIZES = [(batch, classes, "lga") for batch in (64, 256, 1024, 4096) for classes in (10, 100, 1000)]
PLAIN = [(256, 100, "ce"), (4096, 1000, "ce")]


def usual(mode: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the batch, of the losses themselves or with the sign of what they exceed gamma by."""
    if mode == "ce":
        return F.cross_entropy(logits, labels)
    loss = F.cross_entropy(logits, labels, reduction="none")
    return (torch.sign(loss - GAMMA) * loss).mean()


def liger(mode: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The same with Liger-Kernel's cross-entropy."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    if mode == "ce":
        return liger_cross_entropy(logits, labels)
    loss = liger_cross_entropy(logits, labels, reduction="none")
    return (torch.sign(loss - GAMMA) * loss).mean()


@pytest.mark.parametrize("contestant", [OURS, EAGER, COMPILED, LIGER])
@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize(("batch", "classes", "mode"), [*SIZES, *PLAIN])
def test_isolation_loss(contest: Contest, batch: int, classes: int, mode: str, direction: str, contestant: str) -> None:
    """Losses lie on both sides of gamma."""

    def inputs() -> tuple[Tensor, Tensor]:
        generator = torch.Generator(contest.device).manual_seed(0)
        labels = torch.randint(0, classes, (batch,), generator=generator, device=contest.device)
        logits = 2 * torch.randn((batch, classes), generator=generator, device=contest.device)
        logits[::2].scatter_(1, labels[::2, None], 10.0)
        return logits.requires_grad_(direction == BOTH), labels

    functions = {
        OURS: partial(isolation_loss, gamma=GAMMA, mode=mode, reduction="mean"),
        EAGER: partial(usual, mode),
        LIGER: partial(liger, mode),
    }
    case = f"{mode}, {batch} x {classes}"
    bars = {EAGER: 1.0, COMPILED: 1.7} if direction == BOTH else None
    contest(case, direction, contestant, functions, inputs, cpu_bars=bars)
