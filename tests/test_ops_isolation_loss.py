import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from bdcore.ops import OPERATORS, isolation_loss

MODES = ("ce", "ascent", "lga", "flood")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Sizes on both sides of what kernels take at once: a vector, a group of 16 rows, a tile of 1024 classes.
SHAPES = [(1, 1), (7, 2), (33, 10), (1025, 10), (16, 16), (17, 17), (7, 33), (33, 100), (5, 1024), (3, 1025), (2, 4100)]


def draw(
    batch: int, classes: int, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0, ignored: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits of moderate confidence, and labels of which the last `ignored` are -100."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    labels[batch - ignored :] = -100
    return logits.to(device, dtype).requires_grad_(), labels.to(device)


def bent(loss: float, gamma: float, mode: str) -> float:
    """The definition of the modes in plain numbers."""
    if mode == "ce":
        return loss
    if mode == "ascent":
        return -loss
    if mode == "lga":
        return math.copysign(loss, loss - gamma) if loss != gamma else 0.0
    return abs(loss - gamma) + gamma


def by_hand(logits: Tensor, labels: Tensor, gamma: float, mode: str, per: str, reduction: str) -> list[float] | float:
    """The definition, row by row, in plain numbers."""
    losses: list[float | None] = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        others = [math.exp(z - row[label]) for j, z in enumerate(row) if j != label] if label != -100 else []
        losses.append(None if label == -100 else math.log1p(math.fsum(others)))
    used = [loss for loss in losses if loss is not None]
    if per == "batch":
        return bent(math.fsum(used) / len(used), gamma, mode) if used else math.nan
    values = [0.0 if loss is None else bent(loss, gamma, mode) for loss in losses]
    if reduction == "none":
        return values
    total = math.fsum(values)
    return total if reduction == "sum" else total / len(used) if used else math.nan


def by_torch(
    logits: Tensor, labels: Tensor, gamma: float, mode: str, per: str, reduction: str, ignore_index: int = -100
) -> Tensor:
    """The same from PyTorch's functions, to differentiate."""
    loss = cross_entropy(logits, labels, reduction="none", ignore_index=ignore_index)
    used = labels != ignore_index
    if per == "batch":
        loss = loss[used].mean()
    if mode == "ascent":
        loss = -loss
    elif mode == "lga":
        loss = (loss - gamma).sign().detach() * loss
    elif mode == "flood":
        loss = (loss - gamma).abs() + gamma
    if per == "batch":
        return loss
    loss = loss * used
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / used.sum()


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 20),
    classes=st.integers(1, 40),
    share=st.sampled_from([0, 0, 0.3, 1]),
    gamma=st.floats(0, 5),
    mode=st.sampled_from(MODES),
    per=st.sampled_from(["sample", "batch"]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    seed=st.integers(0, 2**31),
)
def test_is_the_definition(
    device: str, batch: int, classes: int, share: float, gamma: float, mode, per, reduction, seed: int
):
    if per == "batch" and reduction == "sum":
        reduction = "mean"
    logits, labels = draw(batch, classes, device=device, seed=seed, ignored=int(batch * share))
    found = isolation_loss(logits, labels, gamma, mode, per=per, reduction=reduction)
    expected = torch.tensor(by_hand(logits, labels, gamma, mode, per, reduction), dtype=torch.float64)
    torch.testing.assert_close(found.detach().cpu(), expected, rtol=1e-11, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_dtypes_at_odd_sizes(device: str, shape: tuple[int, int], dtype: torch.dtype):
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    logits, labels = draw(*shape, dtype, device, ignored=shape[0] // 5)
    exact = logits.detach().cpu().double().requires_grad_()
    loss = isolation_loss(logits, labels, 2.0, "lga")
    expected = by_torch(exact, labels.cpu(), 2.0, "lga", "sample", "none")
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The logits are the same numbers, so the loss is as good as float32 whatever their dtype.
    close = min(tolerance, 2e-6)
    torch.testing.assert_close(loss.detach().cpu().double(), expected.detach(), rtol=close, atol=close)
    weights = torch.linspace(-1, 2, shape[0], dtype=torch.float64)
    loss.backward(weights.to(loss))
    expected.backward(weights)
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.cpu().double(), exact.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("per", "reduction"), [("sample", "none"), ("sample", "mean"), ("sample", "sum"), ("batch", "none")]
)
def test_gradients_are_those_of_pytorchs_functions(device: str, mode, per, reduction):
    for shape in [(33, 10), (9, 70)]:
        logits, labels = draw(*shape, device=device)
        labels[::4] = 255
        other = logits.detach().clone().requires_grad_()
        loss = isolation_loss(logits, labels, 3.0, mode, per=per, reduction=reduction, ignore_index=255)
        expected = by_torch(other, labels, 3.0, mode, per, reduction, ignore_index=255)
        torch.testing.assert_close(loss, expected)
        weights = torch.linspace(-1, 2, shape[0], dtype=torch.float64) if loss.ndim else torch.tensor(1.7).double()
        loss.backward(weights.to(device))
        expected.backward(weights.to(device))
        torch.testing.assert_close(logits.grad, other.grad, rtol=1e-10, atol=1e-12)
        assert not bool(logits.grad[::4].any())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per", ["sample", "batch"])
def test_gradients_agree_with_finite_differences(device: str, mode, per):
    logits, labels = draw(5, 4, device=device, ignored=1)
    for reduction in ("none", "mean"):
        assert torch.autograd.gradcheck(
            lambda z, kind=reduction: isolation_loss(z, labels, 2.0, mode, per=per, reduction=kind), logits
        )


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("shape", [(7, 5), (33, 40), (2, 1500)], ids=str)
def test_label_smoothing_is_pytorchs(device: str, smoothing: float, shape: tuple[int, int]):
    logits, labels = draw(*shape, device=device, ignored=1)
    other = logits.detach().clone().requires_grad_()
    for reduction in ("none", "mean", "sum"):
        found = isolation_loss(logits, labels, mode="ce", label_smoothing=smoothing, reduction=reduction)
        expected = cross_entropy(other, labels, label_smoothing=smoothing, reduction=reduction)
        torch.testing.assert_close(found, expected)
        found.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(logits.grad, other.grad)


def test_confident_samples_do_not_tie(device: str):
    margins = torch.linspace(5, 80, 151, device=device)
    for others, label in ((1, 0), (20, 20)):
        logits = torch.full((151, others + 1), -1.0, device=device)
        logits[:, label] = margins - 1
        loss = isolation_loss(logits, torch.full((151,), label, device=device), mode="ce")
        expected = torch.log1p(others * torch.exp(-margins.double())).cpu()
        torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-5, atol=0)
        assert bool((loss.diff() < 0).all())
        assert bool((cross_entropy(logits[-20:], torch.full((20,), label, device=device), reduction="none") == 0).all())


