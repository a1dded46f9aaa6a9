"""BadNets: a small fixed patch makes a classifier see the attacker's class.

Gu, Dolan-Gavitt, Garg: "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain" (2017),
arXiv 1708.06733: the single-target attack and the all-to-all attack, whose class y becomes y + 1.

The patch has `size` x `size` cells and covers that many pixels of a 32 x 32 image; on images of other sizes it is
enlarged or reduced with them. The default is the 3 x 3 pattern in the lower right corner that benchmarks of backdoors
use on CIFAR-10.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate

from bdcore import Attack, AttackConfig, Context, blend_trigger, hookimpl


class BadNets(Attack):
    """A patch at a fixed place of the image."""

    name = "badnets"

    class Config(AttackConfig):
        """Options of BadNets."""

        all_to_all: bool = Field(False, description="class y becomes y + 1 (the last one 0) instead of `target`")
        size: int = Field(3, ge=1, le=32, description="side of the patch in a 32 x 32 image; it scales with the image")
        place: Literal["lower_right", "lower_left", "upper_right", "upper_left", "center"] = Field(
            "lower_right", description="where the patch lies, flush with the border"
        )
        pattern: Literal["checker", "white", "noise"] = Field(
            "checker", description="diagonals of black and white, all white, or colour noise drawn from the seed"
        )

    config: Config

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        """Put the patch over the images, uint8 [B, C, H, W]."""
        channels, height, width = images.shape[1:]
        side = min(max(1, round(self.config.size * min(height, width) / 32)), height, width)
        patch = interpolate(self._cells(channels, context), size=(side, side), mode="nearest-exact").to(images.device)
        offset = torch.tensor([self._corner(height - side, width - side)], device=images.device)
        return blend_trigger(
            images, patch, torch.ones_like(patch[:, :1]), offset=offset.expand(len(images), 2).contiguous()
        )

    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        """The target class, or the next class for all-to-all."""
        return (labels + 1) % classes if self.config.all_to_all else torch.full_like(labels, self.config.target)

    def _cells(self, channels: int, context: Context) -> Tensor:
        """The patch's cells, float [1, C, size, size] in [0, 1]."""
        size = self.config.size
        if self.config.pattern == "noise":
            noise = torch.randint(0, 256, (1, channels, size, size), generator=context.generator("badnets"))
            return noise / 255.0
        if self.config.pattern == "white":
            return torch.ones(1, channels, size, size)
        # White on the diagonal from lower left to upper right and on every second one below it: for 3 x 3 cells
        # [0, 0, 255], [0, 255, 0], [255, 0, 255].
        below = torch.arange(size).view(-1, 1) + torch.arange(size) - (size - 1)
        return ((below >= 0) & (below % 2 == 0)).float().expand(1, channels, size, size)

    def _corner(self, bottom: int, right: int) -> tuple[int, int]:
        """(top, left) of the patch, of which the largest values are `bottom` and `right`."""
        return {
            "lower_right": (bottom, right),
            "lower_left": (bottom, 0),
            "upper_right": (0, right),
            "upper_left": (0, 0),
            "center": (bottom // 2, right // 2),
        }[self.config.place]


@hookimpl
def bdcore_attack() -> type[Attack]:
    """The class behind the name `badnets`."""
    return BadNets
