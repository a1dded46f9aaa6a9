"""Label-consistent backdoor (CL): images of the target class, made hard to recognise, carry a patch in their corners.

Turner, Tsipras, Madry: "Label-Consistent Backdoor Attacks" (2019), arXiv 1912.02771, the variant with adversarial
perturbations: projected gradient ascent on the loss of an adversarially trained network moves each image away from its
class within an l_inf ball of `epsilon`, in `steps` steps; then the patch is put into all four corners. What the victim
can still learn the class from is the patch, and the labels are right. At test time images get the patch alone.

The network is trained on the spot, as its authors train theirs (Madry, Makelov, Schmidt, Tsipras, Vladu: "Towards Deep
Learning Models Resistant to Adversarial Attacks", ICLR 2018): every batch is replaced by images within the same ball
that seven steps of gradient ascent from a random start have made. It has the victim's architecture and recipe, but
trains without the poison. This costs `training_steps` + 1 times what the training of the victim costs, for as many
epochs, and the perturbation forwards each poisoned image `steps` times.

Deviations from the paper:
- Its network is a larger ResNet than the victims here.
- The ascent that makes poisons starts at the image itself: the same image becomes the same poison.
- The patch has its full contrast, as in the paper's first experiments, and replaces the pixels. Of its 3 x 3 cells in
  the lower right corner those on every second diagonal are white and the others black; the other corners mirror them.
  It covers 3 pixels of a 32 x 32 image and scales with the image.

On the digits ASR is 0%: a change of 8 in 255 does not make black and white hard to recognise, so the patch is not
needed.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdcore import (
    Attack,
    AttackInput,
    Batch,
    CleanLabelAttack,
    CleanLabelConfig,
    Context,
    build,
    fit,
    frozen_copy,
    hookimpl,
    patch_side,
)

_BATCH = 256
_CELLS = ((0.0, 0.0, 255.0), (0.0, 255.0, 0.0), (255.0, 0.0, 255.0))  # in the lower right corner


class LabelConsistent(CleanLabelAttack):
    """Adversarial perturbations of the target class, and a patch in four corners."""

    name = "label_consistent"

    class Config(CleanLabelConfig):
        """Options of the label-consistent attack."""

        poison_rate: float = Field(
            0.05, ge=0, le=1, description="share of all training samples that are poisoned, all of the target class"
        )
        epsilon: int = Field(8, ge=1, le=255, description="largest change of a pixel before the patch, of 255")
        step: float = Field(1.5, gt=0, le=255, description="change of a pixel in one step of the ascent, of 255")
        steps: int = Field(100, ge=1, le=10_000, description="steps of the ascent that makes poisons")
        training_epochs: int | None = Field(
            None, ge=1, le=10_000, description="epochs of adversarial training; by default the victim's"
        )
        training_steps: int = Field(7, ge=1, le=100, description="steps of the ascent in adversarial training")

    config: Config
    _robust: nn.Module

    def prepare(self, given: AttackInput, context: Context) -> None:
        """Train a network of the victim's architecture adversarially on the clean training set."""
        model = build(given.arch, context.generator("label_consistent").initial_seed())
        epsilon, steps = self.config.epsilon / 255, self.config.training_steps

        def loss(batch: Batch) -> dict[str, Tensor]:
            images, labels = batch["images"] / 255, batch["labels"]
            start = (images + (2 * torch.rand_like(images) - 1) * epsilon).clamp(0, 1)
            # In eval mode, so that BatchNorm's statistics are of the images that are trained on.
            attacked = _ascend(model.eval(), images, labels, start, epsilon, 1.75 * epsilon / steps, steps)
            logits = model.train()(attacked).float()
            hits = logits.detach().argmax(1) == labels
            return {"loss": F.cross_entropy(logits, labels), "robust_accuracy": hits.float().mean()}

        epochs = self.config.training_epochs or given.recipe.epochs
        columns = {"images": given.train.images, "labels": given.train.labels}
        fit("label_consistent", model, columns, loss, given.recipe.model_copy(update={"epochs": epochs}), context)
        self._robust = frozen_copy(model, context)

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        """Put the patch into the four corners of the images, uint8 [B, C, H, W]."""
        side = patch_side(3, *images.shape[2:])
        cells = F.interpolate(torch.tensor(_CELLS)[None, None], size=(side, side), mode="nearest-exact")
        corner = cells[0, 0].to(images.device, torch.uint8)
        stamped = images.clone()
        stamped[:, :, -side:, -side:] = corner
        stamped[:, :, -side:, :side] = corner.flip(1)
        stamped[:, :, :side, -side:] = corner.flip(0)
        stamped[:, :, :side, :side] = corner.flip(0, 1)
        return stamped

    def poison(self, images: Tensor, labels: Tensor, context: Context) -> Tensor:
        """Move the images away from their class, then put the patch into their corners, uint8 [B, C, H, W]."""
        config = self.config
        moved: list[Tensor] = []
        for part, classes in zip(images.split(_BATCH), labels.split(_BATCH), strict=True):
            clean, truth = part.to(context.device) / 255, classes.to(context.device)
            found = _ascend(self._robust, clean, truth, clean, config.epsilon / 255, config.step / 255, config.steps)
            moved.append((found * 255).round().to(images.device, torch.uint8))
        return self.stamp(torch.cat(moved), context)


def _ascend(
    model: nn.Module, clean: Tensor, labels: Tensor, start: Tensor, epsilon: float, step: float, steps: int
) -> Tensor:
    """Steps along the sign of the cross entropy's slope, from `start`, within `epsilon` of `clean` and within [0, 1].

    Images are float [B, C, H, W] in [0, 1], labels int64 [B].
    """
    lowest, highest = (clean - epsilon).clamp(min=0), (clean + epsilon).clamp(max=1)
    found = start
    for _ in range(steps):
        found = found.detach().requires_grad_()
        loss = F.cross_entropy(model(found).float(), labels, reduction="sum")
        (slope,) = torch.autograd.grad(loss, found)
        found = (found.detach() + step * slope.sign()).clamp(lowest, highest)
    return found


@hookimpl
def bdcore_attack() -> type[Attack]:
    """The class behind the name `label_consistent`."""
    return LabelConsistent
