"""Input-aware dynamic backdoor: a network draws another trigger for every image, and it works on that image alone.

Nguyen, Tran: "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020, arXiv 2010.08138. A generator G draws a pattern and a
mask network M says where it covers the image: x' = x + (G(x) - x) M(x). M is trained first, alone, to be different for
different images and to cover a share `density` of each; then G and the classifier train together. Of every batch a
share `poison_rate` carries its own trigger and is labelled as the target; a share `cross_rate` carries the trigger of
another image and keeps its label; and the patterns of different images are held apart by the diversity loss.

Deviations from the paper and its released code:
- The classifier is trained by the run's recipe. The learning rates of G and M fall at the same shares of their training
  as in the released code (600 and 25 epochs), by the same factor. M trains for 10 epochs: after 6 over 5,000 images of
  CIFAR-10 its masks cover 4.9% and hardly change any more.
- The other image of a pair comes from the same batch, which is in random order, not from a second pass over the data;
  the diversity loss of G compares all triggers of a batch with each other's neighbours, not poisons with cross samples.
- The number of poisons and cross samples of a batch is rounded up or down at random, so that its mean is exactly as
  asked for; the released code rounds down.
- The networks halve images three times from 32 pixels on, twice from 16 pixels on, else once, and begin with 32
  channels; the released code knows 32 and 28 pixels, and begins with 16 channels for the latter.
- A defense that trains anew is given a training set of clean samples and of triggered ones with the target's label; the
  samples with another image's trigger exist only inside the attacker's loss.
"""

from math import ceil
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from bdcore import (
    Architecture,
    Attack,
    AttackConfig,
    AttackInput,
    Batch,
    BatchNormReLU,
    Context,
    DataError,
    Recipe,
    batch_shares,
    build,
    fit,
    forward_batches,
    hookimpl,
)

_MOMENTUM = 0.05  # of the networks' batch normalisation