def test_extreme_logits(device: str):
    inf, nan = math.inf, math.nan
    rows = [
        [1e4, -1e4, 0.0],  # the largest of all, by far
        [-1e4, 1e4, 0.0],
        [-inf, 0.0, 0.0],  # impossible
        [0.0, -inf, -inf],  # certain
        [0.0, nan, 0.0],
        [nan, 0.0, 0.0],
        [-inf, -inf, -inf],
        [inf, 0.0, 0.0],
    ]
    for width in (3, 40):  # kernels take few classes and many in different ways
        logits = torch.full((len(rows), width), -inf, device=device)
        logits[:, :3] = torch.tensor(rows)
        logits.requires_grad_()
        loss = isolation_loss(logits, torch.zeros(len(rows), dtype=torch.int64, device=device), mode="ce")
        assert loss.tolist()[:4] == [0, 2e4, inf, 0]
        assert bool(loss[4:].isnan().all())
        loss.sum().backward()
        expected = torch.zeros(4, width)
        expected[1, :2] = torch.tensor([-1.0, 1.0])
        expected[2, :3] = torch.tensor([-1.0, 0.5, 0.5])
        torch.testing.assert_close(logits.grad[:4].cpu(), expected)
        assert bool(logits.grad[4:].isnan().any(1).all())


