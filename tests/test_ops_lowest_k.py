import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdcore.ops import OPERATORS, LowestK, lowest_k

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def ranked(losses: list[float], index: list[int], k: int) -> list[int]:
    """The definition: by loss, NaN last, then by index; Python takes 0.0 and -0.0 for equal."""
    pairs = sorted(
        zip(losses, index, strict=True), key=lambda pair: (math.isnan(pair[0]), nan_as_zero(pair[0]), pair[1])
    )
    return [number for _, number in pairs[:k]]


def nan_as_zero(loss: float) -> float:
    return 0.0 if math.isnan(loss) else loss


# Few different values, so that ties are common.
values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-38, -1e-38, 3e38, math.inf, -math.inf, math.nan, -math.nan])
streams = st.lists(values | st.floats(width=32), max_size=60)


@settings(max_examples=150, deadline=None)
@given(losses=streams, share=st.floats(0, 1))
def test_is_the_definition(device: str, losses: list[float], share: float):
    k = round(share * len(losses))
    found = lowest_k(torch.tensor(losses, dtype=torch.float32, device=device), k)
    assert found.dtype == torch.int64
    assert found.device.type == device
    assert found.tolist() == ranked(losses, list(range(len(losses))), k)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [0, 1, 7, 33, 1025, 5000])
def test_all_dtypes_at_odd_sizes(device: str, dtype: torch.dtype, size: int):
    generator = torch.Generator().manual_seed(size)
    losses = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    losses[::13] = math.nan
    losses[::7] = 0.25
    # numpy has no bfloat16, and its conversion to float64 keeps every order
    order = np.argsort(losses.double().numpy(), kind="stable")
    for k in {0, min(1, size), size // 100, size // 2, size}:
        assert lowest_k(losses.to(device), k).tolist() == order[:k].tolist()


@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "nan"])
def test_orders_that_are_hard_to_select_from(device: str, order: str):
    losses = {
        "ascending": torch.arange(4000.0),
        "descending": torch.arange(4000.0, 0, -1),
        "equal": torch.ones(4000),
        "nan": torch.full((4000,), math.nan),
    }[order].to(device)
    expected = list(range(3999, 3799, -1)) if order == "descending" else list(range(200))
    assert lowest_k(losses, 200).tolist() == expected
    stream = LowestK(200)
    stream.add(losses, torch.arange(4000, device=device))
    assert stream.indices().tolist() == expected


def test_the_layout_does_not_matter(device: str):
    losses = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(device)
    wide = losses.repeat_interleave(3)
    assert torch.equal(lowest_k(wide[::3], 9), lowest_k(losses, 9))
    stream = LowestK(9)
    stream.add(wide[::3], torch.arange(192, device=device)[::3])
    assert stream.indices().tolist() == [3 * number for number in lowest_k(losses, 9).tolist()]


def test_nothing_to_differentiate(device: str):
    losses = torch.rand(5, device=device, requires_grad=True)
    assert not lowest_k(losses, 2).requires_grad
    assert not torch.ops.bdcore.lowest_k(losses, 2).requires_grad


def test_compiles_without_a_graph_break_for_any_size(device: str):
    compiled = torch.compile(lambda x: lowest_k(x * 2, 3) + 1, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (5, 9, 40):
        losses = torch.rand(size, generator=torch.Generator().manual_seed(size)).to(device)
        assert torch.equal(compiled(losses), losses.sort(stable=True).indices[:3] + 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck itself reads it
def test_registration_is_sound(device: str):
    losses = torch.rand(9, device=device)
    torch.library.opcheck(torch.ops.bdcore.lowest_k.default, (losses, 4))
    torch.library.opcheck(torch.ops.bdcore_reference.lowest_k.default, (losses, 0))
    assert "bdcore::lowest_k" in OPERATORS


@settings(max_examples=150, deadline=None)
@given(losses=streams, k=st.integers(0, 70), seed=st.integers(0, 2**31), data=st.data())
def test_a_stream_is_ranked_as_the_whole(device: str, losses: list[float], k: int, seed: int, data: st.DataObject):
    count = len(losses)
    numbers = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=6)))
    whole = torch.tensor(losses, dtype=torch.float32)
    stream = LowestK(k)
    for start, end in zip([0, *cuts], [*cuts, count], strict=True):
        tile = numbers[start:end]
        stream.add(whole[tile].to(device), tile.to(device))
        if data.draw(st.booleans()):
            stream.indices()  # looking on the way changes nothing
    found = stream.indices()
    assert found.dtype == torch.int64
    assert found.tolist() == lowest_k(whole, min(k, count)).tolist()


def test_a_long_stream_in_any_order_and_tiling(device: str):
    losses = torch.randint(0, 3000, (20_000,), generator=torch.Generator().manual_seed(0)).double().to(device) / 7
    losses[::111] = math.nan
    expected = lowest_k(losses, 200)
    for tile, order in (
        (500, torch.arange(20_000)),
        (333, torch.arange(19_999, -1, -1)),
        (4096, torch.randperm(20_000)),
    ):
        stream = LowestK(200)
        for numbers in order.to(device).split(tile):
            stream.add(losses[numbers], numbers)
        assert torch.equal(stream.indices(), expected.cpu())


def test_any_sample_numbers(device: str):
    stream = LowestK(3)
    stream.add(torch.tensor([1.0, 1.0, 0.5], device=device), torch.tensor([2**62, -5, 10**12], device=device))
    assert stream.indices().tolist() == [10**12, -5, 2**62]
    stream.add(torch.tensor([0.5], dtype=torch.float16, device=device), torch.tensor([-(2**62)], device=device))
    assert stream.indices().tolist() == [-(2**62), 10**12, -5]


def test_what_a_stream_returned_stays(device: str):
    stream = LowestK(2)
    stream.add(torch.tensor([3.0, 2.0], device=device), torch.tensor([0, 1], device=device))
    first = stream.indices()
    first[:] = 77
    assert stream.indices().tolist() == [1, 0]
    stream.add(torch.rand(4, device=device, requires_grad=True), torch.arange(2, 6, device=device))
    assert first.tolist() == [77, 77]


@pytest.mark.parametrize(
    ("losses", "k", "error", "message"),
    [
        (torch.zeros(3).int(), 1, TypeError, "losses must be float16.*got torch.int32"),
        (torch.zeros(3, 1), 1, ValueError, r"losses must be \[N\], got shape \[3, 1\]"),
        (torch.zeros(3), 4, ValueError, r"k must be in \[0, 3\], the number of losses, got 4"),
        (torch.zeros(3), -1, ValueError, r"k must be in \[0, 3\], the number of losses, got -1"),
    ],
)
def test_wrong_arguments_are_named(losses: Tensor, k: int, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        lowest_k(losses, k)


def test_wrong_tiles_are_named(device: str):
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        LowestK(-1)
    stream = LowestK(2)
    with pytest.raises(TypeError, match=r"losses must be float16.*got torch.int64"):
        stream.add(torch.zeros(3).long(), torch.arange(3))
    with pytest.raises(TypeError, match=r"index must be int64, got torch\.float32"):
        stream.add(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"index must have the shape of losses, \[3\], got \[4\]"):
        stream.add(torch.zeros(3), torch.arange(4))
    with pytest.raises(ValueError, match=r"losses must be \[N\], got shape \[3, 1\]"):
        stream.add(torch.zeros(3, 1), torch.arange(3))
    assert stream.indices().tolist() == []
