"""BadNets: a small fixed patch makes a classifier see the attacker's class.

Gu, Dolan-Gavitt, Garg: "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain" (2017),
arXiv 1708.06733: the single-target attack and the all-to-all attack, whose class y becomes y + 1.

The patch has `size` x `size` cells and covers that many pixels of a 32 x 32 image; on images of other sizes it is
enlarged or reduced with them. The default is the 3 x 3 pattern in the lower right corner that benchmarks of backdoors
use on CIFAR-10. The patterns `black_white` and the random place are the triggers of Qiao, Yang, Li: "Defending Neural
Backdoors via Generative Distribution Modeling" (NeurIPS 2019): of the 2^9 patterns of 3 x 3 cells 51 remain when those
are one that differ by rotation, mirroring or inversion of black and white. A picture of the user's may be the patch,
and any place.
"""

from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import interpolate

from bdcore import Attack, AttackConfig, Context, blend_trigger, hookimpl, patch_side, read_picture


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
        number: int = Field(0, ge=0, le=50, description="which of the 51 patterns `black_white`; 0 is all black")
        picture: Path | None = Field(None, description="image file that is the patch, resized, in place of a pattern")
        row: int | None = Field(
            None, ge=0, le=31, description="of the patch's upper left corner in a 32 x 32 image, in place of `place`"
        )
        column: int | None = Field(None, ge=0, le=31, description="of the same corner; it scales with the image too")

        @model_validator(mode="after")
        def _three_cells(self) -> "BadNets.Config":
            if self.pattern == "black_white" and self.size != 3:
                raise ValueError("the patterns black_white have 3 x 3 cells: leave attack.size at 3")
            if self.pattern != "black_white" and self.number:
                raise ValueError("attack.number counts the patterns black_white: set attack.pattern=black_white")
            return self

        @model_validator(mode="after")
        def _one_patch_at_one_place(self) -> "BadNets.Config":
            # A record names every option, so that only a value of one's own shows that its author expects an effect.
            fields = type(self).model_fields
            if self.picture is not None and self.pattern != fields["pattern"].default:
                raise ValueError("attack.picture takes the place of attack.pattern: leave one of them out")
            if (self.row is None) != (self.column is None):
                raise ValueError("attack.row and attack.column say together where the patch lies: set both")
            if self.row is None or self.column is None:
                return self
            if self.place != fields["place"].default:
                raise ValueError("attack.row and attack.column take the place of attack.place: leave it out")
            if max(self.row, self.column) + self.size > 32:
                raise ValueError(
                    f"a patch of {self.size} x {self.size} pixels whose corner lies in row {self.row}, column"
                    f" {self.column} does not fit into 32 x 32: attack.row and attack.column are at most"
                    f" {32 - self.size}"
                )
            return self

    config: Config

    def files(self) -> tuple[Path, ...]:
        """The picture, where there is one."""
        return (self.config.picture,) if self.config.picture else ()

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        """Put the patch over the images, uint8 [B, C, H, W]."""
        channels, height, width = images.shape[1:]
        side = patch_side(self.config.size, height, width)
        patch = self._patch(channels, side, context).to(images.device)
        offset = self._corners(len(images), height, width, side, context).to(images.device)
        return blend_trigger(images, patch, torch.ones_like(patch[:, :1]), offset=offset)

    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        """The target class, or the next class for all-to-all."""
        return (labels + 1) % classes if self.config.all_to_all else torch.full_like(labels, self.config.target)

    def _patch(self, channels: int, side: int, context: Context) -> Tensor:
        """The patch, float [1, C, side, side] in [0, 1]."""
        if self.config.picture is not None:
            return (read_picture(self.config.picture, channels, side, side) / 255).unsqueeze(0)
        return interpolate(self._cells(channels, context), size=(side, side), mode="nearest-exact")

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

    def _corners(self, count: int, height: int, width: int, side: int, context: Context) -> Tensor:
        """(top, left) of the patch in each image, int64 [count, 2]."""
        bottom, right = height - side, width - side
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
        if self.config.row is not None and self.config.column is not None:
            # What fits into 32 x 32 pixels fits here but for the rounding of corner and side.
            corner = (
                min(round(self.config.row * height / 32), bottom),
                min(round(self.config.column * width / 32), right),
            )
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
