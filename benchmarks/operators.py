"""The operators' table out of what pytest-benchmark measured: medians, ratios, the bound, and which bars are missed.

One section a device. A run on one device leaves the other's section as it was. Why a bar is missed is told in
missed.toml, where an entry says for which rows it speaks.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import ceil, floor
from pathlib import Path
from typing import Any

from bdcore.store import write_json
from benchmarks import report
from benchmarks.contest import OURS, PEERS

ROOT = Path(__file__).parents[1]
REASONS = Path(__file__).with_name("missed.toml")
DEVICES = {"cpu": "CPU", "cuda": "GPU"}

NOTES = (
    "Times are medians, in microseconds a call; IQR: the interquartile range of the rounds, in percent of the median. "
    "x eager, x torch.compile, x Liger-Kernel: how many times faster bdcore is.",
    "Every contestant has shown the same answer, and the same gradients, before it was timed. torch.compile: inductor, "
    "default mode, fixed shapes, the whole function in one graph; compiling is not in its time. A dash: Liger-Kernel "
    "does not have the operation.",
    "Bound: bytes that must move over the bandwidth of a large copy, read and write counted, measured before each "
    "operator's rows. Forward: every input once, every result once. Backward: once more every input, the result's "
    "gradient, and every gradient that is asked for. Inputs that fit into a cache can beat it.",
    "All contestants of a row run one after the other in one process. On a CPU glibc is told to keep freed memory, for "
    "all of them, as bdcore's training loop does: otherwise page faults would be most of what is measured in large "
    "results. On a GPU time is taken from call to call of a loop, and so includes launches.",
)

Row = dict[str, Any]


def measure() -> dict[str, Any]:
    """Run all benchmarks; what pytest-benchmark writes of them.

    Raises:
        SystemExit: a benchmark failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        # -P: the bdcore that is installed, with its compiled operators, not the folder of that name here.
        command = [sys.executable, "-P", "-m", "pytest", "benchmarks/", "--benchmark-only", "-q", "--benchmark-quiet"]
        code = subprocess.run([*command, f"--benchmark-json={file}"], cwd=ROOT, check=False).returncode
        if code:
            raise SystemExit(f"no table is written: the benchmarks ended with exit code {code}")
        return json.loads(file.read_text(encoding="utf-8"))


