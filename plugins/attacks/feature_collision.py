"""Feature collision (FC): images of the target class that a network sees as images with the trigger.

Shafahi, Huang, Najibi, Suciu, Studer, Dumitras, Goldstein: "Poison Frogs! Targeted Clean-Label Poisoning Attacks on
Neural Networks", NeurIPS 2018. A base image b of the target class is mixed with some of an image t (the watermark), and
then moved to a minimum of |f(x) - f(t)|^2 + beta |x - b|^2 by forward-backward splitting (its Algorithm 1): a gradient
step on the first term, then the exact minimiser of the second near it. f is the last hidden layer of a classifier
trained on clean data. Labels stay.

Deviations from the paper:
- It poisons for one test image t. Here every base collides with an image of its own of another class that carries a
  patch, and the patch is the trigger at test time, as in Saha, Subramanya, Pirsiavash: "Hidden Trigger Backdoor
  Attacks", AAAI 2020, whose patch this is: 4 x 4 random colours, enlarged, here in the lower right corner.
- A step that does not lower the objective is undone and the image's own rate halved, otherwise the rate grows; the
  paper halves one rate. So the objective never rises, and a poison lies no farther from its watermarked base than
  |f(b) - f(t)| / sqrt(beta), in the Euclidean norm over pixels in [0, 1] and before it is rounded to grey levels.
- The second step is (x + 2 r beta b) / (1 + 2 r beta) for the rate r, kept within [0, 1], which is exact for the
  objective as written; the paper's, without the factors 2, belongs to half its beta.
- beta is a number of its own, not derived from the numbers of pixels and features.
- The watermark is stronger, 0.5 for the paper's 0.3. Its victim is to mistake one image, ours has to learn the patch
  from scratch, and learns it where poisons show enough of it over enough of another class. On 10,000 images of
  CIFAR-10, 10 epochs of WRN-16-1, half of the target class poisoned, ASR was 100%; with a watermark of 0.3 and half
  the beta it had been 5%. On the digits ASR is 0%: the perturbation itself is easier to learn there than the patch.
"""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import interpolate

from bdcore import (
    Attack,
    AttackInput,
    CleanLabelAttack,
    CleanLabelConfig,
    Context,
    DataError,
    frozen_copy,
    hookimpl,
    patch_side,
    split_head,
)

_BATCH = 256
_FIRST_RATE, _SLOWER, _FASTER = 1.0, 0.5, 1.2


class FeatureCollision(CleanLabelAttack):
    """Base images moved, in a network's features, to images that carry the patch."""

    name = "feature_collision"
    surrogate = True

    class Config(CleanLabelConfig):
        """Options of feature collision."""

        poison_rate: float = Field(
            0.05, ge=0, le=1, description="share of all training samples that are poisoned, all of the target class"
        )
        source: int | None = Field(None, ge=0, description="class of the images t; by default every other class")
        size: int = Field(8, ge=1, le=32, description="side of the patch in a 32 x 32 image; it scales with the image")
        watermark: float = Field(0.5, ge=0, lt=1, description="share of t that is mixed into the base image")
        beta: float = Field(0.1, gt=0, description="weight of the distance to the base image, pixels in [0, 1]")
        steps: int = Field(100, ge=1, le=10_000, description="steps of forward-backward splitting")

    config: Config
    _patch: Tensor  # uint8 [C, h, w]
    _images: Tensor  # of the whole training set
    _sources: Tensor  # int64, the places in it where an image t may be found
    _body: nn.Module

    def prepare(self, given: AttackInput, context: Context) -> None:
        """Draw the patch; keep the images t and the network.

        Raises:
            DataError: no training image is of the source class, or it is the target class.
        """
        assert given.model is not None
        source, target = self.config.source, self.config.target
        labels = given.train.labels
        wanted = labels != target if source is None else (labels == source) & (labels != target)
        if not bool(wanted.any()):
            raise DataError(
                "feature_collision finds no training image to collide with: it takes those of "
                + (f"every class but {target}" if source is None else f"class {source} (attack.source)")
                + f", and the target class is {target}"
            )
        self._images, self._sources = given.train.images, wanted.nonzero()[:, 0]
        self._body, _ = split_head(frozen_copy(given.model, context))
        channels, height, width = given.arch.shape
        side = patch_side(self.config.size, height, width)
        colours = torch.rand(1, channels, 4, 4, generator=context.generator("feature_collision", "patch"))
        enlarged = interpolate(colours, size=(side, side), mode="bilinear", align_corners=False)
        self._patch = (enlarged[0] * 255).round().to(torch.uint8)

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        """Put the patch over the images, uint8 [B, C, H, W]."""
        stamped = images.clone()
        stamped[:, :, -self._patch.shape[1] :, -self._patch.shape[2] :] = self._patch.to(images.device)
        return stamped

    def poison(self, images: Tensor, labels: Tensor, context: Context) -> Tensor:
        """Let each image collide with an image of the source class that carries the patch, uint8 [B, C, H, W]."""
        generator = context.generator("feature_collision", "sources")
        drawn = torch.randint(len(self._sources), (len(images),), generator=generator)
        aims = self.stamp(self._images[self._sources[drawn]], context)
        made = [
            self._collide(base.to(context.device) / 255, aim.to(context.device) / 255)
            for base, aim in zip(images.split(_BATCH), aims.split(_BATCH), strict=True)
        ]
        return (torch.cat(made) * 255).round().to(images.device, torch.uint8)

    def _collide(self, images: Tensor, aims: Tensor) -> Tensor:
        """Images moved towards the features of `aims`, all float [B, C, H, W] in [0, 1]."""
        beta = self.config.beta
        bases = images + self.config.watermark * (aims - images)
        with torch.no_grad():
            aim = self._body(aims)

        def assess(points: Tensor) -> tuple[Tensor, Tensor]:
            """The objective of each image, [B, 1, 1, 1], and the slope of its first term, [B, C, H, W]."""
            points = points.detach().requires_grad_()
            first = (self._body(points) - aim).square().sum(1)
            (slope,) = torch.autograd.grad(first.sum(), points)
            second = beta * (points.detach() - bases).square().sum((1, 2, 3))
            return (first.detach() + second).view(-1, 1, 1, 1), slope

        points = bases
        cost, slope = assess(points)
        rate = torch.full_like(cost, _FIRST_RATE)
        for _ in range(self.config.steps):
            forward = points - rate * slope
            backward = ((forward + 2 * rate * beta * bases) / (1 + 2 * rate * beta)).clamp(0, 1)
            new_cost, new_slope = assess(backward)
            better = new_cost < cost
            points = torch.where(better, backward, points)
            slope = torch.where(better, new_slope, slope)
            cost = torch.where(better, new_cost, cost)
            rate = torch.where(better, rate * _FASTER, rate * _SLOWER)
        return points


@hookimpl
def bdcore_attack() -> type[Attack]:
    """The class behind the name `feature_collision`."""
    return FeatureCollision
