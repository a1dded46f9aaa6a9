"""The figures that the reproduction tables show, computed again by hand."""

import importlib
import json
import sys
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student

ROOT = Path(__file__).parents[1]

PLAIN = {"target_class_accuracy": 0.5, "ra": 0.1, "images": 300_000, "peak_memory_bytes": 2**30}


def outcome(accuracy: float, asr: float | None, nine: float | None, **more: Any) -> dict[str, Any]:
    return {"clean_accuracy": accuracy, "asr": asr, "nontarget_accuracy": nine, "seconds": 10.0, **PLAIN, **more}


def result(case: str, column: str, seed: int, victim: dict[str, Any], defense: dict[str, Any] | None) -> dict[str, Any]:
    made = {
        "case": case, "column": column, "seed": seed, "plugins": [], "settings": {}, "code": "", "command": 0,
        "state": "done", "victim": victim, "poison": {"count": 5000, "rate": 0.1, "class_rate": None},
        "device": {"name": "abacus", "precision": "fp32"}, "fingerprint": "ab" * 32, "warnings": [],
        "wall_seconds": 1.0,
    }  # fmt: skip
    return made if defense is None else {**made, "defense": defense, "oracle": []}


@pytest.fixture
def render(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page that `--render` makes of results, as rows by heading, and as text."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])  # at the end: bdcore itself is the installed one

    def made(name: str, results: list[dict[str, Any]]) -> tuple[dict[str, list[dict[str, str]]], str]:
        tables = importlib.import_module("benchmarks.reproduction.tables")
        cells = tables.load(name, "full", everything=True).cells([0, 1, 2], "cifar10")
        keys = {cell.place: cell.key for cell in cells}
        command = {
            "date": "2030-01-01", "command": "by hand", "jobs": 1, "threads": 1, "versions": {"torch": "9.9"},
            "machine": {"processor": "abacus", "threads": 1, "devices": ["no GPU"]},
        }  # fmt: skip
        content = {
            "schema": 1, "commands": [command],
            "cells": {keys[one["case"], one["column"], one["seed"]]: one for one in results},
        }  # fmt: skip
        (tmp_path / f"{name}-full.json").write_text(json.dumps(content))
        arguments = [name, "--budget", "full", "--render", "--results", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
        importlib.import_module("benchmarks.reproduce").main()
        text = (tmp_path / f"{name}-full.md").read_text()
        return {part.partition("\n")[0]: read_table(part) for part in text.split("\n## ")[1:]}, text

    return made


def read_table(text: str) -> list[dict[str, str]]:
    lines = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]
    return [dict(zip(lines[0], row, strict=True)) for row in lines[2:]]


def interval(values: list[float], least: float = 0) -> str:
    """Mean, standard deviation and 95% interval of the mean, in percent, of what is no less and at most 100."""
    percent = 100 * np.array(values)
    half = student.ppf(0.975, len(percent) - 1) * percent.std(ddof=1) / sqrt(len(percent))
    low, high = np.clip([percent.mean() - half, percent.mean() + half], least, 100)
    return f"{percent.mean():.1f} ± {percent.std(ddof=1):.1f} [{low:.1f}, {high:.1f}]"


def test_means_spread_and_differences(render: Any):
    ba, nine, asr = [0.8531, 0.8602, 0.8555], [0.8711, 0.8742, 0.8803], [0.9991, 0.9972, 1.0]
    after, left, pure = [0.8321, 0.8502, 0.8413], [0.0123, 0.0312, 0.0404], [0.998, 0.996, 1.0]
    rating = [0.9, 0.93, 0.97]
    results: list[dict[str, Any]] = []
    for seed in range(3):
        victim = outcome(ba[seed], asr[seed], nine[seed])
        defense = outcome(
            after[seed], left[seed], after[seed] + 0.01, isolation={"precision": pure[seed]}, der=rating[seed]
        )
        results += [result("badnets", "none", seed, victim, None), result("badnets", "abl", seed, victim, defense)]
    sections, text = render("abl", results)
    none, abl = sections["Figures"]
    assert none["ASR"] == interval(asr)
    assert none["BA"] == interval(ba)
    assert none["BA, nine classes"] == interval(nine)
    assert none["poisons"] == "10%"
    assert none["difference"] == f"{100 * np.mean(asr) - 100:+.1f}"
    assert none["BA difference"] == f"{100 * np.mean(nine) - 85.43:+.1f}"
    assert abl["ASR"] == interval(left)
    assert abl["published"] == "3.04"
    assert abl["difference"] == f"{100 * np.mean(left) - 3.04:+.1f}"
    assert abl["BA published"] == "86.11 (nine)"
    assert abl["BA difference"] == f"{100 * (np.mean(after) + 0.01) - 86.11:+.1f}"
    further = sections["Further figures"]
    assert further[1]["BA change"] == interval([a - b for a, b in zip(after, ba, strict=True)], -100)
    assert further[1]["DER"] == interval(rating)
    assert further[1]["images"] == "300"
    assert further[0]["BA, other classes"] == interval(nine)
    assert abl["isolation precision"] == interval(pure)
    assert abl["seeds"] == "3"
    assert sections["ASR / BA"] == [{"attack": "BadNets", "none": "99.9 / 85.6", "ABL": "2.8 / 84.1"}]
    assert "†" not in text.partition("## Notes")[0]
    assert "Published: ABL paper (arXiv 2110.11571)" in text
    assert "Budget full: for a GPU: all training images and the papers' schedules" in text
    assert "6 of the 6 cells were measured by other sources" in text


def test_two_seeds_have_no_spread(render: Any):
    results = [result("badnets", "none", seed, outcome(0.85, 0.99 + seed / 100, 0.8), None) for seed in range(2)]
    (row,) = render("abl", results)[0]["Figures"]
    assert row["ASR"] == "99.5"
    assert row["seeds"] == "2 of 3"


def test_weak_attacks_and_collapsed_models_are_marked(render: Any):
    def pair(attack: str, asr: float, accuracy: float) -> list[dict[str, Any]]:
        victim = outcome(0.85, asr, 0.85)
        defense = outcome(accuracy, 0.0, accuracy, verdict=None)
        return [result(attack, "none", 0, victim, None), result(attack, "abl", 0, victim, defense)]

    # Published without defense: BadNets 100, feature collision 88.52, WaNet not at all.
    results = [*pair("badnets", 0.89, 0.84), *pair("feature_collision", 0.89, 0.84), *pair("wanet", 0.91, 0.74)]
    marks = {row["attack"]: (row["none"], row["ABL"]) for row in render("abl", results)[0]["ASR / BA"]}
    assert marks["BadNets"] == ("89.0 / 85.0†", "0.0 / 84.0†")
    assert marks["Feature collision"] == ("89.0 / 85.0", "0.0 / 84.0")
    assert marks["WaNet"] == ("91.0 / 85.0", "0.0 / 74.0‡")


def test_patterns_count_once_each_and_the_worst_is_named(render: Any):
    undefended, left = (
        {3: [0.95, 0.97, 0.99], 17: [0.99, 0.99, 0.99], 50: [1.0, 1.0, 1.0]},
        {3: 0.02, 17: 0.3, 50: 0.04},
    )
    results: list[dict[str, Any]] = []
    for pattern, attacks in undefended.items():
        for seed, asr in enumerate(attacks):
            victim = outcome(0.94, asr, 0.94)
            verdict = {"correct": pattern != 17, "backdoored": True, "target": 0}
            defense = outcome(0.93, left[pattern], 0.93, verdict=verdict)
            case = f"badnets-{pattern}"
            results += [result(case, "none", seed, victim, None), result(case, "mesa", seed, victim, defense)]
    clean = outcome(0.94, None, None)
    verdict = {"correct": False, "backdoored": True, "target": 1}
    harmed = result("no_attack", "mesa", 0, clean, outcome(0.9, None, None, verdict=verdict))
    sections, text = render("mesa", [*results, harmed | {"poison": None}])
    none, mesa = sections["Over all patterns"]
    assert none["ASR"] == interval([0.97, 0.99, 1.0])
    assert none["worst ASR"] == "97.0"
    assert none["patterns"] == "3 of 51"
    assert none["runs"] == "9"
    assert mesa["ASR"] == interval(list(left.values()))
    assert mesa["difference"] == "+8.4"
    assert mesa["worst ASR"] == "30.0"
    assert mesa["published worst"] == "8.2"
    assert mesa["verdict"] == "target found 6 of 9"
    clean_row = next(row for row in sections["Figures"] if row["attack"] == "no attack")
    assert clean_row["verdict"] == "false target 1 of 1"
    assert sections["Further figures"][-1]["BA change"] == "-4.0"
    assert "51 patterns, ensemble" in text
