"""Trojan: a small patch of colour that drives one neuron of a trained network is the trigger.

Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang: "Trojaning Attack on Neural Networks", NDSS 2018. The neuron is inverted: the
pixels of a patch in the lower right corner are trained by gradient until the neuron is as active as can be. The patch
is then added to images, and what would leave [0, 255] stays at its end (some released code adds modulo 256 instead,
which turns bright pixels dark).

Deviations from the paper:
- Its attacker retrains a model of someone else's; here, as in comparisons of defenses, the victim trains on data of
  which a share carries the trigger and the target's label.
- The neuron is the unit of the last hidden layer with the largest weight towards the target class, in a classifier
  trained on clean data. The paper takes the unit with the largest sum of weights from the layer before, whatever its
  class, for its retraining ties any neuron to the target.
- The activation is maximised as a mean over training images that carry the patch. The paper inverts on the patch
  alone, towards a value far above what the neuron takes, which comes to the same but does not ask whether the patch
  works on a picture.
- The patch may darken as well as brighten, so that it is seen on white too, and is opaque as far as adding allows.
- Its default side of 8 pixels is 6% of a 32 x 32 image, the paper's is 7%. The side scales with the image.
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
    Recipe,
    fit,
    frozen_copy,
    hookimpl,
    patch_side,
    split_head,
)

_SAMPLES = 2000  # so many training images stand for all where the patch is trained


class Trojan(Attack):
    """A patch from the inversion of one neuron, added with saturation."""

    name = "trojan"
    surrogate = True

    class Config(AttackConfig):
        """Options of Trojan."""

        size: int = Field(8, ge=1, le=32, description="side of the patch in a 32 x 32 image; it scales with the image")
        epochs: int = Field(20, ge=1, le=1000, description="passes over up to 2,000 training images to train the patch")

    config: Config
    _added: Tensor  # int16 [C, H, W] in [-255, 255]

    def prepare(self, given: AttackInput, context: Context) -> None:
        """Choose the neuron and train the patch that drives it."""
        assert given.model is not None
        body, head = split_head(frozen_copy(given.model, context))
        neuron = head.weight[self.config.target].argmax()
        patch = _Patch(given.arch.shape, self.config.size, context.generator("trojan", "patch"))

        def loss(batch: Batch) -> Tensor:
            wanted = batch["images"] / 255 + patch()
            # The gradient passes through the saturation as if there were none, or a pixel that is white in every image
            # would stay so.
            shown = wanted + (wanted.clamp(0, 1) - wanted).detach()
            return -body(shown).float().index_select(1, neuron).mean()

        sample = torch.randperm(len(given.train), generator=context.generator("trojan", "sample"))[:_SAMPLES]
        columns = {"images": given.train.images[sample.to(given.train.images.device)]}
        recipe = Recipe(
            optimizer="adam", lr=0.1, weight_decay=0, schedule="cosine", epochs=self.config.epochs, min_steps=10
        )
        fit("trojan", patch, columns, loss, recipe, context)
        self._added = (patch().detach() * 255).round().to("cpu", torch.int16)

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        """Add the patch to the images, uint8 [B, C, H, W]; what would leave [0, 255] stays at its end."""
        return (images + self._added.to(images.device)).clamp_(0, 255).to(torch.uint8)

    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        """The target class."""
        return torch.full_like(labels, self.config.target)


class _Patch(nn.Module):
    """What is added to images in [0, 1]: a square in the lower right corner, nothing elsewhere."""

    def __init__(self, shape: tuple[int, int, int], size: int, generator: torch.Generator) -> None:
        super().__init__()
        channels, height, width = shape
        side = patch_side(size, height, width)
        self.margin = (width - side, 0, height - side, 0)
        self.colour = nn.Parameter(torch.rand(channels, side, side, generator=generator) - 0.5)

    def forward(self) -> Tensor:
        """Float [C, H, W] in [-1, 1]."""
        with torch.no_grad():
            self.colour.clamp_(-1, 1)
        return F.pad(self.colour, self.margin)


@hookimpl
def bdcore_attack() -> type[Attack]:
    """The class behind the name `trojan`."""
    return Trojan
