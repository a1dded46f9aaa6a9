import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("scipy")
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])  # at the end: bdcore itself is the installed one
    return importlib.import_module("benchmarks.operators")


@pytest.fixture
def contest(operators: ModuleType) -> ModuleType:
    return importlib.import_module("benchmarks.contest")


def measurement(device: str, medians: dict[str, float], bars: dict[str, float], unavailable: tuple[str, ...] = ()):
    """What pytest-benchmark writes of one row that moves 1 MB where a copy makes 1 GB/s: its bound is 1 ms."""
    row = {"operator": "add", "case": "64 x 64", "pass": "forward", "moved": 10**6, "bandwidth": 1e9, "launch": 1e-6}
    row["bars"] = bars
    return {
        "benchmarks": [
            {
                "extra_info": {**row, "contestant": name},
                "stats": {
                    "median": median, "q1": 0.9 * median, "q3": 1.1 * median, "min": 0.5 * median, "max": 9 * median,
                    "rounds": 5, "iterations": 1,
                },
            }
            for name, median in medians.items()
        ],
        "bdcore": {
            "date": "2030-01-01",
            "command": "pytest benchmarks/ --benchmark-only",
            "machine": {"processor": "abacus", "threads": 2, "devices": ["no GPU"]},
            "versions": {"torch": "9.9"},
            "device": device,
            "kernels": "built by hand",
            "unavailable": [{**row, "contestant": name, "reason": "Never: not here"} for name in unavailable],
            "failed": [],
        },
    }  # fmt: skip


def test_ratios_share_of_the_bound_and_missed_bars(operators: ModuleType):
    bars = {"eager": 2.0, "torch.compile": 2.0, "bound": 0.9, "seconds": 0.001, "Liger-Kernel": 5.0}
    medians = {"bdcore": 0.002, "eager": 0.008, "torch.compile": 0.003}
    run = operators.gather(measurement("cpu", medians, bars, ("Liger-Kernel",)))
    (row,) = run["rows"]
    assert row["ratios"] == pytest.approx({"eager": 4.0, "torch.compile": 1.5})
    assert row["bound"] == pytest.approx(0.001)
    assert row["share"] == pytest.approx(0.5)
    assert row["missed"] == [
        "1.50x torch.compile, 2.0x asked",
        "50% of the bound, 90% asked",
        "2 ms, at most 1 ms asked",
    ]
    assert row["contestants"]["Liger-Kernel"] == {"unavailable": "Never: not here"}


def test_a_bar_that_is_just_met_is_met(operators: ModuleType):
    medians = {"bdcore": 0.002, "eager": 0.004}
    (row,) = operators.gather(measurement("cpu", medians, {"eager": 2.0, "bound": 0.5, "seconds": 0.002}))["rows"]
    assert row["missed"] == []


def test_a_bar_missed_by_a_hair_does_not_look_met(operators: ModuleType):
    medians = {"bdcore": 0.1001, "eager": 0.200199, "torch.compile": 0.1}
    bars = {"eager": 2.0, "bound": 0.01, "seconds": 0.1}
    (row,) = operators.gather(measurement("cpu", medians, bars))["rows"]
    assert row["missed"] == ["1.99x eager, 2.0x asked", "0% of the bound, 1% asked", "101 ms, at most 100 ms asked"]


def test_a_table_has_a_section_for_each_device_and_keeps_the_one_not_measured(operators: ModuleType, tmp_path: Path):
    operators.write([measurement("cpu", {"bdcore": 0.002, "eager": 0.001}, {"eager": 1.0})], tmp_path)
    text = (tmp_path / "operators.md").read_text()
    assert "## GPU\n\nNot measured." in text
    assert "add, 64 x 64, forward: 0.50x eager, 1.0x asked. Not yet explained." in text

    gpu = measurement("cuda", {"bdcore": 1e-5, "eager": 4e-5}, {"eager": 4.0}, ("Liger-Kernel",))
    operators.write([gpu], tmp_path)
    text = (tmp_path / "operators.md").read_text()
    assert "Not measured" not in text
    assert "| add | 64 x 64 | forward | 2,000 | 20% | 1,000 | - | - | 0.50 | - | - | 1,000 | 50% | **missed** |" in text
    assert "| add | 64 x 64 | forward | 10.0 | 20% | 40.0 | - | not available on cuda | 4.00 | - | - | 1,000 |" in text
    assert set(json.loads((tmp_path / "operators.json").read_text())["runs"]) == {"cpu", "cuda"}


