"""Batched trigger blending: y = (1 - m) x + m p inside a window of each image, normalised in the same step if asked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bdcore.ops.formats import FLOATS
from bdcore.ops.registration import operators, register
from bdcore.ops.triggers import check_numbers, check_places, check_result, check_triggers, floats


def blend_trigger(
    images: Tensor,
    pattern: Tensor,
    mask: Tensor,
    *,
    index: Tensor | None = None,
    offset: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Blend one of T triggers into each image of a batch.

    Pixels are in [0, 1]; uint8 images are read as x / 255. A uint8 result is computed in units of 1 / 255, rounded to
    the nearest value (ties to even) and clamped to [0, 255]. The arithmetic is float32, or float64 where an input is
    float64. Differentiable once with respect to float images, pattern and mask, with a deterministic reduction over
    the batch.

    Args:
        images: uint8 or float [B, C, H, W], NCHW or channels-last; not altered.
        pattern: float [T, C, h, w] in [0, 1], h <= H and w <= W.
        mask: float [T, 1, h, w] or [T, C, h, w] in [0, 1].
        index: int64 [B], each image's trigger, -1 to leave it clean; None: trigger 0 for all.
        offset: int64 [B, 2], (top, left) of the window; None: (0, 0).
        mean, std: one number a channel; the result is (y - mean) / std over the whole image. Both or neither.
        out_dtype: dtype of the result; None: that of the images, float32 for uint8 images that are normalised.

    Returns:
        [B, C, H, W] in the memory format of the images.

    Raises:
        TypeError: where a dtype is not as above.
        ValueError: where shapes or devices are not as above, or a gradient is asked of a uint8 result.
        RuntimeError: where an index or an offset lies outside; on a GPU, as everywhere in PyTorch, a kernel's assertion
            ends the process's use of the device.
    """
    _check_images(images)
    check_triggers(images, pattern, mask)
    check_numbers("index", index, [images.shape[0]], images.device)
    check_numbers("offset", offset, [images.shape[0], 2], images.device)
    if out_dtype is None:
        out_dtype = torch.float32 if mean is not None and images.dtype == torch.uint8 else images.dtype
    check_result(images.shape[1], mean, std, out_dtype)
    wanted = torch.is_grad_enabled() and (images.requires_grad or pattern.requires_grad or mask.requires_grad)
    if out_dtype == torch.uint8 and wanted:
        raise ValueError("a uint8 result has no gradient: pass out_dtype=torch.float32, or detach the inputs")
    dtype = torch.promote_types(pattern.dtype, mask.dtype)
    return operators(images).blend_trigger(
        images, pattern.to(dtype), mask.to(dtype), index, offset, floats(mean), floats(std), out_dtype
    )


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 and images.dtype not in FLOATS:
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    if images.ndim != 4:
        raise ValueError(f"images must be [B, C, H, W], got shape {list(images.shape)}")


_Window = tuple[Tensor | slice, ...]


def _forward(
    images: Tensor,
    pattern: Tensor,
    mask: Tensor,
    index: Tensor | None,
    offset: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
    out_dtype: torch.dtype,
) -> Tensor:
    check_places(images, pattern, "index", index, offset)
    dtype = _accumulator(images, pattern)
    unit = 255.0 if out_dtype == torch.uint8 else 1.0
    # Between uint8 images only the window is computed: what lies outside is copied.
    out = torch.empty_like(images, dtype=torch.uint8 if images.dtype == out_dtype == torch.uint8 else dtype)
    out.copy_(images)
    if images.dtype != torch.uint8:
        out.mul_(unit)
    elif out_dtype != torch.uint8:
        out.div_(255.0)
    window = _window(images, pattern, offset)
    clean = out[window].to(dtype)
    m = _chosen(mask.to(dtype), index)
    blended = (1 - m) * clean + m * (_chosen(pattern.to(dtype), index) * unit)
    if index is not None:
        blended = torch.where((index < 0).view(-1, 1, 1, 1), clean, blended)
    if out.dtype == torch.uint8:
        blended = blended.round_().clamp_(0, 255)
    out[window] = blended.to(out.dtype)
    if mean is not None and std is not None:
        out.sub_(_per_channel(mean, out)).div_(_per_channel(std, out))
    if out.dtype != torch.uint8 and out_dtype == torch.uint8:
        out.round_().clamp_(0, 255)
    return out.to(out_dtype)


