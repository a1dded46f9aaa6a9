"""The CUDA emulator itself: right kernels give the right numbers in every order, and each mistake shows."""

import importlib.util
import math
import platform
import re
import shutil
import subprocess
from itertools import accumulate
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "emulator"
SEEDS = range(12)

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="the emulator needs g++ on x86-64"
)


@pytest.fixture(scope="session")
def programs(request: pytest.FixtureRequest) -> dict[bool, Path]:
    """mistakes.cpp, compiled without and with the address sanitizer."""
    spec = importlib.util.spec_from_file_location("emulator_build", FOLDER / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    cache = request.config.cache.mkdir("emulated")
    texts = [(FOLDER / name).read_text() for name in ("mistakes.cpp", "emulator.h")]
    made = {}
    for sanitize in (False, True):
        options = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", *build.CHECKS]
        options += build.SANITIZERS if sanitize else []
        output = cache / f"mistakes-{build.digest(*texts, *options)}.exe"
        made[sanitize] = build.make(output, ["g++", *options, str(FOLDER / "mistakes.cpp")])
    return made


@pytest.fixture
def run(programs: dict[bool, Path]):
    def run(kernel: str, seed: int = 0, *, sanitize: bool = False) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [programs[sanitize], kernel],
            env={"BDCORE_EMULATOR_SEED": str(seed), "ASAN_OPTIONS": "detect_leaks=0"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return run


def numbers(done: "subprocess.CompletedProcess[str]") -> list[float]:
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.split()]


RIGHT = {
    "block_sum": [1000.0],
    "rotate": [(i + 5) % 64 for i in range(64)],
    "scan": [total for start in range(0, 32, 8) for total in accumulate(range(start, start + 8))],
    "votes": [16, 1, 1, 0, 31, 0, 20, 7],
    "indices": [1000 * block + thread for block in range(24) for thread in range(30)],
    "last_block_sums": [45.0],
}


@pytest.mark.parametrize("sanitize", [False, True])
@pytest.mark.parametrize("kernel", RIGHT)
def test_right_kernels_are_right_in_every_order(run, kernel: str, sanitize: bool):
    for seed in SEEDS:
        assert numbers(run(kernel, seed, sanitize=sanitize)) == RIGHT[kernel]


@pytest.mark.parametrize("kernel", ["block_sum_no_barrier", "rotate_no_barrier"])
def test_a_missing_barrier_gives_wrong_numbers_under_most_orders(run, kernel: str):
    right = RIGHT[kernel.removesuffix("_no_barrier")]
    wrong = [numbers(run(kernel, seed)) != right for seed in SEEDS]
    assert sum(wrong) > len(wrong) / 2


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("block_sum_half_a_block", r"not all threads reach a barrier: thread \(0, 0, 0\) waits at .*mistakes.cpp:\d+"),
        ("block_sum_some_return", r"not all threads reach a barrier: .*thread \(40, 0, 0\) has returned"),
        ("block_sum_two_places", r"wait at different barriers: .*mistakes.cpp:\d+ .*mistakes.cpp:\d+"),
        ("masks_differ", "different masks"),
        ("asserts", r"assertion `\(int\)threadIdx.x < limit` failed \[block \(\d, 0, 0\), thread \(3\d, 0, 0\)\]"),
        ("misaligned", r"mistakes.cpp:\d+: an address is not aligned as its type asks"),
        ("null", r"mistakes.cpp:\d+: a null pointer is used"),
        ("wild", r"an address is used at which there is no memory \[block \(1, 0, 0\)"),
        ("beyond_static_shared", r"mistakes.cpp:\d+: index 8 is outside an array \[block"),
        ("too_large_a_block", r"a block of \(32, 33, 1\) threads cannot be launched"),
        ("empty_grid", r"a grid of \(0, 1, 1\) blocks cannot be launched"),
        ("too_much_shared", "49153 bytes of shared memory"),
    ],
)
def test_a_kernel_that_a_gpu_would_refuse_or_hang_in_is_an_error(run, kernel: str, message: str):
    for seed in (0, 1, 2):
        done = run(kernel, seed)
        assert done.returncode == 1
        assert re.search(message, done.stderr), done.stderr


def test_what_no_thread_wrote_is_no_number(run):
    for kernel in ("uninitialised", "shuffle_from_absent"):
        assert all(math.isnan(x) for x in numbers(run(kernel)))


def test_writes_beyond_dynamic_shared_memory_are_noticed(run):
    assert "written beyond 32 bytes of shared memory" in run("beyond_dynamic_shared").stderr


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("beyond_a_tensor", "heap-buffer-overflow"),
        ("beyond_dynamic_shared", "heap-buffer-overflow"),
    ],
)
def test_the_address_sanitizer_sees_accesses_outside(run, kernel: str, message: str):
    done = run(kernel, sanitize=True)
    assert done.returncode not in (0, 1) or "Sanitizer" in done.stderr or "runtime error" in done.stderr
    assert any(part in done.stderr for part in message.split("|")), done.stderr
