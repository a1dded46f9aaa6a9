"""Poisoning a data set of CIFAR-10's size with each attack, beside the line or two that a script has for it."""

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from bdcore import Attack, Context
from bdcore_plugins.attacks.badnets import BadNets
from bdcore_plugins.attacks.blended import Blended
from bdcore_plugins.attacks.sig import Sig
from benchmarks.contest import COMPILED, EAGER, FORWARD, OURS, Contest

IMAGES = 50_000
ALPHA, AMPLITUDE, FREQUENCY = 0.2, 20, 6


@cache
def data(device: torch.device) -> Tensor:
    """Noise of CIFAR-10's shape."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator, device=device)


def usual_badnets(context: Context) -> Callable[[Tensor], Tensor]:
    """A patch of three by three pixels, written over the corner."""
    patch = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8, device=context.device)

    def stamp(images: Tensor) -> Tensor:
        stamped = images.clone()
        stamped[:, :, -3:, -3:] = patch
        return stamped

    return stamp


def usual_blended(context: Context) -> Callable[[Tensor], Tensor]:
    """A picture of noise, the attack's own, mixed in."""
    picture = torch.randint(0, 256, (3, 32, 32), generator=context.generator("blended"), dtype=torch.uint8)
    added = ALPHA * picture.to(context.device)

    def stamp(images: Tensor) -> Tensor:
        return ((1 - ALPHA) * images + added).round().to(torch.uint8)

    return stamp


def usual_sig(context: Context) -> Callable[[Tensor], Tensor]:
    """A wave over the columns, added."""
    wave = AMPLITUDE * torch.sin(2 * math.pi * FREQUENCY / 32 * torch.arange(32, dtype=torch.float64))
    added = wave.round().to(torch.int16).to(context.device)

    def stamp(images: Tensor) -> Tensor:
        return (images + added).clamp(0, 255).to(torch.uint8)

    return stamp


ATTACKS: dict[str, tuple[Attack, Callable[[Context], Callable[[Tensor], Tensor]]]] = {
    "badnets": (BadNets(BadNets.Config()), usual_badnets),
    "blended": (Blended(Blended.Config(alpha=ALPHA)), usual_blended),
    "sig": (Sig(Sig.Config(amplitude=AMPLITUDE, frequency=FREQUENCY)), usual_sig),
}


@pytest.mark.parametrize("contestant", [OURS, EAGER, COMPILED])
@pytest.mark.parametrize("name", ATTACKS)
def test_poisoning(contest: Contest, name: str, contestant: str) -> None:
    """All images at once, into a new tensor."""
    attack, usual = ATTACKS[name]
    context = Context(device=contest.device)
    functions = {OURS: lambda images: attack.stamp(images, context), EAGER: usual(context)}
    contest(
        f"{name}, {IMAGES:,} x 3 x 32 x 32",
        FORWARD,
        contestant,
        functions,
        lambda: (data(contest.device),),
        cpu_bars={"seconds": 0.1},
    )
