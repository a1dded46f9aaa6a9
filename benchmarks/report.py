"""A benchmark's result in benchmarks/results: NAME.json with every figure, NAME.md with the table.

`python -m benchmarks.report` measures the operators and writes their table; `python -m benchmarks.report FILE.json ...`
writes it from what `pytest benchmarks/ --benchmark-only --benchmark-json=FILE.json` measured, here or elsewhere.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from math import inf, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import t as student

from bdcore.machine import processor_name
from bdcore.store import write_json

RESULTS = Path(__file__).parent / "results"

Row = Mapping[str, Any]


def main() -> None:
    """Write the operators' table."""
    from benchmarks import operators  # which itself writes with what is below

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, nargs="*", metavar="FILE.json", help="what pytest-benchmark wrote")
    given = parser.parse_args()
    try:
        files = [json.loads(file.read_text(encoding="utf-8")) for file in given.measured]
    except (OSError, ValueError) as error:
        parser.error(f"a file cannot be read: {error}")
    operators.write(files or [operators.measure()], RESULTS)


def write(name: str, title: str, tables: Mapping[str, Sequence[Row]], notes: Sequence[str], **facts: Any) -> None:
    """Write both files and say where.

    Args:
        name: of the files.
        title: first line of the Markdown file.
        tables: rows by heading; in Markdown a row's keys are the columns, its values stand as they are given.
        notes: sentences under the tables.
        facts: what else the JSON file holds, for instance every single measurement.
    """
    around = surroundings()
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", {"name": name, **around, **facts, "tables": tables, "notes": list(notes)})
    lines = [f"# {title}", "", *described(around)]
    for heading, rows in tables.items():
        lines += ["", f"## {heading}", "", *markdown(rows)]
    lines += ["", *(f"- {note}" for note in notes)]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {RESULTS / name}.json and .md", file=sys.stderr)


def described(around: Mapping[str, Any]) -> list[str]:
    """What `surroundings` found, as lines of Markdown."""
    machine, versions = around["machine"], around["versions"]
    where = f"{machine['processor']}, {machine['threads']} threads, {', '.join(machine['devices'])}. "
    where += ", ".join(f"{package} {number}" for package, number in versions.items())
    where += f", commit {around['commit']}." if around.get("commit") else "."
    return [f"{around['date']}, `{around['command']}`", "", where]


def markdown(rows: Sequence[Row]) -> list[str]:
    """A Markdown table of rows with the same keys."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row[column]) for column in columns] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def spread(values: Sequence[float], least: float = -inf, most: float = inf) -> dict[str, float]:
    """Number and mean of values; of three or more also their standard deviation and the 95% interval of the mean by
    Student's t, cut off at the least and the most that a value can be."""
    found = {"n": len(values), "mean": mean(values)}
    if len(values) >= 3:
        deviation = stdev(values)
        half = float(student.ppf(0.975, len(values) - 1)) * deviation / sqrt(len(values))
        found |= {
            "sd": deviation,
            "low": max(found["mean"] - half, least),
            "high": min(found["mean"] + half, most),
        }
    return found


def show(values: Sequence[float | None], scale: float = 100) -> str:
    """One value as it is, several as `mean ± sd [95% interval]`, by default in percent; - where one is missing."""
    present = [scale * value for value in values if value is not None]
    if len(present) < len(values) or not present:
        return "-"
    found = spread(present)
    text = f"{found['mean']:.1f}"
    return text + (f" ± {found['sd']:.1f} [{found['low']:.1f}, {found['high']:.1f}]" if "sd" in found else "")


def surroundings() -> dict[str, Any]:
    """Date, command, commit, machine and versions; of files in the command their names alone."""
    words = [re.sub(rf"[^:]*{os.sep}", "", word) for word in sys.argv[1:]]
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *words]),
        "commit": _commit(),
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "devices": cuda or ["no GPU"],
            "system": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("bdcore", "torch", "torchvision")},
        },
    }


def _commit() -> str | None:
    """The commit that these sources are of, with a plus where they differ from it; None where there is no history."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--exclude=*", "--dirty=+"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


if __name__ == "__main__":
    main()
