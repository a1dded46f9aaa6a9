"""SIG: a faint sinusoidal signal over the images of the target class, whose labels stay as they are.

Barni, Kallas, Tondi: "A New Backdoor Attack in CNNs by Training Set Corruption without Label Poisoning" (ICIP 2019),
arXiv 1902.11237: v(i, j) = d sin(2 pi j f / W) is added to every pixel of column j in an image of width W, with
d = 20 of 255 and f = 6. A clean-label attack: `poison_rate` is a share of the whole training set, all of it taken from
the target class, so a tenth of a balanced set of ten classes would be every image of that class.

Benchmarks of backdoors also blend the signal in, (1 - a) x + a m with a = 0.2, where m is the signal as an image. Here
m has full contrast, 127.5 (1 + sin(2 pi j f / W)), so that it swings by 25.5 of 255 for that a.
"""

import math

import torch
from pydantic import Field
from torch import Tensor

from bdcore import Attack, CleanLabelAttack, CleanLabelConfig, Context, DataError, blend_trigger, hookimpl


class Sig(CleanLabelAttack):
    """Vertical stripes, stronger and weaker by turns."""

    name = "sig"

    class Config(CleanLabelConfig):
        """Options of SIG."""

        poison_rate: float = Field(
            0.05, ge=0, le=1, description="share of all training samples that are poisoned, all of the target class"
        )
        amplitude: float = Field(20, ge=1, le=255, description="d, the largest change of a pixel, in units of 1 / 255")
        frequency: float = Field(6, gt=0, description="f, periods of the signal over the width of an image")
        blend: float | None = Field(
            None, ge=0.01, le=1, description="share a of the signal in (1 - a) x + a m, in place of adding d sin(...)"
        )

    config: Config

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        """Put the signal over the images, uint8 [B, C, H, W]; what would leave [0, 255] stays at its end."""
        width = images.shape[3]
        phase = 2 * math.pi * self.config.frequency / width * torch.arange(width, dtype=torch.float64)
        wave = phase.sin().round(decimals=12)  # zero where it is zero, whatever the machine's sine makes of it
        largest = self.config.amplitude if self.config.blend is None else 127.5 * self.config.blend
        signal = (largest * wave).round().long().to(images.device)
        if not bool(wave.any()):
            raise DataError(
                f"attack.frequency={self.config.frequency:g} leaves no signal on images {width} pixels wide: every "
                "column lies on a zero of the sine. Choose another."
            )
        if not bool(signal.any()):
            name = "amplitude" if self.config.blend is None else "blend"
            raise DataError(
                f"attack.{name}={getattr(self.config, name):g} leaves no signal on images {width} pixels wide: with "
                f"attack.frequency={self.config.frequency:g} no pixel changes by as much as half a grey level: raise "
                f"attack.{name}."
            )
        if self.config.blend is not None:
            return _blended(images, wave, self.config.blend)
        # In uint8 arithmetic, which wraps: what would leave [0, 255] is cut off before the signal is added.
        lowest, highest = (-signal).clamp_min(0).byte(), (255 - signal.clamp_min(0)).byte()
        return images.clamp(lowest, highest).add_((signal % 256).byte())


def _blended(images: Tensor, wave: Tensor, share: float) -> Tensor:
    """(1 - share) x + share m, rounded, where m is the wave as an image of whole values from 0 to 255."""
    signal = (127.5 * (1 + wave)).round().float() / 255
    pattern = signal.to(images.device).expand(1, *images.shape[1:]).contiguous()
    return blend_trigger(images, pattern, torch.full_like(pattern[:, :1], share))


@hookimpl
def bdcore_attack() -> type[Attack]:
    """The class behind the name `sig`."""
    return Sig
