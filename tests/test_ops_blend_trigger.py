import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdcore.ops import OPERATORS, blend_trigger
from bdcore.ops.native import load
from bdcore.ops.registration import NATIVE, REFERENCE


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


def spread(images: Tensor) -> Tensor:
    """Every second column of wider images: strides of no known layout, with gaps."""
    wide = images.new_zeros((*images.shape[:3], 2 * images.shape[3]))
    wide[..., ::2] = images
    return wide[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "spread": spread,
}


@st.composite
def cases(draw: st.DrawFn) -> dict:
    batch, channels = draw(st.integers(0, 9)), draw(st.integers(1, 4))
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    rows, columns = (height, width) if draw(st.booleans()) else (
        draw(st.integers(1, height)), draw(st.integers(1, width))
    )  # fmt: skip
    triggers, seed = draw(st.integers(1, 3)), draw(st.integers(0, 1000))
    images = pixels(batch, channels, height, width, seed=seed)
    if draw(st.booleans()):
        images = images.double() / 255
    return {
        "images": LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](images),
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


def numbers(values: list | None, device: str) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int64, device=device)


@settings(max_examples=80, deadline=None)
@given(cases())
def test_is_the_definition(device: str, case: dict):
    images, pattern, mask = (case[name].to(device) for name in ("images", "pattern", "mask"))
    index, offset = numbers(case["index"], device), numbers(case["offset"], device)
    offset = None if offset is None else offset.reshape(-1, 2)
    channels = images.shape[1]
    mean, std = ([0.1 * c for c in range(channels)], [0.5 + c for c in range(channels)])
    before = images.clone()

    smooth = blend_trigger(
        images, pattern, mask, index=index, offset=offset, out_dtype=torch.float64,
        **({"mean": mean, "std": std} if case["normalise"] else {}),
    )  # fmt: skip
    plain = case["images"], case["pattern"], case["mask"], case["index"], case["offset"]
    expected = expected_blend(*plain, *((mean, std) if case["normalise"] else ()))
    torch.testing.assert_close(smooth.cpu(), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)

    whole = blend_trigger(images, pattern, mask, index=index, offset=offset, out_dtype=torch.uint8)
    levels = 255 * expected_blend(*plain)
    assert float(np.abs(whole.cpu().double().numpy() - levels).max(initial=0)) <= 0.5 + 1e-9
    assert smooth.stride() == whole.stride() == torch.empty_like(images).stride()
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_format_is_rounded_once(device: str, dtype: torch.dtype, out_dtype: torch.dtype):
    images = pixels(7, 3, 33, 41) if dtype == torch.uint8 else rand(7, 3, 33, 41, dtype=dtype)
    index, mean, std = [1, 0, 0, -1, 1, 1, 1], [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    exact, step = 1e-12 if dtype == torch.float64 else 1e-6, torch.finfo(out_dtype).eps / 2
    least = 10 * exact + step * torch.finfo(out_dtype).smallest_normal  # below it numbers are equally far apart
    for window in ((33, 41), (9, 17)):
        pattern, mask = rand(2, 3, *window, seed=1).float(), rand(2, 1, *window, seed=2).float()
        blended = expected_fast(images, pattern, mask, index)
        expected = (blended - blended.new_tensor(mean).view(3, 1, 1)) / blended.new_tensor(std).view(3, 1, 1)
        for layout in LAYOUTS.values():
            result = blend_trigger(
                layout(images.to(device)), pattern.to(device), mask.to(device), index=numbers(index, device),
                mean=mean, std=std, out_dtype=out_dtype,
            )  # fmt: skip
            assert result.dtype == out_dtype
            torch.testing.assert_close(result.cpu().double(), expected, rtol=step + exact, atol=least)


def expected_fast(images: Tensor, pattern: Tensor, mask: Tensor, index: list[int]) -> Tensor:
    """The blend of windows at the upper left, in float64."""
    out = images.double() / (255 if images.dtype == torch.uint8 else 1)
    rows, columns = pattern.shape[2:]
    for image, trigger in zip(out, index, strict=True):
        if trigger >= 0:
            corner, m = image[:, :rows, :columns], mask[trigger].double()
            corner.copy_((1 - m) * corner + m * pattern[trigger].double())
    return out


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("out_dtype", [torch.uint8, torch.float32])
def test_results_larger_than_the_caches(device: str, layout: str, out_dtype: torch.dtype):
    size = (390, 3, 128, 128) if out_dtype == torch.uint8 else (90, 3, 128, 128)
    images = LAYOUTS[layout](pixels(*size))
    pattern, mask = rand(2, 3, 128, 128, seed=1, dtype=torch.float32), rand(2, 1, 128, 128, seed=2).float()
    index = torch.randint(-1, 2, (len(images),), generator=torch.Generator().manual_seed(3))
    result = blend_trigger(
        images.to(device), pattern.to(device), mask.to(device), index=index.to(device), out_dtype=out_dtype
    ).cpu()
    for image, found, trigger in zip(images, result, index.tolist(), strict=True):
        x = image.float() / (255 if out_dtype == torch.float32 else 1)
        if trigger >= 0:
            p = pattern[trigger] * (255 if out_dtype == torch.uint8 else 1)
            x = (1 - mask[trigger]) * x + mask[trigger] * p
        assert torch.equal(found, x.round().clamp(0, 255).byte() if out_dtype == torch.uint8 else x)


@pytest.mark.parametrize("side", [1, 7, 33, 45])
def test_uint8_results_have_the_same_bits_everywhere(device: str, side: int):
    images = pixels(9, 3, side, side)
    pattern, mask = rand(1, 3, side, side, seed=1, dtype=torch.float32), rand(1, 1, side, side, seed=2).float()
    x, p, m = images.numpy().astype(np.float32), pattern.numpy(), mask.numpy()
    # Products and sums rounded one by one, in float32.
    levels = np.rint((np.float32(1) - m) * x + m * (p * np.float32(255))).clip(0, 255).astype(np.uint8)
    result = blend_trigger(images.to(device), pattern.to(device), mask.to(device))
    assert np.array_equal(result.cpu().numpy(), levels)


@pytest.mark.parametrize("count", [1, 1025])
def test_patches_at_their_own_places(device: str, count: int):
    images = pixels(count, 3, 33, 31)
    generator = torch.Generator().manual_seed(1)
    top, left = torch.randint(0, 31, (count,), generator=generator), torch.randint(0, 29, (count,), generator=generator)
    patch = pixels(1, 3, 3, 3, seed=2)
    result = blend_trigger(
        images.to(device), (patch / 255).to(device), torch.ones(1, 1, 3, 3, device=device),
        offset=torch.stack([top, left], 1).to(device),
    ).cpu()  # fmt: skip
    for image, y, x in zip(images, top.tolist(), left.tolist(), strict=True):
        image[:, y : y + 3, x : x + 3] = patch[0]
    assert torch.equal(result, images)


def test_all_pixel_values_survive_and_halves_round_to_even(device: str):
    images = torch.arange(256, dtype=torch.uint8, device=device).reshape(1, 1, 16, 16)
    zeros, ones = torch.zeros(1, 1, 16, 16, device=device), torch.ones(1, 1, 16, 16, device=device)
    assert torch.equal(blend_trigger(images, ones, zeros), images)
    assert torch.equal(blend_trigger(zeros.byte(), images / 255.0, ones), images)
    assert torch.equal(blend_trigger(images / 255.0, ones, zeros, out_dtype=torch.uint8), images)
    fractions = (images.cpu().float() / 255).to(device)
    assert torch.equal(blend_trigger(images, zeros, zeros, out_dtype=torch.float32), fractions)
    halved = blend_trigger(images, zeros, ones / 2)
    assert halved.flatten().tolist() == [round(value / 2) for value in range(256)]


def test_default_output_dtypes():
    images, pattern, mask = pixels(2, 3, 4, 4), torch.rand(1, 3, 2, 2), torch.rand(1, 1, 2, 2)
    normalisation = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    assert blend_trigger(images, pattern, mask).dtype == torch.uint8
    assert blend_trigger(images, pattern, mask, **normalisation).dtype == torch.float32
    assert blend_trigger(images.bfloat16() / 255, pattern, mask, **normalisation).dtype == torch.bfloat16


def test_values_beyond_the_range_are_clamped_not_wrapped(device: str):
    pattern = torch.tensor([2.0, -1.0, 1e9, -1e9, float("inf"), float("-inf")], device=device).reshape(1, 1, 1, 6)
    mask = torch.ones(1, 1, 1, 6, device=device)
    images = torch.full((1, 1, 1, 6), 250, dtype=torch.uint8, device=device)
    for clean in (images, images / 255):
        result = blend_trigger(clean, pattern, mask, out_dtype=torch.uint8)
        assert result.flatten().tolist() == [255, 0, 255, 0, 255, 0]


@pytest.mark.parametrize("mask_channels", [1, 3])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_agree_with_finite_differences(
    device: str, mask_channels: int, chosen: bool, normalise: bool, layout: str
):
    images = LAYOUTS[layout](rand(5, 3, 5, 4).to(device)).detach().requires_grad_()
    pattern = rand(2, 3, 2, 3, seed=1).to(device).requires_grad_()
    mask = rand(2, mask_channels, 2, 3, seed=2).to(device).requires_grad_()
    options = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 1.0, 2.0]} if normalise else {}
    if chosen:
        options |= {
            "index": torch.tensor([1, -1, 0, 1, 1], device=device),
            "offset": torch.tensor([[0, 0], [3, 1], [2, 0], [1, 1], [3, 0]], device=device),
        }
    assert torch.autograd.gradcheck(lambda *x: blend_trigger(*x, **options), (images, pattern, mask))


