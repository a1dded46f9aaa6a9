"""The form that every model has here: pixels in, logits out, normalisation inside."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from bdcore.context import Meter

_meter: ContextVar[Meter | None] = ContextVar("meter", default=None)


class Classifier(nn.Module):
    """A network that takes pixels: it scales and normalises them, then calls `net`.

    Because the normalisation is inside, a trigger always lives in pixel space.

    Args:
        net: maps normalised images [B, C, H, W] to logits [B, classes].
        shape: (channels, height, width) of the images that it is given.
        mean, std: normalisation of images in [0, 1], one value for each channel that `net` takes. Grey images
            (channels = 1) are repeated over these channels, so a network for colour images takes them as well.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, net: nn.Module, shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.net = net
        self.shape = shape
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: uint8 in [0, 255] or floating point in [0, 1], [B, C, H, W].

        Returns:
            Logits [B, classes].
        """
        meter = _meter.get()
        if meter is not None:
            meter.images += len(images)
        pixels = images / 255 if images.dtype == torch.uint8 else images
        return self.net((pixels - self.mean) / self.std)


@contextmanager
def metered(meter: Meter) -> Generator[None]:
    """Within the block, every forward of a Classifier (copies too) adds its batch size to `meter.images`.

    Blocks nest: the innermost meter counts, the outer one takes over again when the inner block ends.
    """
    token = _meter.set(meter)
    try:
        yield
    finally:
        _meter.reset(token)
