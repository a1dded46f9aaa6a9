"""Philox4x32-10, a counter-based random generator, in integer operations of PyTorch.

Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). The same key and counter give the
same numbers on every device and in every order; csrc/common/philox.h is the same function for compiled kernels.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(key: int, counter: Tensor) -> Tensor:
    """Four random numbers for each counter.

    Args:
        key: 64 bits.
        counter: int64 [..., 2], the low and the high 64 bits of each counter, as two's complement.

    Returns:
        int64 [..., 4], each number in [0, 2^32).
    """
    low, high = counter.unbind(-1)
    c0, c1, c2, c3 = low & _LOW, (low >> 32) & _LOW, high & _LOW, (high >> 32) & _LOW
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    for _ in range(10):
        a_high, a_low = _product(_MULTIPLIERS[0], c0)
        b_high, b_low = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=-1)


def below(bound: int, numbers: Tensor) -> Tensor:
    """Map numbers from [0, 2^32) to [0, bound), bound <= 2^31, by the upper half of the product with the bound.

    Each value is drawn with a probability within 2^-32 of 1 / bound.
    """
    return (numbers * bound) >> 32


def _product(factor: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of factor * numbers, which int64 cannot hold: in two steps of 16 bits."""
    lower = factor * (numbers & 0xFFFF)
    upper = factor * (numbers >> 16) + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)
