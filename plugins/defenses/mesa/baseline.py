"""The baseline in pixel space: one patch, found by gradient descent on its pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdcore import Context, Recipe, fit

from .approximator import LEAST_STEPS, whole_epochs
from .mixture import TriggerSource
from .patches import draw_offsets, put_patches


class PixelPatch(TriggerSource):
    """One patch that sends images to a class; it is every sample that is drawn.

    Args:
        shape: (C, h, w) of the patch.
        generator: draws the first pixels, uniform in [0, 1].
    """

    def __init__(self, shape: tuple[int, int, int], generator: torch.Generator) -> None:
        super().__init__()
        self.patch = nn.Parameter(torch.rand(1, *shape, generator=generator))

    def train_on(
        self, phase: str, model: nn.Module, images: Tensor, target: int, steps: int, batch_size: int, context: Context
    ) -> None:
        """SGD (rate 0.1, momentum 0.9) on the cross entropy to the target, with one random place a batch, anywhere.

        Args:
            phase: names the training.
            model: the classifier, frozen and in eval mode.
            images: uint8 [N, C, H, W].
            target: the class.
            steps: updates, rounded up to whole epochs.
            batch_size: images in a batch at most.
            context: where and how to compute.
        """
        recipe = Recipe(
            lr=0.1, weight_decay=0, schedule="constant", batch_size=batch_size, min_steps=LEAST_STEPS,
            epochs=whole_epochs(steps, len(images), batch_size),
        )  # fmt: skip
        fit(phase, self, {"images": images}, lambda batch: self.loss(model, batch["images"], target), recipe, context)
        self.requires_grad_(False)
        self._clip()

    def loss(self, model: nn.Module, images: Tensor, target: int) -> Tensor:
        """Cross entropy to the target, after the clipping that follows each update."""
        self._clip()
        offset = draw_offsets(images, self.patch.shape, 1, "batch")
        index = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        logits = model(put_patches(images, self.patch, index, offset, torch.float32)).float()
        return F.cross_entropy(logits, torch.full_like(index, target))

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """The patch, `count` times."""
        return self.patch.detach().expand(count, -1, -1, -1)

    @torch.no_grad()
    def _clip(self) -> None:
        self.patch.clamp_(0, 1)
