"""A recovered trigger on images, whatever its form."""

import torch
from torch import Tensor

from bdcore.artifacts import Trigger
from bdcore.ops.blend_trigger import blend_trigger


def put_trigger(trigger: Trigger, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Put a recovered trigger on each image; see `Trigger` for its forms.

    Args:
        trigger: with a delta, with mask and pattern, or with patches, on the device of the images.
        images: uint8 [B, C, H, W]; not altered.
        generator: of the CPU; draws which patch comes where, and is needed for patches alone.

    Returns:
        float32 [B, C, H, W] in [0, 1].

    Raises:
        ValueError: the trigger has none of these forms, or there are patches and no generator.
    """
    if trigger.delta is not None:
        return (images.float() / 255 + trigger.delta).clamp(0, 1)
    if trigger.mask is not None and trigger.pattern is not None:
        return blend_trigger(images, trigger.pattern[None], trigger.mask[None], out_dtype=torch.float32)
    if trigger.patches is None:
        raise ValueError("a trigger needs a delta, a mask with a pattern, or patches")
    if generator is None:
        raise ValueError("patches come anywhere: a generator is needed to draw where")
    patches = trigger.patches
    free = torch.tensor([size - side + 1 for size, side in zip(images.shape[2:], patches.shape[2:], strict=True)])
    offset = (torch.rand(len(images), 2, generator=generator, dtype=torch.float64) * free).long()
    index = torch.randint(len(patches), (len(images),), generator=generator)
    return blend_trigger(
        images,
        patches,
        torch.ones_like(patches[:, :1]),
        index=index.to(images.device),
        offset=offset.to(images.device),
        out_dtype=torch.float32,
    )
