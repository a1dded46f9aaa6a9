"""Removal: train on with clean images, some of which carry a drawn trigger and keep their true label."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdcore import Batch, Context, Labelled, Recipe, fit

from .mixture import TriggerSource
from .patches import draw_offsets, put_patches


def remove(
    model: nn.Module,
    source: TriggerSource,
    clean: Labelled,
    trigger_rate: float,
    one_place: bool,
    recipe: Recipe,
    context: Context,
) -> nn.Module:
    """Fine-tune a copy of the model so that triggers mean nothing to it.

    Args:
        model: the backdoored classifier.
        source: draws the triggers; frozen, in eval mode.
        clean: the clean set.
        trigger_rate: the probability that an image carries a trigger.
        one_place: all triggers of a batch lie at one place, and that never in the last row or column.
        recipe: of the fine-tuning.
        context: where and how to compute.

    Returns:
        The copy, in eval mode.
    """
    student = copy.deepcopy(model).train()
    trained = nn.ModuleDict({"student": student, "source": source})  # the source for its buffers

    def loss(batch: Batch) -> Tensor:
        images = put_some(source, batch["images"], trigger_rate, one_place)
        return F.cross_entropy(student(images).float(), batch["labels"])

    def end_epoch(epoch: int, figures: dict[str, float]) -> bool:
        source.end_epoch()
        return False

    fit("remove", trained, {"images": clean.images, "labels": clean.labels}, loss, recipe, context, end_epoch)
    return student.eval()


def put_some(source: TriggerSource, images: Tensor, rate: float, one_place: bool) -> Tensor:
    """uint8 [B, C, H, W] images, each with a drawn trigger with probability `rate`."""
    numbers = torch.arange(len(images), device=images.device)
    index = torch.where(torch.rand(len(images), device=images.device) < rate, numbers, -1)
    patches = source.draw(len(images))
    return put_patches(images, patches, index, draw_offsets(images, patches.shape, 1, one_place))
