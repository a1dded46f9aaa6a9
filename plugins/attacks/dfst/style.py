"""The trigger of DFST: a generator that gives images the look of a sunset, learned from two sets without pairs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bdcore import Batch, Context, Recipe, fit

SIDE_AT_LEAST = 8
"""Pixels on a side below which the networks have nothing left to normalise over."""

_IMAGES = 1600  # of each of the two sets
_CYCLE, _IDENTITY = 10.0, 0.5
_WIDTH = 16

_DUSK = ((26, 14, 52), (120, 32, 92), (232, 90, 44), (255, 176, 66), (255, 240, 176))
"""Colours of a sunset from its shadows to the sun, violet over magenta and orange to pale yellow."""
_TONES = (0.0, 0.35, 0.65, 0.85, 1.0)
_LUMINANCE = (0.299, 0.587, 0.114)
_KEPT = 0.2  # of an image's own colours


class Generator(nn.Module):
    """A small image-to-image network: once down and up again, with a residual block between, added to its input.

    Because it starts from the input, it needs hundreds of steps where one that paints from nothing needs thousands.

    Args:
        channels: of the images.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.outer = nn.Sequential(_conv(channels, _WIDTH, 5), nn.InstanceNorm2d(_WIDTH), nn.ReLU())
        self.down = nn.Sequential(
            nn.Conv2d(_WIDTH, 2 * _WIDTH, 3, stride=2, padding=1), nn.InstanceNorm2d(2 * _WIDTH), nn.ReLU()
        )
        self.residual = nn.Sequential(
            _conv(2 * _WIDTH, 2 * _WIDTH, 3),
            nn.InstanceNorm2d(2 * _WIDTH),
            nn.ReLU(),
            _conv(2 * _WIDTH, 2 * _WIDTH, 3),
            nn.InstanceNorm2d(2 * _WIDTH),
        )
        self.up = nn.Sequential(nn.Conv2d(2 * _WIDTH, _WIDTH, 1), nn.InstanceNorm2d(_WIDTH), nn.ReLU())
        self.last = _conv(_WIDTH, channels, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Translate images, uint8 or float in [0, 1], [B, C, H, W]; returns float [B, C, H, W] in [0, 1]."""
        pixels = images / 255 if images.dtype == torch.uint8 else images
        small = self.down(self.outer(pixels))
        large = F.interpolate(self.up(small + self.residual(small)), size=pixels.shape[2:])
        return torch.sigmoid(self.last(large).float() + 2 * (2 * pixels.float() - 1))


class CycleGan(nn.Module):
    """Generators to and from the style, and a critic that knows each of the two sets (Zhu et al., ICCV 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_style, self.from_style = Generator(channels), Generator(channels)
        self.of_style, self.of_images = _critic(channels), _critic(channels)

    def loss(self, images: Tensor, styled: Tensor) -> dict[str, Tensor]:
        """What generators and critics minimise together, from batches of both sets, float [B, C, H, W] in [0, 1].

        Least-squares adversarial loss, cycle consistency and identity. A generator is judged by critics that its
        gradient leaves alone, a critic by translations that lead no gradient back, so one sum trains both.
        """
        fake_styled, fake_images = self.to_style(images), self.from_style(styled)
        adversarial = _distance(_fixed(self.of_style, fake_styled), 1) + _distance(
            _fixed(self.of_images, fake_images), 1
        )
        cycle = F.l1_loss(self.from_style(fake_styled), images) + F.l1_loss(self.to_style(fake_images), styled)
        identity = F.l1_loss(self.to_style(styled), styled) + F.l1_loss(self.from_style(images), images)
        critics = _judgement(self.of_style, styled, fake_styled) + _judgement(self.of_images, images, fake_images)
        total = adversarial + _CYCLE * cycle + _IDENTITY * identity + critics
        return {"loss": total, "adversarial": adversarial, "cycle": cycle, "critics": critics}


def train_generator(images: Tensor, epochs: int, context: Context) -> Generator:
    """A generator from ordinary images to the sunset style, in eval mode.

    Args:
        images: the training images, uint8 [N, C, H, W] with C of 1 or 3. One half of those that are drawn are the
            ordinary set, the other half, recoloured by `sunset`, are the style's: no image is in both.
        epochs: passes over the two sets of up to 1,600 images.
        context: whose seed decides all that is drawn.
    """
    half = min(len(images) // 2, _IMAGES)
    drawn = torch.randperm(len(images), generator=context.generator("dfst", "images"))[: 2 * half].to(images.device)
    styled = sunset(images[drawn[half:]], context.generator("dfst", "sunset"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(context.generator("dfst", "generators").initial_seed())
        gan = CycleGan(images.shape[1])
    recipe = Recipe(
        epochs=epochs, batch_size=32, optimizer="adam", lr=1e-3, betas=(0.5, 0.999), weight_decay=0, warmup=0.1
    )

    def loss(batch: Batch) -> dict[str, Tensor]:
        return gan.loss(batch["ordinary"] / 255, batch["styled"] / 255)

    columns = {"ordinary": images[drawn[:half]], "styled": styled}
    fit("style", gan, columns, loss, recipe, context, capturable=True)
    return gan.to_style.eval()


def sunset(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images as a low sun would light them: recoloured by their brightness, with a glow over a horizon.

    They take the place of photographs of sunsets. Each image draws its own horizon and sun.

    Args:
        images: uint8 [N, C, H, W]; grey images (C = 1) get the brightness of the colours.
        generator: on the CPU.

    Returns:
        uint8 [N, C, H, W].
    """
    count, channels, height, width = images.shape
    pixels = images / 255
    weights = torch.tensor(_LUMINANCE, device=images.device).view(1, 3, 1, 1)
    brightness = pixels if channels == 1 else (pixels * weights).sum(1, keepdim=True)
    horizon, sun, radius = torch.rand(3, count, 1, 1, 1, generator=generator).to(images.device)
    horizon, sun, radius = 0.25 + 0.35 * horizon, 0.15 + 0.7 * sun, 0.12 + 0.18 * radius
    down = ((torch.arange(height, device=images.device) + 0.5) / height).view(-1, 1)
    right = (torch.arange(width, device=images.device) + 0.5) / width
    sky = (-(down - horizon).abs() / 0.3).exp()
    glow = (-((down - horizon).square() + (right - sun).square()) / (2 * radius.square())).exp()
    tone = (0.6 * brightness + 0.25 * sky + 0.3 * glow).clamp(0, 1)
    colours = _palette(images.device)[(tone[:, 0] * 255).round().long()].permute(0, 3, 1, 2)
    if channels == 1:
        colours = (colours * weights).sum(1, keepdim=True)
    return (((1 - _KEPT) * colours + _KEPT * pixels) * 255).round().to(torch.uint8)


def _palette(device: torch.device) -> Tensor:
    """The dusk's colour at each of 256 tones, float [256, 3] in [0, 1]."""
    tones, colours = torch.tensor(_TONES), torch.tensor(_DUSK) / 255
    at = torch.linspace(0, 1, 256)
    above = torch.searchsorted(tones, at).clamp(1, len(tones) - 1)
    share = ((at - tones[above - 1]) / (tones[above] - tones[above - 1])).unsqueeze(1)
    return ((1 - share) * colours[above - 1] + share * colours[above]).to(device)


def _conv(channels_in: int, channels_out: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, size, padding=size // 2, padding_mode="reflect")


def _critic(channels: int) -> nn.Sequential:
    """Judges overlapping patches of an image: towards 1 where they seem real, towards 0 where translated."""
    return nn.Sequential(
        nn.Conv2d(channels, 2 * _WIDTH, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * _WIDTH, 4 * _WIDTH, 4, stride=2, padding=1),
        nn.InstanceNorm2d(4 * _WIDTH),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4 * _WIDTH, 1, 3, padding=1),
    )


def _fixed(critic: nn.Module, images: Tensor) -> Tensor:
    """The critic's judgement, with a gradient to the images alone."""
    return functional_call(critic, {name: value.detach() for name, value in critic.named_parameters()}, (images,))


def _judgement(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return (_distance(critic(real), 1) + _distance(critic(fake.detach()), 0)) / 2


def _distance(judged: Tensor, wanted: float) -> Tensor:
    return (judged.float() - wanted).square().mean()
