"""The compiled libraries as users meet them: built, missing, damaged, chosen by the environment, on old processors."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bdcore
from bdcore import ops
from bdcore.errors import UsageError
from bdcore.ops.native import load

PACKAGE = Path(bdcore.__file__).parent
# What has no kernel there: BatchNorm and ReLU are cuDNN's, and lowest_k is a stable sort, asked for once in a training.
ON_CUDA_PYTORCHS = ["bdcore::batch_norm_relu", "bdcore::batch_norm_relu_backward", "bdcore::lowest_k"]
WITHOUT_REASON_TO_FAIL = ("no CUDA toolkit was found", "no C++ compiler was found", "BDCORE_BUILD=", "never installed")


def require(part: str) -> None:
    """Skip where a part was not to be built; fail where it was and is not there."""
    status = load()[part]
    if any(reason in status.detail for reason in WITHOUT_REASON_TO_FAIL):
        pytest.skip(status.detail)
    assert status.loaded, status.detail


def has_kernel(operator: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, device)


def test_every_operator_has_a_kernel_for_the_cpu():
    require("cpu")
    assert [name for name in ops.OPERATORS if not has_kernel(name, "CPU")] == []


def test_every_operator_has_a_kernel_for_cuda_with_or_without_a_gpu():
    if torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} is built without CUDA")
    require("cuda")
    assert [name for name in ops.OPERATORS if not has_kernel(name, "CUDA")] == ON_CUDA_PYTORCHS


class Recorded(TorchDispatchMode):
    """The names of the operators of bdcore that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if "bdcore" in str(function):
            self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


def blend() -> list[str]:
    with Recorded() as recorded:
        ops.blend_trigger(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    return recorded.names


def test_the_environment_chooses_at_every_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("BDCORE_OPS", raising=False)
    assert blend() == ["bdcore.blend_trigger.default"]
    monkeypatch.setenv("BDCORE_OPS", "reference")
    assert blend() == ["bdcore_reference.blend_trigger.default"]
    monkeypatch.setenv("BDCORE_OPS", "nonsense")
    with pytest.raises(UsageError, match=r"unknown BDCORE_OPS 'nonsense'.*native, reference"):
        blend()
    monkeypatch.setenv("BDCORE_OPS", "native")
    if load()["cpu"].loaded:
        assert blend() == ["bdcore.blend_trigger.default"]
    else:
        with pytest.raises(UsageError, match="the kernels for cpu are not there: "):
            blend()


PROBE = """
import json, torch, bdcore
from bdcore.ops import model_contrastive_loss
from bdcore.ops.native import load
rows = torch.tensor([[3.0, 4.0]])
loss = model_contrastive_loss(rows, 2 * rows, -rows.unsqueeze(1), 1.0).item()
parts = {name: [status.loaded, status.detail] for name, status in load().items()}
print(json.dumps({"file": bdcore.__file__, "loss": loss, "parts": parts}))
from bdcore.cli import main
main(["doctor", "--json"])
"""


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", *arguments],  # -P: the current folder's bdcore does not count
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stderr}"
    return done.stdout


def cut(folder: Path) -> None:
    for path in (folder / "_C_cpu.so", *folder.glob("_host*.so")):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(folder: Path) -> None:
    (folder / "_C_cpu.so").write_bytes(b"no library " * 1000)
    report = json.loads((folder / "_build.json").read_text())
    report["parts"]["cuda"] = {"built": True, "cuda": "99.1", "architectures": []}
    (folder / "_build.json").write_text(json.dumps(report))


def remove(folder: Path) -> None:
    for path in (folder / "_C_cpu.so", *folder.glob("_host*.so")):
        path.unlink()


def cut_the_report(folder: Path) -> None:
    (folder / "_build.json").write_text((folder / "_build.json").read_text()[:-9])


UNREADABLE = "the build report cannot be read"
OTHER_CUDA = "built, but not loaded: it was built with CUDA 99.1" if torch.version.cuda else "is built without CUDA"


