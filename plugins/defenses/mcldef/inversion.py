"""Trigger inversion, stacked: the smallest change that sends images to a class, for several classes in one batch.

Both forms are modules whose parameters are the triggers and whose buffers hold all other state (the weight of the
penalty, counters, the best so far), so that the one training loop checkpoints and resumes them exactly. All tensors
have the stack of T classes as their first dimension; the classes' gradients and optimiser states do not touch.
"""

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdcore import Batch, Context, Recipe, Trigger, blend_trigger, fit

SUCCESS = 0.9  # an inverted trigger counts where it sends this share of the images to its class


def invert(
    phase: str,
    model: nn.Module,
    stack: "Inversion",
    images: Tensor,
    epochs: int,
    patience: int,
    context: Context,
) -> None:
    """Train the triggers of `stack` on uint8 [N, C, H, W] images; end where every class has a successful trigger and
    none got smaller for `patience` epochs. A class that has not succeeded yet is given all epochs."""

    def end_epoch(epoch: int, figures: dict[str, float]) -> bool:
        stack.end_epoch()
        return bool((stack.stale >= patience).all())

    stack.stale.zero_()  # patience counts within one inversion, not over the rounds before it
    recipe = type(stack).recipe.model_copy(update={"epochs": epochs})
    columns = {"images": images}

    def loss(batch: Batch) -> dict[str, Tensor]:
        return stack.loss(model, batch["images"])

    fit(phase, stack, columns, loss, recipe, context, end_epoch, capturable=True)