class Dynamic(Attack):
    """A trigger for each image, drawn by a network."""

    name = "dynamic"
    controls_training = True

    class Config(AttackConfig):
        """Options of the input-aware attack; the rates, density and weight are the paper's."""

        cross_rate: float = Field(0.1, ge=0, le=1, description="share of a batch that carries another image's trigger")
        density: float = Field(0.032, gt=0, lt=1, description="share of an image that its trigger covers")
        diversity: float = Field(
            1, ge=0, description="weight of the loss that holds triggers of different images apart"
        )
        mask_epochs: int = Field(
            10, ge=1, le=10_000, description="passes over the training set to train the mask network"
        )

        @model_validator(mode="after")
        def _check_shares(self) -> Self:
            if self.poison_rate + self.cross_rate > 1:
                raise ValueError("poison_rate + cross_rate is the share of a batch that carries triggers: at most 1")
            return self

    config: Config
    generator: nn.Module
    mask: nn.Module

    def prepare(self, given: AttackInput, context: Context) -> nn.Module:
        """Train the mask network, then the generator and the victim together.

        Raises:
            DataError: where the images are smaller than 4 x 4 pixels.
        """
        channels, height, width = given.arch.shape
        if min(height, width) < 4:
            raise DataError(
                f"dynamic draws triggers for images of at least 4 x 4 pixels, these have {height} x {width}"
            )
        columns = {"images": given.train.images, "labels": given.train.labels}
        self.mask = _Drawer(given.arch, 1, context.generator("mask").initial_seed())
        self.generator = _Drawer(given.arch, channels, context.generator("generator").initial_seed())
        self._train_mask(columns, given, context)
        return self._train_victim(columns, given, context)

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        """Put each image's own trigger into it, uint8 [B, C, H, W]."""
        networks = [network.to(context.device).eval() for network in (self.generator, self.mask)]

        def triggered(part: Tensor) -> Tensor:
            pixels = part.float() / 255
            return (cover(pixels, networks[0](pixels), threshold(networks[1](pixels))) * 255).round().to(torch.uint8)

        return forward_batches(triggered, images, context).to(images.device)

    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        """The target class."""
        return torch.full_like(labels, self.config.target)

    def _train_mask(self, columns: dict[str, Tensor], given: AttackInput, context: Context) -> None:
        """Masks that differ between images and cover `density` of each."""
        config, mask = self.config, self.mask.train()
        spread = torch.tensor(given.arch.std, device=context.device).view(1, -1, 1, 1)

        def loss(batch: Batch) -> dict[str, Tensor]:
            images = batch["images"].float() / 255
            masks = threshold(mask(images))
            # As in the released code, distances between images are those of normalised ones.
            alike = likeness(images / spread, masks)
            excess = (masks - config.density).clamp_min(0).mean()
            return {"loss": 100 * excess + config.diversity * alike, "likeness": alike, "density": masks.mean()}

        recipe = _adam(given.recipe, config.mask_epochs, (10 / 25, 20 / 25))
        fit("mask", mask, columns, loss, recipe, context)
        mask.eval().requires_grad_(False)

    def _train_victim(self, columns: dict[str, Tensor], given: AttackInput, context: Context) -> nn.Module:
        """The generator and the classifier together, each by its own recipe."""
        config, recipe, mask, generator = self.config, given.recipe, self.mask, self.generator.train()
        victim = build(given.arch, context.generator("init").initial_seed()).train()

        def loss(batch: Batch) -> dict[str, Tensor]:
            images, samples = batch["images"].float() / 255, len(batch["images"])
            shares = (config.poison_rate, config.poison_rate + config.cross_rate)
            (poisoned, _), (changed, most) = batch_shares(samples, shares, images.device)
            labels = torch.where(poisoned, config.target, batch["labels"])
            alike = images.new_zeros(())
            if most:
                # A poison's trigger is drawn for itself, a cross sample's for the image half a batch away.
                own, others = images[:most], images.roll(-(samples // 2), 0)[:most]
                sources = torch.where(poisoned[:most].view(-1, 1, 1, 1), own, others)
                patterns = generator(sources)
                alike = likeness(sources, patterns)
                with torch.no_grad():
                    masks = threshold(mask(sources))
                covered = torch.where(changed[:most].view(-1, 1, 1, 1), cover(own, patterns, masks), own)
                images = torch.cat([covered, images[most:]])
            logits = victim(images).float()
            hits = logits.detach().argmax(1) == labels
            return {
                "loss": F.cross_entropy(logits, labels) + config.diversity * alike,
                "likeness": alike,
                "accuracy": (hits & ~poisoned).sum() / (~poisoned).sum().clamp_min(1),
                "asr": (hits & poisoned).sum() / poisoned.sum().clamp_min(1),
            }

        both = nn.ModuleDict({"victim": victim, "generator": generator})
        parts = {"generator": _adam(recipe, recipe.epochs, (1 / 3, 1 / 2, 2 / 3, 5 / 6))}
        fit("victim", both, columns, loss, recipe, context, parts=parts)
        generator.eval()
        return victim


def cover(images: Tensor, patterns: Tensor, masks: Tensor) -> Tensor:
    """x + (G - x) M for [0, 1] images and patterns [B, C, H, W] and masks [B, 1, H, W] (Section 3.2 of the paper)."""
    return images + (patterns - images) * masks


def threshold(drawn: Tensor) -> Tensor:
    """Drawn masks in [0, 1] pushed towards 0 and 1, as in the released code."""
    return torch.tanh(20 * drawn - 10) / 2 + 0.5


def likeness(inputs: Tensor, drawn: Tensor) -> Tensor:
    """The diversity loss: the distance of two inputs over that of what was drawn for them, the mean over all pairs of a
    sample and the one before it (the first: the last), float [B, C, H, W] and [B, c, H, W].

    Distances are root mean squares of differences. For one sample alone it is 0.
    """
    apart = [torch.linalg.vector_norm(part - part.roll(1, 0), dim=(1, 2, 3)) for part in (inputs, drawn)]
    counts = [part.shape[1:].numel() ** 0.5 for part in (inputs, drawn)]
    return ((apart[0] / counts[0]) / (apart[1] / counts[1] + 1e-7)).mean()


def _adam(recipe: Recipe, epochs: int, falls: tuple[float, ...]) -> Recipe:
    """The recipe of G and M: batches and augmentation of `recipe`; the rate falls after these shares of the epochs."""
    return Recipe(
        epochs=epochs,
        batch_size=recipe.batch_size,
        optimizer="adam",
        lr=0.01,
        betas=(0.5, 0.9),
        weight_decay=0,
        schedule="steps",
        milestones=tuple(ceil(share * epochs) for share in falls),
        crop=recipe.crop,
        flip=recipe.flip,
        cutout=recipe.cutout,
        shuffle=recipe.shuffle,
        min_steps=recipe.min_steps,
    )


class _Drawer(nn.Module):
    """An encoder and decoder that draws an image of values in [0, 1] from an image.

    Args:
        arch: the shape of the images, and how they are normalised.
        channels: of what is drawn.
        seed: of the first weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, arch: Architecture, channels: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(arch.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(arch.std).view(1, -1, 1, 1))
        side = min(arch.shape[1:])
        sizes = [arch.shape[1:]]
        widths = [32 * 2**step for step in range(1 + (side >= 16) + (side >= 32))]
        layers = list[nn.Module]()
        last = arch.shape[0]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for width in widths:
                layers += [*_convolution(last, width), *_convolution(width, width), nn.MaxPool2d(2)]
                sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
                last = width
            layers += _convolution(last, last)
            for width, size in zip([*widths[-2::-1], channels], sizes[-2::-1], strict=True):
                layers += [nn.Upsample(size, mode="bilinear"), *_convolution(last, last), *_convolution(last, width)]
                last = width
            layers[-1] = nn.BatchNorm2d(channels, momentum=_MOMENTUM)  # what is drawn may be below 0
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Draw, float [B, channels, H, W], for images in [0, 1], float [B, C, H, W]."""
        drawn = self.layers((images - self.mean) / self.std)
        return torch.tanh(drawn.float()) / 2 + 0.5


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, padding=1), BatchNormReLU(outputs, momentum=_MOMENTUM)


@hookimpl
def bdcore_attack() -> type[Attack]:
    """The class behind the name `dynamic`."""
    return Dynamic
