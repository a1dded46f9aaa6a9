import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from bdcore.ops import OPERATORS, model_contrastive_loss

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def draw(
    batch: int, negatives: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, width), (batch, width), (batch, negatives, width)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for shape in shapes
    )  # type: ignore[return-value]


def by_hand(anchor: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> list[float]:
    """The definition in plain Python numbers, row by row."""

    def cosine(a: list[float], b: list[float]) -> float:
        lengths = [max(math.sqrt(math.fsum(x * x for x in v)), 1e-8) for v in (a, b)]
        return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (lengths[0] * lengths[1])

    losses = []
    for row in range(len(anchor)):
        z = anchor[row].double().tolist()
        near = cosine(z, positive[row].double().tolist())
        far = [cosine(z, other) for other in negatives[row].double().tolist()]
        losses.append(math.log1p(math.fsum(math.exp((s - near) / temperature) for s in far)))
    return losses


def by_torch(anchor: Tensor, positive: Tensor, negatives: Tensor, temperature: float, reduction: str) -> Tensor:
    """The same as a cross-entropy over cosine similarities."""
    keys = torch.cat([positive.unsqueeze(1), negatives], dim=1)
    logits = cosine_similarity(anchor.unsqueeze(1), keys, dim=-1, eps=1e-8) / temperature
    return cross_entropy(logits, torch.zeros(len(anchor), dtype=torch.int64), reduction=reduction)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 5),
    negatives=st.integers(0, 4),
    width=st.integers(1, 9),
    temperature=st.floats(0.05, 5),
    seed=st.integers(0, 2**31),
)
def test_is_the_definition(batch: int, negatives: int, width: int, temperature: float, seed: int):
    inputs = draw(batch, negatives, width, seed=seed)
    loss = model_contrastive_loss(*inputs, temperature)
    assert loss.shape == (batch,)
    assert loss.dtype == torch.float64
    expected = torch.tensor(by_hand(*inputs, temperature), dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_values_and_gradients_are_those_of_cross_entropy_over_cosines(reduction: str):
    inputs, others = draw(7, 5, 13), draw(7, 5, 13)
    loss = model_contrastive_loss(*inputs, 0.5, reduction)
    expected = by_torch(*others, 0.5, reduction)
    torch.testing.assert_close(loss, expected)
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64) if reduction == "none" else torch.tensor(1.7).double()
    loss.backward(weights)
    expected.backward(weights)
    for mine, other in zip(inputs, others, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 1), (2, 0, 3), (0, 2, 3)])
