"""Put what the steps of gpu.sh left in a folder into benchmarks/results: gpu.{json,md}, and the operators' table."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bdcore.ops.native import load
from benchmarks import operators, report

Row = dict[str, Any]
NOT_MEASURED = [{"result": "not measured"}]


def main() -> None:
    """Write both results from the folder that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, metavar="FOLDER")
    work = parser.parse_args().work
    steps = [dict(zip(("step", "code", "seconds", "limit"), line.split("\t"), strict=True)) for line in lines(work)]
    tests = read_tests(work / "tests.xml")
    training = json.loads(text(work / "training.json") or "[]")
    measured = json.loads(text(work / "operators.json") or "null")
    rows: list[Row] = []
    if measured is not None:
        operators.write([measured], report.RESULTS)
        rows = operators.gather(measured)["rows"]
    tables = {
        "Steps": [show_step(step, work) for step in steps],
        "Tests on the GPU": [tests["counts"]] if tests["counts"] else NOT_MEASURED,
        "Training": [show_training(row) for row in training] or NOT_MEASURED,
        "Operators": summary(rows) or NOT_MEASURED,
    }
    notes = [
        "Tests: those of the operators that run on CUDA. memcheck, racecheck: compute-sanitizer over one small case of"
        " each operator (`benchmarks/gpu_cases.py`).",
        "Training: random images of CIFAR-10's shape, bf16, batches of 128, crop and flip, through bdcore's own loop;"
        " the first epoch is not counted.",
        "Operators: rows by whether they meet their bars; every row stands in operators.md.",
        *(f"Failed: {name}" for name in tests["failed"]),
    ]
    report.write(
        "gpu",
        "What benchmarks/gpu.sh found on a GPU",
        tables,
        notes,
        cuda=torch.version.cuda,
        kernels=load()["cuda"].detail,
        steps=steps,
        tests=tests,
        training=training,
        operators=rows,
    )


def text(path: Path) -> str:
    """A file's content; empty where a step that failed did not write it."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def lines(work: Path) -> list[str]:
    """The steps that were begun."""
    return text(work / "steps.tsv").splitlines()


def read_tests(path: Path) -> Row:
    """Counts by outcome, and the names of the tests that failed, of a JUnit file."""
    content = text(path)
    counts: dict[str, int] = dict.fromkeys(("passed", "failed", "skipped"), 0) if content else {}
    failed: list[str] = []
    for case in ElementTree.fromstring(content).iter("testcase") if content else ():
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[outcome] += 1
        if outcome == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return {"counts": counts, "failed": failed}


def show_step(step: Row, work: Path) -> Row:
    """A line of the table of steps, with what compute-sanitizer says at its end."""
    found = {"0": "ok", "skipped": "no time left", "124": "took too long", "137": "took too long"}
    said = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text(work / f"{step['step']}.log"))
    result = found.get(step["code"], f"failed with code {step['code']}")
    return {"step": step["step"], "result": "; ".join([result, *said]), "seconds": step["seconds"]}


def show_training(row: Row) -> Row:
    """A line of the table of trainings."""
    return {
        "model": row["model"],
        "device": row["device"],
        "images": f"{row['images']:,}",
        "seconds an epoch, median": f"{row['median']:.2f}",
        "lowest": f"{min(row['seconds']):.2f}",
        "highest": f"{max(row['seconds']):.2f}",
        "images/s": f"{row['images_per_second']:,.0f}",
    }


def summary(rows: Sequence[Row]) -> list[Row]:
    """A line for each operator: how many rows it has, and how many of those with a bar meet it."""
    names = dict.fromkeys(row["operator"] for row in rows)
    return [{"operator": name, **judged([row for row in rows if row["operator"] == name])} for name in names]


def judged(rows: Sequence[Row]) -> Row:
    """Counts over rows of one operator, and the best and worst share of the bound."""
    shares = [row["share"] for row in rows if row["share"] is not None]
    return {
        "rows": len(rows),
        "with a bar": sum(bool(row["bars"]) for row in rows),
        "met": sum(bool(row["bars"]) and not row["missed"] for row in rows),
        "of the bound, lowest": f"{min(shares):.0%}" if shares else "-",
        "of the bound, highest": f"{max(shares):.0%}" if shares else "-",
    }


if __name__ == "__main__":
    main()
