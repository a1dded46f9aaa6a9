import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bdcore.machine import peak_memory_bytes, reset_peak_memory
from bdcore.ops import OPERATORS, info_nce, model_contrastive_loss

Inputs = tuple[Tensor, Tensor, Tensor]


def draw(
    batch: int, keys: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu"
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for rows in (batch, keys))
    anchor, others = (x.to(device, dtype).requires_grad_() for x in drawn)
    index = torch.randint(0, max(keys, 1), (batch,), generator=generator)
    return anchor, others, index.to(device)


def exact(inputs: Inputs) -> Inputs:
    """The same numbers in float64 on the CPU."""
    anchor, keys = (x.detach().cpu().double().requires_grad_() for x in inputs[:2])
    return anchor, keys, inputs[2].cpu()


def by_hand(anchor: Tensor, keys: Tensor, positive_index: Tensor, temperature: float) -> list[float]:
    """The definition in plain Python numbers."""

    def unit(v: list[float]) -> list[float]:
        length = max(math.sqrt(math.fsum(x * x for x in v)), 1e-8)
        return [x / length for x in v]

    units = [unit(key) for key in keys.double().tolist()]
    losses = []
    for row, positive in zip(anchor.double().tolist(), positive_index.tolist(), strict=True):
        scores = [math.fsum(x * y for x, y in zip(unit(row), key, strict=True)) / temperature for key in units]
        losses.append(math.log(math.fsum(math.exp(s - scores[positive]) for s in scores)))
    return losses


def by_torch(anchor: Tensor, keys: Tensor, positive_index: Tensor, temperature: float, reduction: str) -> Tensor:
    """The same with the whole matrix."""
    scores = normalize(anchor, eps=1e-8) @ normalize(keys, eps=1e-8).T
    return cross_entropy(scores / temperature, positive_index, reduction=reduction)


def assert_gradients_agree(inputs: Inputs, others: Inputs, tolerance: float) -> None:
    for mine, other in zip(inputs[:2], others[:2], strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert mine.grad.dtype == mine.dtype
        largest = float(other.grad.abs().max()) if other.grad.numel() else 0.0
        torch.testing.assert_close(mine.grad.cpu().double(), other.grad, rtol=tolerance, atol=tolerance * largest)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 6),
    keys=st.integers(1, 9),
    width=st.integers(1, 9),
    temperature=st.floats(0.05, 5),
    seed=st.integers(0, 2**31),
)
def test_is_the_definition(device: str, batch: int, keys: int, width: int, temperature: float, seed: int):
    inputs = draw(batch, keys, width, seed=seed, device=device)
    loss = info_nce(*inputs, temperature)
    assert loss.shape == (batch,)
    assert loss.dtype == torch.float64
    expected = torch.tensor(by_hand(*exact(inputs), temperature), dtype=torch.float64)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_values_and_gradients_are_those_of_cross_entropy_over_the_whole_matrix(device: str, reduction: str):
    inputs = draw(13, 29, 11, device=device)
    others = exact(inputs)
    loss = info_nce(*inputs, 0.2, reduction)
    expected = by_torch(*others, 0.2, reduction)
    torch.testing.assert_close(loss.cpu(), expected)
    weights = torch.linspace(-1, 2, 13, dtype=torch.float64) if reduction == "none" else torch.tensor(1.7).double()
    loss.backward(weights.to(device))
    expected.backward(weights)
    assert_gradients_agree(inputs, others, 1e-9)


DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 7), (33, 7, 1025), (1025, 530, 33), (600, 1300, 65)])
def test_every_dtype_and_odd_sizes(device: str, dtype: torch.dtype, tolerance: float, shape: tuple[int, int, int]):
    inputs = draw(*shape, dtype, device=device)
    others = exact(inputs)
    loss = info_nce(*inputs, 0.1)
    expected = by_torch(*others, 0.1, "none")
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The inputs are the same numbers, so the loss is as good as float32 whatever their dtype.
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=2e-6, atol=2e-6)
    weights = torch.linspace(-1, 2, shape[0], dtype=torch.float64)
    loss.backward(weights.to(device, loss.dtype))
    expected.backward(weights)
    assert_gradients_agree(inputs, others, tolerance)


def test_more_rows_than_any_tile_holds(device: str):
    inputs = draw(4200, 2100, 3, torch.float32, device=device)
    others = exact(inputs)
    loss = info_nce(*inputs, 0.3, "mean")
    expected = by_torch(*others, 0.3, "mean")
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_agree(inputs, others, 2e-5)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 1), (5, 2, 3), (0, 2, 3)])
def test_gradients_agree_with_finite_differences(device: str, reduction: str, shape: tuple[int, int, int]):
    if shape[0] == 0 and reduction == "mean":
        pytest.skip("the mean of nothing is nan")
    anchor, keys, index = draw(*shape, device=device)
    assert torch.autograd.gradcheck(lambda a, k: info_nce(a, k, index, 0.3, reduction), (anchor, keys))


