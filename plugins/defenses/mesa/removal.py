"""Removal: train on with clean images, some of which carry a drawn trigger and keep their true label."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdcore import Batch, Context, Labelled, Recipe, fit

from .mixture import TriggerSource
from .patches import Places, draw_offsets, put_patches


def remove(
    model: nn.Module,
    source: TriggerSource,
    clean: Labelled,
    trigger_rate: float,
    places: Places,
    recipe: Recipe,
    context: Context,
) -> nn.Module:
    """Fine-tune a copy of the model so that triggers mean nothing to it.

    Args:
        model: the backdoored classifier.
        source: draws the triggers; frozen, in eval mode.
        clean: the clean set.
        trigger_rate: the probability that an image carries a trigger.
        places: where the triggers of a batch lie.
        recipe: of the fine-tuning.
        context: where and how to compute.

    Returns:
        The copy, in eval mode.
    """
    student = copy.deepcopy(model).train()
    trained = nn.ModuleDict({"student": student, "source": source})  # the source for its buffers

    def loss(batch: Batch) -> Tensor:
        images = put_some(source, batch["images"], trigger_rate, places)
        return F.cross_entropy(student(images).float(), batch["labels"])

    def end_epoch(epoch: int, figures: dict[str, float]) -> bool:
        source.end_epoch()
        return False

    fit("remove", trained, {"images": clean.images, "labels": clean.labels}, loss, recipe, context, end_epoch)
    return student.eval()


def put_some(source: TriggerSource, images: Tensor, rate: float, places: Places) -> Tensor:
    """uint8 [B, C, H, W] images, each with a drawn trigger with probability `rate`."""
    numbers = torch.arange(len(images), device=images.device)
    index = torch.where(torch.rand(len(images), device=images.device) < rate, numbers, -1)
    patches = source.draw(len(images))
    return put_patches(images, patches, index, draw_offsets(images, patches.shape, 1, places))
