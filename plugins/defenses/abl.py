"""ABL: isolate the training samples that are learnt too fast, and unlearn them while the classifier is trained.

Li, Lyu, Koren, Lyu, Li, Ma: "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021, arXiv
2110.11571. Needs the suspect training set and an architecture, no clean data; returns a classifier trained on that set,
the isolated samples, and a score for every sample. Three phases, each through the one training loop:

1. Isolation: training without augmentation, with a loss that turns round where it falls below gamma, so that only what
   is learnt much faster than the rest stays below. The samples of lowest cross entropy are isolated, whatever their
   labels.
2. Fine-tuning: plain cross entropy on all others with crop, flip and cutout, a tenth of the rate in the last third.
3. Unlearning: gradient ascent on the isolated samples.

Variants; each of their settings can be given by itself:
- `paper`: local gradient ascent, 20 epochs; unlearning by the joint objective, E_others[l] - E_isolated[l], 20 epochs
  at a rate of 1e-4, the isolated samples as they are and the others augmented.
- `official`, the released code: flooding, 10 epochs over the samples in the order in which they are stored; unlearning
  by ascent on the isolated samples alone, not augmented, 4 epochs at 5e-4, with the momentum left by the fine-tuning.
- `backdoorbench`, that benchmark's schedule for PreAct ResNet-18: flooding, rate 0.01, batches of 256; ascent on the
  isolated samples alone, augmented, 20 epochs at 1e-4, with the momentum left by the fine-tuning.

Deviations from the paper and the released code:
- `per = "batch"` in the paper's variant too: the sign is that of the batch's mean loss, as in all released code. The
  formula as printed takes it of each sample. Every sample is then drawn to gamma from both sides, the poisons closest
  of all, and those of lowest loss are clean ones: on 20,000 images of CIFAR-10 with BadNets none of the isolated 1% was
  a poison after 10 epochs or 20, with the batch's sign 94 to 100%. `per = "sample"` is the formula.
- An epoch of unlearning is a pass over the isolated samples, in the joint objective too, where each batch comes with
  one of the others in the same forward pass. That makes the published 20 epochs at 1e-4 and the released 4 at 5e-4
  equally long ways. Nothing bounds the ascent: passes over the others, some forty times as many updates, destroy the
  model (on 20,000 images two cost 8 points of accuracy and six 70).
- So that few isolated samples are unlearnt as thoroughly as CIFAR-10's 500, a pass has at least `min_steps` updates:
  by default as many as a pass over 500 has in batches of `batch_size`, 8 of 64.
- `stop_loss` is ours. A sample's gradient is as small as its loss, so that on a classifier which is sure of its poisons
  the ascent begins late, and soon after it has begun it destroys. When that is differs between seeds on a small set. On
  the bundled digits (BadNets, 3 seeds) the published unlearning leaves an ASR of 14 to 100%; `unlearning_lr=1e-3`,
  `unlearning_epochs=200`, `stop_loss=3`, `flip=false` leave 1 to 4% and less than a point of accuracy is lost.
- A collapse is told by the accuracy on training samples that were not isolated, before the unlearning and after it: a
  model that isolation and fine-tuning have already left poor passes unnoticed.
- In the joint objective the isolated are not augmented, as in the released ascent: a crop often loses the trigger, and
  it is then not unlearnt.
- SGD without Nesterov's form of the momentum; batches as even as can be; bf16 where the device computes it natively,
  except for the ranking.
- Crop and cutout scale with the image: 4 and 3 pixels of 32. The released cutout of 3 clears 2 x 2.
- Ties in the ranking go by index, and a loss is exact down to 1e-38: in the usual fp32 form strong poisons tie at 0.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from decimal import ROUND_CEILING
from decimal import Context as Decimals
from math import ceil
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bdcore import (
    Batch,
    Context,
    Defense,
    DefenseError,
    DefenseInput,
    Labelled,
    Outcome,
    PluginConfig,
    Recipe,
    Suspects,
    build,
    fit,
    forward_batches,
    hookimpl,
    isolation_loss,
    load_batch,
    lowest_k,
)

_IGNORED = -100
"""The label of samples that do not count; `isolation_loss` leaves them out."""
_JUDGED = 5000
"""How many of the other samples tell the accuracy before and after the unlearning."""
_COLLAPSED = 0.2
"""Share of that accuracy whose loss is more than the unlearnt poisons explain, up to a poison rate of about a fifth.
What was lost before the unlearning does not count."""
_PASS = 500
"""Isolated samples of CIFAR-10, whose passes are the published ones."""


@dataclass(frozen=True)
class Settings:
    """What a variant decides; `shuffle` is of the isolation, `augment` of the isolated samples in the unlearning, and
    `min_steps` follows the batch size where it is None."""

    loss: Literal["lga", "flood"]
    per: Literal["sample", "batch"]
    shuffle: bool
    isolation_epochs: int
    finetuning_epochs: int
    unlearning: Literal["joint", "ascent"]
    unlearning_epochs: int
    unlearning_lr: float
    augment: bool
    lr: float
    batch_size: int
    min_steps: int | None = None


VARIANTS = {
    "paper": Settings("lga", "batch", True, 20, 60, "joint", 20, 1e-4, False, 0.1, 64),
    "official": Settings("flood", "batch", False, 10, 60, "ascent", 4, 5e-4, False, 0.1, 64),
    "backdoorbench": Settings("flood", "batch", True, 20, 60, "ascent", 20, 1e-4, True, 0.01, 256),
}


class ABL(Defense):
    """Isolation by loss, fine-tuning on the others, unlearning of the isolated."""

    name = "abl"
    needs = frozenset({"suspect", "arch"})

    class Config(PluginConfig):
        """Options of ABL; those without a value follow the variant."""

        variant: Literal["paper", "official", "backdoorbench"] = Field(
            "paper", description="as published, as released, or with the schedule of that benchmark"
        )
        isolation_rate: float = Field(0.01, gt=0, le=0.5, description="share of the training set that is isolated (p)")
        gamma: float = Field(0.5, ge=0, le=100, description="loss below which the isolation turns round")
        loss: Literal["lga", "flood"] | None = Field(None, description="local gradient ascent, or flooding")
        per: Literal["sample", "batch"] | None = Field(
            None, description="whether each sample's loss turns round, or the batch's mean"
        )
        isolation_epochs: int | None = Field(None, ge=1, le=10_000, description="passes over the set to isolate")
        finetuning_epochs: int | None = Field(None, ge=1, le=10_000, description="passes over the others")
        unlearning: Literal["joint", "ascent"] | None = Field(
            None, description="ascent on the isolated with descent on the others, or ascent alone"
        )
        unlearning_epochs: int | None = Field(None, ge=1, le=10_000, description="passes over the isolated")
        unlearning_lr: float | None = Field(None, gt=0, le=1, description="SGD's rate in the unlearning")
        stop_loss: float | None = Field(
            None,
            gt=0,
            description="mean loss of the isolated at which the unlearning ends early; a guess has log(classes)",
        )
        min_steps: int | None = Field(
            None, ge=1, description="updates that an epoch of unlearning has at least; default 500 / batch_size"
        )
        lr: float | None = Field(None, gt=0, le=10, description="SGD's rate before; a tenth in the last third")
        batch_size: int | None = Field(None, ge=2, description="largest batch")
        flip: bool = Field(True, description="mirror half of the images; not for digits and letters")

        def settings(self) -> Settings:
            """The variant's settings, with those that were given in their place."""
            given: dict[str, Any] = {field.name: getattr(self, field.name, None) for field in fields(Settings)}
            chosen = replace(
                VARIANTS[self.variant], **{name: value for name, value in given.items() if value is not None}
            )
            return replace(chosen, min_steps=chosen.min_steps or ceil(_PASS / chosen.batch_size))

    config: Config

    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        """Train a classifier on the suspect set without its backdoor.

        Raises:
            DefenseError: the isolation rate is less than two samples.
        """
        assert given.suspect is not None
        assert given.arch is not None
        data, settings = given.suspect, self.config.settings()
        count = int(len(data) * self.config.isolation_rate)
        if count < 2:
            raise DefenseError(
                f"abl.isolation_rate={self.config.isolation_rate:g} of {len(data)} training samples isolates {count}; "
                f"the unlearning needs two at least: {_more_isolated(len(data))}."
            )
        model = build(given.arch, context.generator("init").initial_seed())
        self.train_to_isolate(model, data, settings, context)
        suspects = rank(model, data, count, context)
        others = torch.ones(len(data), dtype=torch.bool, device=data.labels.device)
        others[suspects.index.to(others.device)] = False
        isolated, rest = data.select(suspects.index.to(data.labels.device)), data.select(others)

        recipe = self.recipe(rest, settings)
        loss = _cross_entropy(model)
        optimizer = fit("finetune", model.train(), _columns(rest), loss, recipe, context, capturable=True)
        before = _accuracy(model, rest, context)
        self.unlearn(model, isolated, rest, recipe, settings, optimizer, context)
        after = _accuracy(model, rest, context)
        if before - after > _COLLAPSED * before:
            context.warn(
                f"the unlearning took the accuracy on the training samples that were not isolated from {before:.1%} to "
                f"{after:.1%}, more than forgotten poisons explain: a low ASR of this model is no success. Lower "
                f"abl.unlearning_lr (now {settings.unlearning_lr:g}) or abl.unlearning_epochs (now "
                f"{settings.unlearning_epochs})."
            )
        notes = {"variant": self.config.variant, **asdict(settings), "isolated": count}
        notes |= {"accuracy_finetuned": round(before, 4), "accuracy_unlearned": round(after, 4)}
        return Outcome(model.eval(), suspects=suspects, notes=notes)

    def train_to_isolate(self, model: nn.Module, data: Labelled, settings: Settings, context: Context) -> None:
        """Train with the loss that turns round at gamma, without augmentation."""

        def loss(batch: Batch) -> dict[str, Tensor]:
            logits = model(batch["images"])
            bent = isolation_loss(
                logits, batch["labels"], self.config.gamma, settings.loss, per=settings.per, reduction="mean"
            )
            return {"loss": bent, "accuracy": _hits(logits, batch["labels"])}

        recipe = Recipe(
            epochs=settings.isolation_epochs,
            batch_size=settings.batch_size,
            lr=settings.lr,
            weight_decay=1e-4,
            schedule="constant",
            shuffle=settings.shuffle,
        )
        fit("isolate", model.train(), _columns(data), loss, recipe, context, capturable=True)

    def recipe(self, data: Labelled, settings: Settings) -> Recipe:
        """How the other samples are learnt."""
        side = min(data.images.shape[2:])
        return Recipe(
            epochs=settings.finetuning_epochs,
            batch_size=settings.batch_size,
            lr=settings.lr,
            weight_decay=1e-4,
            schedule="steps",
            milestones=(ceil(settings.finetuning_epochs * 2 / 3),),
            crop=max(1, round(side / 8)),
            flip=self.config.flip,
            cutout=max(1, round(side * 3 / 32)),
        )

    def unlearn(
        self,
        model: nn.Module,
        isolated: Labelled,
        rest: Labelled,
        recipe: Recipe,
        settings: Settings,
        optimizer: torch.optim.Optimizer,
        context: Context,
    ) -> None:
        """Gradient ascent on the isolated samples, alone or beside descent on the rest."""
        changes: dict[str, Any] = {
            "epochs": settings.unlearning_epochs,
            "lr": settings.unlearning_lr,
            "schedule": "constant",
            "min_steps": settings.min_steps,
        }
        if not settings.augment:
            changes |= {"crop": 0, "flip": False, "cutout": 0}
        slow = recipe.model_copy(update=changes)

        def enough(epoch: int, figures: dict[str, float]) -> bool:
            return self.config.stop_loss is not None and figures["isolated"] >= self.config.stop_loss

        if settings.unlearning == "ascent":

            def ascent(batch: Batch) -> dict[str, Tensor]:
                loss = isolation_loss(model(batch["images"]), batch["labels"], mode="ascent", reduction="mean")
                return {"loss": loss, "isolated": -loss}

            fit("unlearn", model.train(), _columns(isolated), ascent, slow, context, enough, optimizer=optimizer)
            return

        rest = rest.to(context.device)
        size = min(settings.batch_size, len(rest))

        def joint(batch: Batch) -> dict[str, Tensor]:
            drawn = torch.randint(len(rest), (size,)).to(context.device)
            seed = int(torch.randint(2**63 - 1, ()))
            images = load_batch(rest.images, drawn, seed=seed, crop=recipe.crop, flip=recipe.flip, cutout=recipe.cutout)
            # Together, so that BatchNorm takes both to the same statistics, which are those that it keeps.
            logits = model(torch.cat([images, batch["images"]]))
            learnt = isolation_loss(logits[:size], rest.labels[drawn], mode="ce", reduction="mean")
            unlearnt = isolation_loss(logits[size:], batch["labels"], mode="ce", reduction="mean")
            return {"loss": learnt - unlearnt, "others": learnt, "isolated": unlearnt}

        fit("unlearn", model.train(), _columns(isolated), joint, slow, context, enough)


