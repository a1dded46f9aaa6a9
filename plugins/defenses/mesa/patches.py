"""Patches on images: where they lie, how they are put there, and how often they succeed."""

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor, nn

from bdcore import Context, Labelled, Trigger, blend_trigger, forward_batches, put_trigger

_TRIALS = 1000  # images that a success is measured on: a share then errs by 1.6 points at most (one deviation)


def put_patches(
    images: Tensor, patches: Tensor, index: Tensor, offset: Tensor, out_dtype: torch.dtype = torch.uint8
) -> Tensor:
    """Overwrite a window of each image with a patch.

    Args:
        images: uint8 [B, C, H, W].
        patches: float [T, C, h, w] in [0, 1].
        index: int64 [B], each image's patch, -1 for none.
        offset: int64 [B, 2], (top, left) of the window.
        out_dtype: uint8, or float32 for images in [0, 1] that are differentiable with respect to the patches.

    Returns:
        [B, C, H, W].
    """
    return blend_trigger(
        images, patches, torch.ones_like(patches[:, :1]), index=index, offset=offset, out_dtype=out_dtype
    )


def draw_offsets(images: Tensor, patch: Sequence[int], stack: int, one_place: bool) -> Tensor:
    """Uniform places for patches, from the default generator of the images' device.

    Args:
        images: [B, C, H, W]; only the shape and the device matter.
        patch: (..., h, w).
        stack: S, how many times the images are used.
        one_place: one place for the B images together, and that never the last row or column (as the released code
            draws it), instead of one for each image, anywhere.

    Returns:
        (top, left), int64 [S * B, 2].
    """
    limits = [size - side + 1 for size, side in zip(images.shape[2:], patch[-2:], strict=True)]
    count = len(images)
    if one_place:
        limits = [max(1, limit - 1) for limit in limits]
    drawn = [torch.randint(limit, (stack if one_place else stack * count,), device=images.device) for limit in limits]
    offset = torch.stack(drawn, dim=1)
    return offset.repeat_interleave(count, dim=0) if one_place else offset


def measure_success(
    model: nn.Module, patches: Tensor, target: int, clean: Labelled, context: Context, generator: torch.Generator
) -> float:
    """The share of clean images of other classes that go to `target` with one of the patches at a random place.

    Args:
        model: in eval mode.
        patches: float [K, C, h, w] in [0, 1].
        target: a class.
        clean: the clean set; each image is used once or, of a small set, several times.
        context: where to compute.
        generator: on the CPU; draws images, patches and places.
    """
    others = (clean.labels.cpu() != target).nonzero()[:, 0]
    chosen = others[torch.randperm(len(others), generator=generator)].repeat(ceil(_TRIALS / len(others)))[:_TRIALS]
    trigger = Trigger(target, patches=patches)
    predicted = forward_batches(
        lambda batch: model(put_trigger(trigger, batch, generator)).argmax(1),
        clean.images[chosen.to(clean.images.device)],
        context,
    )
    return float((predicted == target).double().mean())