def write(measured: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write operators.json and operators.md, one section for each device that was measured now or before.

    Raises:
        SystemExit: something else than the benchmarks' own JSON was given.
    """
    target = folder / "operators.json"
    runs = json.loads(target.read_text(encoding="utf-8"))["runs"] if target.exists() else dict.fromkeys(DEVICES)
    for one in measured:
        if "bdcore" not in one:
            raise SystemExit("this is not what `pytest benchmarks/ --benchmark-only --benchmark-json=FILE` writes")
        runs[one["bdcore"]["device"]] = gather(one)
    folder.mkdir(exist_ok=True)
    write_json(target, {"name": "operators", "runs": runs, "notes": NOTES})
    lines = ["# Operators"]
    for device, name in DEVICES.items():
        lines += ["", f"## {name}", "", *(section(runs[device]) if runs[device] else ["Not measured."])]
    lines += ["", "## How to read it", "", *(f"- {note}" for note in NOTES)]
    target.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {target} and .md", file=sys.stderr)


def gather(measured: Mapping[str, Any]) -> dict[str, Any]:
    """One device's run: where and when, and a row for each operator, case and pass, in the order of measuring."""
    facts = dict(measured["bdcore"])
    rows: dict[tuple[str, str, str], Row] = {}
    found = [(one["extra_info"], _times(one["stats"])) for one in measured["benchmarks"]]
    absent = [(one, {"unavailable": one["reason"]}) for one in facts.pop("unavailable")]
    for info, result in found + absent:
        key = info["operator"], info["case"], info["pass"]
        row = rows.setdefault(key, {name: info[name] for name in ("operator", "case", "pass", "moved", "bars")})
        row.setdefault("contestants", {})[info["contestant"]] = result
        row["bound"] = info["moved"] / info["bandwidth"]
        facts.setdefault("bandwidth", {})[info["operator"]] = info["bandwidth"]
        facts.setdefault("launch", {})[info["operator"]] = info["launch"]
    return {**facts, "rows": [{**row, **judge(row)} for row in rows.values()]}


def _times(stats: Mapping[str, Any]) -> dict[str, Any]:
    return {name: stats[name] for name in ("median", "q1", "q3", "min", "max", "rounds", "iterations")}


def judge(row: Row) -> dict[str, Any]:
    """A row's ratios, its share of the bound, and a sentence for each bar that it misses, rounded away from the bar."""
    found = row["contestants"]
    if OURS not in found:
        return {"ratios": {}, "share": None, "missed": ["bdcore failed"] if row["bars"] else []}
    ours = found[OURS]["median"]
    ratios = {peer: found[peer]["median"] / ours for peer in PEERS if "median" in found.get(peer, ())}
    share = row["bound"] / ours
    missed: list[str] = []
    for bar, least in row["bars"].items():
        if bar == "seconds" and ours > least:
            missed.append(f"{ceil(1000 * ours)} ms, at most {1000 * least:.0f} ms asked")
        elif bar == "bound" and share < least:
            missed.append(f"{floor(100 * share)}% of the bound, {least:.0%} asked")
        elif bar in ratios and ratios[bar] < least:
            missed.append(f"{floor(100 * ratios[bar]) / 100:.2f}x {bar}, {least:.1f}x asked")
    return {"ratios": ratios, "share": share, "missed": missed}


def section(run: Mapping[str, Any]) -> list[str]:
    """A device's part of the Markdown file."""
    rows, bandwidths = run["rows"], run["bandwidth"].values()
    lowest, highest = (f"{limit / 1e9:.1f}" for limit in (min(bandwidths), max(bandwidths)))
    launch = 1e6 * max(run["launch"].values())
    missed, judged = ([row for row in rows if row[kind]] for kind in ("missed", "bars"))
    absent = {
        f"{name}: {result['unavailable']}"
        for row in rows
        for name, result in row["contestants"].items()
        if "unavailable" in result
    }
    lines = [
        *report.described(run),
        "",
        f"Kernels: {run['kernels']}. Copy: {lowest} to {highest} GB/s; the smallest call takes {launch:.1f} us.",
        f"Of {len(judged)} rows with a bar, {len(judged) - len(missed)} meet it.",
        *(f"Not available: {reason}" for reason in sorted(absent)),
        *(f"Failed: {name}" for name in run["failed"]),
        "",
        *report.markdown([_shown(row, run["device"]) for row in rows]),
    ]
    if missed:
        lines += ["", "Bars missed:", ""]
        lines += [f"- {_named(row)}: {'; '.join(row['missed'])}. {_why(row, run['device'])}" for row in missed]
    return lines


def _named(row: Row) -> str:
    return f"{row['operator']}, {row['case']}, {row['pass']}"


def _shown(row: Row, device: str) -> dict[str, str]:
    contestants, ratios = row["contestants"], row["ratios"]
    cells = {"operator": row["operator"], "case": row["case"], "pass": row["pass"]}
    for name in (OURS, *PEERS):
        cells[name] = _cell(contestants.get(name), device)
        if name == OURS:
            cells["IQR"] = _spread(contestants.get(name))
    cells |= {f"x {name}": f"{ratios[name]:.2f}" if name in ratios else "-" for name in PEERS}
    cells["bound"] = _microseconds(row["bound"])
    cells["of bound"] = "-" if row["share"] is None else f"{row['share']:.0%}"
    cells["bars"] = "**missed**" if row["missed"] else "met" if row["bars"] else ""
    return cells


def _cell(result: Mapping[str, Any] | None, device: str) -> str:
    if result is None:
        return "-"
    return f"not available on {device}" if "unavailable" in result else _microseconds(result["median"])


def _spread(result: Mapping[str, Any] | None) -> str:
    return "-" if result is None else f"{(result['q3'] - result['q1']) / result['median']:.0%}"


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:,.{1 if seconds < 1e-3 else 0}f}"


def _why(row: Row, device: str) -> str:
    """What missed.toml tells of a row: the first entry whose operator, device and patterns fit."""
    reasons = tomllib.loads(REASONS.read_text(encoding="utf-8")).get("missed", []) if REASONS.exists() else []
    for reason in reasons:
        named = {"operator": row["operator"], "device": device, "case": row["case"], "pass": row["pass"]}
        if all(fnmatchcase(named[key], pattern) for key, pattern in reason.items() if key != "why"):
            return " ".join(reason["why"].split())
    return "Not yet explained."