def test_sign_of_zero_is_zero(device: str):
    logits = torch.zeros(4, 8, device=device, dtype=torch.float64).requires_grad_()
    labels = torch.arange(4, device=device)
    exact = isolation_loss(logits, labels, mode="ce").tolist()[0]
    assert exact == pytest.approx(math.log(8), rel=1e-15)
    for per in ("sample", "batch"):
        logits.grad = None
        lga = isolation_loss(logits, labels, exact, "lga", per=per)
        assert not bool(lga.any())
        (lga.sum() + isolation_loss(logits, labels, exact, "flood", per=per).sum()).backward()
        assert not bool(logits.grad.any())


def test_ignored_samples_may_hold_anything(device: str):
    for width in (4, 40):
        logits, labels = draw(6, width, torch.float32, device)
        clean = isolation_loss(logits[2:], labels[2:], mode="ce", reduction="mean").item()
        labels[:2] = -100
        with torch.no_grad():
            logits[0], logits[1] = math.nan, math.inf
        loss = isolation_loss(logits, labels, mode="ce", reduction="mean")
        assert loss.item() == pytest.approx(clean, rel=1e-6)
        loss.backward()
        assert not bool(logits.grad[:2].any())
        assert bool(logits.grad[2:].isfinite().all())


def test_nothing_to_average(device: str):
    for logits, labels in (draw(0, 5, device=device), draw(3, 5, device=device, ignored=3)):
        assert isolation_loss(logits, labels).tolist() == [0.0] * len(labels)
        assert isolation_loss(logits, labels, reduction="sum").item() == 0
        for options in ({"reduction": "mean"}, {"per": "batch"}):
            logits.grad = None
            loss = isolation_loss(logits, labels, **options)
            assert math.isnan(loss.item())
            loss.backward()
            assert not bool(logits.grad.any())


def test_the_layout_of_inputs_does_not_matter(device: str):
    logits, labels = draw(9, 12, torch.float32, device)
    expected = isolation_loss(logits, labels)
    expected.sum().backward()
    wide = torch.zeros(18, 24, device=device)
    wide[::2, ::2] = logits.detach()
    gaps = torch.zeros(18, dtype=torch.int64, device=device)
    gaps[::2] = labels
    columns = logits.detach().t().contiguous().t()
    shifted = torch.zeros(9 * 12 + 1, device=device)[1:].view(9, 12).copy_(logits.detach())
    # A GPU's threads take single numbers where rows do not begin at 16 bytes, and add in another order.
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if device == "cuda" else {"rtol": 0, "atol": 0}
    for same in (wide[::2, ::2], columns, shifted):
        leaf = same.detach().requires_grad_()
        found = isolation_loss(leaf, gaps[::2])
        torch.testing.assert_close(found, expected, **tolerance)
        found.sum().backward()
        torch.testing.assert_close(leaf.grad, logits.grad, **tolerance)


def test_gradients_of_any_layout_reach_the_logits(device: str):
    logits, labels = draw(6, 5, device=device)
    weights = torch.arange(12.0, dtype=torch.float64, device=device)
    isolation_loss(logits, labels).backward(weights[::2])
    scattered, logits.grad = logits.grad, None
    isolation_loss(logits, labels).backward(weights[::2].contiguous())
    assert torch.equal(scattered, logits.grad)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_repeats_to_the_bit_with_any_number_of_threads(device: str, reduction):
    def results() -> list[Tensor]:
        logits, labels = draw(1025, 300, torch.float32, device, ignored=100)
        loss = isolation_loss(logits, labels, 3.0, reduction=reduction)
        loss.sum().backward()
        return [loss.detach(), logits.grad]

    threads = torch.get_num_threads()
    try:
        first = results()
        for count in (1, 2):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_autocast_changes_nothing(device: str):
    logits, labels = draw(6, 64, torch.float32, device)
    plain = isolation_loss(logits, labels)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(isolation_loss(logits, labels), plain)
        mixed = isolation_loss(logits.bfloat16(), labels, reduction="mean")
    mixed.backward()
    assert mixed.dtype == torch.float32
    assert logits.grad.dtype == torch.float32


