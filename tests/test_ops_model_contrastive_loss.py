import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from bdcore.ops import OPERATORS, model_contrastive_loss

Inputs = tuple[Tensor, Tensor, Tensor]


def draw(
    batch: int, negatives: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu"
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, width), (batch, width), (batch, negatives, width)
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    anchor, positive, rest = (x.to(device, dtype).requires_grad_() for x in drawn)
    return anchor, positive, rest


def exact(inputs: Inputs) -> Inputs:
    """The same numbers in float64 on the CPU."""
    anchor, positive, negatives = (x.detach().cpu().double().requires_grad_() for x in inputs)
    return anchor, positive, negatives


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


def assert_gradients_agree(inputs: Inputs, others: Inputs, rtol: float = 1e-7, atol: float = 1e-7) -> None:
    for mine, other in zip(inputs, others, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert mine.grad.dtype == mine.dtype
        torch.testing.assert_close(mine.grad.cpu().double(), other.grad, rtol=rtol, atol=atol)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 5),
    negatives=st.integers(0, 4),
    width=st.integers(1, 9),
    temperature=st.floats(0.05, 5),
    seed=st.integers(0, 2**31),
)
def test_is_the_definition(device: str, batch: int, negatives: int, width: int, temperature: float, seed: int):
    inputs = draw(batch, negatives, width, seed=seed, device=device)
    loss = model_contrastive_loss(*inputs, temperature)
    assert loss.shape == (batch,)
    assert loss.dtype == torch.float64
    expected = torch.tensor(by_hand(*inputs, temperature), dtype=torch.float64)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_values_and_gradients_are_those_of_cross_entropy_over_cosines(device: str, reduction: str):
    inputs = draw(7, 5, 13, device=device)
    others = exact(inputs)
    loss = model_contrastive_loss(*inputs, 0.5, reduction)
    expected = by_torch(*others, 0.5, reduction)
    torch.testing.assert_close(loss.cpu(), expected)
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64) if reduction == "none" else torch.tensor(1.7).double()
    loss.backward(weights.to(device))
    expected.backward(weights)
    assert_gradients_agree(inputs, others)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 1), (2, 0, 3), (0, 2, 3)])
def test_gradients_agree_with_finite_differences(device: str, reduction: str, shape: tuple[int, int, int]):
    if shape[0] == 0 and reduction == "mean":
        pytest.skip("the mean of nothing is nan")
    inputs = draw(*shape, device=device)
    assert torch.autograd.gradcheck(lambda *x: model_contrastive_loss(*x, 0.3, reduction), inputs)


DTYPES = [(torch.float64, 1e-9), (torch.float32, 2e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", [(17, 3, 129), (33, 1, 64), (7, 1, 1025), (65, 2, 7), (2, 70, 33), (1, 1, 2048)])
def test_every_dtype_and_odd_sizes(device: str, dtype: torch.dtype, tolerance: float, shape: tuple[int, int, int]):
    inputs = draw(*shape, dtype, device=device)
    others = exact(inputs)
    loss = model_contrastive_loss(*inputs, 0.5)
    expected = by_torch(*others, 0.5, "none")
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The inputs are the same numbers, so the loss is as good as float32 whatever their dtype.
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    expected.sum().backward()
    assert_gradients_agree(inputs, others, rtol=tolerance, atol=tolerance / 50)


def test_inputs_larger_than_the_caches(device: str):
    # 27 MB of gradients: the CPU's kernels then write past the caches, in whole registers and beside.
    inputs = draw(1111, 1, 2049, torch.float32, device=device)
    others = exact(inputs)
    loss = model_contrastive_loss(*inputs, 0.5, "sum")
    expected = by_torch(*others, 0.5, "sum")
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.item(), expected.item(), rtol=1e-5, atol=0)
    assert_gradients_agree(inputs, others, rtol=1e-4, atol=1e-7)
    aligned = draw(1024, 1, 2112, torch.float32, device=device)
    others = exact(aligned)
    model_contrastive_loss(*aligned, 0.5, "sum").backward()
    by_torch(*others, 0.5, "sum").backward()
    assert_gradients_agree(aligned, others, rtol=1e-4, atol=1e-7)


def test_autocast_changes_nothing(device: str):
    anchor, positive, negatives = draw(6, 2, 64, torch.float32, device=device)
    plain = model_contrastive_loss(anchor, positive, negatives, 0.5)
    with torch.autocast(device, dtype=torch.bfloat16):
        torch.testing.assert_close(model_contrastive_loss(anchor, positive, negatives, 0.5), plain, rtol=0, atol=0)
        mixed = model_contrastive_loss(anchor.bfloat16(), positive, negatives, 0.5, "sum")
    mixed.backward()
    assert mixed.dtype == torch.float32
    assert anchor.grad is not None
    assert anchor.grad.dtype == torch.float32


def test_zero_vectors_have_similarity_zero_and_finite_gradients(device: str):
    inputs = tuple(x.detach().zero_().requires_grad_() for x in draw(2, 3, 4, device=device))
    loss = model_contrastive_loss(*inputs, 0.5)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(4)))
    loss.sum().backward()
    assert all(bool((x.grad == 0).all()) for x in inputs)

    inputs = draw(2, 3, 4, device=device)
    with torch.no_grad():
        inputs[0][0] = 0
        inputs[2][1, 2] = 0
    others = exact(inputs)
    model_contrastive_loss(*inputs, 0.5, "sum").backward()
    by_torch(*others, 0.5, "sum").backward()
    assert_gradients_agree(inputs, others)


