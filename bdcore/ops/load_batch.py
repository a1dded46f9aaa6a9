"""A training batch in one pass: gather, crop, flip, cutout, trigger and normalisation of resident uint8 images.

What is random about a sample follows from the seed and the sample's own number alone, through the counter-based
generator Philox4x32-10 (see `philox`): not from the batch that it came in, its place there, the device or its threads.
With the seed as key and v(block) the four numbers of counter (sample, block),

    crop     rows and columns shifted by floor(v(0)[0] (2 p + 1) / 2^32) - p and floor(v(0)[1] (2 p + 1) / 2^32) - p
    cutout   centre in row floor(v(0)[2] H / 2^32) and column floor(v(0)[3] W / 2^32)
    flip     where the lowest bit of v(1)[0] is 1
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bdcore.ops.philox import below, philox
from bdcore.ops.registration import operators, register
from bdcore.ops.triggers import check_numbers, check_places, check_result, check_triggers, extent, floats

_MOST = 1 << 30  # pixels of padding and cutout: kernels count pixels in 32 bits


def load_batch(
    images: Tensor,
    index: Tensor,
    *,
    seed: int = 0,
    crop: int = 0,
    flip: bool = False,
    cutout: int = 0,
    pattern: Tensor | None = None,
    mask: Tensor | None = None,
    trigger: Tensor | None = None,
    offset: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Gather samples of a resident set, augment them, blend a trigger into each, normalise.

    In this order; so a trigger lies where `offset` puts it, unmoved by the augmentation. Pixels are x / 255. A uint8
    result is blended in units of 1 / 255, rounded to the nearest value (ties to even) and clamped to [0, 255], as
    `blend_trigger` does it, and is the same to the bit on every device. The arithmetic is float32, or float64 where
    the pattern, the mask or the result is float64. The same sample, twice in a batch, is augmented in the same way
    both times: give every pass over the data a seed of its own. It has no gradient.

    Args:
        images: uint8 [N, C, H, W], NCHW or channels-last, equally fast; not altered.
        index: int64 [B] in [0, N), the samples.
        seed: 0 <= seed < 2^63.
        crop: pixels of zero padding on each side, of which a random window of H x W is cut out.
        flip: mirror each image left to right with probability 1/2.
        cutout: side of a square of zeros around a random pixel of each image; parts of it may lie outside.
        pattern: float [T, C, h, w] in [0, 1], h <= H and w <= W; None: no trigger.
        mask: float [T, 1, h, w] or [T, C, h, w] in [0, 1]; with `pattern`.
        trigger: int64 [B], each row's pattern, -1 to leave it clean; None: pattern 0 for all.
        offset: int64 [B, 2], (top, left) of the window; None: (0, 0).
        mean, std: one number a channel; the result is (y - mean) / std over the whole image. Both or neither.
        out_dtype: dtype of the result; None: uint8, or float32 where it is normalised.

    Returns:
        [B, C, H, W], channels-last.

    Raises:
        TypeError: where a dtype is not as above.
        ValueError: where shapes, devices or numbers are not as above, or pattern or mask need a gradient.
        RuntimeError: where an index, a trigger or an offset lies outside; on a GPU, as everywhere in PyTorch, a
            kernel's assertion ends the process's use of the device.
    """
    _check_samples(images, index)
    if not 0 <= seed <= 0x7FFFFFFFFFFFFFFF:
        raise ValueError(f"seed must be in [0, 2^63), got {seed}")
    for name, value in (("crop", crop), ("cutout", cutout)):
        if not 0 <= value <= _MOST:
            raise ValueError(f"{name} must be a number of pixels from 0 to 2^30, got {value}")
    if pattern is not None and mask is not None:
        check_triggers(images, pattern, mask)
        check_numbers("trigger", trigger, [index.shape[0]], images.device)
        check_numbers("offset", offset, [index.shape[0], 2], images.device)
        if torch.is_grad_enabled() and (pattern.requires_grad or mask.requires_grad):
            raise ValueError("load_batch has no gradient: detach pattern and mask, or blend with blend_trigger")
    elif not (pattern is None and mask is None and trigger is None and offset is None):
        raise ValueError("a trigger needs pattern and mask together; without them, give neither trigger nor offset")
    if out_dtype is None:
        out_dtype = torch.float32 if mean is not None else torch.uint8
    check_result(images.shape[1], mean, std, out_dtype)
    return operators(images).load_batch(
        images, index, seed, crop, flip, cutout, pattern, mask, trigger, offset, floats(mean), floats(std), out_dtype
    )