def test_a_missed_bar_is_explained_by_the_first_entry_that_fits(
    operators: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reasons = tmp_path / "missed.toml"
    reasons.write_text(
        '[[missed]]\noperator = "add"\ndevice = "cuda"\nwhy = "Not this device."\n'
        '[[missed]]\ncase = "64 x *"\nwhy = "Adding is hard."\n'
        '[[missed]]\nwhy = "Too late."\n'
    )
    monkeypatch.setattr(operators, "REASONS", reasons)
    operators.write([measurement("cpu", {"bdcore": 0.002, "eager": 0.001}, {"eager": 1.0})], tmp_path)
    assert "0.50x eager, 1.0x asked. Adding is hard.\n" in (tmp_path / "operators.md").read_text()


def test_a_contestant_that_failed_is_named_and_meets_no_bar(operators: ModuleType, tmp_path: Path):
    measured = measurement("cpu", {"eager": 0.001}, {"eager": 1.0})
    measured["bdcore"]["failed"] = ["benchmarks/test_add.py::test_add[bdcore]"]
    operators.write([measured], tmp_path)
    text = (tmp_path / "operators.md").read_text()
    assert "Failed: benchmarks/test_add.py::test_add[bdcore]\n" in text
    assert "Of 1 rows with a bar, 0 meet it." in text
    assert "add, 64 x 64, forward: bdcore failed." in text


def test_what_else_is_given_is_refused(operators: ModuleType, tmp_path: Path):
    with pytest.raises(SystemExit, match="--benchmark-json"):
        operators.write([{"benchmarks": []}], tmp_path)
    assert not list(tmp_path.iterdir())


def test_bytes_moved(contest: ModuleType):
    images, scale = torch.empty(10, 3, 4, 4, dtype=torch.uint8), torch.empty(5)
    out, gradient = torch.empty(10, 3, 4, 4), torch.empty(5)
    assert contest.bytes_moved((images, scale), (out,)) == (480 + 20) + 1920
    assert contest.bytes_moved((images, scale), (out, gradient)) == (500 + 1920) + (500 + 1920 + 20)


@pytest.mark.parametrize(
    "wrong",
    [torch.tensor([1.0, 2.001]), torch.tensor([1.0, 2.0]).double(), torch.tensor([[1.0, 2.0]]), torch.tensor([1, 2])],
)
def test_contestants_that_compute_something_else_are_not_timed(contest: ModuleType, wrong: torch.Tensor):
    right = torch.tensor([1.0, 2.0])
    contest.agree([right], [right + 1e-7], 1e-5)
    with pytest.raises(AssertionError, match="result"):
        contest.agree([wrong], [right], 1e-5)
    with pytest.raises(AssertionError, match="gradient 1"):
        contest.agree([right, wrong], [right, right], 1e-5)


def test_pixels_may_differ_by_one_and_places_not_at_all(contest: ModuleType):
    pixels, places = torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([3, 1])
    contest.agree([pixels], [torch.tensor([1, 254], dtype=torch.uint8)], 0.0)
    for other in (torch.tensor([2, 255], dtype=torch.uint8), torch.tensor([255, 0], dtype=torch.uint8)):
        with pytest.raises(AssertionError, match="differs"):
            contest.agree([pixels], [other], 0.0)
    with pytest.raises(AssertionError, match="differs"):
        contest.agree([places], [torch.tensor([1, 3])], 0.0)


def test_a_benchmark_measures_and_the_table_takes_it(operators: ModuleType, tmp_path: Path):
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "measured.json"
    command = [sys.executable, "-P", "-m", "pytest", "benchmarks/test_model_contrastive_loss.py", "--benchmark-only"]
    command += ["--device=cpu", "--threads=1", "--seconds=0.001", "-k", "64-1-64 and (bdcore or eager)"]
    # Where these tests run in parallel, the benchmarks do not.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    finished = subprocess.run(
        [*command, f"--benchmark-json={file}", "-p", "no:cacheprovider"],
        cwd=ROOT, env=alone, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    operators.write([json.loads(file.read_text())], tmp_path)
    rows = json.loads((tmp_path / "operators.json").read_text())["runs"]["cpu"]["rows"]
    assert [(row["operator"], row["pass"]) for row in rows] == [
        ("model_contrastive_loss", "forward"),
        ("model_contrastive_loss", "forward+backward"),
    ]
    forward, both = rows
    assert forward["moved"] == 4 * (3 * 64 * 64 + 1)
    assert both["moved"] == 4 * (3 * 3 * 64 * 64 + 2)
    for row in rows:
        assert row["ratios"]["eager"] > 0
        assert row["share"] > 0
    assert both["bars"] == {"torch.compile": 2.0}  # not among the contestants here, and so neither met nor missed
    assert both["missed"] == []