def test_no_negatives_and_empty_batches(device: str):
    assert model_contrastive_loss(*draw(3, 0, 4, device=device), 0.5).tolist() == [0, 0, 0]
    assert model_contrastive_loss(*draw(0, 2, 4, device=device), 0.5).shape == (0,)
    assert model_contrastive_loss(*draw(0, 2, 4, device=device), 0.5, "sum").item() == 0
    assert math.isnan(model_contrastive_loss(*draw(0, 2, 4, device=device), 0.5, "mean").item())
    assert model_contrastive_loss(*draw(2, 3, 0, device=device), 0.5).tolist() == pytest.approx([math.log(4)] * 2)
    empty = draw(0, 2, 4, device=device)
    model_contrastive_loss(*empty, 0.5, "sum").backward()
    assert [tuple(x.grad.shape) for x in empty if x.grad is not None] == [(0, 4), (0, 4), (0, 2, 4)]


def test_not_a_number_stays_one(device: str):
    inputs = tuple(x.detach() for x in draw(3, 2, 40, torch.float32, device=device))
    for which in range(3):
        changed = [x.clone() for x in inputs]
        changed[which].reshape(3, -1)[1, 5] = math.nan
        assert model_contrastive_loss(*changed, 0.5).isnan().tolist() == [False, True, False]


def test_extreme_margins_stay_finite_and_exact(device: str):
    anchor = torch.tensor([[1.0, 0.0]], device=device, requires_grad=True)
    away = -anchor.detach()[:, None].repeat(1, 3, 1)
    tiny = model_contrastive_loss(anchor, anchor.detach(), away, 0.05)
    assert tiny.item() == pytest.approx(3 * math.exp(-40), rel=1e-4)
    huge = model_contrastive_loss(anchor, -anchor.detach(), -away, 1e-3)
    assert huge.item() == pytest.approx(2000 + math.log(3), rel=1e-6)
    huge.backward()
    assert bool(anchor.grad.isfinite().all())


