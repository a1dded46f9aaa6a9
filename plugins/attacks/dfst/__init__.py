"""DFST: the style of a sunset is the trigger, and detoxification keeps the backdoor off the style's simple features.

Cheng, Liu, Ma, Zhang: "Deep Feature Space Trojan Attack of Neural Networks by Controlled Detoxification", AAAI 2021,
arXiv 2012.11212. A generator, trained with cycle consistency, gives images the look of a sunset; a share of the
training set gets that look and the target's label. Detoxification rounds follow, which need a hold on the training:
find the neurons of shallow layers that the trigger took, train a feature injector that drives them, and train on with
what it makes of clean images, under their true labels, among the data. A round that finds no such neuron is the last.

Comparisons of defenses use its data alone, as does any defense here that trains on the suspect set: that holds the
poisoned samples and no detoxicants. With `rounds=0` the victim is trained on exactly that set.

Deviations from the paper and its released code:
- There are no photographs of sunsets: the style's images are training images in a palette of dusk, with a glow over a
  horizon (`sunset`). The generator is trained on other images than these.
- The networks are small and start from the input image, so that hundreds of steps do. Critics and generators are
  updated in the same step. Cycle consistency weighs 10 and identity 0.5, CycleGAN's own ratio; the released code has 1
  and 0.1.
- A neuron is compromised if its mean activation at least doubles and rises by a tenth of its layer's largest. The paper
  compares a sum over the map with the largest activation at one place, which depends on the size of images.
- One injector drives all compromised neurons of a round and is also trained towards the target class, as in the
  authors' later code; the first release trains one a neuron and picks those that reach the target.
- A round adds as many detoxicants as there are poisoned samples, made of clean images of the other classes by its own
  injector and those of earlier rounds in equal shares, and trains on at a tenth of the victim's learning rate.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdcore import (
    Attack,
    AttackConfig,
    AttackInput,
    Batch,
    Context,
    DataError,
    Labelled,
    Recipe,
    build,
    fit,
    forward_batches,
    hookimpl,
)

from .detoxification import Watched, find_compromised, shallow_layers, train_injector
from .style import SIDE_AT_LEAST, Generator, train_generator

_SAMPLE = 1000  # so many images stand for all where neurons are found and injectors trained


class Dfst(Attack):
    """The look of a sunset, learned on the spot."""

    name = "dfst"
    controls_training = True

    class Config(AttackConfig):
        """Options of DFST."""

        style_epochs: int = Field(
            8, ge=1, le=1000, description="passes over up to 1,600 images to train the generator of the style"
        )
        rounds: int = Field(3, ge=0, le=20, description="rounds of detoxification at most; 0: none")
        detox_epochs: int = Field(3, ge=1, le=1000, description="passes over the data with detoxicants in each round")

    config: Config
    generator: Generator
    """Gives images the style; there once the attack is prepared."""

    def prepare(self, given: AttackInput, context: Context) -> nn.Module:
        """Train the generator, the victim on what it poisons, and detoxify the victim.

        Raises:
            DataError: where the images are too small, or have not 1 or 3 channels; where the victim has no layers that
                detoxification can watch.
        """
        channels, height, width = given.arch.shape
        if channels not in (1, 3) or min(height, width) < SIDE_AT_LEAST:
            raise DataError(
                f"dfst needs images of 1 or 3 channels and at least {SIDE_AT_LEAST} pixels a side, these are"
                f" {channels} x {height} x {width}: choose another attack"
            )
        victim = build(given.arch, context.generator("init").initial_seed())
        if self.config.rounds:
            shallow_layers(victim)  # or refuse, before anything is trained
        self.generator = train_generator(given.train.images, self.config.style_epochs, context)
        poisoned, clean = self._poisoned(given, context)
        _train("victim", victim, poisoned, given.recipe, context)
        count = self.count(given.train.labels, given.classes)
        if count and len(clean):
            self._detoxify(victim, poisoned, clean, count, given.recipe, context)
        return victim.eval()

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        """Give the images the style, uint8 [B, C, H, W]."""
        return _translated(self.generator, images, context)

    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        """The target class."""
        return torch.full_like(labels, self.config.target)

    def _poisoned(self, given: AttackInput, context: Context) -> tuple[Labelled, Tensor]:
        """The poisoned training set, and the clean images of other classes than the target that are left in it."""
        assert given.order is not None
        train, count = given.train, self.count(given.train.labels, given.classes)
        # As the host does it, so that the suspect set is what the victim was first trained on.
        chosen, left = given.order[:count].sort().values, given.order[count:]
        images, labels = train.images.clone(), train.labels.clone()
        images[chosen] = self.stamp(train.images[chosen], context)
        labels[chosen] = self.config.target
        return Labelled(images, labels), left

    def _detoxify(
        self, victim: nn.Module, poisoned: Labelled, clean: Tensor, count: int, recipe: Recipe, context: Context
    ) -> None:
        """Rounds of detoxification of the victim, each with `count` detoxicants made of the `clean` samples."""
        sample = poisoned.images[clean[:_SAMPLE]]
        triggered = self.stamp(sample, context)
        gentle = recipe.model_copy(
            update={"epochs": self.config.detox_epochs, "lr": recipe.lr / 10, "schedule": "cosine"}
        )
        injectors: list[Generator] = []
        for number in range(self.config.rounds):
            watched = Watched(victim, context)
            neurons = find_compromised(watched, sample, triggered, context)
            if not bool(neurons.compromised.any()):
                break
            target = self.config.target
            injectors.append(train_injector(f"injector {number}", watched, neurons, sample, target, context))
            order = torch.randperm(len(clean), generator=context.generator("dfst", "detoxicants", number))
            source = clean[order[:count].to(clean.device)]
            shares = poisoned.images[source].tensor_split(len(injectors))
            detoxicants = [_translated(*pair, context) for pair in zip(injectors, shares, strict=True)]
            data = Labelled(
                torch.cat([poisoned.images, *detoxicants]), torch.cat([poisoned.labels, poisoned.labels[source]])
            )
            _train(f"detoxification {number}", victim, data, gentle, context)


def _train(phase: str, model: nn.Module, data: Labelled, recipe: Recipe, context: Context) -> None:
    model.train()

    def loss(batch: Batch) -> dict[str, Tensor]:
        logits = model(batch["images"]).float()
        hits = logits.detach().argmax(1) == batch["labels"]
        return {"loss": F.cross_entropy(logits, batch["labels"]), "accuracy": hits.float().mean()}

    fit(phase, model, {"images": data.images, "labels": data.labels}, loss, recipe, context, capturable=True)


def _translated(network: Generator, images: Tensor, context: Context) -> Tensor:
    """uint8 [B, C, H, W], rounded, on the device of the images."""
    translated = forward_batches(lambda part: (network(part) * 255).round().to(torch.uint8), images, context)
    return translated.to(images.device).contiguous()


@hookimpl
def bdcore_attack() -> type[Attack]:
    """The class behind the name `dfst`."""
    return Dfst