def test_compiles_without_a_graph_break_for_any_size(device: str):
    def objective(logits: Tensor, labels: Tensor) -> Tensor:
        return isolation_loss(logits * 1.5, labels, 2.0, reduction="mean") * 2

    compiled = torch.compile(objective, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((6, 8), (9, 5), (33, 10)):
        logits, labels = draw(*shape, torch.float32, device)
        other = logits.detach().clone().requires_grad_()
        compiled(logits, labels).backward()
        objective(other, labels).backward()
        torch.testing.assert_close(logits.grad, other.grad)


def test_second_derivatives_are_refused(device: str):
    logits, labels = draw(3, 4, device=device)
    (grad,) = torch.autograd.grad(isolation_loss(logits, labels, reduction="mean"), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="isolation_loss has no second derivatives"):
        grad.sum().backward()


class _GradientOfNone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_missing_upstream_gradient_gives_none(device: str):
    logits, labels = draw(3, 4, device=device)
    _GradientOfNone.apply(isolation_loss(logits, labels)).sum().backward()
    assert logits.grad is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck itself reads it
@pytest.mark.parametrize("reduction", [0, 1, 3])
def test_registration_is_sound(device: str, reduction: int):
    logits, labels = draw(5, 4, torch.float32, device, ignored=1)
    arguments = (labels, 0.5, 2, -100, 0.0, reduction)
    for ops in (torch.ops.bdcore, torch.ops.bdcore_reference):
        torch.library.opcheck(ops.isolation_loss.default, (logits, *arguments))
        loss, saved = ops.isolation_loss(logits, *arguments)
        assert loss.requires_grad
        assert not saved.requires_grad
        torch.library.opcheck(
            ops.isolation_loss_backward.default,
            (torch.ones_like(loss), logits.detach(), labels, saved, 0.0),
        )
    assert "bdcore::isolation_loss" in OPERATORS
    assert "bdcore::isolation_loss_backward" in OPERATORS


def test_calling_the_operator_itself_gives_the_same_gradient(device: str):
    logits, labels = draw(5, 4, torch.float32, device)
    isolation_loss(logits, labels).sum().backward()
    expected, logits.grad = logits.grad, None
    torch.ops.bdcore.isolation_loss(logits, labels, 0.5, 2, -100, 0.0, 0)[0].sum().backward()
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("wrong", [10, -1, 2**40])
def test_labels_out_of_range_are_named(device: str, wrong: int):
    if device == "cuda":
        pytest.skip("a kernel's assertion ends the use of the device")
    logits, labels = draw(40, 10)
    labels[33] = wrong
    span = f"got {min(wrong, 0)} to {max(wrong, 9)}"
    with pytest.raises(RuntimeError, match=rf"labels must be in \[0, 9\] or ignore_index \(-100\), {span}"):
        isolation_loss(logits, labels)
    isolation_loss(logits, labels, ignore_index=wrong)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3, 4).int()}, TypeError, "logits must be float16.*got torch.int32"),
        ({"logits": torch.zeros(12)}, ValueError, r"logits must be \[B, C\] with C >= 1, got shape \[12\]"),
        ({"logits": torch.zeros(3, 0)}, ValueError, r"C >= 1, got shape \[3, 0\]"),
        ({"labels": torch.zeros(3)}, TypeError, "labels must be int64, got torch.float32"),
        ({"labels": torch.zeros(4).long()}, ValueError, r"labels must be \[3\], one a row.*got shape \[4\]"),
        ({"labels": torch.zeros(3, 1).long()}, ValueError, r"got shape \[3, 1\]"),
        ({"labels": torch.zeros(3, device="meta").long()}, ValueError, "labels is on meta and logits on cpu"),
        ({"mode": "lda"}, ValueError, "unknown mode 'lda'. Did you mean lga.*ascent, ce, flood, lga"),
        ({"per": "row"}, ValueError, "unknown per 'row'.*batch, sample"),
        ({"reduction": "men"}, ValueError, "unknown reduction 'men'. Did you mean mean"),
        ({"gamma": math.nan}, ValueError, "gamma must be a finite number, got nan"),
        ({"gamma": math.inf}, ValueError, "gamma must be a finite number, got inf"),
        ({"label_smoothing": 1.5, "mode": "ce"}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"label_smoothing": 0.1}, ValueError, "must be 0 with mode 'lga'.*floor.*the ascent never begins"),
        ({"per": "batch", "reduction": "sum"}, ValueError, "cannot be summed: use 'mean'"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        isolation_loss(**{"logits": torch.zeros(3, 4), "labels": torch.zeros(3, dtype=torch.int64), **change})
