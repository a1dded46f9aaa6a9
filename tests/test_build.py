"""setup.py's build of the native operators, run as pip runs it, on copies of the sources that each break one thing."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")

GOOD = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
torch::stable::Tensor same(const torch::stable::Tensor& x) { return x; }
STABLE_TORCH_LIBRARY_FRAGMENT(bdcore_built, m) { m.def("same(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(bdcore_built, CPU, m) { m.impl("same", TORCH_BOX(&same)); }
"""
KERNEL = "namespace BDCORE_ISA { int width() { return sizeof(long); } }"
LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
print(torch.ops.bdcore_built.same(torch.ones(2)).tolist())
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """What an sdist holds, with one small operator in place of those of csrc/."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("the sources are not here")
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    for name in ("bdcore", "plugins"):
        left = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
        shutil.copytree(ROOT / name, folder / name, ignore=left)
    shutil.copytree(ROOT / "csrc" / "host", folder / "csrc" / "host")
    shutil.copytree(ROOT / "csrc" / "common", folder / "csrc" / "common")
    (folder / "csrc" / "cpu").mkdir()
    for header in (ROOT / "csrc" / "cpu").glob("*.h"):
        shutil.copy2(header, folder / "csrc" / "cpu")
    (folder / "csrc" / "cpu" / "same.cpp").write_text(GOOD)
    (folder / "csrc" / "cpu" / "same_kernel.cpp").write_text(KERNEL)
    return folder


@pytest.fixture
def build(sources: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], dict]]:
    def run(**environment: str) -> tuple[subprocess.CompletedProcess[str], dict]:
        kept = {name: value for name, value in os.environ.items() if name not in ("BDCORE_BUILD", "CXX", "CXXFLAGS")}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(
            command, cwd=sources, env={**kept, **environment}, capture_output=True, text=True, timeout=120, check=False
        )
        report = sources / "bdcore" / "ops" / "_build.json"
        return done, json.loads(report.read_text()) if report.exists() else {}

    return run


def library(sources: Path) -> Path:
    return sources / "bdcore" / "ops" / "_C_cpu.so"


@needs_compiler
def test_what_is_built_is_reported_and_loads(build, sources):
    done, report = build(BDCORE_BUILD="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["mode"] == "cpu"
    assert report["parts"]["cpu"]["built"]
    assert report["parts"]["host"]["built"]
    assert report["parts"]["cuda"] == {"built": False, "reason": "BDCORE_BUILD=cpu"}
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(library(sources))], capture_output=True, text=True, timeout=60, check=True
    )
    assert loaded.stdout.strip() == "[1.0, 1.0]"


@needs_compiler
def test_a_source_that_does_not_compile_is_left_out_with_its_message(build, sources):
    assert build(BDCORE_BUILD="cpu")[0].returncode == 0
    (sources / "csrc" / "cpu" / "same.cpp").write_text("int broken = nothing;")

    done, report = build(BDCORE_BUILD="cpu")
    assert done.returncode != 0
    assert "BDCORE_BUILD=cpu, but not everything could be built" in done.stderr
    assert "nothing" in done.stderr
    assert not library(sources).exists(), "an older library would be shipped"

    done, report = build(BDCORE_BUILD="auto", CUDA_HOME="", PATH=os.environ["PATH"])
    assert done.returncode == 0
    assert not report["parts"]["cpu"]["built"]
    assert "nothing" in report["parts"]["cpu"]["reason"]
    assert "operators without native code" in done.stdout + done.stderr


def test_without_a_compiler_there_is_a_reason(build):
    done, report = build(BDCORE_BUILD="auto", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert {part["built"] for part in report["parts"].values()} == {False}
    assert "install g++ or clang++, or set CXX" in report["parts"]["cpu"]["reason"]
    done, _ = build(BDCORE_BUILD="cpu", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "install g++ or clang++, or set CXX" in done.stderr


def test_off_builds_nothing_and_removes_what_was_built(build, sources):
    library(sources).write_bytes(b"old")
    done, report = build(BDCORE_BUILD="off")
    assert done.returncode == 0
    assert report["parts"]["cpu"] == {"built": False, "reason": "BDCORE_BUILD=off"}
    assert not library(sources).exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"BDCORE_BUILD": "gpu"}, "BDCORE_BUILD=gpu: choose one of auto, cpu, cuda, off"),
        ({"BDCORE_TORCH_DIR": "/nowhere"}, "BDCORE_TORCH_DIR=/nowhere is no folder of an installed torch >= 2.11"),
        ({"BDCORE_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "hopper"}, "'hopper' is no architecture such as 9.0"),
        ({"BDCORE_BUILD": "cpu", "MAX_JOBS": "many"}, "MAX_JOBS=many is no number of compilers"),
    ],
)
def test_wrong_settings_are_named(build, environment, message):
    if "TORCH_CUDA_ARCH_LIST" in environment and not shutil.which("nvcc"):
        pytest.skip("no nvcc here")
    if COMPILER is None:
        pytest.skip("no C++ compiler here")
    done, _ = build(**environment)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
