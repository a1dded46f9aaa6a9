"""What the operators on images take alike, and its checks: triggers, their places, normalisation, result dtypes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bdcore.ops.formats import FLOATS


def check_triggers(images: Tensor, pattern: Tensor, mask: Tensor) -> None:
    """Raise where pattern [T, C, h, w] and mask [T, 1 or C, h, w] do not fit the images [B, C, H, W]."""
    for name, tensor in (("pattern", pattern), ("mask", mask)):
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be floating point with values in [0, 1], got {tensor.dtype}")
        if tensor.device != images.device:
            raise ValueError(f"{name} is on {tensor.device} and images on {images.device}: move them to one device")
    _, channels, height, width = images.shape
    if pattern.ndim != 4 or pattern.shape[0] < 1 or pattern.shape[1] != channels:
        raise ValueError(f"pattern must be [T, {channels}, h, w] with T >= 1, got shape {list(pattern.shape)}")
    triggers, _, rows, columns = pattern.shape
    if rows > height or columns > width:
        raise ValueError(f"pattern of {rows} x {columns} pixels does not fit into images of {height} x {width}")
    if mask.ndim != 4 or mask.shape[0] != triggers or mask.shape[1] not in (1, channels):
        raise ValueError(f"mask must be [{triggers}, 1 or {channels}, {rows}, {columns}], got {list(mask.shape)}")
    if mask.shape[2:] != pattern.shape[2:]:
        raise ValueError(f"mask must cover the pattern's {rows} x {columns} pixels, got shape {list(mask.shape)}")


def check_numbers(name: str, value: Tensor | None, shape: list[int], device: torch.device) -> None:
    """Raise where an integer argument is there and is not int64 of that shape on that device."""
    if value is None:
        return
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {value.dtype}")
    if list(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} and images on {device}: move them to one device")


def check_result(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None, out_dtype: torch.dtype
) -> None:
    """Raise where the normalisation is not one number a channel, or the dtype cannot hold the result."""
    if out_dtype != torch.uint8 and out_dtype not in FLOATS:
        raise TypeError(f"out_dtype must be torch.uint8 or a floating-point dtype, got {out_dtype}")
    if mean is None and std is None:
        return
    if mean is None or std is None:
        raise ValueError("mean and std must be given together")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"{name} must have {channels} values, one a channel, got {len(values)}")
    if min(std) <= 0:
        raise ValueError(f"std must be positive, got {list(std)}")
    if out_dtype == torch.uint8:
        raise ValueError("out_dtype torch.uint8 cannot hold normalised images: ask for a floating-point dtype")


def floats(values: Sequence[float] | None) -> list[float] | None:
    """Numbers as an operator's schema takes them."""
    return None if values is None else [float(value) for value in values]


def check_places(images: Tensor, pattern: Tensor, name: str, index: Tensor | None, offset: Tensor | None) -> None:
    """Raise where a trigger's number, in the argument `name`, or its window lies outside.

    For the references alone, and apart from the other checks: torch.compile cannot trace a question about values. It is
    a RuntimeError because compiled kernels can raise nothing else.
    """
    triggers, _, rows, columns = pattern.shape
    height, width = images.shape[2:]
    if index is not None and bool(((index < -1) | (index >= triggers)).any()):
        raise RuntimeError(f"{name} must be in [-1, {triggers - 1}] for {triggers} triggers, got {extent(index)}")
    if offset is not None:
        limit = offset.new_tensor([height - rows, width - columns])
        if bool(((offset < 0) | (offset > limit)).any()):
            raise RuntimeError(
                f"offset places a patch of {rows} x {columns} pixels outside images of {height} x {width}: top must be"
                f" in [0, {height - rows}] and left in [0, {width - columns}], got top {extent(offset[:, 0])}"
                f" and left {extent(offset[:, 1])}"
            )


def extent(values: Tensor) -> str:
    """The least and the largest value, for a message."""
    return f"{int(values.min())} to {int(values.max())}"
