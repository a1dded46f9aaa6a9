"""Generators of patches and the networks that judge their diversity, stacked: S of each in one batched product.

A stack computes what S separate networks would, each with its own weights, its own BatchNorm statistics and a gradient
that touches no other. All tensors have the stack as their first dimension.
"""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 16  # latent values that each layer of a generator takes in
LATENT = 4 * CHUNK
_SLOPE = 0.2


class Generators(nn.Module):
    """S generators: latent values in, the pixels of a patch out.

    The latent comes in four chunks, one for each layer: three of `hidden` units with BatchNorm and LeakyReLU, and a
    last one with a sigmoid.

    Args:
        stack: S.
        pixels: values of a patch, channels x height x width.
        hidden: units of each hidden layer.
        generator: draws the first weights, as torch.nn.Linear would.
    """

    def __init__(self, stack: int, pixels: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        inputs = [CHUNK, hidden + CHUNK, hidden + CHUNK]
        self.hidden = nn.ModuleList(StackedLinear(stack, size, hidden, generator) for size in inputs)
        self.norms = nn.ModuleList(StackedBatchNorm(stack, hidden) for _ in inputs)
        self.last = StackedLinear(stack, hidden + CHUNK, pixels, generator)

    def forward(self, latent: Tensor) -> Tensor:
        """Map latent values [S, B, 64] to patches [S, B, pixels] in [0, 1]."""
        first, *chunks = latent.split(CHUNK, dim=2)
        taken = first
        for linear, norm, chunk in zip(self.hidden, self.norms, chunks, strict=True):
            active = F.leaky_relu(norm(linear(taken)), _SLOPE)
            taken = torch.cat([active, chunk], dim=2)
        return torch.sigmoid(self.last.exactly(taken))


class StatisticsNetworks(nn.Module):
    """S statistics networks T(z, x) of MINE: high where a patch x goes with the latent z that it was made from.

    Args:
        stack: S.
        pixels: values of a patch.
        hidden: units of both hidden layers.
        leaky_output: a LeakyReLU on T's output too, as in the released code.
        generator: draws the first weights.
    """

    def __init__(self, stack: int, pixels: int, hidden: int, leaky_output: bool, generator: torch.Generator) -> None:
        super().__init__()
        # One product over both inputs side by side is Wx z + Wy x + b.
        self.first = StackedLinear(stack, LATENT + pixels, hidden, generator)
        self.second = StackedLinear(stack, hidden, hidden, generator)
        self.last = StackedLinear(stack, hidden, 1, generator)
        self.leaky_output = leaky_output

    def forward(self, latent: Tensor, patches: Tensor) -> Tensor:
        """Map latent values [S, B, 64] and patches [S, B, pixels] to T, [S, B]."""
        active = F.leaky_relu(self.first(torch.cat([latent, patches], dim=2)), _SLOPE)
        output = self.last.exactly(F.leaky_relu(self.second(active), _SLOPE)).squeeze(2)
        return F.leaky_relu(output, _SLOPE) if self.leaky_output else output


class StackedLinear(nn.Module):
    """S linear layers: y[s] = x[s] weight[s] + bias[s], x [S, B, inputs], weight [S, inputs, outputs]."""

    def __init__(self, stack: int, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / sqrt(inputs)  # torch.nn.Linear's
        self.weight = nn.Parameter(torch.empty(stack, inputs, outputs).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(stack, 1, outputs).uniform_(-bound, bound, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Map [S, B, inputs] to [S, B, outputs]."""
        return torch.baddbmm(self.bias, x, self.weight)

    def exactly(self, x: Tensor) -> Tensor:
        """The same in the weights' own precision, whatever autocast says: for outputs, whose exponentials count."""
        with torch.autocast(x.device.type, enabled=False):
            return self(x.to(self.weight.dtype))


class StackedBatchNorm(nn.Module):
    """S BatchNorms over features: statistics are taken over the B samples of each, never across the stack."""

    def __init__(self, stack: int, features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(stack * features)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [S, B, features]."""
        stack, batch, features = x.shape
        rows = x.transpose(0, 1).reshape(batch, stack * features)
        return self.norm(rows).view(batch, stack, features).transpose(0, 1)
