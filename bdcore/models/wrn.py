"""Wide residual networks.

Zagoruyko, Komodakis: Wide Residual Networks, BMVC 2016 (arXiv:1605.07146): three groups of 16k, 32k, 64k channels,
(depth - 4) / 6 pre-activation blocks in each, no dropout. WRN-16-1 has 64 penultimate features.
"""

from bdcore.models.preact_resnet import PreActResNet


def wrn(depth: int, width: int, channels: int, classes: int) -> PreActResNet:
    """WRN-depth-width.

    Args:
        depth: 6n + 4 for n >= 1 blocks a group.
        width: the widening factor k >= 1.
        channels: of the images.
        classes: of the logits.
    """
    return PreActResNet(
        channels, classes, stem=16, widths=(16 * width, 32 * width, 64 * width), blocks=[(depth - 4) // 6] * 3
    )
