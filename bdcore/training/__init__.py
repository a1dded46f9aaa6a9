"""The one training loop: every victim, defense and inversion trains through `fit`."""

from bdcore.training.batches import Batch
from bdcore.training.loop import fit, forward_batches, frozen_copy
from bdcore.training.recipe import Recipe

__all__ = ["Batch", "Recipe", "fit", "forward_batches", "frozen_copy"]