def test_the_layout_of_inputs_does_not_matter(device: str):
    inputs = draw(5, 4, 6, device=device)
    scattered = tuple(x.detach().transpose(-1, 0).contiguous().transpose(-1, 0).requires_grad_() for x in inputs)
    assert not scattered[2].is_contiguous()
    wide = tuple(torch.cat([x.detach(), x.detach()], -1)[..., :6].requires_grad_() for x in inputs)  # rows with gaps
    weights = torch.arange(5, dtype=torch.float64, device=device)
    for values in (inputs, scattered, wide):
        model_contrastive_loss(*values, 0.5).backward(weights)
    for mine, other, third in zip(inputs, scattered, wide, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(mine.grad, third.grad, rtol=1e-12, atol=1e-14)


def test_shared_vectors_and_unaligned_rows(device: str):
    anchor, positive, negatives = draw(5, 1, 8, torch.float32, device=device)
    shared = negatives.detach()[:1].expand(5, 3, 8)
    odd = torch.cat([anchor.detach().flatten()[:1], anchor.detach().flatten()])[1:].view(5, 8)  # 4 bytes off
    found = model_contrastive_loss(odd, positive.detach(), shared, 0.5)
    expected = by_torch(*exact((anchor, positive, shared.contiguous())), 0.5, "none")
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(700, 1, 300), (40, 9, 1025)])
def test_same_inputs_give_the_same_bits_on_any_number_of_threads(device: str, shape: tuple[int, int, int]):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            inputs = draw(*shape, torch.float32, device=device)
            loss = model_contrastive_loss(*inputs, 0.1, "mean")
            loss.backward()
            results.append([loss, *(x.grad for x in inputs)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_the_gradients_asked_for_are_computed(device: str, needed: tuple[bool, bool, bool]):
    inputs = draw(3, 2, 4, device=device)
    others = exact(inputs)
    for x, need in zip(inputs, needed, strict=True):
        x.requires_grad_(need)
    model_contrastive_loss(*inputs, 0.5, "sum").backward()
    by_torch(*others, 0.5, "sum").backward()
    for x, need, other in zip(inputs, needed, others, strict=True):
        assert (x.grad is not None) == need
        if need:
            torch.testing.assert_close(x.grad.cpu(), other.grad)
    values = tuple(x.detach() for x in inputs)
    _, norms, cosines = torch.ops.bdcore.model_contrastive_loss(*values, 0.5, 0)
    found = torch.ops.bdcore.model_contrastive_loss_backward(
        torch.ones(3, device=device).double(), *values, norms, cosines, 0.5, 0, *needed
    )
    shapes = [x.shape if need else (0,) for x, need in zip(values, needed, strict=True)]
    assert [tuple(x.shape) for x in found] == shapes


def test_what_is_saved_has_no_gradient(device: str):
    _, norms, cosines = torch.ops.bdcore.model_contrastive_loss(*draw(3, 2, 4, device=device), 0.5, 0)
    assert not norms.requires_grad
    assert not cosines.requires_grad


class _GradientOfNone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_missing_upstream_gradient_gives_none(device: str):
    inputs = draw(3, 2, 4, device=device)
    loss = _GradientOfNone.apply(model_contrastive_loss(*inputs, 0.5))
    loss.sum().backward()
    assert all(x.grad is None for x in inputs)


def test_second_derivatives_are_refused(device: str):
    inputs = draw(3, 2, 4, device=device)
    (grad,) = torch.autograd.grad(model_contrastive_loss(*inputs, 0.5, "sum"), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck itself reads it
@pytest.mark.parametrize("namespace", ["bdcore", "bdcore_reference"])
def test_registration_is_sound(device: str, namespace: str):
    operators = getattr(torch.ops, namespace)
    inputs = draw(3, 2, 4, torch.float32, device=device)
    for reduction in (0, 1):
        torch.library.opcheck(operators.model_contrastive_loss.default, (*inputs, 0.5, reduction))
    values = tuple(x.detach() for x in inputs)
    _, norms, cosines = operators.model_contrastive_loss(*values, 0.5, 0)
    grad = torch.ones(3, device=device)
    torch.library.opcheck(
        operators.model_contrastive_loss_backward.default,
        (grad, *values, norms, cosines, 0.5, 0, True, False, True),
    )
    assert "bdcore::model_contrastive_loss" in OPERATORS
    assert "bdcore::model_contrastive_loss_backward" in OPERATORS


def test_compiles_without_a_graph_break_for_any_size(device: str):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: model_contrastive_loss(*x, 0.5, "mean") * 2, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for shape in ((6, 2, 8), (9, 3, 5)):
        inputs, others = draw(*shape, torch.float32, device=device), draw(*shape, torch.float32, device=device)
        compiled(*inputs).backward()
        (model_contrastive_loss(*others, 0.5, "mean") * 2).backward()
        for mine, other in zip(inputs, others, strict=True):
            torch.testing.assert_close(mine.grad, other.grad)


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
