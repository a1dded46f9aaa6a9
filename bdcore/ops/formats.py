"""What the operators take and return alike: number formats, and how losses are reduced."""

from typing import Literal

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The formats that operators take where they take floating-point numbers."""

Reduction = Literal["none", "mean", "sum"]

REDUCTIONS: dict[str, int] = {"none": 0, "mean": 1, "sum": 2}
"""The numbers by which schemas and kernels know the reductions."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The format in which numbers of `dtype` are added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32
