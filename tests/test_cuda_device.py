"""What only a GPU can show of every operator: CUDA graphs, streams, and devices other than the current one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bdcore import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

B, K, D, C, T = 33, 3, 65, 10, 2
NORMALISED = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "model_contrastive_loss": lambda z, pos, neg: ops.model_contrastive_loss(z, pos, neg, 0.5, "mean"),
    "info_nce": lambda z, keys, positive: ops.info_nce(z, keys, positive, 0.1, "mean"),
    "isolation_loss": lambda logits, labels: ops.isolation_loss(logits, labels, 2.3, reduction="mean"),
    "blend_trigger": lambda x, p, m, index, offset: ops.blend_trigger(
        x, p, m, index=index, offset=offset, **NORMALISED
    ),
    "load_batch": lambda pixels, index, p, m, trigger, offset: ops.load_batch(
        pixels, index, seed=3, crop=2, flip=True, pattern=p, mask=m, trigger=trigger, offset=offset, **NORMALISED
    ),
    "lowest_k": lambda losses: ops.lowest_k(losses.detach(), 7),
    "batch_norm_relu": lambda x, weight, bias, mean, var: ops.batch_norm_relu(
        x, mean.detach(), var.detach(), weight, bias
    ),
}


def draw(operator: str, seed: int, device: torch.device) -> list[Tensor]:
    """The operator's tensors; floating-point ones require a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device).requires_grad_(operator != "load_batch")

    def choose(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(device)

    match operator:
        case "model_contrastive_loss":
            found = [rand(B, D), rand(B, D), rand(B, K, D)]
        case "info_nce":
            found = [rand(B, D), rand(2 * B, D), choose(0, 2 * B, B)]
        case "isolation_loss":
            found = [rand(B, C), choose(0, C, B)]
        case "blend_trigger":
            found = [rand(B, 3, 8, 8), rand(T, 3, 3, 3), rand(T, 1, 3, 3), choose(-1, T, B), choose(0, 6, B, 2)]
        case "load_batch":
            window = [rand(T, 3, 3, 3), rand(T, 1, 3, 3), choose(-1, T, B), choose(0, 6, B, 2)]
            found = [choose(0, 256, 50, 3, 8, 8).byte(), choose(0, 50, B), *window]
        case "batch_norm_relu":
            found = [rand(B, 3, 8, 8), rand(3), rand(3), rand(3).detach(), rand(3).detach()]
        case _:
            found = [rand(1025)]
    return found


def step(operator: str, tensors: list[Tensor]) -> list[Tensor]:
    """The result and all gradients."""
    result = FUNCTIONS[operator](*tensors)
    if not result.requires_grad:
        return [result]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return [result.detach(), *torch.autograd.grad(result, wanted, torch.ones_like(result))]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("operator", FUNCTIONS)
def test_a_cuda_graph_repeats_it_on_other_numbers(operator: str):
    device = torch.device("cuda")
    tensors, others = draw(operator, 0, device), draw(operator, 1, device)
    expected = step(operator, others)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(operator, tensors)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(operator, tensors)
    with torch.no_grad():
        for tensor, other in zip(tensors, others, strict=True):
            tensor.copy_(other)
    graph.replay()
    assert same(captured, expected)


@pytest.mark.parametrize("operator", FUNCTIONS)
def test_it_runs_on_the_current_stream(operator: str):
    device = torch.device("cuda")
    tensors, others = draw(operator, 0, device), draw(operator, 1, device)
    expected = step(operator, others)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Only this stream knows when the tensors hold their new numbers.
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for tensor, other in zip(tensors, others, strict=True):
                tensor.copy_(other)
        found = step(operator, tensors)
    stream.synchronize()
    assert same(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("operator", FUNCTIONS)
def test_it_runs_on_the_device_of_its_tensors(operator: str):
    expected = step(operator, draw(operator, 0, torch.device("cuda:0")))
    with torch.cuda.device(0):
        found = step(operator, draw(operator, 0, torch.device("cuda:1")))
        assert torch.cuda.current_device() == 0
    assert all(tensor.device.index == 1 for tensor in found)
    assert same(found, expected)


def test_every_operator_is_here():
    assert {name.removeprefix("bdcore::").removesuffix("_backward") for name in ops.OPERATORS} == set(FUNCTIONS)
