"""The native code under the address and undefined-behaviour sanitizers: `pytest -m slow tests/test_sanitizers.py`."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=vptr"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ and its sanitizers"),
    pytest.mark.timeout(1800),
]


def copy_sources(folder: Path) -> Path:
    """What the build reads, without what it has built."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    for name in ("bdcore", "plugins", "csrc"):
        left = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
        shutil.copytree(ROOT / name, folder / name, ignore=left)
    return folder


def build(folder: Path) -> None:
    """Compile the CPU library into the copy of the package."""
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env={
            **os.environ,
            "BDCORE_BUILD": "cpu",
            "CXX": "g++",
            "CXXFLAGS": f"{FLAGS} -O1 -g -fno-omit-frame-pointer",
            "LDFLAGS": FLAGS,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def library(name: str) -> str:
    """The path of a library of the compiler."""
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run Python with the sanitizers loaded: its exit code and all that was printed."""
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
            # Python frees little when it ends; torch, which is not instrumented, frees with free what it got by new.
            "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "OMP_NUM_THREADS": "2",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=1500,
    )
    return done.returncode, done.stdout


def check_clean(*arguments: str, **environment: str) -> str:
    """What a run printed, in which nothing went wrong."""
    code, said = run(*arguments, **environment)
    assert code == 0, said[-8000:]
    assert "AddressSanitizer" not in said, said[-8000:]
    assert "runtime error:" not in said, said[-8000:]
    return said


PLANTED = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
using torch::stable::Tensor;
double read(const Tensor& x, int64_t i) { return static_cast<const float*>(x.const_data_ptr())[i]; }
int64_t shift(const Tensor& x, int64_t by) { return static_cast<int>(x.numel()) << by; }
STABLE_TORCH_LIBRARY_FRAGMENT(bdcore_planted, m) {
  m.def("read(Tensor x, int i) -> float");
  m.def("shift(Tensor x, int by) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(bdcore_planted, CPU, m) {
  m.impl("read", TORCH_BOX(&read));
  m.impl("shift", TORCH_BOX(&shift));
}
"""
CALL = """
import sys, torch
torch.ops.load_library(sys.argv[1])
print(getattr(torch.ops.bdcore_planted, sys.argv[2])(torch.ones(100), int(sys.argv[3])))
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of operators that do what they should not, built as the true one is."""
    folder = copy_sources(tmp_path_factory.mktemp("planted"))
    for source in (folder / "csrc" / "cpu").glob("*.cpp"):
        source.unlink()
    (folder / "csrc" / "cpu" / "planted.cpp").write_text(PLANTED)
    build(folder)
    return folder / "bdcore" / "ops" / "_C_cpu.so"


@pytest.mark.parametrize(
    ("operator", "harmless", "harmful", "report"),
    [("read", "99", "100", "heap-buffer-overflow"), ("shift", "3", "40", "shift exponent 40 is too large")],
)
def test_a_planted_mistake_is_found(planted: Path, operator: str, harmless: str, harmful: str, report: str):
    check_clean("-c", CALL, str(planted), operator, harmless)
    code, said = run("-c", CALL, str(planted), operator, harmful)
    assert code != 0
    assert report in said


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bdcore, its CPU kernels built with the sanitizers."""
    folder = copy_sources(tmp_path_factory.mktemp("package"))
    build(folder)
    return folder


USED = "import bdcore.ops.native as n; status = n.load()['cpu']; assert status.loaded, status; print(n.__file__)"


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_the_cpu_kernels_are_clean(package: Path, capability: str):
    environment = {"PYTHONPATH": str(package), "ATEN_CPU_CAPABILITY": capability}
    assert check_clean("-c", USED, **environment).startswith(str(package))
    tests = sorted(str(path) for path in (ROOT / "tests").glob("test_ops_*.py"))
    # What torch.compile generates is not ours, and its compiler would be run with the sanitizers loaded. -s: pytest
    # would keep a report for the end of the test, which does not come.
    options = ["-q", "-s", "-p", "no:cacheprovider", "-k", "not reference and not compile"]
    assert " passed" in check_clean("-m", "pytest", *options, *tests, **environment)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator needs x86-64")
def test_the_emulated_cuda_kernels_are_clean(tmp_path: Path):
    options = ["-q", "-s", "-o", f"cache_dir={tmp_path / 'cache'}"]
    said = check_clean("-m", "pytest", *options, "tests/test_cuda_emulated.py", BDCORE_EMULATOR_SANITIZE="1")
    assert " passed" in said