class Inversion(nn.Module, ABC):
    """T triggers; subclasses say what a trigger is and how its size is held down.

    Args:
        targets: int64 [T], the class that each trigger shall lead to.
        shape: (C, H, W) of the images.
    """

    recipe: ClassVar[Recipe]

    def __init__(self, targets: Tensor, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.targets = nn.Buffer(targets.clone())
        self.size = nn.Buffer(torch.full((len(targets),), torch.inf))  # of the best trigger; inf: none succeeded yet
        self.stale = nn.Buffer(torch.zeros(len(targets)))  # epochs since the last smaller one; 0 until one succeeds
        self.hits = nn.Buffer(torch.zeros(len(targets)))  # images sent to their target in this epoch,
        self.seen = nn.Buffer(torch.zeros(len(targets)))  # of so many

    @abstractmethod
    def apply_to(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] images with each trigger, float [T * B, C, H, W] in [0, 1], class by class."""

    @abstractmethod
    def penalty(self) -> Tensor:
        """What the size of each trigger costs, [T]."""

    @abstractmethod
    def keep(self, success: Tensor) -> None:
        """At an epoch's end: note new best triggers, and adapt to each one's success [T]."""

    @abstractmethod
    def best(self, place: int) -> Trigger | None:
        """The best trigger of the class at `place` in the stack; None where none succeeded or it is empty."""

    def loss(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """The sum over the stack of mean cross entropy to the target and penalty, with the success beside it."""
        logits = model(self.apply_to(images)).float()
        labels = self.targets.repeat_interleave(len(images))
        hits = (logits.detach().argmax(1) == labels).view(len(self.targets), -1).sum(1)
        self.hits += hits
        self.seen += len(images)
        entropy = F.cross_entropy(logits, labels, reduction="none").view(len(self.targets), -1).mean(1)
        return {"loss": (entropy + self.penalty()).sum(), "success": hits.float().mean() / len(images)}

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Close the epoch's books."""
        success = self.hits / self.seen
        self.hits.zero_()
        self.seen.zero_()
        self.stale += self.size.isfinite()  # what has not succeeded yet cannot get smaller
        self.keep(success)

    def take(self, places: Tensor) -> Self:
        """A stack of the classes at `places` alone, in the state that they have here."""
        part = copy.deepcopy(self)
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = tensor.data[places.to(tensor.device)].clone()
        return part

    @torch.no_grad()
    def put(self, places: Tensor, part: Self) -> None:
        """Write the state of a stack taken from here back to its `places`."""
        mine, theirs = self.state_dict(), part.state_dict()
        for name, value in mine.items():
            value[places] = theirs[name].to(value)


class PixelInversion(Inversion):
    """x' = clamp(x + delta, 0, 1), delta = clamp(P) - clamp(N) (Tao et al., "Better Trigger Inversion Optimization in
    Backdoor Scanning", CVPR 2022; the form that MCLDef's ACM MM release uses)."""

    recipe = Recipe(
        optimizer="adam", lr=0.1, betas=(0.5, 0.9), weight_decay=0, schedule="constant", batch_size=64, epochs=100,
        min_steps=5,
    )  # fmt: skip

    def __init__(self, targets: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> None:
        super().__init__(targets, shape)
        stack = len(targets)
        self.up = nn.Parameter(torch.rand(stack, *shape, generator=generator))
        self.down = nn.Parameter(torch.rand(stack, *shape, generator=generator))
        self.weight = nn.Buffer(torch.full((stack,), 1e-3))
        self.successes = nn.Buffer(torch.zeros(stack))  # epochs in a row with success,
        self.failures = nn.Buffer(torch.zeros(stack))  # or without
        self.best_delta = nn.Buffer(torch.zeros(stack, *shape))
        self.best_cost = nn.Buffer(torch.full((stack,), torch.inf))
        self.best_pixels = nn.Buffer(torch.full((stack,), torch.inf))

    def delta(self) -> Tensor:
        """What is added to images, [T, C, H, W] in [-1, 1]."""
        return self.up.clamp(0, 1) - self.down.clamp(0, 1)

    def apply_to(self, images: Tensor) -> Tensor:
        """clamp(x + delta, 0, 1) for every pair of trigger and image."""
        return (images.float().div(255) + self.delta()[:, None]).clamp(0, 1).flatten(0, 1)

    def cost(self) -> Tensor:
        """The unweighted regulariser, [T]: a smooth count of the pixels in use."""
        count = sum((torch.tanh(b / 10) / (2 - 1e-7) + 0.5).amax(1).sum((1, 2)) for b in (self.up, self.down))
        return torch.as_tensor(count)

    def penalty(self) -> Tensor:
        """The regulariser times each class's own weight."""
        return self.weight * self.cost()

    def keep(self, success: Tensor) -> None:
        """Drop changes below one grey level, keep the best, and move the weight after ten epochs of one kind.

        The best changes the fewest pixels; the regulariser decides between equals. It cannot decide alone: values below
        zero lower it and change no pixel, so it may be at its lowest while the trigger still shrinks.
        """
        faint = self.delta().abs() < 1 / 255
        self.up[faint] = 0
        self.down[faint] = 0
        delta, cost = self.delta(), self.cost()
        pixels = delta.abs().amax(1).gt(0).sum((1, 2)).float()
        won = success >= SUCCESS
        fewer, equal = pixels < self.best_pixels, pixels == self.best_pixels
        better = won & (fewer | (equal & (cost < self.best_cost)))
        self.best_delta[better] = delta[better]
        self.best_cost[better] = cost[better]
        self.best_pixels[better] = pixels[better]
        self.size[better] = delta.abs().amax(1).sum((1, 2))[better]
        self.stale[won & fewer] = 0  # a better one among equals is no reason to go on
        self.successes.copy_(torch.where(won, self.successes + 1, 0))
        self.failures.copy_(torch.where(won, 0, self.failures + 1))
        raised, lowered = self.successes >= 10, self.failures >= 10
        self.weight *= torch.where(raised, 1.5, torch.where(lowered, 1.5**-1.5, 1.0))
        self.successes[raised] = 0
        self.failures[lowered] = 0

    def best(self, place: int) -> Trigger | None:
        """The smallest successful delta."""
        delta = self.best_delta[place].clone()
        return Trigger(int(self.targets[place]), delta=delta) if delta.any() else None


class MaskInversion(Inversion):
    """x' = (1 - mask) x + mask pattern with an L1 penalty on the mask (Neural Cleanse, Wang et al., S&P 2019; MCLDef's
    first release). Blended in pixel space: blending normalised images clipped to [0, 1] cannot reach white or black."""

    recipe = Recipe(
        optimizer="adam", lr=0.005, weight_decay=0, schedule="constant", batch_size=64, epochs=100, min_steps=5
    )

    def __init__(self, targets: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> None:
        super().__init__(targets, shape)
        channels, height, width = shape
        stack = len(targets)
        self.pattern = nn.Parameter(torch.rand(stack, channels, height, width, generator=generator))
        self.mask = nn.Parameter(torch.rand(stack, 1, height, width, generator=generator))
        self.best_pattern = nn.Buffer(torch.zeros(stack, channels, height, width))
        self.best_mask = nn.Buffer(torch.zeros(stack, 1, height, width))

    def apply_to(self, images: Tensor) -> Tensor:
        """The blend of every pair of trigger and image, after the clipping that follows each optimiser step."""
        with torch.no_grad():
            self.pattern.clamp_(0, 1)
            self.mask.clamp_(0, 1)
        stack = len(self.targets)
        index = torch.arange(stack, device=images.device).repeat_interleave(len(images))
        repeated = images.repeat(stack, 1, 1, 1)
        return blend_trigger(repeated, self.pattern, self.mask, index=index, out_dtype=torch.float32)

    def penalty(self) -> Tensor:
        """lambda |mask|_1, lambda 0.01 for small images and 0.001 for large ones, as published."""
        return (0.01 if self.shape[1] <= 64 else 0.001) * self.mask.sum((1, 2, 3))

    def keep(self, success: Tensor) -> None:
        """Keep the smallest successful mask."""
        norm = self.mask.clamp(0, 1).sum((1, 2, 3))
        better = (success >= SUCCESS) & (norm < self.size)
        self.best_pattern[better] = self.pattern[better].clamp(0, 1)
        self.best_mask[better] = self.mask[better].clamp(0, 1)
        self.size[better] = norm[better]
        self.stale[better] = 0

    def best(self, place: int) -> Trigger | None:
        """The smallest successful mask and its pattern."""
        mask = self.best_mask[place].clone()
        target = int(self.targets[place])
        return Trigger(target, mask=mask, pattern=self.best_pattern[place].clone()) if mask.any() else None


INVERSIONS: dict[str, type[PixelInversion] | type[MaskInversion]] = {"pixel": PixelInversion, "mask": MaskInversion}