def test_with_a_key_for_each_role_it_is_the_model_contrastive_loss(device: str):
    anchor, keys, _ = draw(1, 6, 9, device=device)
    index = torch.tensor([2], device=device)
    rest = torch.cat([keys[:2], keys[3:]]).unsqueeze(0)
    expected = model_contrastive_loss(anchor, keys[2:3], rest, 0.4)
    torch.testing.assert_close(info_nce(anchor, keys, index, 0.4), expected)


def test_neither_autocast_nor_matmul_precision_changes_a_bit(device: str):
    inputs = draw(70, 130, 64, torch.float32, device=device)
    loss = info_nce(*inputs, 0.05)
    plain = torch.autograd.grad(loss.sum(), inputs[:2])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast(device, dtype=torch.bfloat16):
            again = info_nce(*inputs, 0.05)
            grads = torch.autograd.grad(again.sum(), inputs[:2])
            mixed = info_nce(inputs[0].bfloat16(), inputs[1], inputs[2], 0.05)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(plain, grads, strict=True))
    assert mixed.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_inputs_give_the_same_bits_on_any_number_of_threads(device: str, dtype: torch.dtype):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            inputs = draw(300, 700, 40, dtype, device=device)
            loss = info_nce(*inputs, 0.1, "mean")
            loss.backward()
            results.append([loss, inputs[0].grad, inputs[1].grad])
    finally:
        torch.set_num_threads(before)
    # With torch's products, of the reference, the order of additions may depend on the number of threads.
    for other in results[2:3] if os.environ["BDCORE_OPS"] == "reference" else results:
        assert all(torch.equal(a, b) for a, b in zip(results[1], other, strict=True))


def test_the_matrix_is_never_stored(device: str):
    inputs = draw(8192, 8192, 4, torch.float32, device=device)
    where = torch.device(device)
    info_nce(inputs[0][:2000], inputs[1], inputs[2][:2000], 0.1, "mean").backward()  # libraries and threads are there
    reset_peak_memory(where)
    before = peak_memory_bytes(where)
    info_nce(*inputs, 0.1, "mean").backward()
    assert peak_memory_bytes(where) - before < 8192 * 8192 * 4 // 4


def test_zero_vectors_have_similarity_zero_and_finite_gradients(device: str):
    inputs = draw(3, 4, 5, device=device)
    with torch.no_grad():
        inputs[0][1] = 0
        inputs[1][2] = 0
        inputs[1][3] *= 1e-12
    others = exact(inputs)
    info_nce(*inputs, 0.5, "sum").backward()
    expected = by_torch(*others, 0.5, "sum")
    expected.backward()
    torch.testing.assert_close(info_nce(*inputs, 0.5, "sum").cpu(), expected)
    assert_gradients_agree(inputs, others, 1e-9)


def test_extreme_temperatures_stay_finite_and_exact(device: str):
    anchor = torch.tensor([[1.0, 0.0]], device=device, requires_grad=True)
    keys = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [-3.0, 0.0]], device=device)
    near, far = (torch.tensor([i], device=device) for i in (0, 1))
    assert info_nce(anchor, keys, near, 0.05).item() == pytest.approx(2 * math.exp(-40), rel=1e-4)
    huge = info_nce(anchor, keys, far, 1e-3)
    assert huge.item() == pytest.approx(2000, rel=1e-6)
    huge.backward()
    assert bool(anchor.grad.isfinite().all())
    assert info_nce(anchor, keys[:1], near, 0.5).item() == 0


def test_not_a_number_stays_one(device: str):
    anchor, keys, index = (x.detach() for x in draw(4, 70, 20, torch.float32, device=device))
    broken = anchor.clone()
    broken[1, 3] = math.nan
    assert info_nce(broken, keys, index, 0.5).isnan().tolist() == [False, True, False, False]
    keys[69, 0] = math.nan
    assert bool(info_nce(anchor, keys, index, 0.5).isnan().all())


def test_empty_inputs(device: str):
    assert info_nce(*draw(0, 2, 4, device=device), 0.5).shape == (0,)
    assert info_nce(*draw(0, 0, 4, device=device), 0.5, "sum").item() == 0
    assert math.isnan(info_nce(*draw(0, 2, 4, device=device), 0.5, "mean").item())
    assert info_nce(*draw(2, 3, 0, device=device), 0.5).tolist() == pytest.approx([math.log(3)] * 2)
    empty = draw(0, 2, 4, device=device)
    info_nce(*empty, 0.5, "sum").backward()
    assert [x.grad.tolist() for x in empty[:2] if x.grad is not None] == [[], [[0] * 4] * 2]


