import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdcore.ops import OPERATORS, blend_trigger

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def expected_blend(
    images: Tensor,
    pattern: Tensor,
    mask: Tensor,
    index: list[int] | None = None,
    offset: list[tuple[int, int]] | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> np.ndarray:
    """The definition in float64, one pixel at a time."""
    out = images.double().numpy() / (255.0 if images.dtype == torch.uint8 else 1.0)
    p, m = pattern.double().numpy(), mask.double().numpy()
    for b in range(out.shape[0]):
        trigger = 0 if index is None else index[b]
        top, left = (0, 0) if offset is None else offset[b]
        if trigger < 0:
            continue
        for c, i, j in np.ndindex(*p.shape[1:]):
            share = m[trigger, c if m.shape[1] > 1 else 0, i, j]
            x = out[b, c, top + i, left + j]
            out[b, c, top + i, left + j] = (1 - share) * x + share * p[trigger, c, i, j]
    if mean is not None and std is not None:
        out = (out - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    return out


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@st.composite
def cases(draw: st.DrawFn) -> dict:
    batch, channels = draw(st.integers(0, 4)), draw(st.integers(1, 4))
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    rows, columns = draw(st.integers(1, height)), draw(st.integers(1, width))
    triggers, seed = draw(st.integers(1, 3)), draw(st.integers(0, 1000))
    images = pixels(batch, channels, height, width, seed=seed)
    if draw(st.booleans()):
        images = images.double() / 255
    if draw(st.booleans()):
        images = images.contiguous(memory_format=torch.channels_last)
    return {
        "images": images,
        "pattern": rand(triggers, channels, rows, columns, seed=seed + 1),
        "mask": rand(triggers, draw(st.sampled_from([1, channels])), rows, columns, seed=seed + 2),
        "index": draw(st.none() | st.lists(st.integers(-1, triggers - 1), min_size=batch, max_size=batch)),
        "offset": draw(
            st.none()
            | st.lists(
                st.tuples(st.integers(0, height - rows), st.integers(0, width - columns)),
                min_size=batch,
                max_size=batch,
            )
        ),
        "normalise": draw(st.booleans()),
    }


@settings(max_examples=80, deadline=None)
@given(cases())
def test_is_the_definition(case: dict):
    images, pattern, mask = case["images"], case["pattern"], case["mask"]
    index = None if case["index"] is None else torch.tensor(case["index"], dtype=torch.int64)
    offset = None if case["offset"] is None else torch.tensor(case["offset"], dtype=torch.int64).reshape(-1, 2)
    channels = images.shape[1]
    mean, std = ([0.1 * c for c in range(channels)], [0.5 + c for c in range(channels)])
    before = images.clone()

    smooth = blend_trigger(
        images, pattern, mask, index=index, offset=offset, out_dtype=torch.float64,
        **({"mean": mean, "std": std} if case["normalise"] else {}),
    )  # fmt: skip
    expected = expected_blend(
        images, pattern, mask, case["index"], case["offset"], *((mean, std) if case["normalise"] else ())
    )
    torch.testing.assert_close(smooth, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)

    whole = blend_trigger(images, pattern, mask, index=index, offset=offset, out_dtype=torch.uint8)
    levels = 255 * expected_blend(images, pattern, mask, case["index"], case["offset"])
    assert float(np.abs(whole.double().numpy() - levels).max(initial=0)) <= 0.5 + 1e-9
    assert whole.stride() == torch.empty_like(images).stride()
    assert torch.equal(images, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_rounds_once(device: str, dtype: torch.dtype):
    images = rand(5, 3, 9, 7).to(device, dtype)
    pattern, mask = rand(1, 3, 4, 5, seed=1).to(device), rand(1, 1, 4, 5, seed=2).to(device)
    result = blend_trigger(images, pattern.float(), mask.float())
    assert result.dtype == dtype
    expected = torch.from_numpy(expected_blend(images.cpu(), pattern.cpu().float(), mask.cpu().float()))
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(result.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def test_all_pixel_values_survive_and_halves_round_to_even():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    zeros, ones = torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16)
    assert torch.equal(blend_trigger(images, ones, zeros), images)
    assert torch.equal(blend_trigger(zeros.byte(), images / 255.0, ones), images)
    assert torch.equal(blend_trigger(images / 255.0, ones, zeros, out_dtype=torch.uint8), images)
    assert torch.equal(blend_trigger(images, zeros, zeros, out_dtype=torch.float32), images.float() / 255)
    halved = blend_trigger(images, zeros, ones / 2)
    assert halved.flatten().tolist() == [round(value / 2) for value in range(256)]


def test_default_output_dtypes():
    images, pattern, mask = pixels(2, 3, 4, 4), torch.rand(1, 3, 2, 2), torch.rand(1, 1, 2, 2)
    normalisation = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    assert blend_trigger(images, pattern, mask).dtype == torch.uint8
    assert blend_trigger(images, pattern, mask, **normalisation).dtype == torch.float32
    assert blend_trigger(images.bfloat16() / 255, pattern, mask, **normalisation).dtype == torch.bfloat16


def test_values_beyond_the_range_are_clamped_not_wrapped():
    images = torch.full((1, 1, 1, 2), 250, dtype=torch.uint8)
    pattern = torch.tensor([[[[2.0, -1.0]]]])
    assert blend_trigger(images, pattern, torch.ones(1, 1, 1, 2)).flatten().tolist() == [255, 0]
    assert blend_trigger(images / 255, pattern, torch.ones(1, 1, 1, 2), out_dtype=torch.uint8).flatten().tolist() == [
        255,
        0,
    ]


@pytest.mark.parametrize("mask_channels", [1, 3])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_gradients_agree_with_finite_differences(mask_channels: int, chosen: bool, normalise: bool):
    images = rand(4, 3, 5, 4).requires_grad_()
    pattern, mask = rand(2, 3, 2, 3, seed=1).requires_grad_(), rand(2, mask_channels, 2, 3, seed=2).requires_grad_()
    options = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 1.0, 2.0]} if normalise else {}
    if chosen:
        options |= {
            "index": torch.tensor([1, -1, 0, 1]),
            "offset": torch.tensor([[0, 0], [3, 1], [2, 0], [1, 1]]),
        }
    assert torch.autograd.gradcheck(lambda *x: blend_trigger(*x, **options), (images, pattern, mask))


def test_gradients_through_uint8_images():
    images = pixels(4, 3, 5, 4)
    pattern, mask = rand(1, 3, 5, 4, seed=1).requires_grad_(), rand(1, 1, 5, 4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: blend_trigger(images, *x, out_dtype=torch.float64), (pattern, mask))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_repeat_to_the_bit(device: str):
    images = rand(257, 3, 8, 8, dtype=torch.float32).to(device)
    index = torch.randint(-1, 3, (257,), generator=torch.Generator().manual_seed(3)).to(device)

    def gradients() -> list[Tensor]:
        pattern = rand(3, 3, 8, 8, seed=1, dtype=torch.float32).to(device).requires_grad_()
        mask = rand(3, 1, 8, 8, seed=2, dtype=torch.float32).to(device).requires_grad_()
        (blend_trigger(images, pattern, mask, index=index) ** 2).sum().backward()
        return [pattern.grad, mask.grad]

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_clean_images_keep_their_gradient_and_their_bits():
    images = torch.tensor([0.1, -0.0, 3.0]).reshape(3, 1, 1, 1).requires_grad_()
    pattern = torch.full((1, 1, 1, 1), float("inf"))
    result = blend_trigger(images, pattern, torch.zeros(1, 1, 1, 1), index=torch.tensor([-1, -1, -1]))
    assert torch.equal(result.signbit(), images.signbit())
    assert torch.equal(result, images)
    result.sum().backward()
    assert images.grad.flatten().tolist() == [1, 1, 1]


def test_autocast_changes_nothing():
    images, pattern, mask = rand(3, 3, 6, 6, dtype=torch.float32), rand(1, 3, 6, 6, seed=1), rand(1, 1, 6, 6, seed=2)
    plain = blend_trigger(images, pattern.float(), mask.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(blend_trigger(images, pattern.float(), mask.float()), plain)
        assert blend_trigger(images.bfloat16(), pattern.float(), mask.float()).dtype == torch.bfloat16


def test_second_derivatives_are_refused():
    images, pattern, mask = rand(2, 3, 4, 4), rand(1, 3, 4, 4).requires_grad_(), rand(1, 1, 4, 4)
    (grad,) = torch.autograd.grad((blend_trigger(images, pattern, mask) ** 2).sum(), pattern, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        grad.sum().backward()


class _GradientOfNone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        return images.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_missing_upstream_gradient_gives_none():
    pattern = rand(1, 3, 4, 4).requires_grad_()
    _GradientOfNone.apply(blend_trigger(rand(2, 3, 4, 4), pattern, rand(1, 1, 4, 4))).sum().backward()
    assert pattern.grad is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck itself reads it
@pytest.mark.parametrize("device", DEVICES)
def test_registration_is_sound(device: str):
    images = rand(3, 3, 6, 5, dtype=torch.float32).to(device).contiguous(memory_format=torch.channels_last)
    pattern, mask = rand(2, 3, 2, 2, dtype=torch.float32).to(device), rand(2, 1, 2, 2, dtype=torch.float32).to(device)
    index = torch.tensor([1, -1, 0], device=device)
    offset = torch.tensor([[0, 0], [4, 3], [1, 2]], device=device)
    forward, backward = torch.ops.bdcore.blend_trigger.default, torch.ops.bdcore.blend_trigger_backward.default
    wanted = tuple(x.clone().requires_grad_() for x in (images, pattern, mask))
    torch.library.opcheck(forward, (*wanted, index, offset, [0.1] * 3, [0.5] * 3, torch.float32))
    torch.library.opcheck(forward, ((images * 255).byte(), pattern, mask, None, None, None, None, torch.uint8))
    torch.library.opcheck(
        backward, (images.contiguous(), images, pattern, mask, index, offset, [0.5] * 3, True, True, False)
    )
    assert "bdcore::blend_trigger" in OPERATORS
    assert "bdcore::blend_trigger_backward" in OPERATORS


def test_compiles_without_a_graph_break():
    images = pixels(5, 3, 8, 8)
    index = torch.tensor([0, 1, -1, 1, 0])

    def loss(pattern: Tensor, mask: Tensor) -> Tensor:
        blended = blend_trigger(images, pattern, mask.sigmoid(), index=index, out_dtype=torch.float32)
        return (blended**3).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        pattern = rand(2, 3, 8, 8, seed=1, dtype=torch.float32).requires_grad_()
        mask = rand(2, 1, 8, 8, seed=2, dtype=torch.float32).requires_grad_()
        function(pattern, mask).backward()
        results.append((pattern.grad, mask.grad))
    torch.testing.assert_close(results[0], results[1])


GOOD = {
    "images": torch.zeros(2, 3, 8, 6),
    "pattern": torch.zeros(2, 3, 4, 4),
    "mask": torch.zeros(2, 1, 4, 4),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 6).int()}, TypeError, "images must be uint8 or floating point, got torch.int"),
        ({"images": torch.zeros(3, 8, 6)}, ValueError, r"images must be \[B, C, H, W\], got shape \[3, 8, 6\]"),
        ({"pattern": torch.zeros(2, 3, 4, 4).byte()}, TypeError, "pattern must be floating point"),
        ({"pattern": torch.zeros(2, 1, 4, 4)}, ValueError, r"pattern must be \[T, 3, h, w\]"),
        ({"pattern": torch.zeros(0, 3, 4, 4)}, ValueError, "T >= 1"),
        ({"pattern": torch.zeros(2, 3, 4, 7)}, ValueError, "4 x 7 pixels does not fit into images of 8 x 6"),
        ({"mask": torch.zeros(2, 2, 4, 4)}, ValueError, r"mask must be \[2, 1 or 3, 4, 4\], got \[2, 2, 4, 4\]"),
        ({"mask": torch.zeros(2, 1, 3, 4)}, ValueError, "mask must cover the pattern's 4 x 4 pixels"),
        ({"mask": torch.zeros(2, 1, 4, 4, device="meta")}, ValueError, "mask is on meta and images on cpu"),
        ({"index": torch.zeros(2)}, TypeError, "index must be int64, got torch.float32"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, ValueError, r"index must have shape \[2\], got \[3\]"),
        ({"index": torch.tensor([0, 2])}, RuntimeError, r"index must be in \[-1, 1\] for 2 triggers, got 0 to 2"),
        ({"index": torch.tensor([0, -2])}, RuntimeError, "got -2 to 0"),
        ({"offset": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"offset must have shape \[2, 2\]"),
        ({"offset": torch.tensor([[0, 0], [5, 0]])}, RuntimeError, r"top must be in \[0, 4\].*got top 0 to 5"),
        ({"offset": torch.tensor([[0, 0], [0, -1]])}, RuntimeError, r"left in \[0, 2\].*left -1 to 0"),
        ({"mean": [0.0] * 3}, ValueError, "mean and std must be given together"),
        ({"mean": [0.0] * 3, "std": [1.0] * 2}, ValueError, "std must have 3 values, one a channel, got 2"),
        ({"mean": [0.0] * 3, "std": [1.0, 0.0, 1.0]}, ValueError, "std must be positive"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype must be torch.uint8 or a floating-point dtype"),
        ({"mean": [0.0] * 3, "std": [1.0] * 3, "out_dtype": torch.uint8}, ValueError, "cannot hold normalised images"),
        ({"pattern": torch.zeros(2, 3, 4, 4, requires_grad=True), "out_dtype": torch.uint8}, ValueError, "no gradient"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        blend_trigger(**{**GOOD, **change})
