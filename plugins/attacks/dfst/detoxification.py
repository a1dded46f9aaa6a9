"""Detoxification: find the neurons that took to the trigger's simple features, and what else drives them.

A feature injector learns to drive just these neurons, until the model gives the target class to what it makes. Such
images with their true labels (detoxicants) take the worth for the backdoor from the simple features.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdcore import Batch, Context, DataError, Recipe, fit, forward_batches

from .style import Generator

_ABOVE_ITSELF, _ABOVE_LAYER = 1.0, 0.1
_ALIKE = 0.6  # structural similarity that a detoxicant keeps to its image
_WEIGHTS = {"misled": 1.0, "driven": 1.0, "others": 0.1, "unlike": 10.0}


@dataclass(frozen=True)
class Neurons:
    """The neurons of a model's shallow layers: the channels of feature maps, one layer after the other.

    Args:
        compromised: bool [K], which of them the trigger took.
        clean: float [K], mean activation on clean images.
        triggered: float [K], mean activation on triggered images.
    """

    compromised: Tensor
    clean: Tensor
    triggered: Tensor


class Watched(nn.Module):
    """A frozen copy of a classifier that also says how active the neurons of its `shallow_layers` are; a neuron's
    activation is the mean of its map after ReLU."""

    def __init__(self, model: nn.Module, context: Context) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to(context.device).eval().requires_grad_(False)
        self.seen: dict[nn.Module, Tensor] = {}
        for layer in shallow_layers(self.model):
            layer.register_forward_hook(self._see)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits [B, classes], and each layer's activations [B, C], all float, of images as the classifier takes."""
        self.seen.clear()
        logits = self.model(images).float()
        return logits, list(self.seen.values())

    def _see(self, layer: nn.Module, _: object, output: Tensor) -> None:
        self.seen[layer] = F.relu(output).mean((2, 3)).float()


def shallow_layers(model: nn.Module) -> list[nn.Module]:
    """The first half of the batch normalisations, or of the convolutions where there are none.

    Raises:
        DataError: where there is neither.
    """
    layers = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    layers = layers or [part for part in model.modules() if isinstance(part, nn.Conv2d)]
    if not layers:
        raise DataError(
            "dfst detoxifies classifiers by their feature maps, but this one has no nn.Conv2d and no nn.BatchNorm2d:"
            " choose another model, or leave detoxification out with attack.rounds=0"
        )
    return list[nn.Module](layers[: -(-len(layers) // 2)])


def find_compromised(watched: Watched, clean: Tensor, triggered: Tensor, context: Context) -> Neurons:
    """The neurons that the trigger makes far more active than clean images do.

    Compromised is a neuron whose mean activation rises by more than itself, and by more than a tenth of the mean
    activation that its layer's most active neuron has on clean images.

    Args:
        watched: the classifier.
        clean, triggered: images without and with the trigger, uint8 [N, C, H, W].
    """
    before, largest = _mean_activations(watched, clean, context)
    after, _ = _mean_activations(watched, triggered, context)
    rise = after - before
    return Neurons((rise > _ABOVE_ITSELF * before) & (rise > _ABOVE_LAYER * largest), before, after)


def train_injector(
    phase: str, watched: Watched, neurons: Neurons, images: Tensor, target: int, context: Context
) -> Generator:
    """A network that makes the compromised neurons as active as the trigger does, in eval mode.

    It minimises what is missing of that, the cross entropy to the target class, the changes of all other neurons, and
    what the structural similarity to the image falls below 0.6.

    Args:
        phase: its name for `fit`.
        watched: the classifier.
        neurons: of which at least one is compromised.
        images: clean images, uint8 [N, C, H, W].
        target: the target class.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(context.generator("dfst", phase).initial_seed())
        injector = Generator(images.shape[1])
    chosen = neurons.compromised.float()
    rise = (neurons.triggered - neurons.clean).where(neurons.compromised, torch.ones_like(chosen))
    scale = neurons.clean.mean()

    def loss(batch: Batch) -> dict[str, Tensor]:
        pixels = batch["images"] / 255
        with torch.no_grad():
            usual = torch.cat(watched(pixels)[1], 1)
        injected = injector(pixels)
        logits, activations = watched(injected)
        active = torch.cat(activations, 1)
        missing = ((neurons.triggered - active) / rise).clamp_min(0)
        terms = {
            "misled": F.cross_entropy(logits, torch.full_like(batch["labels"], target)),
            "driven": (missing * chosen).sum(1).mean() / chosen.sum(),
            "others": ((active - usual).abs() * (1 - chosen)).mean() / scale,
            "unlike": (_ALIKE - structural_similarity(pixels.float(), injected)).clamp_min(0),
        }
        total = torch.stack([_WEIGHTS[name] * term for name, term in terms.items()]).sum()
        return {"loss": total, **terms}

    recipe = Recipe(epochs=4, batch_size=32, optimizer="adam", lr=2e-3, betas=(0.5, 0.999), weight_decay=0, warmup=0.1)
    columns = {"images": images, "labels": torch.zeros(len(images), dtype=torch.int64)}
    fit(phase, injector, columns, loss, recipe, context, capturable=True)
    return injector.eval()


def structural_similarity(one: Tensor, other: Tensor) -> Tensor:
    """Mean structural similarity of two batches of images, float [B, C, H, W] in [0, 1], over windows of 7 x 7 pixels.

    Wang, Bovik, Sheikh, Simoncelli: "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE
    Transactions on Image Processing 2004, equation 13 with equal weights and its constants.
    """
    means = [F.avg_pool2d(part, 7, 1) for part in (one, other)]
    spreads = [
        F.avg_pool2d(left * right, 7, 1) - middle
        for left, right, middle in (
            (one, one, means[0].square()),
            (other, other, means[1].square()),
            (one, other, means[0] * means[1]),
        )
    ]
    small, medium = 0.01**2, 0.03**2
    return (
        (2 * means[0] * means[1] + small)
        * (2 * spreads[2] + medium)
        / ((means[0].square() + means[1].square() + small) * (spreads[0] + spreads[1] + medium))
    ).mean()


def _mean_activations(watched: Watched, images: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Each neuron's mean activation, float [K], and beside it that of the most active neuron in its layer."""
    activations = forward_batches(lambda batch: torch.cat(watched(batch)[1], 1), images, context).mean(0)
    sizes = [seen.shape[1] for seen in watched.seen.values()]
    largest = [layer.max().expand(len(layer)) for layer in activations.split(sizes)]
    return activations, torch.cat(largest)
