"""Fine-tuning on the defender's clean samples: the control that every other defense must beat.

Cross entropy with the clean labels, SGD with momentum, nothing else; what it removes, training on a few clean images
removes by itself (Liu, Dolan-Gavitt, Garg: "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
Networks", RAID 2018, Sect. 3, use it as such). Needs the model and a clean set; returns a fine-tuned copy.
"""

import copy
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdcore import Batch, Context, Defense, DefenseInput, Outcome, PluginConfig, Recipe, fit, hookimpl


class FineTune(Defense):
    """Train on with the clean samples."""

    name = "finetune"

    class Config(PluginConfig):
        """Options of fine-tuning."""

        epochs: int = Field(20, ge=1, le=10_000, description="passes over the clean set")
        lr: float = Field(0.01, gt=0, le=10, description="learning rate of SGD (momentum 0.9)")
        schedule: Literal["constant", "cosine"] = Field("constant", description="of that rate: or falling to 0")
        batch_size: int = Field(128, ge=2, description="largest batch")
        weight_decay: float = Field(5e-4, ge=0, le=1, description="L2 penalty")
        min_steps: int = Field(10, ge=1, description="updates an epoch has at least; a small clean set is repeated")
        crop: int = Field(0, ge=0, description="random crop after so many pixels of padding")
        flip: bool = Field(False, description="mirror half of the images")

    config: Config

    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        """Return a fine-tuned copy of the model."""
        assert given.model is not None
        assert given.clean is not None
        model = copy.deepcopy(given.model).train()

        def loss(batch: Batch) -> Tensor:
            return F.cross_entropy(model(batch["images"]).float(), batch["labels"])

        recipe = Recipe(**self.config.model_dump())
        columns = {"images": given.clean.images, "labels": given.clean.labels}
        fit("finetune", model, columns, loss, recipe, context, capturable=True)
        return Outcome(model=model.eval())


@hookimpl
def bdcore_defense() -> type[Defense]:
    """The class behind the name `finetune`."""
    return FineTune
