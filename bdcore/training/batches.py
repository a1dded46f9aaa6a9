"""Batches out of resident tensors: order, crop, flip, cutout, drawn on the CPU so that every device gets the same."""

from collections.abc import Iterator, Mapping
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcore.training.recipe import Recipe

Batch = dict[str, Tensor]


def steps_per_epoch(samples: int, recipe: Recipe) -> int:
    """Batches an epoch: whole passes over the data, at least `recipe.min_steps` of them."""
    batches = ceil(samples / recipe.batch_size)
    return batches * ceil(recipe.min_steps / batches)


def epoch_batches(columns: Mapping[str, Tensor], recipe: Recipe, generator: torch.Generator) -> Iterator[Batch]:
    """One epoch of batches.

    Args:
        columns: tensors with N rows each, on one device; the column "images" is uint8 [N, C, H, W] and augmented.
        recipe: batch size, order and augmentation.
        generator: a CPU generator of this epoch's own.

    Yields:
        the rows of every column for at most `batch_size` samples (as even as can be: no batch of a single sample
        after many full ones, which BatchNorm would suffer from), and their numbers as "index".
    """
    images = columns.get("images")
    device = next(iter(columns.values())).device
    samples = len(next(iter(columns.values())))
    batches = ceil(samples / recipe.batch_size)
    for _ in range(ceil(recipe.min_steps / batches)):
        order = torch.randperm(samples, generator=generator) if recipe.shuffle else torch.arange(samples)
        draws = None if images is None else _draw(images, recipe, generator, device)
        for index in order.to(device).tensor_split(batches):
            batch = {name: column[index] for name, column in columns.items()}
            batch["index"] = index
            if draws is not None:
                batch["images"] = _augment(batch["images"], {k: v[index] for k, v in draws.items()}, recipe)
            yield batch


def _draw(images: Tensor, recipe: Recipe, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """This pass's random numbers, a row a sample, so that they do not depend on how batches are cut."""
    samples, _, height, width = images.shape
    draws: dict[str, Tensor] = {}
    if recipe.crop:
        draws["crop"] = torch.randint(0, 2 * recipe.crop + 1, (samples, 2), generator=generator)
    if recipe.flip:
        draws["flip"] = torch.rand(samples, generator=generator) < 0.5
    if recipe.cutout:
        rows = torch.randint(0, height, (samples,), generator=generator)
        draws["cutout"] = torch.stack([rows, torch.randint(0, width, (samples,), generator=generator)], 1)
    return {name: value.to(device) for name, value in draws.items()}


def _augment(images: Tensor, draws: dict[str, Tensor], recipe: Recipe) -> Tensor:
    """Crop, flip and cut uint8 [B, C, H, W] images in whole-batch operations."""
    batch, _, height, width = images.shape
    if "crop" in draws:
        # Every window of the padded batch is a view; one gather copies the chosen ones.
        windows = F.pad(images, (recipe.crop,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        rows = torch.arange(batch, device=images.device)
        images = windows[rows, :, draws["crop"][:, 0], draws["crop"][:, 1]]
    if "flip" in draws:
        images = torch.where(draws["flip"].view(-1, 1, 1, 1), images.flip(-1), images)
    if "cutout" in draws:
        # The square covers `cutout` pixels from its first row and column, which may lie outside the image.
        first = draws["cutout"] - recipe.cutout // 2
        down = torch.arange(height, device=images.device) - first[:, :1]
        right = torch.arange(width, device=images.device) - first[:, 1:]
        inside = ((down >= 0) & (down < recipe.cutout))[:, :, None] & ((right >= 0) & (right < recipe.cutout))[:, None]
        images = images.masked_fill(inside[:, None], 0)
    return images
