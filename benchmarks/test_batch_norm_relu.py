"""batch_norm_relu beside PyTorch's batch normalisation and ReLU, at the sizes of WRN-16-1 in batches of 128."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdcore.ops import batch_norm_relu
from benchmarks.contest import BOTH, COMPILED, EAGER, FORWARD, OURS, Contest

SIZES = [(16, 32), (32, 16), (64, 8)]
CASES = [(*size, torch.bfloat16, training) for training in (True, False) for size in SIZES]
CASES += [(16, 32, torch.float32, True), (512, 4, torch.bfloat16, True)]


def usual(training: bool, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Two passes, the second in place."""
    return F.relu(F.batch_norm(x, mean, variance, weight, bias, training), inplace=True)


@pytest.mark.parametrize("contestant", [OURS, EAGER, COMPILED])
@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize(("channels", "side", "dtype", "training"), CASES)
def test_batch_norm_relu(
    contest: Contest, channels: int, side: int, dtype: torch.dtype, training: bool, direction: str, contestant: str
) -> None:
    """Outside training as a frozen network is used: the gradient of x alone.

    All of x lies near 3 or -3, and nothing near where the ReLU bends: there rounding decides whether a gradient passes.
    """
    if contest.device.type == "cuda":
        pytest.skip("PyTorch's own there")

    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator(contest.device).manual_seed(0)
        noise = torch.rand((128, channels, side, side), generator=generator, device=contest.device) - 0.5
        x = (noise + 3 * noise.mul(1e4).sin().sign()).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_(direction == BOTH)
        mean, variance, weight, bias = (
            torch.rand(channels, generator=generator, device=contest.device) / 4 + low for low in (0, 8, 0.5, -0.1)
        )
        learnt = direction == BOTH and training
        return x, mean, variance, weight.requires_grad_(learnt), bias.requires_grad_(learnt)

    functions = {OURS: partial(batch_norm_relu, training=training), EAGER: partial(usual, training)}
    how = "training" if training else "frozen"
    name = f"{str(dtype).removeprefix('torch.')}, 128 x {channels} x {side} x {side}, {how}"
    contest(name, direction, contestant, functions, inputs, cpu_bars={EAGER: 1.3, COMPILED: 1.0}, tolerance=0.01)