def test_the_layout_of_inputs_does_not_matter(device: str):
    inputs = draw(9, 35, 6, device=device)
    scattered = tuple(x.detach().T.contiguous().T.requires_grad_() for x in inputs[:2])
    wide = tuple(torch.cat([x.detach(), x.detach()], 1)[:, :6].requires_grad_() for x in inputs[:2])  # rows with gaps
    index = inputs[2].repeat_interleave(2)[::2]
    weights = torch.arange(9, dtype=torch.float64, device=device)
    for values in (inputs[:2], scattered, wide):
        info_nce(*values, index, 0.5).backward(weights)
    for mine, other, third in zip(inputs[:2], scattered, wide, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(mine.grad, third.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_the_gradients_asked_for_are_computed(device: str, needed: tuple[bool, bool]):
    anchor, keys, index = draw(5, 40, 7, device=device)
    others = exact((anchor, keys, index))
    for x, need in zip((anchor, keys), needed, strict=True):
        x.requires_grad_(need)
    info_nce(anchor, keys, index, 0.5, "sum").backward()
    by_torch(*others, 0.5, "sum").backward()
    for x, need, other in zip((anchor, keys), needed, others[:2], strict=True):
        assert (x.grad is not None) == need
        if need:
            torch.testing.assert_close(x.grad.cpu(), other.grad)
    _, statistics, norms = torch.ops.bdcore.info_nce(anchor, keys, index, 0.5, 0)
    assert not statistics.requires_grad
    assert not norms.requires_grad
    found = torch.ops.bdcore.info_nce_backward(
        torch.ones(5, device=device).double(), anchor.detach(), keys.detach(), index, statistics, norms, 0.5, 0, *needed
    )
    assert [tuple(x.shape) for x in found] == [(5, 7) if needed[0] else (0,), (40, 7) if needed[1] else (0,)]


def test_second_derivatives_are_refused(device: str):
    anchor, keys, index = draw(3, 5, 4, device=device)
    (grad,) = torch.autograd.grad(info_nce(anchor, keys, index, 0.5, "sum"), anchor, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck itself reads it
@pytest.mark.parametrize("namespace", ["bdcore", "bdcore_reference"])
def test_registration_is_sound(device: str, namespace: str):
    operators = getattr(torch.ops, namespace)
    inputs = draw(3, 5, 4, torch.float32, device=device)
    for reduction in (0, 1):
        torch.library.opcheck(operators.info_nce.default, (*inputs, 0.5, reduction))
    anchor, keys, index = (x.detach() for x in inputs)
    _, statistics, norms = operators.info_nce(anchor, keys, index, 0.5, 0)
    grad = torch.ones(3, device=device)
    for needed in ((True, False), (True, True)):
        torch.library.opcheck(
            operators.info_nce_backward.default, (grad, anchor, keys, index, statistics, norms, 0.5, 0, *needed)
        )
    assert "bdcore::info_nce" in OPERATORS
    assert "bdcore::info_nce_backward" in OPERATORS


def test_compiles_without_a_graph_break_for_any_size(device: str):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: info_nce(*x, 0.5, "mean") * 2, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for shape in ((6, 9, 8), (9, 4, 5)):
        inputs, others = draw(*shape, torch.float32, device=device), draw(*shape, torch.float32, device=device)
        compiled(*inputs).backward()
        (info_nce(*others, 0.5, "mean") * 2).backward()
        for mine, other in zip(inputs[:2], others[:2], strict=True):
            torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_a_positive_outside_the_keys_is_named(device: str, wrong: int):
    if device == "cuda":
        pytest.skip("an assertion on the device ends the process's use of it")
    anchor, keys, _ = draw(3, 5, 4)
    with pytest.raises(RuntimeError, match=rf"positive_index must be in \[0, 4\] for 5 keys, got {min(wrong, 0)} to "):
        info_nce(anchor, keys, torch.tensor([0, wrong, 2]), 0.5)
    with pytest.raises(RuntimeError, match=r"positive_index must be in \[0, -1\] for 0 keys"):
        info_nce(anchor, keys[:0], torch.tensor([0, 0, 0]), 0.5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"anchor": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "anchor must be float16.*int64"),
        ({"anchor": torch.ones(12)}, ValueError, r"anchor must be \[rows, D\], got shape \[12\]"),
        ({"keys": torch.ones(5, 3)}, ValueError, r"keys must be \[M, 4\] as anchor is, got shape \[5, 3\]"),
        ({"keys": torch.ones(5, 4, device="meta")}, ValueError, "keys is on meta and anchor on cpu"),
        ({"positive_index": torch.zeros(3)}, TypeError, "positive_index must be int64, got torch.float32"),
        ({"positive_index": torch.zeros(2, dtype=torch.int64)}, ValueError, r"must be \[3\] as anchor is, got \[2\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive number, got 0.0"),
        ({"temperature": math.inf}, ValueError, "temperature must be a positive number, got inf"),
        ({"reduction": "men"}, ValueError, "unknown reduction 'men'. Did you mean mean.*mean, none, sum"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str):
    arguments = {
        "anchor": torch.ones(3, 4),
        "keys": torch.ones(5, 4),
        "positive_index": torch.zeros(3, dtype=torch.int64),
        "temperature": 0.5,
        **change,
    }
    with pytest.raises(error, match=message):
        info_nce(**arguments)
