"""MCLDef: model-contrastive learning for backdoor defense.

Yue, Xia, Ling, Hu, Wang, Wei, Chen: "Model-Contrastive Learning for Backdoor Defense", ACM MM 2023, pp. 8869-8880,
arXiv 2205.04411.
"""

import copy

import torch
from pydantic import Field
from torch import Tensor
from typing import Literal

from bdcore import (
    Batch, Context, Defense, DefenseError, DefenseInput, Outcome, PluginConfig, Recipe, Trigger, Verdict,
    fit, forward_batches, frozen_copy, hookimpl, model_contrastive_loss, split_head,
)
from bdcore_plugins.defenses.mcldef.inversion import MaskInversion, PixelInversion


class MCLDef(Defense):
    name = "mcldef"

    class Config(PluginConfig):
        target: int | None = Field(None, ge=0, description="")
        form: Literal["paper", "mixed"] = Field("paper", description="")
        inversion_epochs: int = 100
        epochs: int = 20
        lr: float = 0.1
        min_steps: int = 20
        mix: float = 1.0

    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        config = self.config
        teacher = frozen_copy(given.model, context)
        images = given.clean.images
        inv = PixelInversion(torch.tensor([config.target]), tuple(images.shape[1:]), context.generator("inv"))
        r = inv.recipe.model_copy(update={"epochs": config.inversion_epochs})
        fit("invert", inv, {"images": images}, lambda b: inv.loss(teacher, b["images"]), r, context, inv.end_epoch)
        trigger = inv.best(0)
        student = self.purify(given.model, images, trigger, context)
        return Outcome(model=student, triggers=(trigger,))

    def purify(self, model, images, trigger, context):
        config = self.config
        teacher, _ = split_head(frozen_copy(model, context))
        def put(x): return (x.float() / 255 + trigger.delta).clamp(0, 1)
        columns = {"images": images, "positive": forward_batches(teacher, images, context), "negative": forward_batches(lambda x: teacher(put(x)), images, context)}
        student = copy.deepcopy(model).train()
        body, _ = split_head(student)
        def loss(batch: Batch):
            b = len(batch["images"])
            x = put(batch["images"])
            if config.form == "mixed":
                f = body(torch.cat([x, batch["images"].float() / 255])).float()
                anchor, clean = f[:b], f[b:]
                c = model_contrastive_loss(anchor, batch["positive"], batch["negative"][:, None], 0.5, "mean")
                d = (1 - torch.cosine_similarity(clean, batch["positive"])).mean()
                return {"loss": c + config.mix * d, "contrast": c.detach(), "distill": d.detach()}
            anchor = body(x).float()
            return {"loss": model_contrastive_loss(anchor, batch["positive"], batch["negative"][:, None], 0.5, "mean")}
        recipe = Recipe(optimizer="sgd", lr=config.lr, weight_decay=1e-4, schedule="steps", milestones=(1, 10), batch_size=64, epochs=config.epochs, min_steps=config.min_steps)
        fit("purify", body, columns, loss, recipe, context)
        return student.eval()


@hookimpl
def bdcore_defense() -> type[MCLDef]:
    return MCLDef
