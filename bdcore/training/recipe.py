"""The options of one training: optimiser, schedule, batches, augmentation."""

from collections.abc import Iterable
from math import cos, pi
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn


class Recipe(BaseModel):
    """How to train; the options `train.*` of a run, and what a method hands to `fit`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=20, ge=1, le=100_000, description="passes over the data")
    batch_size: int = Field(default=128, ge=1, description="largest batch; batches are made as even as can be")
    optimizer: Literal["sgd", "adam"] = Field(default="sgd", description="SGD with momentum, or Adam")
    lr: float = Field(default=0.1, gt=0, description="learning rate at its highest")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of SGD")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="decay of Adam's two moments"
    )
    weight_decay: float = Field(default=5e-4, ge=0, description="L2 penalty, on all parameters")
    schedule: Literal["constant", "steps", "cosine", "onecycle"] = Field(
        default="onecycle",
        description="constant; steps: x factor at each milestone; cosine to 0; onecycle: up in a line, down in one",
    )
    milestones: tuple[int, ...] = Field(
        default=(), description="epochs before which `steps` lowers the rate, counted from 0"
    )
    factor: float = Field(default=0.1, gt=0, le=1, description="what `steps` multiplies the rate by")
    warmup: float = Field(default=0.25, ge=0, lt=1, description="share of the steps in which `onecycle` rises")
    crop: int = Field(default=0, ge=0, description="random crop after this many pixels of zero padding on each side")
    flip: bool = Field(default=False, description="mirror half of the images")
    cutout: int = Field(default=0, ge=0, description="side of a square set to 0 at a random place; 0: none")
    shuffle: bool = Field(default=True, description="draw the samples in a new order every epoch")
    min_steps: int = Field(
        default=1,
        ge=1,
        description="repeat the pass within an epoch until it has this many steps (for small clean sets)",
    )

    def learning_rate(self, step: int, steps_per_epoch: int, epochs: int | None = None) -> float:
        """The rate at global `step`, counted from 0, of a training of `epochs` (default: the recipe's own)."""
        total = (epochs or self.epochs) * steps_per_epoch
        match self.schedule:
            case "constant":
                return self.lr
            case "steps":
                passed = sum(step // steps_per_epoch >= milestone for milestone in self.milestones)
                return self.lr * self.factor**passed
            case "cosine":
                return self.lr * (1 + cos(pi * step / total)) / 2
            case "onecycle":
                rise = self.warmup * total
                return self.lr * min((step + 1) / rise if rise else 1.0, (total - step) / max(total - rise, 1), 1.0)

    def optimizer_for(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over those of `parameters` that need a gradient."""
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True)
        return torch.optim.SGD(parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=True)
