"""Batches out of resident tensors: order, crop, flip, cutout, the same ones on every device."""

from collections.abc import Iterator, Mapping
from math import ceil

import torch
from torch import Tensor

from bdcore.ops import load_batch
from bdcore.training.recipe import Recipe

Batch = dict[str, Tensor]


def steps_per_epoch(samples: int, recipe: Recipe) -> int:
    """Batches an epoch: whole passes over the data, at least `recipe.min_steps` of them."""
    batches = ceil(samples / recipe.batch_size)
    return batches * ceil(recipe.min_steps / batches)


def epoch_batches(columns: Mapping[str, Tensor], recipe: Recipe, generator: torch.Generator) -> Iterator[Batch]:
    """One epoch of batches.

    Args:
        columns: tensors with N rows each, on one device; the column "images" is uint8 [N, C, H, W], NCHW or
            channels-last, and augmented.
        recipe: batch size, order and augmentation.
        generator: a CPU generator of this epoch's own.

    Yields:
        the rows of every column for at most `batch_size` samples (as even as can be: no batch of a single sample
        after many full ones, which BatchNorm would suffer from), and their numbers as "index". Images are
        channels-last. How a sample is augmented follows from the generator and the sample's number, not from how
        batches are cut.
    """
    gathered = {name: column for name, column in columns.items() if name != "images"}
    images = columns.get("images")
    device = next(iter(columns.values())).device
    samples = len(next(iter(columns.values())))
    batches = ceil(samples / recipe.batch_size)
    for _ in range(ceil(recipe.min_steps / batches)):
        order = torch.randperm(samples, generator=generator) if recipe.shuffle else torch.arange(samples)
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        for index in order.to(device).tensor_split(batches):
            batch = {name: column[index] for name, column in gathered.items()}
            batch["index"] = index
            if images is not None:
                batch["images"] = load_batch(
                    images, index, seed=seed, crop=recipe.crop, flip=recipe.flip, cutout=recipe.cutout
                )
            yield batch
