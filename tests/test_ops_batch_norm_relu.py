import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bdcore.ops import OPERATORS, BatchNormReLU, batch_norm_relu
from bdcore.ops.registration import implementation

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Channels on both sides of what kernels take at once: one, two and four registers of 4 to 16; rows for several chunks.
SHAPES = [(2, 1, 3, 5), (5, 3, 1, 1), (3, 7, 4, 3), (4, 8, 5, 5), (2, 16, 33, 33), (3, 17, 4, 4), (2, 20, 3, 3),
          (2, 33, 5, 4), (2, 64, 17, 17), (1, 100, 2, 3), (2, 130, 12, 12)]  # fmt: skip


def draw(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """x, running mean and variance, weight and bias; x away from 0, so that not all of a channel passes."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    channels = shape[1]
    own = torch.float64 if dtype == torch.float64 else torch.float32
    x = (3 * rand(*shape) + rand(1, channels, 1, 1)).to(device, dtype)
    of_channels = [2 * rand(channels), rand(channels) + 0.5, rand(channels) - 0.4, rand(channels) - 0.5]
    mean, variance, weight, bias = (one.to(device, own) for one in of_channels)
    return [x.requires_grad_(), mean, variance, weight.requires_grad_(), bias.requires_grad_()]


def by_hand(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, training: bool) -> Tensor:
    """The definition, for autograd to differentiate."""
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    column = (slice(None), None, None)
    spread = (variance[column] + 1e-5).sqrt()
    return ((x - mean[column]) / spread * weight[column] + bias[column]).clamp_min(0)


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64, device=y.device).view(y.shape).to(y.dtype)
    return list(torch.autograd.grad(y, [one for one in inputs if one.requires_grad], weights))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 6), st.integers(1, 6)),
    training=st.booleans(),
    last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_is_the_definition(device: str, shape: tuple[int, int, int, int], training: bool, last: bool, seed: int):
    if shape[0] * shape[2] * shape[3] == 1:
        training = False
    inputs = draw(shape, torch.float64, device, seed)
    if last:
        inputs[0] = inputs[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = by_hand(*inputs, training)
    slopes = gradients(expected, inputs)
    found = batch_norm_relu(*inputs, training)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    for one, other in zip(gradients(found, inputs), slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_all_dtypes_at_odd_sizes(device: str, shape: tuple[int, int, int, int], dtype: torch.dtype, training: bool):
    tolerance = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    inputs = draw(shape, dtype, device)
    exact = [one.detach().double().cpu().requires_grad_(one.requires_grad) for one in inputs]
    expected = by_hand(*exact, training)
    found = batch_norm_relu(*inputs, training)
    assert found.dtype == dtype
    torch.testing.assert_close(found.detach().cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    for one, other, of in zip(gradients(found, inputs), gradients(expected, exact), "xwb", strict=True):
        assert one.dtype == (dtype if of == "x" else inputs[3].dtype)
        # A sum over the channel, which the gradient's rounding enters as often as there are values.
        close = tolerance * (1 if of == "x" else max(1.0, float(other.abs().max())))
        torch.testing.assert_close(one.cpu().double(), other, rtol=tolerance, atol=close)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_agree_with_finite_differences(device: str, training: bool):
    for channels in (2, 9):
        x, mean, variance, weight, bias = draw((2, channels, 2, 3), torch.float64, device)
        assert torch.autograd.gradcheck(
            lambda x, weight, bias, mean=mean, variance=variance: batch_norm_relu(
                x, mean.clone(), variance.clone(), weight, bias, training
            ),
            (x, weight, bias),
        )


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
def test_running_averages_are_pytorchs(device: str, momentum: float):
    for dtype, close in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        x, mean, variance, weight, bias = draw((4, 18, 6, 5), dtype, device)
        others = mean.clone(), variance.clone()
        F.batch_norm(x, *others, weight, bias, True, momentum)
        batch_norm_relu(x, mean, variance, weight, bias, True, momentum)
        torch.testing.assert_close((mean, variance), others, rtol=close, atol=close)
        before = mean.clone(), variance.clone()
        batch_norm_relu(x, mean, variance, weight, bias, False, momentum)
        torch.testing.assert_close((mean, variance), before, rtol=0, atol=0)


def test_a_mean_far_above_the_deviation_costs_no_digits(device: str):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(8, 24, 40, 40, generator=generator) + 4096).to(device)
    ones, zeros = torch.ones(24, device=device), torch.zeros(24, device=device)
    variance = zeros.clone()
    found = batch_norm_relu(x, zeros.clone(), variance, ones, zeros, True, 1.0)
    exact = x.double()
    # A float32 near 4096 is rounded by up to 2.4e-4, and PyTorch's sum over the channel by a hundred times that.
    ours = implementation(device) == "native" and device == "cpu"
    torch.testing.assert_close(variance.double(), exact.var((0, 2, 3)), rtol=1e-5 if ours else 1e-3, atol=0)
    expected = by_hand(exact, zeros, ones, ones.double(), zeros.double(), True)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-4 if ours else 3e-2)


def test_nan_and_infinity_are_not_hidden(device: str):
    for channels in (3, 20):
        x, mean, variance, weight, bias = (one.detach() for one in draw((2, channels, 3, 3), torch.float32, device))
        weight = weight.abs() + 0.1
        x[0, 0, 0, 0], x[1, 1, 2, 2], x[0, 2, 1, 1] = torch.nan, torch.inf, -torch.inf
        found = batch_norm_relu(x, mean, variance, weight, bias)
        assert bool(found[0, 0, 0, 0].isnan())
        assert float(found[1, 1, 2, 2]) == torch.inf
        assert float(found[0, 2, 1, 1]) == 0
        assert int(found.isnan().sum()) == 1
        trained = batch_norm_relu(x, mean, variance, weight, bias, True)
        assert bool(trained[:, 0].isnan().all())
        assert bool(trained[:, 3:].isfinite().all())


def test_what_is_exactly_zero_has_no_gradient(device: str):
    for channels in (2, 20):
        x = torch.zeros(2, channels, 2, 2, device=device, requires_grad=True)
        ones, zeros = torch.ones(channels, device=device), torch.zeros(channels, device=device)
        batch_norm_relu(x, zeros, ones, ones, zeros).sum().backward()
        assert not bool(x.grad.any())
        x.grad = None
        batch_norm_relu(x, zeros, ones, ones, zeros + 1e-3).sum().backward()
        torch.testing.assert_close(x.grad, torch.full_like(x, (1 + 1e-5) ** -0.5))


@pytest.mark.parametrize("training", [True, False])
def test_the_layout_of_inputs_does_not_matter(device: str, training: bool):
    inputs = draw((3, 20, 4, 6), torch.float32, device)
    expected = batch_norm_relu(*inputs, training)
    slopes = gradients(expected, inputs)
    x = inputs[0].detach()
    wide = torch.zeros(6, 40, 8, 12, device=device)
    wide[::2, ::2, ::2, ::2] = x
    last = x.contiguous(memory_format=torch.channels_last)
    for same in (wide[::2, ::2, ::2, ::2], last, x.transpose(2, 3).contiguous().transpose(2, 3)):
        others = [same.detach().requires_grad_(), *inputs[1:]]
        found = batch_norm_relu(*others, training)
        torch.testing.assert_close(found, expected)
        for one, other in zip(gradients(found, others), slopes, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if device != "cuda":
        assert expected.is_contiguous(memory_format=torch.channels_last)


def test_gradients_of_any_layout_reach_x(device: str):
    inputs = draw((3, 17, 4, 5), torch.float32, device)
    mean = batch_norm_relu(*inputs, True).mean((2, 3))  # whose gradient repeats one number over the pixels
    (found,) = torch.autograd.grad(mean.sum(), inputs[0])
    y = batch_norm_relu(*inputs, True)
    (expected,) = torch.autograd.grad(y, inputs[0], torch.full_like(y, 1 / 20))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_only_what_is_asked_for_is_differentiated(device: str):
    x, mean, variance, weight, bias = draw((2, 17, 3, 3), torch.float32, device)
    expected = gradients(batch_norm_relu(x, mean, variance, weight, bias), [x])[0]
    frozen = batch_norm_relu(x, mean, variance, weight.detach(), bias.detach())
    frozen.backward(torch.linspace(-1, 2, frozen.numel(), device=device).view(frozen.shape))
    torch.testing.assert_close(x.grad, expected)
    half = batch_norm_relu(x.detach(), mean, variance, weight, bias.detach())
    half.sum().backward()
    assert weight.grad is not None
    assert bias.grad is None
    assert not batch_norm_relu(x.detach(), mean, variance, weight.detach(), bias.detach()).requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_repeats_to_the_bit_with_any_number_of_threads(device: str, training: bool):
    if implementation(device) == "reference":
        pytest.skip("PyTorch's own sums depend on the number of threads")

    def results() -> list[Tensor]:
        inputs = draw((9, 24, 33, 33), torch.bfloat16, device)
        y = batch_norm_relu(*inputs, training)
        return [y.detach(), *gradients(y, inputs), inputs[1], inputs[2]]

    threads = torch.get_num_threads()
    try:
        first = results()
        for count in (1, 2):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_parameters_of_another_format_are_converted(device: str):
    x, mean, variance, weight, bias = draw((2, 18, 3, 3), torch.bfloat16, device)
    low = [one.detach().bfloat16() for one in (mean, variance, weight, bias)]
    low[2].requires_grad_()
    if device == "cuda":
        pytest.skip("PyTorch's own there")
    high = [one.detach().float() for one in low]
    found = batch_norm_relu(x, *low, True)
    torch.testing.assert_close(found, batch_norm_relu(x, *high, True))
    found.sum().backward()
    assert low[2].grad.dtype == torch.bfloat16
    torch.testing.assert_close(low[1].float(), high[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break_for_any_size(device: str, training: bool):
    def objective(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm_relu(x * 1.5, mean, variance, weight, bias, training).square().mean()

    compiled = torch.compile(objective, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 5, 3, 3), (3, 5, 4, 2), (2, 17, 3, 3)):
        inputs, others = (draw(shape, torch.float32, device) for _ in range(2))
        compiled(*inputs).backward()
        objective(*others).backward()
        for one, other in zip(inputs, others, strict=True):
            torch.testing.assert_close(one.grad, other.grad)
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_are_those_of_the_definition(device: str, training: bool):
    x, mean, variance, weight, bias = draw((2, 18, 2, 3), torch.float64, device)

    def penalties(function) -> list[Tensor]:
        y = function(x, mean.clone(), variance.clone(), weight, bias, training)
        slopes = torch.autograd.grad(y.square().sum(), [x, weight, bias], create_graph=True)
        return list(torch.autograd.grad(sum(slope.square().sum() for slope in slopes), [x, weight, bias]))

    for one, other in zip(penalties(batch_norm_relu), penalties(by_hand), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)
    (slope,) = torch.autograd.grad(
        batch_norm_relu(x, mean, variance, weight.detach(), bias.detach()).sum(), x, create_graph=True
    )
    assert slope.shape == x.shape


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # which jvp itself uses
def test_transforms_of_torch_func_pass_through(device: str):
    x, mean, variance, weight, bias = (one.detach() for one in draw((6, 5, 3, 3), torch.float64, device))

    def of_one(image: Tensor) -> Tensor:
        return batch_norm_relu(image[None], mean, variance, weight, bias)[0]

    torch.testing.assert_close(torch.func.vmap(of_one)(x), batch_norm_relu(x, mean, variance, weight, bias))
    _, found = torch.func.jvp(of_one, (x[0],), (torch.ones_like(x[0]),))
    active = by_hand(x[:1], mean, variance, weight, bias, False)[0] > 0
    torch.testing.assert_close(found, active * (weight / (variance + 1e-5).sqrt())[:, None, None])


def test_exported_it_is_pytorchs_own():
    layer = BatchNormReLU(18).eval()
    x = torch.randn(2, 18, 4, 4)
    program = torch.export.export(layer, (x,))
    assert "bdcore" not in program.graph_module.code
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck itself reads it
@pytest.mark.parametrize("training", [True, False])
def test_registration_is_sound(device: str, training: bool):
    x, mean, variance, weight, bias = draw((2, 17, 3, 3), torch.float32, device)
    for ops in (torch.ops.bdcore, torch.ops.bdcore_reference):
        torch.library.opcheck(ops.batch_norm_relu.default, (x, weight, bias, mean, variance, training, 1e-5))
        y, statistics = ops.batch_norm_relu(x, weight, bias, mean, variance, training, 1e-5)
        assert y.requires_grad
        assert not statistics.requires_grad
        saved = [one.detach() for one in (x, weight, bias, statistics)]
        for affine in (True, False):
            arguments = (torch.ones_like(y), *saved, training, affine, 1e-5)
            torch.library.opcheck(ops.batch_norm_relu_backward.default, arguments)
    assert "bdcore::batch_norm_relu" in OPERATORS
    assert "bdcore::batch_norm_relu_backward" in OPERATORS


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 4).int()}, TypeError, "x must be float16.*got torch.int32"),
        ({"x": torch.zeros(2, 3, 4)}, ValueError, r"x must be \[B, C, H, W\], got shape \[2, 3, 4\]"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must be \[3\], one a channel of x, got shape \[4\]"),
        ({"running_var": torch.zeros(3, 1)}, ValueError, r"running_var must be \[3\].*\[3, 1\]"),
        ({"bias": torch.zeros(3, device="meta")}, ValueError, "bias is on meta and x on cpu"),
        ({"x": torch.zeros(1, 3, 1, 1), "training": True}, ValueError, r"more than one value a channel"),
        ({"x": torch.zeros(0, 3, 2, 2), "training": True}, ValueError, r"more than one value a channel"),
    ],
)
def test_wrong_arguments_are_named(device: str, change, error, message):
    arguments = {
        "x": torch.zeros(2, 3, 4, 4),
        **{name: torch.zeros(3) for name in ("running_mean", "running_var", "weight", "bias")},
    }
    with pytest.raises(error, match=message):
        batch_norm_relu(**(arguments | change))


def test_an_empty_batch(device: str):
    x, *others = draw((0, 20, 3, 3), torch.float32, device)
    found = batch_norm_relu(x, *others)
    assert found.shape == (0, 20, 3, 3)
    found.sum().backward()
    assert x.grad.shape == x.shape
    assert not bool(others[2].grad.any())


# ------------------------------------------------------------------------------------------------------- the module


def pair(**options: float | None) -> tuple[nn.Module, nn.Module]:
    """PyTorch's two layers, and ours with their weights."""
    usual = nn.Sequential(nn.BatchNorm2d(18, **options), nn.ReLU())
    ours = BatchNormReLU(18, **options)
    with torch.no_grad():
        for one in usual[0].parameters():
            one.uniform_(-0.5, 1)
    ours.load_state_dict(usual[0].state_dict())
    return usual, ours


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_module_trains_as_pytorchs_two_do(device: str, momentum: float | None):
    usual, ours = (one.to(device) for one in pair(momentum=momentum, eps=1e-3))
    for seed in range(3):
        x = draw((4, 18, 5, 5), torch.float32, device, seed)[0]
        torch.testing.assert_close(ours(x), usual(x))
        for one in (usual, ours):
            one(x).square().sum().backward()
            torch.optim.SGD(one.parameters(), 1e-3).step()
    torch.testing.assert_close(ours.state_dict(), usual[0].state_dict(), rtol=1e-4, atol=1e-5)
    usual.eval()
    ours.eval()
    torch.testing.assert_close(ours(x), usual(x), rtol=1e-4, atol=1e-4)


def test_the_module_is_a_batch_norm_to_others():
    _, ours = pair()
    assert isinstance(ours, nn.BatchNorm2d)
    assert set(ours.state_dict()) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    seen: list[Tensor] = []
    copied = copy.deepcopy(ours)
    copied.register_forward_hook(lambda layer, arguments, output: seen.append(output))
    copied(torch.randn(3, 18, 2, 2))
    assert float(seen[0].detach().min()) == 0
    assert int(copied.num_batches_tracked) == 1
    assert int(ours.num_batches_tracked) == 0
