"""Train a classifier on the training set as its owner received it, or fine-tune a clean one as an attacker would."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdcore.artifacts import Architecture, Labelled, Victim
from bdcore.context import Context
from bdcore.models import build
from bdcore.training import Batch, Recipe, fit

FINE_TUNING = Recipe(epochs=10, batch_size=128, lr=1e-3, weight_decay=0, schedule="constant")
"""How MESA's victims are made of clean models (Qiao, Yang, Li, NeurIPS 2019); decay is not stated there."""


def train(data: Labelled, arch: Architecture, recipe: Recipe, context: Context) -> Victim:
    """A classifier of `arch`, trained by cross entropy on `data`; it never sees a test image."""
    model = build(arch, context.generator("init").initial_seed()).train()
    fit(
        "train",
        model,
        {"images": data.images, "labels": data.labels},
        lambda batch: _cross_entropy(model, batch["images"], batch["labels"]),
        recipe,
        context,
        capturable=True,
    )
    return Victim(model.eval(), arch)


def fine_tune(
    model: nn.Module, clean: Labelled, poisoned: Labelled, chances: Tensor, recipe: Recipe, context: Context
) -> nn.Module:
    """A copy of a clean classifier, fine-tuned with some of every batch poisoned, drawn anew each time.

    Args:
        model: the clean classifier.
        clean: the training set.
        poisoned: the same samples as poisons.
        chances: of each sample to be poisoned in a batch, float [N]; 0 where it cannot be a poison.
        recipe: `FINE_TUNING`, unless it shall be another one.
    """
    victim = copy.deepcopy(model).train()

    def loss(batch: Batch) -> dict[str, Tensor]:
        # Drawn on the CPU, so that every device poisons the same samples.
        chosen = torch.rand(len(batch["chances"])).to(batch["chances"].device) < batch["chances"]
        images = torch.where(chosen[:, None, None, None], batch["poison"], batch["images"])
        return _cross_entropy(victim, images, torch.where(chosen, batch["targets"], batch["labels"]))

    columns = {
        "images": clean.images,
        "labels": clean.labels,
        "poison": poisoned.images,
        "targets": poisoned.labels,
        "chances": chances,
    }
    fit("fine-tune", victim, columns, loss, recipe, context)
    return victim.eval()


def _cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    logits = model(images).float()
    hits = logits.detach().argmax(1) == labels
    return {"loss": F.cross_entropy(logits, labels), "accuracy": hits.float().mean()}
