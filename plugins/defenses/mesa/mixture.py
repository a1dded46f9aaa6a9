"""Where triggers are drawn from: the staircase of trained sub-models, which together stand for the attacker's trigger.

Sub-model i spreads evenly over the triggers of success above beta_i. The density f of triggers is approximated in
steps: on the set of beta_i it rises by g^-1(beta_i) - g^-1(beta_{i-1}), where F = g(f). An even spread over that set
has the density exp(-h_i), h_i being its entropy, so sub-model i is drawn with probability gamma_i in proportion to
(g^-1(beta_i) - g^-1(beta_{i-1})) exp(h_i). The paper leaves g open; here it is the identity, and beta_0 is 0.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from .approximator import Approximator


def mixture_weights(betas: Tensor, entropies: Tensor) -> Tensor:
    """gamma, the probability of each sub-model.

    Args:
        betas: float [N], rising thresholds in (0, 1).
        entropies: float [N] in nats.

    Returns:
        float [N] with sum 1.
    """
    steps = torch.diff(betas, prepend=betas.new_zeros(1))
    # Relative to the largest entropy, which cancels: a large one cannot overflow.
    weights = steps * (entropies - entropies.max()).exp()
    return weights / weights.sum()


class TriggerSource(nn.Module, ABC):
    """Patches for the removal; what changes with its epochs lives in buffers."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Patches for `count` images, float [count, C, h, w] in [0, 1]; from the device's default generator, unless a
        CPU generator is given."""

    def end_epoch(self) -> None:
        """Called after each epoch of the removal."""
        return


class Mixture(TriggerSource):
    """Trained sub-models: for each patch one is drawn by its weight, or all take turns by the epoch.

    Args:
        stack: N sub-models with rising thresholds, in eval mode.
        weights: float [N], of sum 1; None lets them take turns, the highest threshold first (the released code).
    """

    def __init__(self, stack: Approximator, weights: Tensor | None) -> None:
        super().__init__()
        self.stack = stack
        edges = torch.empty(0) if weights is None else weights.cumsum(0)[:-1].float()
        self.edges = nn.Buffer(edges.to(stack.betas.device))
        self.in_turn = weights is None
        self.epoch = nn.Buffer(torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Patches of the sub-models that are drawn, or of the one whose turn it is."""
        patches = self.stack.sample(count, generator)
        numbers = torch.arange(count, device=patches.device)
        if self.in_turn:
            return patches[self._turn().expand(count), numbers]
        source = generator.device if generator else patches.device
        drawn = torch.rand(count, generator=generator, device=source).to(patches.device)
        return patches[torch.bucketize(drawn, self.edges, right=True), numbers]

    def keep(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` samples of the whole distribution: by the weights, or the same number of every sub-model's."""
        if not self.in_turn:
            return self.draw(count, generator)
        patches = self.stack.sample(count, generator)
        numbers = torch.arange(count, device=patches.device)
        return patches[numbers % len(patches), numbers]

    @torch.no_grad()
    def end_epoch(self) -> None:
        """The next sub-model's turn."""
        self.epoch += 1

    def _turn(self) -> Tensor:
        """Which sub-model is used in this epoch, int64 [1] on the device."""
        stack = len(self.stack.betas)
        return stack - 1 - self.epoch % stack
