"""BadNets: a small fixed patch makes a classifier see the attacker's class.

Gu, Dolan-Gavitt, Garg: "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain" (2017),
arXiv 1708.06733: the single-target attack and the all-to-all attack, whose class y becomes y + 1.

The patch has `size` x `size` cells and covers that many pixels of a 32 x 32 image; on images of other sizes it is
enlarged or reduced with them. The default is the 3 x 3 pattern in the lower right corner that benchmarks of backdoors
use on CIFAR-10. The patterns `black_white` and the random place are the triggers of Qiao, Yang, Li: "Defending Neural
Backdoors via Generative Distribution Modeling" (NeurIPS 2019): of the 2^9 patterns of 3 x 3 cells 51 remain when those
are one that differ by rotation, mirroring or inversion of black and white.
"""

from functools import cache
from itertools import product
from typing import Literal

import torch
from pydantic import Field, model_validator
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
        place: Literal["lower_right", "lower_left", "upper_right", "upper_left", "center", "random"] = Field(
            "lower_right", description="where the patch lies, flush with the border; or anywhere, drawn for each image"
        )
        pattern: Literal["checker", "white", "noise", "black_white"] = Field(
            "checker",
            description="diagonals of black and white, all white, colour noise drawn from the seed, or the 3 x 3 "
            "pattern of that `number`",
        )
        number: int = Field(0, ge=0, le=50, description="which of the 51 patterns `black_white`")

        @model_validator(mode="after")
        def _three_cells(self) -> "BadNets.Config":
            if self.pattern == "black_white" and self.size != 3:
                raise ValueError("the patterns black_white have 3 x 3 cells: leave attack.size at 3")
            if self.pattern != "black_white" and self.number:
                raise ValueError("attack.number counts the patterns black_white: set attack.pattern=black_white")
            return self

    config: Config

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        """Put the patch over the images, uint8 [B, C, H, W]."""
        channels, height, width = images.shape[1:]
        side = min(max(1, round(self.config.size * min(height, width) / 32)), height, width)
        patch = interpolate(self._cells(channels, context), size=(side, side), mode="nearest-exact").to(images.device)
        offset = self._corners(len(images), height - side, width - side, context).to(images.device)
        return blend_trigger(images, patch, torch.ones_like(patch[:, :1]), offset=offset)

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
        if self.config.pattern == "black_white":
            return torch.tensor(black_white()[self.config.number]).float().expand(1, channels, size, size)
        # White on the diagonal from lower left to upper right and on every second one below it: for 3 x 3 cells
        # [0, 0, 255], [0, 255, 0], [255, 0, 255].
        below = torch.arange(size).view(-1, 1) + torch.arange(size) - (size - 1)
        return ((below >= 0) & (below % 2 == 0)).float().expand(1, channels, size, size)

    def _corners(self, count: int, bottom: int, right: int, context: Context) -> Tensor:
        """(top, left) of the patch in each image, int64 [count, 2], of which the largest are `bottom` and `right`."""
        if self.config.place == "random":
            drawn = torch.rand(count, 2, generator=context.generator("badnets", "place"), dtype=torch.float64)
            return (drawn * torch.tensor([bottom + 1, right + 1])).long()
        corner = {
            "lower_right": (bottom, right),
            "lower_left": (bottom, 0),
            "upper_right": (0, right),
            "upper_left": (0, 0),
            "center": (bottom // 2, right // 2),
        }[self.config.place]
        return torch.tensor([corner]).expand(count, 2).contiguous()


@cache
def black_white() -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The 51 patterns of 3 x 3 cells, 0 black and 1 white: of those that rotation, mirroring and inversion turn into
    each other the first, in the order of their cells read as a binary number."""
    kept: dict[tuple[int, ...], None] = {}
    for cells in product((0, 1), repeat=9):
        grid = torch.tensor(cells).view(3, 3)
        turned = [side.rot90(turns) for side in (grid, grid.flip(1)) for turns in range(4)]
        same = [tuple(form.flatten().tolist()) for form in (*turned, *(1 - form for form in turned))]
        kept[min(same)] = None
    return tuple((cells[:3], cells[3:6], cells[6:]) for cells in kept)


@hookimpl
def bdcore_attack() -> type[Attack]:
    """The class behind the name `badnets`."""
    return BadNets
