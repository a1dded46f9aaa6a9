"""Train a classifier on the training set as its owner received it."""

import torch.nn.functional as F
from torch import Tensor

from bdcore.artifacts import Architecture, Labelled, Victim
from bdcore.context import Context
from bdcore.models import build
from bdcore.training import Batch, Recipe, fit


def train(data: Labelled, arch: Architecture, recipe: Recipe, context: Context) -> Victim:
    """A classifier of `arch`, trained by cross entropy on `data`; it never sees a test image."""
    model = build(arch, context.generator("init").initial_seed()).train()

    def loss(batch: Batch) -> dict[str, Tensor]:
        logits = model(batch["images"]).float()
        hits = logits.detach().argmax(1) == batch["labels"]
        return {"loss": F.cross_entropy(logits, batch["labels"]), "accuracy": hits.float().mean()}

    fit("train", model, {"images": data.images, "labels": data.labels}, loss, recipe, context)
    return Victim(model.eval(), arch)