@pytest.mark.parametrize(
    ("damage", "reasons"),
    [
        (cut, {"cpu": "not loaded: _C_cpu.so was cut short to", "host": "was cut short to"}),
        (overwrite, {"cpu": "built, but not loaded: ", "cuda": OTHER_CUDA}),
        (remove, {"cpu": "No such file", "host": "built, but not loaded: "}),
        (cut_the_report, {"cpu": UNREADABLE, "cuda": UNREADABLE, "host": UNREADABLE}),
    ],
)
def test_a_damaged_installation_says_why_and_runs_the_references(
    damage: Callable[[Path], None], reasons: dict[str, str], tmp_path: Path
):
    require("cpu")
    shutil.copytree(PACKAGE, tmp_path / "bdcore", ignore=shutil.ignore_patterns("__pycache__"))
    damage(tmp_path / "bdcore" / "ops")
    found, _, doctor = run("-c", PROBE, PYTHONPATH=str(tmp_path)).partition("\n")
    probe, report = json.loads(found), json.loads(doctor)
    assert Path(probe["file"]).is_relative_to(tmp_path)
    assert probe["loss"] == pytest.approx(math.log1p(math.exp(-2)), rel=1e-6)
    for part, reason in reasons.items():
        loaded, detail = probe["parts"][part]
        assert not loaded
        assert reason in detail
        assert report["native"][part] == detail
    assert all(how.startswith("cpu reference") for how in report["operators"].values())


LEVELS = """
import json, os, torch
from importlib import import_module
from bdcore import ops

torch.manual_seed(0)
x = {"anchor": torch.randn(33, 257), "positive": torch.randn(33, 257), "negatives": torch.randn(33, 3, 257)}
logits, labels = 5 * torch.randn(65, 101), torch.randint(101, (65,))
images = torch.rand(5, 3, 17, 33)
pattern, mask = torch.rand(1, 3, 17, 33), torch.rand(1, 1, 17, 33)
pixels, index = torch.randint(256, (9, 3, 17, 33), dtype=torch.uint8), torch.randint(9, (12,))


def results(dtype):
    def leaf(tensor):
        return tensor.detach().clone().to(dtype).requires_grad_()

    found = []
    for function, tensors in (
        (lambda *t: ops.model_contrastive_loss(*t, 0.3), x.values()),
        (lambda t: ops.isolation_loss(t, labels, 4.0), [logits]),
        (lambda a, k: ops.info_nce(a, k, torch.arange(33), 0.3), [x["anchor"], x["positive"]]),
        (ops.blend_trigger, (images, pattern, mask)),
    ):
        leaves = [leaf(tensor) for tensor in tensors]
        result = function(*leaves)
        result.pow(2).sum().backward()
        found += [result.detach(), *(leaf.grad for leaf in leaves)]
    found.append(
        ops.load_batch(pixels, index, crop=2, flip=True, mean=[0.5] * 3, std=[0.2] * 3, out_dtype=dtype)
    )
    return [tensor.double() for tensor in found]


os.environ["BDCORE_OPS"] = "reference"
exact = results(torch.float64)
os.environ["BDCORE_OPS"] = "native"
errors = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    pairs = zip(results(dtype), exact, strict=True)
    errors[str(dtype)] = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
level = import_module("bdcore.ops._host").cpu_level()
print(json.dumps({"level": level, "torch": torch.backends.cpu.get_cpu_capability(), "errors": errors}))
"""
TOLERANCE = {"torch.float32": 1e-5, "torch.bfloat16": 0.1, "torch.float16": 0.02}


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_gives_the_results(capability: str):
    require("cpu")
    require("host")
    found: dict[str, Any] = json.loads(run("-c", LEVELS, ATEN_CPU_CAPABILITY=capability))
    # torch reads the same variable and asks the processor itself.
    assert found["level"] == {"DEFAULT": "baseline", "AVX2": "avx2", "AVX512": "avx512"}[found["torch"]]
    for dtype, errors in found["errors"].items():
        assert max(errors) < TOLERANCE[dtype], f"{dtype}: {errors}"
