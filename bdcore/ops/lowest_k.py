"""Which k losses are the smallest, with one answer on every device: ties go by index, NaN comes last.

Anti-Backdoor Learning ranks all training samples so; an answer that depended on the order of batches or on the device
would isolate other samples in another run.

On a GPU the operator is PyTorch's stable sort. It is asked once in a training run, for as many numbers as there are
samples, so that a selection of its own would save microseconds in hours.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdcore.ops.formats import FLOATS
from bdcore.ops.registration import implementation, operators, register

if TYPE_CHECKING:
    from bdcore.ops import _host


def lowest_k(losses: Tensor, k: int) -> Tensor:
    """Indices of the k smallest losses.

    Not differentiable.

    Args:
        losses: float [N] (float16, bfloat16, float32 or float64); any values, infinities and NaN included.
        k: in [0, N].

    Returns:
        int64 [k], in ascending order of (loss, index), where 0.0 and -0.0 are equal and every NaN is larger than
        infinity and equal to every other.

    Raises:
        TypeError: losses are not floating point.
        ValueError: losses are not [N], or k is outside [0, N].
    """
    _check_losses(losses)
    if not 0 <= k <= losses.shape[0]:
        raise ValueError(f"k must be in [0, {losses.shape[0]}], the number of losses, got {k}")
    return operators(losses).lowest_k(losses, k)


class LowestK:
    """`lowest_k` over losses that arrive in tiles, of which no more than about 2 k are kept.

    The answer is that of `lowest_k` over all losses, with sample numbers in place of places, whatever the order and the
    size of the tiles. What is kept lies on the CPU: tiles on another device are copied there, which waits for them.

        lowest = LowestK(k)
        for images, labels, numbers in batches:
            lowest.add(isolation_loss(model(images), labels, mode="ce"), numbers)
        suspects = lowest.indices()

    Args:
        k: at least 0.

    Raises:
        ValueError: k is negative.
    """

    def __init__(self, k: int) -> None:
        if k < 0:
            raise ValueError(f"k must be at least 0, got {k}")
        self._kept = _compiled(k) if implementation("host") == "native" else _Sorted(k)

    def add(self, losses: Tensor, index: Tensor) -> None:
        """Consider a tile.

        Args:
            losses: float [n], n >= 0.
            index: int64 [n], the samples' numbers, each given once in the whole stream.

        Raises:
            TypeError: where a dtype is not as above.
            ValueError: where shapes are not as above.
        """
        _check_losses(losses)
        if index.dtype != torch.int64:
            raise TypeError(f"index must be int64, got {index.dtype}")
        if index.shape != losses.shape:
            raise ValueError(f"index must have the shape of losses, {list(losses.shape)}, got {list(index.shape)}")
        self._kept.add(
            losses.detach().to("cpu", torch.float64).contiguous().numpy(), index.to("cpu").contiguous().numpy()
        )

    def indices(self) -> Tensor:
        """Numbers of the k smallest of what was added, or of all where there are fewer.

        More may be added afterwards.

        Returns:
            int64 [k] or shorter, on the CPU, in the order of `lowest_k`.
        """
        return torch.from_numpy(self._kept.indices())


def _check_losses(losses: Tensor) -> None:
    if losses.dtype not in FLOATS:
        raise TypeError(f"losses must be float16, bfloat16, float32 or float64, got {losses.dtype}")
    if losses.ndim != 1:
        raise ValueError(f"losses must be [N], got shape {list(losses.shape)}")


def _compiled(k: int) -> "_host.LowestK":
    from bdcore.ops import _host

    return _host.LowestK(k)


class _Sorted:
    """What the compiled class does, by sorting what is kept together with each tile."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._losses = torch.empty(0, dtype=torch.float64)
        self._index = torch.empty(0, dtype=torch.int64)

    def add(self, losses: NDArray[np.float64], index: NDArray[np.int64]) -> None:
        numbers, order = torch.cat([self._index, torch.from_numpy(index)]).sort()
        values = torch.cat([self._losses, torch.from_numpy(losses)])[order]
        lowest = _forward(values, min(self._k, len(values)))
        self._losses, self._index = values[lowest], numbers[lowest]

    def indices(self) -> NDArray[np.int64]:
        return self._index.clone().numpy()


def _forward(losses: Tensor, k: int) -> Tensor:
    # Adding 0 makes 0.0 of -0.0; a radix sort would tell them apart, and NaNs by their bits.
    comparable = torch.where(losses.isnan(), math.nan, losses + 0.0)
    return comparable.sort(stable=True).indices[:k].clone()


def _forward_fake(losses: Tensor, k: int) -> Tensor:
    return losses.new_empty((k,), dtype=torch.int64)


register("lowest_k", "(Tensor losses, int k) -> Tensor", _forward, _forward_fake)