def _check_samples(images: Tensor, index: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim != 4:
        raise ValueError(f"images must be [N, C, H, W], got shape {list(images.shape)}")
    if index.ndim != 1:
        raise ValueError(f"index must be [B], got shape {list(index.shape)}")
    check_numbers("index", index, [index.shape[0]], images.device)


def _forward(
    images: Tensor,
    index: Tensor,
    seed: int,
    crop: int,
    flip: bool,
    cutout: int,
    pattern: Tensor | None,
    mask: Tensor | None,
    trigger: Tensor | None,
    offset: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if bool(((index < 0) | (index >= len(images))).any()):
        raise RuntimeError(f"index must be in [0, {len(images) - 1}] for {len(images)} images, got {extent(index)}")
    if pattern is not None:
        check_places(images, pattern, "trigger", trigger, offset)
    out = _forward_fake(images, index, seed, crop, flip, cutout, pattern, mask, trigger, offset, mean, std, out_dtype)
    batch = _augmented(images, index, seed, crop, flip, cutout)
    if pattern is not None and mask is not None:
        dtype = torch.float64 if torch.float64 in (pattern.dtype, mask.dtype, out_dtype) else torch.float32
        blend = torch.ops.bdcore_reference.blend_trigger
        return out.copy_(blend(batch, pattern.to(dtype), mask.to(dtype), trigger, offset, mean, std, out_dtype))
    if out_dtype == torch.uint8:
        return out.copy_(batch)
    unit = batch.to(torch.float64 if out_dtype == torch.float64 else torch.float32).div_(255)
    if mean is not None and std is not None:
        middle, spread = (unit.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
        unit.sub_(middle).div_(spread)
    return out.copy_(unit)


def _forward_fake(
    images: Tensor,
    index: Tensor,
    seed: int,
    crop: int,
    flip: bool,
    cutout: int,
    pattern: Tensor | None,
    mask: Tensor | None,
    trigger: Tensor | None,
    offset: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
    out_dtype: torch.dtype,
) -> Tensor:
    shape = (index.shape[0], *images.shape[1:])
    return torch.empty(shape, dtype=out_dtype, device=images.device, memory_format=torch.channels_last)


def _augmented(images: Tensor, index: Tensor, seed: int, crop: int, flip: bool, cutout: int) -> Tensor:
    """The chosen samples, cropped, flipped and cut: uint8 [B, C, H, W]."""
    height, width = images.shape[2:]
    down, right = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    blocks = torch.arange(2, device=images.device).expand(len(index), 2)
    numbers = philox(seed, torch.stack([index[:, None].expand(-1, 2), blocks], dim=-1))
    first, second = numbers[:, 0], numbers[:, 1]
    top, left = (below(2 * crop + 1, first[:, :2]) - crop).split(1, 1)
    mirrored = (second[:, :1] & 1) * int(flip)
    row = down + top  # [B, H] and [B, W]: where each pixel comes from
    column = torch.where(mirrored == 1, width - 1 - right, right) + left
    seen = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[:, None]
    if cutout:
        y = down - (below(height, first[:, 2:3]) - cutout // 2)
        x = right - (below(width, first[:, 3:]) - cutout // 2)
        seen &= ~(((y >= 0) & (y < cutout))[:, :, None] & ((x >= 0) & (x < cutout))[:, None])
    row, column = row.clamp(0, height - 1)[:, :, None], column.clamp(0, width - 1)[:, None]
    picked = images[index[:, None, None], :, row, column]  # [B, H, W, C]
    return picked.masked_fill_(~seen[..., None], 0).permute(0, 3, 1, 2)


# seed is a SymInt so that a function that torch.compile has compiled takes every seed, and not the first one alone.
register(
    "load_batch",
    "(Tensor images, Tensor index, SymInt seed, int crop, bool flip, int cutout, Tensor? pattern, Tensor? mask,"
    " Tensor? trigger, Tensor? offset, float[]? mean, float[]? std, ScalarType out_dtype) -> Tensor",
    _forward,
    _forward_fake,
)
