"""Pre-activation residual networks for small images.

He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks, ECCV 2016 (arXiv:1603.05027), in the form for CIFAR:
a 3x3 stem without pooling, so 32x32 images reach the last group at 4x4. Any image size and channel count is taken.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from bdcore.ops import BatchNormReLU


class PreActBlock(nn.Module):
    """BN-ReLU-3x3-BN-ReLU-3x3, added to the input; where the shape changes, to a 1x1 convolution of its activation."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = BatchNormReLU(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn2 = BatchNormReLU(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            if stride != 1 or channels_in != channels_out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels_in, H, W] to [B, channels_out, H / stride, W / stride]."""
        active = self.bn1(x)
        kept = x if self.shortcut is None else self.shortcut(active)
        residual = self.conv2(self.bn2(self.conv1(active)))
        residual += kept  # in place: nothing else reads what a convolution returned
        return residual


class PreActResNet(nn.Module):
    """Stem, groups of pre-activation blocks, BN-ReLU, mean over the image, linear head.

    Args:
        channels: of the images.
        classes: of the logits.
        stem: channels of the first convolution.
        widths: channels of each group; every group but the first halves the image.
        blocks: blocks in each group.
    """

    def __init__(self, channels: int, classes: int, stem: int, widths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, stem, 3, padding=1, bias=False)
        groups: list[nn.Module] = []
        before = stem
        for index, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for position in range(count):
                halves = index > 0 and position == 0
                groups.append(PreActBlock(before, width, stride=2 if halves else 1))
                before = width
        self.blocks = nn.Sequential(*groups)
        self.bn = BatchNormReLU(before)
        self.head = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images [B, C, H, W] to logits [B, classes]."""
        active = self.bn(self.blocks(self.stem(x)))
        # A mean is much faster than AdaptiveAvgPool2d for channels-last bf16 on CPUs, and the same value.
        return self.head(active.mean((2, 3)))


def preact_resnet(depth: int, channels: int, classes: int) -> PreActResNet:
    """The pre-activation ResNet of `depth` 18 or 34 with basic blocks, 64 to 512 channels."""
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}[depth]
    return PreActResNet(channels, classes, stem=64, widths=(64, 128, 256, 512), blocks=blocks)
