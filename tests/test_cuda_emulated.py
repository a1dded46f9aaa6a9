"""The CUDA kernels, run thread by thread on the CPU (see emulator/README.md), against the references."""

import importlib.util
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bdcore import ops

FOLDER = Path(__file__).parent / "emulator"
KERNELS = FOLDER.parents[1] / "csrc" / "cuda"
SOURCES = sorted(path.stem for path in KERNELS.glob("*.cu"))
SANITIZE = "BDCORE_EMULATOR_SANITIZE" in os.environ

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="the emulator needs g++ on x86-64"
)

Results = list[Tensor]


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randint(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def strided(tensor: Tensor) -> Tensor:
    """The same values, with gaps between them."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 77, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def shifted(tensor: Tensor) -> Tensor:
    """The same values, contiguous, from an address that only single elements are aligned to."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return flat[1:].view(tensor.shape).copy_(tensor)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


LAYOUTS = {"plain": lambda tensor: tensor, "strided": strided, "shifted": shifted, "channels_last": channels_last}


def with_gradients(function: Callable[..., Tensor], *tensors: Tensor, fixed: Sequence[int] = ()) -> Results:
    """The result, and the gradients of all floating-point tensors but the fixed ones."""
    leaves = [
        tensor.requires_grad_(i not in fixed) if tensor.is_floating_point() else tensor
        for i, tensor in enumerate(tensors)
    ]
    result = function(*leaves)
    if result.requires_grad:
        result.backward(rand(*result.shape, dtype=result.dtype, seed=9) - 0.5)
    return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def contrastive(
    batch: int,
    count: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "plain",
    reduction: str = "none",
    fixed: Sequence[int] = (),
) -> Results:
    anchor, positive = rand(batch, width, dtype=dtype) - 0.5, rand(batch, width, dtype=dtype, seed=1) - 0.5
    negatives = rand(batch, count, width, dtype=dtype, seed=2) - 0.5
    tensors = (LAYOUTS[layout](tensor) for tensor in (anchor, positive, negatives))
    return with_gradients(lambda *x: ops.model_contrastive_loss(*x, 0.3, reduction), *tensors, fixed=fixed)


def info_nce(
    batch: int,
    keys: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "plain",
    reduction: str = "none",
    fixed: Sequence[int] = (),
) -> Results:
    tensors = [LAYOUTS[layout](rand(rows, width, dtype=dtype, seed=rows) - 0.5) for rows in (batch, keys)]
    positive = randint(0, keys, batch, seed=2)
    return with_gradients(lambda a, k: ops.info_nce(a, k, positive, 0.3, reduction), *tensors, fixed=fixed)


def isolation(
    batch: int,
    classes: int,
    mode: str = "lga",
    dtype: torch.dtype = torch.float32,
    layout: str = "plain",
    scale: float = 4.0,
    **options: Any,
) -> Results:
    logits = LAYOUTS[layout]((scale * (rand(batch, classes, dtype=torch.float64) - 0.5)).to(dtype))
    labels = randint(0, classes, batch, seed=1)
    labels[::5] = options.get("ignore_index", -100)
    return with_gradients(lambda x: ops.isolation_loss(x, labels, math.log(classes), mode, **options), logits)


def blend(
    images: tuple[int, ...],
    triggers: int = 1,
    window: tuple[int, int] = (3, 4),
    mask_channels: int = 1,
    dtype: torch.dtype = torch.float32,
    layout: str = "plain",
    fixed: Sequence[int] = (),
    chosen: bool = False,
    normalise: bool = False,
    floats: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
) -> Results:
    batch, channels, height, width = images
    options: dict[str, Any] = {"out_dtype": out_dtype}
    if chosen:
        top, left = randint(0, height - window[0] + 1, batch), randint(0, width - window[1] + 1, batch, seed=1)
        options |= {"index": randint(-1, triggers, batch, seed=2), "offset": torch.stack([top, left], 1)}
    if normalise:
        options |= {"mean": [0.1 * (c + 1) for c in range(channels)], "std": [0.3 + c for c in range(channels)]}
    x = randint(0, 256, *images, seed=3).byte() if dtype == torch.uint8 else rand(*images, dtype=dtype, seed=3)
    floats = torch.float64 if dtype == torch.float64 else floats
    pattern = rand(triggers, channels, *window, seed=4, dtype=floats)
    mask = rand(triggers, mask_channels, *window, seed=5, dtype=floats)
    if dtype == torch.uint8 and not normalise and out_dtype is None:
        fixed = (0, 1, 2)  # a uint8 result has no gradient
    return with_gradients(lambda *t: ops.blend_trigger(*t, **options), LAYOUTS[layout](x), pattern, mask, fixed=fixed)


def load(
    images: tuple[int, ...],
    batch: int,
    layout: str = "plain",
    trigger: bool = False,
    normalise: bool = False,
    floats: torch.dtype = torch.float32,
    **options: Any,
) -> Results:
    count, channels, height, width = images
    if trigger:
        window = (min(3, height), min(5, width))
        top, left = randint(0, height - window[0] + 1, batch), randint(0, width - window[1] + 1, batch, seed=1)
        options |= {
            "pattern": rand(2, channels, *window, dtype=floats),
            "mask": rand(2, 1, *window, seed=1, dtype=floats),
        }
        options |= {"trigger": randint(-1, 2, batch, seed=2), "offset": torch.stack([top, left], 1)}
    if normalise:
        options |= {"mean": [0.1 * (c + 1) for c in range(channels)], "std": [0.3 + c for c in range(channels)]}
    pixels = LAYOUTS[layout](randint(0, 256, *images).byte())
    return [ops.load_batch(pixels, randint(0, max(count, 1), batch, seed=3), seed=5, **options)]


CASES: dict[str, tuple[Callable[..., Results], list[dict[str, Any]]]] = {
    "model_contrastive_loss": (
        contrastive,
        [
            *({"batch": b, "count": k, "width": d} for b, k, d in [(0, 1, 5), (1, 1, 1), (7, 0, 33), (33, 1, 7)]),
            *({"batch": b, "count": k, "width": d} for b, k, d in [(3, 5, 1025), (1025, 1, 3), (2, 33, 64), (2, 3, 0)]),
            *({"batch": 7, "count": 2, "width": 64, "dtype": dtype} for dtype in FLOATS),
            *({"batch": 5, "count": 2, "width": 33, "dtype": dtype, "layout": "shifted"} for dtype in FLOATS),
            *({"batch": 2, "count": 2, "width": 4096, "dtype": dtype} for dtype in (torch.float32, torch.bfloat16)),
            {"batch": 5, "count": 2, "width": 32, "layout": "strided"},
            {"batch": 5, "count": 2, "width": 32, "layout": "shifted"},
            *({"batch": 70, "count": 1, "width": 16, "reduction": reduction} for reduction in ("mean", "sum")),
            *({"batch": 4, "count": 2, "width": 12, "fixed": fixed} for fixed in ((0,), (1,), (2,), (0, 1), (1, 2))),
        ],
    ),
    "info_nce": (
        info_nce,
        [
            *({"batch": b, "keys": m, "width": d} for b, m, d in [(0, 1, 3), (1, 1, 1), (7, 33, 33), (33, 7, 5)]),
            *(
                {"batch": b, "keys": m, "width": d}
                for b, m, d in [(65, 130, 64), (3, 1025, 17), (1025, 3, 7), (2, 3, 0)]
            ),
            *({"batch": 7, "keys": 40, "width": 64, "dtype": dtype} for dtype in FLOATS),
            *({"batch": 5, "keys": 9, "width": 33, "dtype": dtype, "layout": "shifted"} for dtype in FLOATS),
            *({"batch": 5, "keys": 9, "width": 32, "layout": layout} for layout in ("strided", "shifted")),
            *({"batch": b, "keys": 20, "width": 16, "reduction": r} for b in (0, 70) for r in ("mean", "sum")),
            *({"batch": 4, "keys": 5, "width": 12, "fixed": fixed} for fixed in ((0,), (1,))),
            {"batch": 1430, "keys": 1500, "width": 9},
            {"batch": 33, "keys": 17000, "width": 3, "dtype": torch.float64},
            {"batch": 2, "keys": 3, "width": 0},
        ],
    ),
    "isolation_loss": (
        isolation,
        [
            *({"batch": b, "classes": c} for b, c in [(0, 3), (1, 1), (7, 33), (33, 7), (3, 1025), (1025, 10)]),
            *({"batch": 33, "classes": 10, "mode": mode} for mode in ("ce", "ascent", "flood")),
            *({"batch": 7, "classes": 40, "dtype": dtype} for dtype in FLOATS),
            *({"batch": 7, "classes": 33, "dtype": dtype, "layout": "shifted"} for dtype in FLOATS),
            {"batch": 7, "classes": 32, "layout": "strided"},
            {"batch": 9, "classes": 10, "scale": 300.0},
            *({"batch": b, "classes": 10, "reduction": r} for b in (0, 70, 1025) for r in ("mean", "sum")),
            *({"batch": b, "classes": 10, "mode": m, "per": "batch"} for b in (0, 70) for m in ("lga", "flood")),
            *({"batch": 12, "classes": 10, "mode": "ce", "label_smoothing": 0.1, "dtype": dtype} for dtype in FLOATS),
            *({"batch": 700, "classes": 65, "reduction": r, "mode": m} for r in ("mean", "sum") for m in ("ce", "lga")),
            {"batch": 700, "classes": 65, "per": "batch"},
            {"batch": 12, "classes": 10, "mode": "ce", "ignore_index": 3, "reduction": "mean"},
        ],
    ),
    "blend_trigger": (
        blend,
        [
            *({"images": size, "window": window} for size, window in [((0, 3, 4, 5), (3, 4)), ((1, 1, 1, 1), (1, 1))]),
            *(
                {"images": (b, c, 7, 33), "chosen": chosen, "triggers": 3, "mask_channels": m, "layout": layout}
                for b, c, m in [(5, 3, 1), (7, 3, 3), (33, 1, 1)]
                for layout in ("plain", "channels_last")
                for chosen in (False, True)
            ),
            *(
                {"images": (3, 3, 8, 16), "window": (8, 16), "dtype": dtype, "normalise": normalise, "layout": layout}
                for dtype in (*FLOATS, torch.uint8)
                for normalise in (False, True)
                for layout in ("plain", "channels_last")
            ),
            *({"images": (3, 3, 5, 7), "layout": layout, "chosen": True} for layout in ("strided", "shifted")),
            *({"images": (3, 2, 5, 7), "dtype": torch.uint8, "out_dtype": out} for out in FLOATS),
            *({"images": (4, 3, 6, 6), "fixed": fixed, "chosen": True} for fixed in ((0,), (1,), (2,), (0, 1), (1, 2))),
            {"images": (257, 1, 4, 4), "triggers": 2, "chosen": True},
            *({"images": (2, 300, 2, 3), "window": (2, 2), "normalise": True, "dtype": dtype} for dtype in FLOATS),
            {"images": (3, 2, 5, 7), "dtype": torch.uint8, "floats": torch.float64, "normalise": True},
            {"images": (2, 3, 40, 33), "window": (40, 33), "triggers": 2},
        ],
    ),
    "load_batch": (
        load,
        [
            {"images": (5, 3, 8, 8), "batch": 0},
            {"images": (1, 1, 1, 1), "batch": 7, "crop": 2, "flip": True, "cutout": 1},
            *(
                {"images": (9, 3, 7, 33), "batch": 33, "crop": 4, "flip": True, "layout": layout, **more}
                for layout in ("plain", "channels_last", "strided")
                for more in ({}, {"cutout": 3}, {"trigger": True}, {"normalise": True})
            ),
            *(
                {"images": (9, 3, 8, 8), "batch": 5, "trigger": True, "crop": 1, "cutout": 2, "out_dtype": dtype}
                for dtype in (*FLOATS, torch.uint8)
            ),
            *(
                {"images": (9, 3, 8, 16), "batch": 9, "layout": "channels_last", "crop": 3, "out_dtype": dtype, **more}
                for dtype in (*FLOATS, torch.uint8)
                for more in ({}, {"flip": True, "cutout": 3}, {"trigger": True, "flip": True})
            ),
            *({"images": (9, c, 5, 6), "batch": 5, "trigger": True, "normalise": True} for c in (1, 2, 4, 5)),
            {"images": (40, 3, 4, 4), "batch": 1025, "flip": True, "trigger": True},
            {"images": (3, 300, 4, 5), "batch": 5, "normalise": True},
            {"images": (3, 3, 8, 8), "batch": 5, "trigger": True, "floats": torch.float64},
        ],
    ),
}


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


def all_cases() -> Iterator[Any]:
    for operator, (function, variants) in CASES.items():
        for options in variants:
            text = "-".join(f"{name}={name_of(value)}" for name, value in options.items())
            yield pytest.param(operator, partial(function, **options), id=f"{operator}-{text}")


@pytest.fixture(scope="session")
def emulated(request: pytest.FixtureRequest) -> Callable[[str], AbstractContextManager[list[str]]]:
    """Called with a source's name: a context in which its operators run emulated."""
    wanted = {item.callspec.params["operator"] for item in request.session.items if is_case(item)}
    cache = request.config.cache.mkdir("emulated")

    def build(source: str) -> "subprocess.CompletedProcess[str]":
        options = ["--cache", str(cache), *(["--sanitize"] if SANITIZE else [])]
        command = [sys.executable, str(FOLDER / "build.py"), str(KERNELS / f"{source}.cu"), *options]
        # A sanitizer's library, preloaded into this process, is not for compilers.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        built = dict(zip(sorted(wanted), pool.map(build, sorted(wanted)), strict=True))
    spec = importlib.util.spec_from_file_location("emulated", FOLDER / "emulated.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(source: str) -> AbstractContextManager[list[str]]:
        assert built[source].returncode == 0, built[source].stderr
        return module.emulated(Path(built[source].stdout.strip()))

    return run


def is_case(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and hasattr(item, "callspec") and "operator" in item.callspec.params


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors are full of NaN, or of the largest number: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("operator", "case"), list(all_cases()))
def test_kernels_agree_with_the_reference_and_not_with_the_order_of_threads(
    operator: str, case: Callable[[], Results], emulated, poisoned: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("BDCORE_OPS", "reference")
    expected = case()
    monkeypatch.delenv("BDCORE_OPS")
    found = []
    with emulated(operator):
        for seed in (0, 1, 2):
            monkeypatch.setenv("BDCORE_EMULATOR_SEED", str(seed))
            found.append(case())
    assert len(found[0]) == len(expected)
    for ours, theirs in zip(found[0], expected, strict=True):
        scale = max(0.1, float(theirs.double().abs().nan_to_num().max())) if theirs.numel() else 0.0
        tolerance = TOLERANCE.get(theirs.dtype, 0.0)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            assert torch.equal(bits(ours), bits(theirs))


def bits(tensor: Tensor) -> Tensor:
    """For a comparison in which NaN equals NaN."""
    return tensor.flatten().view(torch.uint8)


@pytest.mark.parametrize("operator", CASES)
def test_every_operator_has_kernels_for_its_gradient_too(operator: str, emulated):
    wanted = [name.removeprefix("bdcore::") for name in ops.OPERATORS if name.startswith(f"bdcore::{operator}")]
    with emulated(operator) as found:
        assert set(found) >= set(wanted)


def test_every_source_is_run():
    assert sorted(CASES) == SOURCES


@pytest.mark.parametrize("operator", ["blend_trigger", "info_nce", "isolation_loss", "load_batch"])
def test_values_outside_end_in_an_assertion(operator: str, emulated):
    images, pattern, mask = rand(2, 3, 8, 8), rand(1, 3, 4, 4), rand(1, 1, 4, 4)
    calls: dict[str, list[Callable[[], Tensor]]] = {
        "blend_trigger": [
            lambda: ops.blend_trigger(images, pattern, mask, index=torch.tensor([0, 1])),
            lambda: ops.blend_trigger(images, pattern, mask, index=torch.tensor([-2, 0])),
            lambda: ops.blend_trigger(images, pattern, mask, offset=torch.tensor([[0, 0], [5, 0]])),
            lambda: ops.blend_trigger(images, pattern, mask, offset=torch.tensor([[0, -1], [0, 0]])),
        ],
        "info_nce": [lambda: ops.info_nce(rand(2, 3), rand(4, 3), torch.tensor([0, 4]), 0.5)],
        "isolation_loss": [lambda: ops.isolation_loss(rand(2, 3), torch.tensor([0, 3]))],
        "load_batch": [
            lambda: ops.load_batch(images.byte(), torch.tensor([0, 2])),
            lambda: ops.load_batch(images.byte(), torch.tensor([-1])),
        ],
    }
    with emulated(operator):
        for call in calls[operator]:
            with pytest.raises(RuntimeError, match="assertion"):
                call()