def test_gradients_through_uint8_images(device: str):
    images = pixels(4, 3, 5, 4).to(device)
    pattern, mask = rand(1, 3, 5, 4, seed=1).to(device), rand(1, 1, 5, 4, seed=2).to(device)
    assert torch.autograd.gradcheck(
        lambda *x: blend_trigger(images, *x, out_dtype=torch.float64), (pattern.requires_grad_(), mask.requires_grad_())
    )


@pytest.mark.parametrize("batch", [0, 1, 33, 1025])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (torch.uint8, torch.float32),
        (torch.uint8, torch.bfloat16),
        (torch.uint8, torch.float16),
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_gradients_are_the_sums_of_the_definition(device: str, batch: int, dtype: torch.dtype, out_dtype: torch.dtype):
    images = pixels(batch, 3, 7, 9) if dtype == torch.uint8 else rand(batch, 3, 7, 9, dtype=dtype)
    pattern, mask = rand(3, 3, 7, 9, seed=1, dtype=torch.float32), rand(3, 1, 7, 9, seed=2, dtype=torch.float32)
    index = torch.randint(-1, 3, (batch,), generator=torch.Generator().manual_seed(3))
    slope, std = rand(batch, 3, 7, 9, seed=4).sub(0.5).to(out_dtype), [0.5, 0.25, 2.0]

    g = slope.double() / torch.tensor(std).view(3, 1, 1)
    x = images.double() / (255 if dtype == torch.uint8 else 1)
    m = mask.double()[index.clamp_min(0)] * (index >= 0).view(-1, 1, 1, 1)
    grad_pattern, grad_mask = torch.zeros(3, 3, 7, 9).double(), torch.zeros(3, 1, 7, 9).double()
    for t in range(3):
        mine = index == t
        grad_pattern[t] = (m[mine] * g[mine]).sum(0)
        grad_mask[t] = ((pattern[t].double() - x[mine]) * g[mine]).sum((0, 1))
    exact = 1e-12 if dtype == torch.float64 else 1e-6
    loose = exact * max(1.0, batch / 3)
    for layout in LAYOUTS.values():
        inputs = [layout(images.to(device)), pattern.to(device), mask.to(device)]
        inputs = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
        result = blend_trigger(*inputs, index=index.to(device), mean=[0.0] * 3, std=std, out_dtype=out_dtype)
        result.backward(slope.to(device))
        torch.testing.assert_close(inputs[1].grad.cpu().double(), grad_pattern, rtol=1e-6, atol=loose)
        torch.testing.assert_close(inputs[2].grad.cpu().double(), grad_mask, rtol=1e-6, atol=10 * loose)
        if images.is_floating_point():
            assert inputs[0].grad.dtype == dtype
            step = torch.finfo(dtype).eps / 2
            torch.testing.assert_close(inputs[0].grad.cpu().double(), (1 - m) * g, rtol=step + exact, atol=exact)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_gradients_are_computed_for_what_asks(device: str, wanted: tuple[int, ...]):
    def gradients(asking: tuple[int, ...]) -> list[Tensor | None]:
        inputs = [
            rand(5, 3, 6, 6, dtype=torch.float32),
            rand(1, 3, 4, 4, seed=1).float(),
            rand(1, 3, 4, 4, seed=2).float(),
        ]
        inputs = [x.to(device).requires_grad_(place in asking) for place, x in enumerate(inputs)]
        (blend_trigger(*inputs) ** 2).sum().backward()
        return [x.grad for x in inputs]

    for place, (some, every) in enumerate(zip(gradients(wanted), gradients((0, 1, 2)), strict=True)):
        assert some is None if place not in wanted else torch.equal(some, every)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_at_every_repetition_and_on_any_number_of_threads(device: str, layout: str):
    images = LAYOUTS[layout](rand(1025, 3, 16, 16, dtype=torch.float32)).to(device)
    index = torch.randint(-1, 3, (1025,), generator=torch.Generator().manual_seed(3)).to(device)

    def results() -> list[Tensor]:
        inputs = [images.detach(), rand(3, 3, 16, 16, seed=1).float(), rand(3, 1, 16, 16, seed=2).float()]
        inputs = [x.to(device).requires_grad_() for x in inputs]
        blended = blend_trigger(*inputs, index=index)
        (blended**2).sum().backward()
        return [blended, *(x.grad for x in inputs)]

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_clean_images_keep_their_gradient_and_their_bits(device: str, dtype: torch.dtype):
    images = torch.tensor([0.1, -0.0, 3.0]).reshape(3, 1, 1, 1).to(device, dtype).requires_grad_()
    pattern, mask = torch.full((1, 1, 1, 1), float("inf"), device=device), torch.zeros(1, 1, 1, 1, device=device)
    result = blend_trigger(images, pattern, mask, index=torch.tensor([-1, -1, -1], device=device))
    assert torch.equal(result.signbit(), images.signbit())
    assert torch.equal(result, images)
    result.sum().backward()
    assert images.grad.flatten().tolist() == [1, 1, 1]


