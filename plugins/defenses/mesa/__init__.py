"""MESA: learn the whole distribution of triggers that fire a backdoor, then retrain the model against samples of it.

Qiao, Yang, Li: "Defending Neural Backdoors via Generative Distribution Modeling", NeurIPS 2019, arXiv 1910.04749
(max-entropy staircase approximator). Needs the model and a small clean set; returns a purified copy, the verdict on
which class the backdoor leads to, and samples of the recovered triggers. Where no class stands out, the model is left
as it is.

A trigger is a patch of known size that overwrites the image anywhere. A backdoor that a patch does not fire, or only in
one place, is not in that family, and the search is then right to find nothing.

Variants
- `paper`: Gaussian latents, every image's patch at a place of its own (for 3 x 3 pixels in 32 x 32 each of 30 x 30),
  the hinge on the success of a trigger over several images, sub-models drawn by their mixture weights.
- `official`, as the released code does it: latents uniform in [0, 1], one place a batch and never the last row or
  column, the hinge on each image, a LeakyReLU on the statistics networks' output, sub-models in turn by the epoch.
- `baseline`: what the paper compares with, one patch found in pixel space. Search and removal are those of `paper`, so
  that the difference is the model of the trigger alone.

The control that belongs beside every result is the same fine-tuning without triggers; BatchNorm in train mode alone can
weaken a backdoor. It is the defense `finetune` with this recipe, in the same run:

    bdcore run --plugin mesa --plugin finetune --set finetune.epochs=10 --set finetune.lr=0.001 \\
        --set finetune.weight_decay=0 --set finetune.min_steps=62

The rates of the removal are the paper's, for ResNet-18. What a network learns in a step grows with its width: one eight
times narrower, as WRN-16-1, keeps a part of the backdoor at `lr=0.001`; there `lr=0.008`, `schedule=cosine` and
`trigger_rate=0.05` remove it (`benchmarks/results/mesa-small.md`). A constant rate so high costs accuracy by itself.
`batch_size` is the batch of the removal too, as of the search and the sub-models.

Deviations from the paper and the released code:
- The clean set is `run.clean_fraction` of the training data; the paper takes 8,000 of CIFAR-10's test images, for which
  run.clean_fraction=0.16 stands (as many images, but such as the model was trained on).
- 8,000 images are 62 batches of 128; of a smaller set an epoch of the removal repeats the pass until there are
  `min_steps` updates, so that the model sees as many triggers as in the paper.
- All classes are searched side by side and briefly (`search_steps`); the sub-models are trained for the chosen class.
- The rule that names the target is ours (see `target_search`); `target` gives it by hand, which is recorded as an
  oracle. The noise of the search is used for the sub-models as well, and is not clamped to [0, 1].
- The success that is reported and judged is measured on images of other classes than the target's. The training has
  images of all classes, as the paper's algorithm has, and so asks for a little less than beta on the others: of ten
  classes for 0.89 where beta is 0.9 (see `Approximator.success`).
- The mixture weights need exp(entropy), an estimate that is bounded by the batch: entropies are clamped to
  [0, log batch_size] and reported with the weights.
- The paper leaves the function g between a trigger's density and its success open; here it is the identity.
"""

from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from bdcore import (
    Context,
    Defense,
    DefenseError,
    DefenseInput,
    Labelled,
    Outcome,
    PluginConfig,
    Recipe,
    Trigger,
    frozen_copy,
    hookimpl,
    patch_side,
)

from .approximator import Approximator, Form
from .baseline import PixelPatch
from .mixture import Mixture, TriggerSource, mixture_weights
from .patches import Places, measure_success
from .removal import remove
from .target_search import search_target, successes

_KEPT = 64  # samples of the recovered distribution that the outcome holds


