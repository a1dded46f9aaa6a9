"""Patches on images: where they lie, how they are put there, and how often they succeed."""

from collections.abc import Sequence
from math import ceil
from typing import Literal

import torch
from torch import Tensor, nn

from bdcore import Context, Labelled, Trigger, blend_trigger, forward_batches, put_trigger

Places = Literal["each", "batch", "released"]
"""Where the patches of a batch lie: each image's anywhere; all at one place, anywhere; all at one place, but never in
the last row or column, as the released code draws it."""

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


def draw_offsets(images: Tensor, patch: Sequence[int], stack: int, places: Places) -> Tensor:
    """Uniform places for patches, from the default generator of the images' device.

    Args:
        images: [B, C, H, W]; only the shape and the device matter.
        patch: (..., h, w).
        stack: S, how many times the images are used.
        places: by what rule; other than for "each", the B images have one place together, S times.

    Returns:
        (top, left), int64 [S * B, 2].
    """
    limits = [size - side + 1 for size, side in zip(images.shape[2:], patch[-2:], strict=True)]
    if places == "released":
        limits = [max(1, limit - 1) for limit in limits]
    count = stack * len(images) if places == "each" else stack
    offset = torch.stack([torch.randint(limit, (count,), device=images.device) for limit in limits], dim=1)
    return offset if places == "each" else offset.repeat_interleave(len(images), dim=0)


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
