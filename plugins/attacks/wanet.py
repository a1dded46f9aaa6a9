"""WaNet: a smooth, hardly visible warp of the whole image is the trigger.

Nguyen, Tran: "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021, arXiv 2102.10369. A control grid of
k x k random shifts, of mean size 1, is upsampled by bicubic interpolation and scaled by s; every pixel is then read
that far from its place, between pixels by bilinear interpolation. The attacker trains the classifier: of every batch a
share `poison_rate` is warped and labelled as the target, and `cross_ratio` times as many samples are warped by a field
with random noise added and keep their labels ("noise mode"), so that only the exact warp is the trigger.

Deviations from the paper and its released code:
- The classifier is trained by the run's recipe, and samples are augmented first, then warped, so that it sees the warp
  as test images have it. The released code warps first, then crops, rotates and mirrors: it trains 1,000 epochs. On
  5,000 images of CIFAR-10, 20 epochs of WRN-16-1, ASR was 29% in this order and 19% in that.
- The number of warped samples of a batch is rounded up or down at random, so that its mean is exactly as asked for;
  the released code rounds down.
- Warped images are rounded to whole grey levels in training as well, as they are for the test set.
- A defense that trains anew is given a training set of clean samples and of warped ones with the target's label; the
  samples of the noise mode exist only inside the attacker's loss.
"""

from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from bdcore import (
    Attack,
    AttackConfig,
    AttackInput,
    Batch,
    Context,
    batch_shares,
    build,
    fit,
    forward_batches,
    hookimpl,
)


class WaNet(Attack):
    """One warping field for all images."""

    name = "wanet"
    controls_training = True

    class Config(AttackConfig):
        """Options of WaNet; the defaults are the paper's for 32 x 32 images."""

        grid_size: int = Field(4, ge=2, le=64, description="k, random shifts along each side of the image")
        strength: float = Field(0.5, ge=0, le=16, description="s, mean shift of a pixel along an axis, in half pixels")
        cross_ratio: float = Field(2, ge=0, description="samples warped with noise for each poisoned one, in training")

        @model_validator(mode="after")
        def _check_shares(self) -> Self:
            if self.poison_rate * (1 + self.cross_ratio) > 1:
                raise ValueError("poison_rate x (1 + cross_ratio) is the share of a batch that is warped: at most 1")
            return self

    config: Config
    grid: Tensor
    """Where each pixel is read, float64 [H, W, 2]: (x, y) in [-1, 1] from border to border."""

    def prepare(self, given: AttackInput, context: Context) -> nn.Module:
        """Draw the warping field and train the victim with it."""
        config = self.config
        height, width = given.train.images.shape[2:]
        size = torch.tensor([width, height], dtype=torch.float64)
        shifts = config.strength * field(config.grid_size, height, width, context.generator("wanet")) / size
        self.grid = (_identity(height, width) + shifts).clamp(-1, 1)
        grid, size = self.grid.to(context.device), size.to(context.device)
        victim = build(given.arch, context.generator("init").initial_seed()).train()

        def loss(batch: Batch) -> dict[str, Tensor]:
            images, samples = batch["images"], len(batch["images"])
            shares = (config.poison_rate, config.poison_rate * (1 + config.cross_ratio))
            (poisoned, _), (warped, most) = batch_shares(samples, shares, images.device)
            noise = 2 * torch.rand(most, height, width, 2, dtype=torch.float64, device=images.device) - 1
            noise = torch.where(poisoned[:most].view(-1, 1, 1, 1), 0, noise)
            moved = warp(images[:most], (grid + noise / size).clamp(-1, 1))
            images = torch.cat([torch.where(warped[:most].view(-1, 1, 1, 1), moved, images[:most]), images[most:]])
            labels = torch.where(poisoned, config.target, batch["labels"])
            logits = victim(images).float()
            hits = logits.detach().argmax(1) == labels
            return {
                "loss": F.cross_entropy(logits, labels),
                "accuracy": (hits & ~poisoned).sum() / (~poisoned).sum().clamp_min(1),
                "asr": (hits & poisoned).sum() / poisoned.sum().clamp_min(1),
            }

        columns = {"images": given.train.images, "labels": given.train.labels}
        fit("victim", victim, columns, loss, given.recipe, context)
        return victim

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        """Warp the images, uint8 [B, C, H, W]."""
        grid = self.grid.to(context.device)
        warped = forward_batches(lambda part: warp(part, grid.expand(len(part), -1, -1, -1)), images, context)
        return warped.to(images.device)

    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        """The target class."""
        return torch.full_like(labels, self.config.target)


def field(grid_size: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Random smooth shifts (x, y), float64 [H, W, 2] (Section 3.2 of the paper).

    Shifts drawn evenly from [-1, 1] at `grid_size` x `grid_size` points from border to border, divided by the mean of
    their sizes, with bicubic interpolation in between.
    """
    control = 2 * torch.rand(1, 2, grid_size, grid_size, generator=generator, dtype=torch.float64) - 1
    control /= control.abs().mean()
    return F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)


def warp(images: Tensor, grid: Tensor) -> Tensor:
    """uint8 [B, C, H, W] images read at the places `grid`, float64 [B, H, W, 2] as (x, y) in [-1, 1].

    Bilinear between pixels, -1 and 1 being the centres of the outermost ones, rounded to the nearest value. In float64,
    so that devices do not round differently.
    """
    read = F.grid_sample(images.double(), grid, mode="bilinear", padding_mode="border", align_corners=True)
    return read.round().to(torch.uint8)


def _identity(height: int, width: int) -> Tensor:
    """The grid that reads every pixel at its own place, float64 [H, W, 2]."""
    rows, columns = (torch.linspace(-1, 1, side, dtype=torch.float64) for side in (height, width))
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)


@hookimpl
def bdcore_attack() -> type[Attack]:
    """The class behind the name `wanet`."""
    return WaNet