def test_gradients_agree_with_finite_differences(reduction: str, shape: tuple[int, int, int]):
    if shape[0] == 0 and reduction == "mean":
        pytest.skip("the mean of nothing is nan")
    inputs = draw(*shape)
    assert torch.autograd.gradcheck(lambda *x: model_contrastive_loss(*x, 0.3, reduction), inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_low_precision_inputs_are_accumulated_in_float32(device: str, dtype: torch.dtype, tolerance: float):
    inputs = draw(17, 3, 129, dtype, device=device)
    exact = tuple(x.detach().cpu().double().requires_grad_() for x in inputs)
    loss = model_contrastive_loss(*inputs, 0.5)
    expected = by_torch(*exact, 0.5, "none")
    assert loss.dtype == torch.float32
    # The inputs are the same numbers, so the loss is as good as float32 whatever their dtype.
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    expected.sum().backward()
    for mine, other in zip(inputs, exact, strict=True):
        assert mine.grad is not None
        assert mine.grad.dtype == dtype
        torch.testing.assert_close(mine.grad.cpu().double(), other.grad, rtol=tolerance, atol=tolerance / 50)


def test_autocast_changes_nothing():
    anchor, positive, negatives = draw(6, 2, 64, torch.float32)
    plain = model_contrastive_loss(anchor, positive, negatives, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model_contrastive_loss(anchor, positive, negatives, 0.5), plain, rtol=0, atol=0)
        mixed = model_contrastive_loss(anchor.bfloat16(), positive, negatives, 0.5, "sum")
    mixed.backward()
    assert mixed.dtype == torch.float32
    assert anchor.grad is not None
    assert anchor.grad.dtype == torch.float32


def test_zero_vectors_have_similarity_zero_and_finite_gradients():
    inputs = tuple(x.detach().zero_().requires_grad_() for x in draw(2, 3, 4))
    loss = model_contrastive_loss(*inputs, 0.5)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(4)))
    loss.sum().backward()
    assert all(bool((x.grad == 0).all()) for x in inputs)

    inputs, others = draw(2, 3, 4), draw(2, 3, 4)
    with torch.no_grad():
        inputs[0][0] = others[0][0] = 0
        inputs[2][1, 2] = others[2][1, 2] = 0
    model_contrastive_loss(*inputs, 0.5, "sum").backward()
    by_torch(*others, 0.5, "sum").backward()
    for mine, other in zip(inputs, others, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_no_negatives_and_empty_batches():
    assert model_contrastive_loss(*draw(3, 0, 4), 0.5).tolist() == [0, 0, 0]
    assert model_contrastive_loss(*draw(0, 2, 4), 0.5).shape == (0,)
    assert model_contrastive_loss(*draw(0, 2, 4), 0.5, "sum").item() == 0


def test_extreme_margins_stay_finite_and_exact():
    anchor = torch.tensor([[1.0, 0.0]], requires_grad=True)
    away = -anchor.detach()[:, None].repeat(1, 3, 1)
    tiny = model_contrastive_loss(anchor, anchor.detach(), away, 0.05)
    assert tiny.item() == pytest.approx(3 * math.exp(-40), rel=1e-4)
    huge = model_contrastive_loss(anchor, -anchor.detach(), -away, 1e-3)
    assert huge.item() == pytest.approx(2000 + math.log(3), rel=1e-6)
    huge.backward()
    assert bool(anchor.grad.isfinite().all())


def test_the_layout_of_inputs_does_not_matter():
    inputs = draw(5, 4, 6)
    scattered = tuple(x.detach().transpose(-1, 0).contiguous().transpose(-1, 0).requires_grad_() for x in inputs)
    assert not scattered[2].is_contiguous()
    weights = torch.arange(5, dtype=torch.float64)
    for values in (inputs, scattered):
        model_contrastive_loss(*values, 0.5).backward(weights)
    for mine, other in zip(inputs, scattered, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-14)


def test_only_the_gradients_asked_for_are_computed():
    anchor, positive, negatives = draw(3, 2, 4)
    loss = model_contrastive_loss(anchor, positive.detach(), negatives.detach(), 0.5, "sum")
    loss.backward()
    assert anchor.grad is not None
    _, norms, cosines = torch.ops.bdcore.model_contrastive_loss(anchor, positive, negatives, 0.5, 0)
    assert not norms.requires_grad
    assert not cosines.requires_grad
    found = torch.ops.bdcore.model_contrastive_loss_backward(
        torch.ones(3).double(), anchor.detach(), positive.detach(), negatives.detach(), norms, cosines, 0.5, 0,
        False, True, False,
    )  # fmt: skip
    assert [tuple(x.shape) for x in found] == [(0,), (3, 4), (0,)]


class _GradientOfNone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_missing_upstream_gradient_gives_none():
    inputs = draw(3, 2, 4)
    loss = _GradientOfNone.apply(model_contrastive_loss(*inputs, 0.5))
    loss.sum().backward()
    assert all(x.grad is None for x in inputs)


def test_second_derivatives_are_refused():
    inputs = draw(3, 2, 4)
    (grad,) = torch.autograd.grad(model_contrastive_loss(*inputs, 0.5, "sum"), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck itself reads it
@pytest.mark.parametrize("device", DEVICES)
def test_registration_is_sound(device: str):
    inputs = draw(3, 2, 4, torch.float32, device=device)
    for reduction in (0, 1):
        torch.library.opcheck(torch.ops.bdcore.model_contrastive_loss.default, (*inputs, 0.5, reduction))
    values = tuple(x.detach() for x in inputs)
    _, norms, cosines = torch.ops.bdcore.model_contrastive_loss(*values, 0.5, 0)
    grad = torch.ones(3, device=device)
    torch.library.opcheck(
        torch.ops.bdcore.model_contrastive_loss_backward.default,
        (grad, *values, norms, cosines, 0.5, 0, True, False, True),
    )
    assert "bdcore::model_contrastive_loss" in OPERATORS
    assert "bdcore::model_contrastive_loss_backward" in OPERATORS


def test_compiles_without_a_graph_break():
    inputs, others = draw(6, 2, 8, torch.float32), draw(6, 2, 8, torch.float32)
    compiled = torch.compile(
        lambda *x: model_contrastive_loss(*x, 0.5, "mean") * 2, fullgraph=True, backend="aot_eager"
    )
    loss = compiled(*inputs)
    loss.backward()
    (model_contrastive_loss(*others, 0.5, "mean") * 2).backward()
    for mine, other in zip(inputs, others, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_a_cpu_kernel_replaces_the_reference_and_keeps_its_gradient():
    calls = []

    def kernel(anchor, positive, negatives, temperature, reduction):
        calls.append(anchor.shape)
        dots = torch.einsum("bd,bkd->bk", anchor, torch.cat([positive[:, None], negatives], 1))
        norms = torch.cat([anchor[:, None], positive[:, None], negatives], 1).norm(dim=-1)
        cosines = dots / norms[:, :1] / norms[:, 1:]
        return -(cosines / temperature).log_softmax(1)[:, 0], norms, cosines

    inputs = draw(3, 2, 4)
    expected = by_torch(*draw(3, 2, 4), 0.5, "none")
    with torch.library._scoped_library("bdcore", "IMPL") as library:
        library.impl("model_contrastive_loss", kernel, "CPU")
        loss = model_contrastive_loss(*inputs, 0.5)
        torch.testing.assert_close(loss, expected)
        loss.sum().backward()
    assert calls == [(3, 4)]
    assert inputs[0].grad is not None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"anchor": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "anchor must be float16.*int64"),
        ({"anchor": torch.ones(12)}, ValueError, r"anchor must be \[B, D\], got shape \[12\]"),
        ({"positive": torch.ones(3, 5)}, ValueError, r"positive must have anchor's shape \[3, 4\], got \[3, 5\]"),
        ({"negatives": torch.ones(3, 4)}, ValueError, r"negatives must be \[3, K, 4\].*\[3, 4\]"),
        ({"negatives": torch.ones(2, 2, 4)}, ValueError, r"negatives must be \[3, K, 4\].*\[2, 2, 4\]"),
        ({"negatives": torch.ones(3, 2, 4, device="meta")}, ValueError, "negatives is on meta and anchor on cpu"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive number, got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be a positive number, got nan"),
        ({"reduction": "men"}, ValueError, "unknown reduction 'men'. Did you mean mean.*mean, none, sum"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str):
    arguments = {
        "anchor": torch.ones(3, 4),
        "positive": torch.ones(3, 4),
        "negatives": torch.ones(3, 2, 4),
        "temperature": 0.5,
        **change,
    }
    with pytest.raises(error, match=message):
        model_contrastive_loss(**arguments)