def test_autocast_changes_nothing(device: str):
    images = rand(3, 3, 6, 6, dtype=torch.float32).to(device)
    pattern, mask = rand(1, 3, 6, 6, seed=1).to(device), rand(1, 1, 6, 6, seed=2).to(device)
    plain = blend_trigger(images, pattern.float(), mask.float())
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(blend_trigger(images, pattern.float(), mask.float()), plain)
        assert blend_trigger(images.bfloat16(), pattern.float(), mask.float()).dtype == torch.bfloat16


@pytest.mark.usefixtures("device")
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


@pytest.mark.usefixtures("device")
def test_missing_upstream_gradient_gives_none():
    pattern = rand(1, 3, 4, 4).requires_grad_()
    _GradientOfNone.apply(blend_trigger(rand(2, 3, 4, 4), pattern, rand(1, 1, 4, 4))).sum().backward()
    assert pattern.grad is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck itself reads it
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_registration_is_sound(device: str, layout: str):
    images = LAYOUTS[layout](rand(3, 3, 6, 5, dtype=torch.float32).to(device))
    pattern, mask = rand(2, 3, 2, 2, dtype=torch.float32).to(device), rand(2, 1, 2, 2, dtype=torch.float32).to(device)
    index = torch.tensor([1, -1, 0], device=device)
    offset = torch.tensor([[0, 0], [4, 3], [1, 2]], device=device)
    namespace = getattr(torch.ops, REFERENCE if os.environ["BDCORE_OPS"] == "reference" else NATIVE)
    forward, backward = namespace.blend_trigger.default, namespace.blend_trigger_backward.default
    wanted = tuple(x.clone().requires_grad_() for x in (images, pattern, mask))
    torch.library.opcheck(forward, (*wanted, index, offset, [0.1] * 3, [0.5] * 3, torch.float32))
    torch.library.opcheck(forward, ((images * 255).byte(), pattern, mask, None, None, None, None, torch.uint8))
    torch.library.opcheck(
        backward, (images.contiguous(), images, pattern, mask, index, offset, [0.5] * 3, True, True, False)
    )
    assert "bdcore::blend_trigger" in OPERATORS
    assert "bdcore::blend_trigger_backward" in OPERATORS


def test_compiles_without_a_graph_break(device: str):
    def loss(images: Tensor, pattern: Tensor, mask: Tensor, index: Tensor) -> Tensor:
        blended = blend_trigger(images, pattern, mask.sigmoid(), index=index, out_dtype=torch.float32)
        return (blended**3).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (5, 8):
        images = pixels(batch, 3, 8, 8).to(device)
        index = torch.randint(-1, 2, (batch,), generator=torch.Generator().manual_seed(1)).to(device)
        results = []
        for function in (loss, compiled):
            pattern = rand(2, 3, 8, 8, seed=1, dtype=torch.float32).to(device).requires_grad_()
            mask = rand(2, 1, 8, 8, seed=2, dtype=torch.float32).to(device).requires_grad_()
            function(images, pattern, mask, index).backward()
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
def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch, change: dict, error: type[Exception], message: str):
    for choice in ("reference", "native") if load()["cpu"].loaded else ("reference",):
        monkeypatch.setenv("BDCORE_OPS", choice)
        with pytest.raises(error, match=message):
            blend_trigger(**{**GOOD, **change})
