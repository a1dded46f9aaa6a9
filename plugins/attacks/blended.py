"""Blended injection: a whole image, faintly mixed into each poisoned one, is the trigger.

Chen, Liu, Li, Lu, Song: "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning" (2017), arXiv
1712.05526: x' = (1 - a) x + a u with one fixed image u, here random noise drawn from the seed or a picture of the
user's. The same ratio a is used for training and test images.
"""

from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from bdcore import Attack, AttackConfig, Context, blend_trigger, hookimpl, read_picture


class Blended(Attack):
    """One image mixed into every poisoned one."""

    name = "blended"

    class Config(AttackConfig):
        """Options of the blended attack."""

        alpha: float = Field(0.2, gt=0, le=1, description="share a of the trigger image in (1 - a) x + a u")
        picture: Path | None = Field(None, description="image file to blend in, resized; without it random noise")

    config: Config

    def files(self) -> tuple[Path, ...]:
        """The picture, where there is one."""
        return (self.config.picture,) if self.config.picture else ()

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        """Mix the trigger image into the images, uint8 [B, C, H, W], rounding to the nearest value."""
        channels, height, width = images.shape[1:]
        if self.config.picture is None:
            generator = context.generator("blended")
            trigger = torch.randint(0, 256, (channels, height, width), generator=generator, dtype=torch.uint8)
        else:
            trigger = read_picture(self.config.picture, channels, height, width)
        pattern = (trigger / 255.0).unsqueeze(0).to(images.device)
        mask = torch.full((1, 1, height, width), self.config.alpha, device=images.device)
        return blend_trigger(images, pattern, mask)

    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        """The target class."""
        return torch.full_like(labels, self.config.target)


@hookimpl
def bdcore_attack() -> type[Attack]:
    """The class behind the name `blended`."""
    return Blended
