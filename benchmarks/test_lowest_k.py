"""lowest_k beside topk, which need not keep the order of ties and is the faster of PyTorch's two ways.

No two of the losses are the same, so that both give the same answer. Asked once in a training run, it has no bar.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bdcore.ops import LowestK, lowest_k
from benchmarks.contest import COMPILED, EAGER, FORWARD, OURS, Contest

TILE = 128
CASES = [(50_000, 500, False), (50_000, 5_000, False), (1_281_167, 12_811, False), (50_000, 500, True)]


def ours(k: int, tiled: bool) -> Callable[[Tensor], Tensor]:
    """All at once, or tile by tile as a pass over the data gives them."""
    if not tiled:
        return lambda losses: lowest_k(losses, k)

    def stream(losses: Tensor) -> Tensor:
        kept, index = LowestK(k), torch.arange(len(losses), device=losses.device)
        for tile, places in zip(losses.split(TILE), index.split(TILE), strict=True):
            kept.add(tile, places)
        return kept.indices()

    return stream


def usual(k: int, tiled: bool) -> Callable[[Tensor], Tensor]:
    """All at once; tiles are gathered first, and the answer is brought to the CPU, where LowestK has it."""
    if not tiled:
        return lambda losses: losses.topk(k, largest=False).indices
    return lambda losses: torch.cat(list(losses.split(TILE))).topk(k, largest=False).indices.cpu()


@pytest.mark.parametrize("contestant", [OURS, EAGER, COMPILED])
@pytest.mark.parametrize(("losses", "k", "tiled"), CASES)
def test_lowest_k(contest: Contest, losses: int, k: int, tiled: bool, contestant: str) -> None:
    """The share that Anti-Backdoor Learning isolates, one percent, and ten."""
    order = torch.randperm(losses, generator=torch.Generator().manual_seed(0)).to(contest.device)
    values = order.float() / losses
    functions = {OURS: ours(k, tiled), EAGER: usual(k, tiled)}
    case = f"{k:,} of {losses:,}" + (f", in tiles of {TILE}" if tiled else "")
    contest(case, FORWARD, contestant, functions, lambda: (values,))
