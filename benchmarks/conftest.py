"""Benchmarks of the operators with pytest-benchmark: `pytest benchmarks/ --benchmark-only`."""

import os
from collections.abc import Generator, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from bdcore.machine import keep_freed_memory
from bdcore.ops import OPERATORS
from bdcore.ops.native import load
from benchmarks.contest import Contest, copy_bandwidth, launch_seconds, synchronised
from benchmarks.report import surroundings

_UNAVAILABLE = pytest.StashKey[list[dict[str, Any]]]()
_FAILED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where, with how many threads and for how long to measure."""
    group = parser.getgroup("bdcore operators")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", choices=("cpu", "cuda"), default=default, help=f"default here: {default}")
    group.addoption("--threads", type=int, default=2, metavar="N", help="CPU threads of all contestants; default 2")
    group.addoption("--seconds", type=float, default=0.4, help="to spend on each contestant at each size; default 0.4")


def pytest_configure(config: pytest.Config) -> None:
    """The same surroundings for all contestants."""
    config.stash[_UNAVAILABLE] = []
    config.stash[_FAILED] = []
    torch.set_num_threads(config.getoption("threads"))
    keep_freed_memory()
    # What pytest-benchmark has to say at the end, for instance that nothing was saved, is no reason for a traceback.
    config.addinivalue_line("filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Clock and length of rounds by device; warnings of the peers' compilers are not ours to make errors."""
    device = torch.device(config.getoption("device"))
    round_seconds = 0.002 if device.type == "cpu" else 0.02
    settings = pytest.mark.benchmark(
        timer=synchronised(device),
        min_time=min(round_seconds, config.getoption("seconds")),
        max_time=config.getoption("seconds"),
        min_rounds=5,
        disable_gc=True,
    )
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(settings)
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where everything is computed."""
    return torch.device(pytestconfig.getoption("device"))


@pytest.fixture(scope="module")
def limits(device: torch.device) -> tuple[float, float]:
    """Bandwidth of a large copy and seconds of the smallest call, anew for each operator: a machine's speed drifts."""
    return copy_bandwidth(device), launch_seconds(device)


@pytest.fixture
def contest(
    request: pytest.FixtureRequest, benchmark: Any, device: torch.device, limits: tuple[float, float]
) -> Iterator[Contest]:
    """Checks and times one contestant of the operator that the test is named after."""
    operator = request.node.originalname.removeprefix("test_")
    yield Contest(operator, device, benchmark, *limits, request.config.stash[_UNAVAILABLE])
    if device.type == "cuda":
        torch.cuda.empty_cache()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember what failed: pytest-benchmark leaves it out of its file without a word."""
    report = yield
    if report.failed:
        item.config.stash[_FAILED].append(item.nodeid)
    return report


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: object, output_json: dict[str, Any]) -> None:
    """What the table needs besides times: where they were measured, with which kernels, and what could not run."""
    device = config.getoption("device")
    around = surroundings()
    around["command"] = "pytest benchmarks/ --benchmark-only"
    around["versions"] |= {name: _version(name) for name in ("liger-kernel", "triton")}
    if device == "cuda":
        around["versions"]["cuda"] = torch.version.cuda
    output_json["bdcore"] = {
        **around,
        "device": device,
        "kernels": _kernels(device),
        "unavailable": config.stash[_UNAVAILABLE],
        "failed": config.stash[_FAILED],
    }


def _kernels(device: str) -> str:
    """With what bdcore computed: the compiled kernels, or references where there are none."""
    if os.environ.get("BDCORE_OPS") == "reference":
        return "references alone, as BDCORE_OPS asks"
    status = load()[device]
    if not status.loaded:
        return f"references alone ({status.detail})"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [name for name in OPERATORS if not has(name, device.upper())]
    return status.detail + (f"; references of {', '.join(missing)}" if missing else "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
