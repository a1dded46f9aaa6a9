"""What attacks share: the side of a patch, a picture as a trigger, shares of a batch."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bdcore.errors import DataError


def patch_side(size: int, height: int, width: int) -> int:
    """The side in pixels, at least 1, of a square patch on images of that height and width: `size`, at most 32, is its
    side on an image of 32 x 32, and it scales with the image's shorter side."""
    return max(1, round(size * min(height, width) / 32))


def batch_shares(samples: int, shares: Sequence[float], device: torch.device) -> list[tuple[Tensor, int]]:
    """The samples at the head of a batch that make up each of some shares of it.

    A share that is no whole number of samples is rounded up or down at random, so that its mean is as asked for: of
    12.8 samples 12 are certain, and one more in 8 of 10 cases. One draw decides for all shares, so that a larger one
    holds a smaller one. It is of the CPU's default generator, which `fit` seeds and restores.

    Args:
        samples: in the batch, which is in random order.
        shares: each in [0, 1].
        device: of the result.

    Returns:
        For each share: which samples belong to it, bool [samples], and how many those can be at most.
    """
    place = torch.arange(samples, device=device) + torch.rand(()).item()
    return [(place < samples * share, min(ceil(samples * share), samples)) for share in shares]


def read_picture(path: Path, channels: int, height: int, width: int) -> Tensor:
    """The picture at `path`, which the option `picture` of an attack names, uint8 [C, H, W], resized without keeping
    its aspect ratio.

    Raises:
        DataError: the images have not 1 or 3 channels; there is no such file, or it is no image of 8 bits a channel.
    """
    if channels not in (1, 3):
        raise DataError(f"attack.picture needs images of 1 or 3 channels, these have {channels}: leave it out")
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):  # which Pillow would cut off at 255
                raise DataError(f"attack.picture: {path} has more than 8 bits a channel: save it with 8")
            # As a viewer turns it; by way of RGBA, because palettes may hold transparency, which is dropped.
            upright = ImageOps.exif_transpose(picture).convert("RGBA")
            resized = upright.convert("L" if channels == 1 else "RGB").resize(
                (width, height), Image.Resampling.BILINEAR
            )
    except FileNotFoundError as error:
        raise DataError(f"attack.picture: there is no file {path}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow reports damaged files by any of these.
        raise DataError(f"attack.picture: {path} cannot be read as an image: {error}") from error
    return torch.from_numpy(np.array(resized)).reshape(height, width, channels).permute(2, 0, 1).contiguous()
