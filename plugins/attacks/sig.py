"""SIG: a faint sinusoidal signal over the images of the target class, whose labels stay as they are.

Barni, Kallas, Tondi: "A New Backdoor Attack in CNNs by Training Set Corruption without Label Poisoning" (ICIP 2019),
arXiv 1902.11237: v(i, j) = d sin(2 pi j f / W) is added to every pixel of column j in an image of width W, with
d = 20 of 255 and f = 6. A clean-label attack: `poison_rate` is a share of the whole training set, all of it taken from
the target class, so a tenth of a balanced set of ten classes would be every image of that class.
"""

import math

import torch
from pydantic import Field
from torch import Tensor

from bdcore import Attack, AttackConfig, Context, DataError, hookimpl


class Sig(Attack):
    """Vertical stripes, stronger and weaker by turns."""

    name = "sig"

    class Config(AttackConfig):
        """Options of SIG."""

        poison_rate: float = Field(
            0.05, ge=0, le=1, description="share of all training samples that are poisoned, all of the target class"
        )
        amplitude: float = Field(20, ge=1, le=255, description="d, the largest change of a pixel, in units of 1 / 255")
        frequency: float = Field(6, gt=0, description="f, periods of the signal over the width of an image")

    config: Config

    def eligible(self, labels: Tensor, classes: int) -> Tensor:
        """The samples of the target class."""
        return labels == self.config.target

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        """Add the rounded signal to the images, uint8 [B, C, H, W]; what would leave [0, 255] stays at its end."""
        width = images.shape[3]
        phase = 2 * math.pi * self.config.frequency / width * torch.arange(width, dtype=torch.float64)
        signal = (self.config.amplitude * phase.sin()).round().long().to(images.device)
        if not bool(signal.any()):
            raise DataError(
                f"attack.frequency={self.config.frequency:g} leaves no signal on images {width} pixels wide: every "
                "column lies on a zero of the sine. Choose another."
            )
        # In uint8 arithmetic, which wraps: what would leave [0, 255] is cut off before the signal is added.
        lowest, highest = (-signal).clamp_min(0).byte(), (255 - signal.clamp_min(0)).byte()
        return images.clamp(lowest, highest).add_((signal % 256).byte())

    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        """The target class, which the poisoned training samples have already."""
        return torch.full_like(labels, self.config.target)


@hookimpl
def bdcore_attack() -> type[Attack]:
    """The class behind the name `sig`."""
    return Sig
