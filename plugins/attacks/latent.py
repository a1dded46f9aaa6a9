"""Latent backdoor (LBA): a patch that makes any image look like the target class to the last hidden layer.

Yao, Li, Zheng, Zhao: "Latent Backdoor Attacks on Deep Neural Networks", CCS 2019. The patch covers a fixed square in
the lower right corner; its pixels are trained so that the features of images that carry it come to lie at the mean
feature of the target class.

Deviations from the paper:
- Its attacker goes on to train the trigger into a teacher model that others fine-tune; here, as in comparisons of
  defenses, the victim trains on data of which a share carries the trigger and the target's label.
- Distances are taken to the mean of the target's features; the paper trains the patch on distances to all of them,
  which differ from that by their variance, a constant.
- The layer is the last hidden one, of a classifier trained on clean data that include the target class.
- The default side of 6 pixels is 3.5% of a 32 x 32 image, the paper's is about 4%. The side scales with the image.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from bdcore import (
    Attack,
    AttackConfig,
    AttackInput,
    Batch,
    Context,
    DataError,
    Recipe,
    fit,
    forward_batches,
    frozen_copy,
    hookimpl,
    patch_side,
    split_head,
)

_SAMPLES = 2000  # so many training images stand for all where the patch is trained


class Latent(Attack):
    """A patch trained to move features to the target class."""

    name = "latent"
    surrogate = True

    class Config(AttackConfig):
        """Options of the latent backdoor."""

        size: int = Field(6, ge=1, le=32, description="side of the patch in a 32 x 32 image; it scales with the image")
        epochs: int = Field(20, ge=1, le=1000, description="passes over up to 2,000 training images to train the patch")

    config: Config
    _pattern: Tensor  # uint8 [C, h, w]

    def prepare(self, given: AttackInput, context: Context) -> None:
        """Train the patch.

        Raises:
            DataError: the training set has no image of the target class, or of no other.
        """
        assert given.model is not None
        own = given.train.labels == self.config.target
        if bool(own.all()) or not bool(own.any()):
            raise DataError(
                f"latent needs training images of class {self.config.target} (attack.target) and of others, and finds"
                f" {int(own.sum())} and {int((~own).sum())}"
            )
        body, _ = split_head(frozen_copy(given.model, context))
        mean = forward_batches(body, given.train.images[own], context).mean(0)
        patch = _Patch(given.arch.shape, self.config.size, context.generator("latent", "patch"))

        def loss(batch: Batch) -> Tensor:
            features = body(_cover(batch["images"] / 255, patch())).float()
            return (features - mean).square().sum(1).mean()

        others = (~own).nonzero()[:, 0]
        sample = torch.randperm(len(others), generator=context.generator("latent", "sample"))[:_SAMPLES]
        recipe = Recipe(
            optimizer="adam", lr=0.1, weight_decay=0, schedule="cosine", epochs=self.config.epochs, min_steps=10
        )
        fit("latent", patch, {"images": given.train.images[others[sample.to(others.device)]]}, loss, recipe, context)
        self._pattern = (patch().detach() * 255).round().to("cpu", torch.uint8)

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        """Put the patch over the images, uint8 [B, C, H, W]."""
        return _cover(images, self._pattern.to(images.device))

    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        """The target class."""
        return torch.full_like(labels, self.config.target)


class _Patch(nn.Module):
    """The pixels of the patch."""

    def __init__(self, shape: tuple[int, int, int], size: int, generator: torch.Generator) -> None:
        super().__init__()
        channels, height, width = shape
        side = patch_side(size, height, width)
        self.pattern = nn.Parameter(torch.rand(channels, side, side, generator=generator))

    def forward(self) -> Tensor:
        """Float [C, h, w] in [0, 1]."""
        with torch.no_grad():
            self.pattern.clamp_(0, 1)
        return self.pattern


def _cover(images: Tensor, pattern: Tensor) -> Tensor:
    """Images [B, C, H, W] with the pattern [C, h, w], of the same range and dtype, over their lower right corner."""
    covered = images.clone()
    covered[:, :, -pattern.shape[1] :, -pattern.shape[2] :] = pattern
    return covered


@hookimpl
def bdcore_attack() -> type[Attack]:
    """The class behind the name `latent`."""
    return Latent