def _forward_fake(
    images: Tensor,
    pattern: Tensor,
    mask: Tensor,
    index: Tensor | None,
    offset: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(images, dtype=out_dtype)


def _backward(
    grad: Tensor,
    images: Tensor,
    pattern: Tensor,
    mask: Tensor,
    index: Tensor | None,
    offset: Tensor | None,
    std: list[float] | None,
    need_images: bool,
    need_pattern: bool,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """With g = dy/std: dx = (1 - m) g, dp[t] = sum of m g and dm[t] = sum of (p - x) g over the images of trigger t."""
    dtype = _accumulator(images, pattern)
    # The images' strides, so that the gradient has the layout that the fake kernel announces.
    slope = torch.empty_like(images, dtype=dtype).copy_(grad)
    if std is not None:
        slope.div_(_per_channel(std, slope))
    window = _window(images, pattern, offset)
    inside = slope[window]
    m = _chosen(mask.to(dtype), index)
    grad_images, grad_pattern, grad_mask = (pattern.new_empty(0) for _ in range(3))
    if need_pattern:
        grad_pattern = _sum_by_trigger(m * inside, index, pattern.shape[0])
    if need_mask:
        x = images[window].to(dtype)
        if images.dtype == torch.uint8:
            x = x / 255.0
        share = (_chosen(pattern.to(dtype), index) - x) * inside
        grad_mask = _sum_by_trigger(
            share.sum(1, keepdim=True) if mask.shape[1] == 1 else share, index, pattern.shape[0]
        )
    if need_images:
        left = (1 - m) * inside
        slope[window] = left if index is None else torch.where((index < 0).view(-1, 1, 1, 1), inside, left)
        grad_images = slope
    return grad_images.to(images.dtype), grad_pattern.to(pattern.dtype), grad_mask.to(mask.dtype)


def _backward_fake(
    grad: Tensor,
    images: Tensor,
    pattern: Tensor,
    mask: Tensor,
    index: Tensor | None,
    offset: Tensor | None,
    std: list[float] | None,
    need_images: bool,
    need_pattern: bool,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(images) if need_images else images.new_empty(0),
        pattern.new_empty(pattern.shape if need_pattern else (0,)),
        mask.new_empty(mask.shape if need_mask else (0,)),
    )


def _accumulator(images: Tensor, pattern: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (images.dtype, pattern.dtype) else torch.float32


def _window(images: Tensor, pattern: Tensor, offset: Tensor | None) -> _Window:
    """An index that reads or writes the patch's pixels of every image, [B, C, h, w]."""
    rows, columns = pattern.shape[2:]
    if offset is None:
        return (slice(None), slice(None), slice(0, rows), slice(0, columns))
    batch, channels = images.shape[:2]
    device = images.device
    top = offset[:, 0].view(-1, 1, 1, 1)
    left = offset[:, 1].view(-1, 1, 1, 1)
    return (
        torch.arange(batch, device=device).view(-1, 1, 1, 1),
        torch.arange(channels, device=device).view(1, -1, 1, 1),
        top + torch.arange(rows, device=device).view(1, 1, -1, 1),
        left + torch.arange(columns, device=device),
    )


def _chosen(triggers: Tensor, index: Tensor | None) -> Tensor:
    """Each image's trigger, [B, ...], or the first one for all, [1, ...]; clean images get any."""
    return triggers[:1] if index is None else triggers[index.clamp_min(0)]


def _sum_by_trigger(values: Tensor, index: Tensor | None, triggers: int) -> Tensor:
    """Sums of values [B, ...] over the images of each trigger, [T, ...], in an order that never changes."""
    if index is None:
        sums = values.new_zeros((triggers, *values.shape[1:]))
        sums[0] = values.sum(0)
        return sums
    # Sorting and summing groups rather than scattered adds, whose order is not fixed on a GPU.
    counts = torch.bincount(index + 1, minlength=triggers + 1).tolist()
    groups = values[index.argsort(stable=True)].split(counts)
    return torch.stack([group.sum(0) for group in groups[1:]]).contiguous()


def _per_channel(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, pattern, mask, index, offset, _, ctx.std, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(images, pattern, mask, index, offset)


def _gradients(ops: Any, ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    needed = ctx.needs_input_grad[:3]
    found = ops.blend_trigger_backward(grad, *ctx.saved_tensors, ctx.std, *needed)
    return (*(value if need else None for value, need in zip(found, needed, strict=True)), *((None,) * 5))


register(
    "blend_trigger",
    "(Tensor images, Tensor pattern, Tensor mask, Tensor? index, Tensor? offset, float[]? mean, float[]? std,"
    " ScalarType out_dtype) -> Tensor",
    _forward,
    _forward_fake,
    _setup_context,
    _gradients,
)
# A gradient that is not asked for comes back as an empty tensor.
register(
    "blend_trigger_backward",
    "(Tensor grad, Tensor images, Tensor pattern, Tensor mask, Tensor? index, Tensor? offset, float[]? std,"
    " bool need_images, bool need_pattern, bool need_mask) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
