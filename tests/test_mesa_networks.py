"""MESA's stacked networks against separate ones of torch, and MINE against closed forms and float64 autograd."""

import copy
from math import log

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bdcore_plugins.defenses.mesa.generator import Generators, StackedLinear, StatisticsNetworks
from bdcore_plugins.defenses.mesa.mine import NEW_VALUE, log_mean_exp, mutual_information, statistics_loss

STACK, HIDDEN, PIXELS, BATCH = 3, 20, 12, 16


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


class OneGenerator(nn.Module):
    """The generator of the paper for one sub-model, of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(
            nn.Linear(inputs, outputs)
            for inputs, outputs in [(16, HIDDEN), (HIDDEN + 16, HIDDEN), (HIDDEN + 16, HIDDEN), (HIDDEN + 16, PIXELS)]
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(HIDDEN) for _ in range(3))

    def forward(self, latent: Tensor) -> Tensor:
        a, b, c, d = latent.chunk(4, dim=1)
        x = nn.functional.leaky_relu(self.norms[0](self.linears[0](a)), 0.2)
        x = nn.functional.leaky_relu(self.norms[1](self.linears[1](torch.cat([x, b], 1))), 0.2)
        x = nn.functional.leaky_relu(self.norms[2](self.linears[2](torch.cat([x, c], 1))), 0.2)
        return self.linears[3](torch.cat([x, d], 1)).sigmoid()


def separate(stack: Generators) -> list[OneGenerator]:
    """One network for each of the stack, with the same weights."""
    made = [OneGenerator().double() for _ in range(STACK)]
    for place, one in enumerate(made):
        for mine, theirs in zip(one.linears, [*stack.hidden, stack.last], strict=True):
            copy_linear(mine, theirs, place)
        for mine, theirs in zip(one.norms, stack.norms, strict=True):
            part = slice(place * HIDDEN, (place + 1) * HIDDEN)
            with torch.no_grad():
                mine.weight.copy_(theirs.norm.weight[part])
                mine.bias.copy_(theirs.norm.bias[part])
    return made


def copy_linear(one: nn.Module, stack: nn.Module, place: int) -> None:
    assert isinstance(one, nn.Linear)
    assert isinstance(stack, StackedLinear)
    with torch.no_grad():
        one.weight.copy_(stack.weight[place].T)
        one.bias.copy_(stack.bias[place, 0])


class TestGenerators:
    @pytest.fixture
    def stack(self) -> Generators:
        made = Generators(STACK, PIXELS, HIDDEN, generator(0)).double()
        with torch.no_grad():  # so that an error in their order would show
            for norm in made.norms:
                norm.norm.weight.uniform_(0.5, 2, generator=generator(1))
                norm.norm.bias.uniform_(-1, 1, generator=generator(2))
        return made

    def test_a_stack_is_so_many_networks(self, stack: Generators):
        ones = separate(stack)
        for step in range(3):
            latent = noise(STACK, BATCH, 64, seed=step)
            slope = noise(STACK, BATCH, PIXELS, seed=10 + step)
            patches = stack(latent)
            assert patches.shape == (STACK, BATCH, PIXELS)
            stack.zero_grad()
            (patches * slope).sum().backward()
            for place, one in enumerate(ones):
                expected = one(latent[place])
                torch.testing.assert_close(patches[place], expected)
                one.zero_grad()
                (expected * slope[place]).sum().backward()
                for theirs, mine in zip(one.linears, [*stack.hidden, stack.last], strict=True):
                    torch.testing.assert_close(mine.weight.grad[place].T, theirs.weight.grad)
                    torch.testing.assert_close(mine.bias.grad[place, 0], theirs.bias.grad)
                for theirs, mine in zip(one.norms, stack.norms, strict=True):
                    part = slice(place * HIDDEN, (place + 1) * HIDDEN)
                    torch.testing.assert_close(mine.norm.weight.grad[part], theirs.weight.grad)
                    torch.testing.assert_close(mine.norm.running_mean[part], theirs.running_mean)
                    torch.testing.assert_close(mine.norm.running_var[part], theirs.running_var)
        stack.eval()
        latent = noise(STACK, 1, 64, seed=20)  # a single patch can be made: the statistics are those of training
        for place, one in enumerate(ones):
            torch.testing.assert_close(stack(latent)[place], one.eval()(latent[place]))

    def test_sub_models_do_not_touch(self, stack: Generators):
        latent = noise(STACK, BATCH, 64, seed=0)
        stack(latent)[1].sum().backward()
        for parameter in (stack.last.weight, stack.hidden[0].weight, stack.hidden[2].bias):
            assert parameter.grad[1].any()
            assert not parameter.grad[[0, 2]].any()

    def test_first_weights_are_those_of_torch(self):
        made = Generators(2, PIXELS, 400, generator(0))
        ours, theirs = made.hidden[1].weight.detach(), nn.Linear(416, 400).weight.detach()
        assert ours.abs().max() <= 416**-0.5
        assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.01)
        assert not torch.equal(ours[0], ours[1])

    def test_outputs_are_exact_under_autocast(self, stack: Generators):
        single = stack.float()
        latent = noise(STACK, BATCH, 64, seed=0).float()
        with torch.autocast("cpu", torch.bfloat16):
            rough = copy.deepcopy(single)(latent)
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough, single(latent), rtol=0, atol=0.05)


@pytest.mark.parametrize("leaky", [False, True])
def test_a_stack_of_statistics_networks(leaky: bool):
    stack = StatisticsNetworks(STACK, PIXELS, HIDDEN, leaky, generator(0)).double()
    latent, patches = noise(STACK, BATCH, 64, seed=1), noise(STACK, BATCH, PIXELS, seed=2)
    found = stack(latent, patches)
    assert found.shape == (STACK, BATCH)
    assert (found < 0).any(), "so that a LeakyReLU on the output shows"
    for place in range(STACK):
        first, second, last = (layer.weight[place] for layer in (stack.first, stack.second, stack.last))
        # The form of the spec: two maps of the first layer, one for each input.
        x = latent[place] @ first[:64] + patches[place] @ first[64:] + stack.first.bias[place]
        x = torch.where(x > 0, x, 0.2 * x) @ second + stack.second.bias[place]
        x = (torch.where(x > 0, x, 0.2 * x) @ last + stack.last.bias[place])[:, 0]
        torch.testing.assert_close(found[place], torch.where(x > 0, x, 0.2 * x) if leaky else x)


class TestMINE:
    def test_the_bound_in_numpy(self):
        joint, marginal = noise(STACK, BATCH, seed=0), 3 * noise(STACK, BATCH, seed=1)
        expected = joint.numpy().mean(1) - np.log(np.exp(marginal.numpy()).mean(1))
        np.testing.assert_allclose(mutual_information(joint, marginal), expected)

    def test_a_moving_average_corrects_the_gradient(self):
        """d/dT' of the loss is exp T' over the average, which counts this batch with 0.001; of the joint it is -1/B."""
        average = np.ones(STACK)
        log_average = torch.zeros(STACK, dtype=torch.float64)
        for step in range(4):
            joint, marginal = noise(STACK, BATCH, seed=step), 2 * noise(STACK, BATCH, seed=50 + step)
            average = 0.999 * average + 0.001 * np.exp(marginal.numpy()).mean(1)
            joint.requires_grad_()
            marginal.requires_grad_()
            statistics_loss(joint, marginal, log_average).sum().backward()
            np.testing.assert_allclose(log_average.exp(), average)
            np.testing.assert_allclose(joint.grad, np.full((STACK, BATCH), -1 / BATCH))
            corrected = np.exp(marginal.detach().numpy()) / BATCH / average[:, None]
            np.testing.assert_allclose(marginal.grad, corrected)

    def test_it_is_the_gradient_of_the_bound_where_the_average_is_the_batch(self):
        """By autograd of the definition: with the batch's own mean in the denominator nothing is corrected."""
        network = StatisticsNetworks(STACK, PIXELS, HIDDEN, False, generator(0)).double()
        latent, other = noise(STACK, BATCH, 64, seed=1), noise(STACK, BATCH, 64, seed=2)
        patches = noise(STACK, BATCH, PIXELS, seed=3)

        def gradients(loss: Tensor) -> list[Tensor]:
            return list(torch.autograd.grad(loss.sum(), list(network.parameters()), allow_unused=True))

        marginal = network(other, patches)
        own = marginal.detach().exp().mean(1).log()
        corrected = gradients(statistics_loss(network(latent, patches), marginal, own.clone()))
        marginal = network(other, patches)
        plain = gradients(marginal.exp().mean(1).log() - network(latent, patches).mean(1))
        for ours, theirs in zip(corrected, plain, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_large_values_stay_finite(self):
        joint = torch.full((1, 4), 5000.0, requires_grad=True)
        marginal = torch.tensor([[4000.0, 4000, 4000, 4000]], requires_grad=True)
        log_average = torch.tensor([4000.0])
        statistics_loss(joint, marginal, log_average).sum().backward()
        torch.testing.assert_close(marginal.grad, torch.full((1, 4), 0.25))
        torch.testing.assert_close(log_mean_exp(marginal), torch.tensor([4000.0]))
        torch.testing.assert_close(mutual_information(joint, marginal), torch.tensor([1000.0]))

    def test_the_new_value_weighs_a_thousandth(self):
        log_average = torch.zeros(1, dtype=torch.float64)
        statistics_loss(torch.zeros(1, 2), torch.full((1, 2), log(1001.0), dtype=torch.float64), log_average)
        assert NEW_VALUE == 0.001
        assert float(log_average.exp()) == pytest.approx(2.0)

    def test_the_information_of_correlated_gaussians(self):
        """I = -pixels / 2 log(1 - rho^2) for as many independent pairs of correlation rho."""
        pixels, batch = 2, 512
        rho = torch.tensor([0.0, 0.6, 0.9])
        network = StatisticsNetworks(len(rho), pixels, 48, False, generator(0))
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        log_average = torch.zeros(len(rho))
        draws = generator(1)

        def values(count: int) -> tuple[Tensor, Tensor]:
            latent, other = torch.randn(2, len(rho), count, 64, generator=draws)
            own = torch.randn(len(rho), count, pixels, generator=draws)
            scale = rho[:, None, None]
            seen = scale * latent[:, :, :pixels] + (1 - scale**2).sqrt() * own
            return network(latent, seen), network(other, seen)

        for _ in range(300):
            optimizer.zero_grad()
            statistics_loss(*values(batch), log_average).sum().backward()
            optimizer.step()
        with torch.no_grad():
            found = mutual_information(*values(20_000)).double().numpy()
        exact = -pixels / 2 * np.log(1 - rho.double().numpy() ** 2)
        assert (found < exact + 0.05).all(), "it is a lower bound"
        assert (found > 0.8 * exact - 0.05).all()