class MESA(Defense):
    """Target search, a staircase of max-entropy generators, and removal by retraining against their samples."""

    name = "mesa"

    class Config(PluginConfig):
        """Options of MESA; the defaults are the paper's for CIFAR-10."""

        variant: Literal["paper", "official", "baseline"] = Field(
            "paper", description="as published, as released, or the baseline of one patch in pixel space"
        )
        target: int | None = Field(None, ge=0, description="target class, where it is known: an oracle")
        patch: int = Field(
            3, ge=1, le=32, description="side of the trigger in a 32 x 32 image; it scales with the image"
        )
        betas: tuple[float, ...] = Field(
            (0.5, 0.8, 0.9), min_length=1, description="rising thresholds of success, one for each sub-model"
        )
        alpha: float = Field(0.1, ge=0, description="weight of the entropy")
        noise: float = Field(0.1, ge=0, le=1, description="standard deviation of the noise on a trigger in training")
        images_per_trigger: int | None = Field(
            None, ge=1, description="images that a trigger's success is averaged over; None: 8, official 1"
        )
        hidden: int = Field(
            512, ge=1, le=8192, description="units of the generators' layers; the paper: CIFAR-100 2048"
        )
        search_steps: int = Field(200, ge=1, le=100_000, description="updates of each class's generator in the search")
        steps: int = Field(620, ge=1, le=100_000, description="updates of each sub-model's generator")
        batch_size: int = Field(128, ge=2, description="triggers, and images at most, in a batch; of the removal too")
        success: float = Field(0.5, gt=0, le=1, description="success that the target class must reach in the search")
        anomaly: float = Field(3.0, gt=0, description="deviations above the median that it must reach as well")
        trigger_rate: float = Field(0.01, gt=0, le=1, description="probability of a trigger on an image in the removal")
        epochs: int = Field(10, ge=1, le=10_000, description="passes over the clean set in the removal")
        lr: float = Field(1e-3, gt=0, le=10, description="learning rate of the removal's SGD (momentum 0.9)")
        schedule: Literal["constant", "cosine"] = Field(
            "constant", description="of that rate: constant, as published, or falling to 0, for higher ones"
        )
        min_steps: int = Field(62, ge=1, description="updates an epoch of the removal has at least")

        @field_validator("betas")
        @classmethod
        def _rising(cls, betas: tuple[float, ...]) -> tuple[float, ...]:
            if not all(low < high for low, high in zip((0.0, *betas), (*betas, 1.0), strict=True)):
                raise ValueError(f"betas must rise strictly between 0 and 1, got {list(betas)}")
            return betas

        @model_validator(mode="after")
        def _used(self) -> Self:
            if self.variant == "baseline" and "betas" in self.model_fields_set:
                raise ValueError("betas belong to sub-models, which variant=baseline does not have: leave them out")
            return self

    config: Config

    def oracles(self) -> tuple[str, ...]:
        """The target class, where it was given by hand."""
        return () if self.config.target is None else ("target",)

    def __call__(self, given: DefenseInput, context: Context) -> Outcome:
        """Find the target class, model its triggers, and purify a copy of the model; leave it where nothing is found.

        Raises:
            DefenseError: the target given by hand is no class, all clean images are of one class, or the classes are
                too few to search.
        """
        assert given.model is not None
        assert given.clean is not None
        found, source = self._find(given, context)
        if source is None:
            return found
        (trigger,) = found.triggers
        target, patches = trigger.target, trigger.patches
        assert patches is not None
        notes = dict(found.notes)
        best = max(float(value) for name, value in notes.items() if name.startswith("success"))
        if best < self.config.success:
            context.warn(
                f"the triggers found for class {target} succeed on {best:.0%} of the clean images at most: the removal "
                "trains against what is hardly a trigger. Perhaps that class is not the target, or the trigger is no "
                "patch of this size."
            )
        model = self._remove(given.model, source, given.clean, context)
        _note_cost(notes, "removal", context)
        left = measure_success(model, patches, target, given.clean, context, context.generator("left"))
        notes["success_after_removal"] = round(left, 3)
        return replace(found, model=model, notes=notes)

    def inspect(self, given: DefenseInput, context: Context) -> Outcome:
        """The target class and samples of its triggers alone; raises as a call does."""
        found, _ = self._find(given, context)
        return found

    def _find(self, given: DefenseInput, context: Context) -> tuple[Outcome, TriggerSource | None]:
        """Verdict, samples of the triggers, and what draws more; without these where no class stands out."""
        config = self.config
        assert given.model is not None
        assert given.clean is not None
        clean = given.clean
        shape = self._shape(given.classes, clean)
        frozen = frozen_copy(given.model, context)
        form = self._form()
        notes: dict[str, float | int | str] = {}
        verdict, target = None, config.target
        if target is None:
            verdict = search_target(
                frozen,
                clean,
                given.classes,
                shape,
                form,
                config.search_steps,
                config.success,
                config.anomaly,
                context,
            )
            _note_cost(notes, "search", context)
            if verdict.target is None:
                return Outcome(verdict=verdict, notes=notes), None
            target = verdict.target

        source, patches = self._model_triggers(frozen, clean, target, shape, form, notes, context)
        _note_cost(notes, "triggers", context)
        return Outcome(None, verdict, (Trigger(target, patches=patches),), notes), source

    def _model_triggers(
        self,
        frozen: nn.Module,
        clean: Labelled,
        target: int,
        shape: tuple[int, int, int],
        form: Form,
        notes: dict[str, float | int | str],
        context: Context,
    ) -> tuple[TriggerSource, Tensor]:
        """Where the removal draws triggers from, and samples to keep, [_KEPT, C, h, w]; facts go into `notes`."""
        config = self.config
        if config.variant == "baseline":
            pixels = PixelPatch(shape, context.generator("baseline"))
            pixels.train_on("baseline", frozen, clean.images, target, config.steps, config.batch_size, context)
            found = measure_success(frozen, pixels.patch, target, clean, context, context.generator("success"))
            notes["success"] = round(found, 3)
            return pixels, pixels.draw(1)
        betas = torch.tensor(config.betas, dtype=torch.float64)
        targets = [target] * len(betas)
        stack = Approximator(targets, list(config.betas), shape, form, context.generator("staircase"))
        stack.train_on("staircase", frozen, clean.images, config.steps, context)
        entropies = stack.entropies(context.generator("entropy"))
        weights = mixture_weights(betas, entropies) if config.variant == "paper" else None
        facts = {"success": successes(stack, frozen, clean, context), "entropy": entropies.tolist()}
        if weights is not None:
            facts["weight"] = weights.tolist()
        notes |= {
            f"{name}_{beta:g}": round(value, 3)
            for name, values in facts.items()
            for beta, value in zip(config.betas, values, strict=True)
        }
        mixture = Mixture(stack, weights)
        return mixture, mixture.keep(_KEPT, context.generator("kept"))

    def _remove(self, model: nn.Module, source: TriggerSource, clean: Labelled, context: Context) -> nn.Module:
        config = self.config
        recipe = Recipe(
            epochs=config.epochs,
            batch_size=config.batch_size,
            lr=config.lr,
            weight_decay=0,
            schedule=config.schedule,
            min_steps=config.min_steps,
        )
        return remove(model, source, clean, config.trigger_rate, self._places(), recipe, context)

    def _places(self) -> Places:
        return "released" if self.config.variant == "official" else "each"

    def _form(self) -> Form:
        config = self.config
        released = config.variant == "official"
        return Form(
            uniform_latent=released,
            places=self._places(),
            images_per_trigger=config.images_per_trigger or (1 if released else 8),
            leaky_output=released,
            alpha=config.alpha,
            noise=config.noise,
            hidden=config.hidden,
            batch_size=config.batch_size,
        )

    def _shape(self, classes: int, clean: Labelled) -> tuple[int, int, int]:
        """(C, h, w) of a patch, after the refusals."""
        config = self.config
        channels, height, width = clean.images.shape[1:]
        if config.target is not None and config.target >= classes:
            raise DefenseError(f"mesa.target={config.target}: the model's classes are 0 to {classes - 1}.")
        if bool((clean.labels == clean.labels[0]).all()):
            raise DefenseError(
                "all clean images are of one class: whether a trigger sends images elsewhere cannot be measured on "
                "them. Use a larger run.clean_fraction."
            )
        side = patch_side(config.patch, height, width)
        return channels, side, side


def _note_cost(notes: dict[str, float | int | str], part: str, context: Context) -> None:
    """Images and seconds of the part of the defense that ends here: what was spent in all, less the earlier parts'."""
    spent = {"images": context.meter.images, "seconds": round(context.meter.seconds, 1)}
    for unit, value in spent.items():
        earlier = sum(float(known) for name, known in notes.items() if name.endswith(f"_{unit}"))
        notes[f"{part}_{unit}"] = type(value)(round(value - earlier, 1))


@hookimpl
def bdcore_defense() -> type[Defense]:
    """The class behind the name `mesa`."""
    return MESA