def rank(model: nn.Module, data: Labelled, count: int, context: Context) -> Suspects:
    """The samples that a model has learnt best: those of lowest cross entropy, in eval mode and fp32, not augmented.

    Args:
        model: left in eval mode.
        data: N samples; those with the label -100, and those whose loss is NaN, come last.
        count: how many to pick out, in [0, N].
        context: device to compute on.

    Returns:
        Their places by ascending loss, ties by place; as scores of all N samples their losses with the sign changed.
    """
    # On CPUs a small batch stays in the caches from layer to layer; a GPU needs work for all its cores.
    size = 32 if context.device.type == "cpu" else 500
    logits = forward_batches(model.to(context.device).eval(), data.images, context, size)
    labels = data.labels.to(context.device)
    losses = isolation_loss(logits, labels, mode="ce").masked_fill(labels == _IGNORED, torch.nan)
    return Suspects(lowest_k(losses, count), (-losses).masked_fill(losses.isnan(), -torch.inf))


def _columns(data: Labelled) -> dict[str, Tensor]:
    return {"images": data.images, "labels": data.labels}


def _cross_entropy(model: nn.Module) -> Callable[[Batch], dict[str, Tensor]]:
    def loss(batch: Batch) -> dict[str, Tensor]:
        logits = model(batch["images"])
        mean = isolation_loss(logits, batch["labels"], mode="ce", reduction="mean")
        return {"loss": mean, "accuracy": _hits(logits, batch["labels"])}

    return loss


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == labels).float().mean()


def _accuracy(model: nn.Module, data: Labelled, context: Context) -> float:
    """On `_JUDGED` of the samples, in eval mode."""
    chosen = data.select(torch.arange(0, len(data), ceil(len(data) / _JUDGED), device=data.labels.device))
    predicted = forward_batches(lambda batch: model(batch).argmax(1), chosen.images, context)
    return float((predicted == chosen.labels.to(predicted.device)).float().mean())


def _more_isolated(samples: int) -> str:
    """What to do for two of so many samples to be isolated: rounded up, for a rate rounded down isolates one."""
    if samples < 4:  # the rate is at most a half
        return "use four training samples or more"
    return f"set it to {Decimals(prec=2, rounding=ROUND_CEILING).divide(2, samples):g} or more"


@hookimpl
def bdcore_defense() -> type[Defense]:
    """The class behind the name `abl`."""
    return ABL
