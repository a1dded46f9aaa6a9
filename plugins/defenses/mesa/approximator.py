"""The sub-models of the staircase, stacked: S max-entropy generators, each for a class and a threshold of success.

Sub-model s minimises L = max(0, beta_s - F_s(G_s(z))) - alpha I(G_s(z); z): its patches shall lead to class target_s
with a success F of at least beta_s, and be as different from one another as that allows. The gradients of the stack do
not touch, so it learns what S separate trainings would, with one pass of the classifier over all images.
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from bdcore import Context, Recipe, fit

from .generator import LATENT, Generators, StatisticsNetworks
from .mine import mutual_information, statistics_loss
from .patches import Places, draw_offsets, put_patches

LEAST_STEPS = 40  # updates in an epoch, between which there is no checkpoint
_SAMPLES = 4096  # patches that an entropy is estimated from


@dataclass(frozen=True)
class Form:
    """How sub-models are trained.

    Args:
        uniform_latent: latent values uniform in [0, 1] instead of Gaussian.
        places: where the patches of a batch lie.
        images_per_trigger: over how many images the success of a patch is averaged before the hinge; 1 is a hinge for
            each image.
        leaky_output: a LeakyReLU on the statistics networks' output.
        alpha: weight of the entropy.
        noise: standard deviation of the noise on a patch before the classifier sees it.
        hidden: units of the networks' hidden layers.
        batch_size: latents, and images at most, in a batch.
    """

    uniform_latent: bool
    places: Places
    images_per_trigger: int
    leaky_output: bool
    alpha: float
    noise: float
    hidden: int
    batch_size: int


class Approximator(nn.Module):
    """S sub-models.

    Args:
        targets: the class of each, S in all.
        betas: the threshold of success of each.
        shape: (C, h, w) of a patch.
        form: how they are trained.
        generator: draws the first weights.
    """

    def __init__(
        self,
        targets: list[int],
        betas: list[float],
        shape: tuple[int, int, int],
        form: Form,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        stack, pixels = len(targets), shape[0] * shape[1] * shape[2]
        self.shape = shape
        self.form = form
        self.generators = Generators(stack, pixels, form.hidden, generator)
        self.statistics = StatisticsNetworks(stack, pixels, form.hidden, form.leaky_output, generator)
        self.targets = nn.Buffer(torch.tensor(targets))
        self.betas = nn.Buffer(torch.tensor(betas))
        self.log_average = nn.Buffer(torch.zeros(stack))  # of exp T, which is about 1 before training
        self._step = 0  # within an epoch

    def train_on(self, phase: str, model: nn.Module, images: Tensor, steps: int, context: Context) -> None:
        """Train by so many updates of the generators, each followed by one of the statistics networks.

        Args:
            phase: names the training.
            model: the classifier, frozen and in eval mode.
            images: uint8 [N, C, H, W].
            steps: updates of the generators, rounded up to whole epochs.
            context: where and how to compute.
        """
        recipe = Recipe(
            optimizer="adam",
            lr=2e-4,
            betas=(0.5, 0.999),
            weight_decay=0,
            schedule="constant",
            batch_size=self.form.batch_size,
            min_steps=LEAST_STEPS,
            epochs=whole_epochs(2 * steps, len(images), self.form.batch_size),
        )

        def end_epoch(epoch: int, figures: dict[str, float]) -> bool:
            self._step = 0  # a resumed training begins with an epoch, and so must count from there
            return False

        self.train()
        fit(
            phase, self, {"images": images}, lambda batch: self.loss(model, batch["images"]), recipe, context, end_epoch
        )
        self.requires_grad_(False).eval()

    def loss(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """The generators' and the statistics networks' loss in turn, summed over the stack.

        The networks whose turn it is not take no gradient, so that the optimiser leaves them alone.
        """
        generating = self._step % 2 == 0
        self._step += 1
        self.generators.requires_grad_(generating)
        self.statistics.requires_grad_(not generating)
        latent, other = self.draw_latent(self.form.batch_size), self.draw_latent(self.form.batch_size)
        patches = self.generators(latent)
        joint, marginal = self.statistics(latent, patches), self.statistics(other, patches)
        if not generating:
            return {"loss": statistics_loss(joint, marginal, self.log_average).sum()}
        entropy = mutual_information(joint, marginal)
        hinge = (self.betas[:, None] - self.success(model, images, patches)).clamp(min=0).mean(1)
        return {"loss": (hinge - self.form.alpha * entropy).sum()}

    def success(self, model: nn.Module, images: Tensor, patches: Tensor) -> Tensor:
        """F, the mean probability of the target class over the images that carry a patch.

        The images are of all classes, as in the paper's algorithm, which leaves none out; those of the target class
        have a probability near 1 whatever the patch. With a share s of them, an average of beta asks for an attack
        success of (beta - s) / (1 - s) on the others: of ten classes for 0.89 where beta is 0.9. `measure_success`
        leaves them out; a hinge for each image is not concerned.

        Args:
            model: the classifier.
            images: uint8 [b, C, H, W]; they are dealt out to the patches, `images_per_trigger` to each.
            patches: [S, B, C * h * w]; the first ones are used, as many as there are images for.

        Returns:
            [S, K], K patches of each sub-model.
        """
        stack = len(patches)
        each = min(self.form.images_per_trigger, len(images))
        used = min(len(images) // each, patches.shape[1])
        images = images[: used * each]
        trigger = patches[:, :used].reshape(stack * used, *self.shape)
        if self.form.noise:
            trigger = trigger + self.form.noise * torch.randn_like(trigger)
        index = torch.arange(stack * used, device=images.device).repeat_interleave(each)
        offset = draw_offsets(images, self.shape, stack, self.form.places)
        stamped = put_patches(torch.cat([images] * stack), trigger, index, offset, torch.float32)
        labels = self.targets.repeat_interleave(used * each)
        share = model(stamped).float().softmax(1).gather(1, labels[:, None])
        return share.view(stack, used, each).mean(2)

    def draw_latent(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` latents for each sub-model, [S, count, 64]; from the device's default generator if none is given."""
        device = self.targets.device
        draw = torch.rand if self.form.uniform_latent else torch.randn
        source = generator.device if generator else device
        return draw(len(self.targets), count, LATENT, generator=generator, device=source).to(device)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` patches of each sub-model, [S, count, C, h, w] in [0, 1]."""
        patches: Tensor = self.generators(self.draw_latent(count, generator))
        return patches.unflatten(2, self.shape)

    @torch.no_grad()
    def entropies(self, generator: torch.Generator) -> Tensor:
        """The estimated entropy of each trained sub-model's patches in nats, float64 [S] on the CPU.

        It is clamped to [0, log B]: with batches of B the statistics networks have learnt no larger one.
        """
        latent, other = self.draw_latent(_SAMPLES, generator), self.draw_latent(_SAMPLES, generator)
        patches = self.generators(latent)
        joint, marginal = self.statistics(latent, patches), self.statistics(other, patches)
        found = mutual_information(joint.double(), marginal.double()).cpu()
        return found.clamp(0, float(torch.tensor(self.form.batch_size).double().log()))


def whole_epochs(updates: int, samples: int, batch_size: int) -> int:
    """How many epochs of at least `LEAST_STEPS` batches hold so many updates."""
    batches = ceil(samples / batch_size)
    return ceil(updates / (batches * ceil(LEAST_STEPS / batches)))
