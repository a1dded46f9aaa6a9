"""What a table's cells come to: means over seeds beside the published figures, in percent, as JSON values.

A row holds `spread`s (see `benchmarks.report`): number of values, mean, and of three or more also standard deviation
and 95% interval of the mean. Cells that failed or were not run add nothing to a mean; the row counts them.
"""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from bdcore.analysis.summary import COLLAPSE
from benchmarks.report import spread
from benchmarks.reproduction.tables import BEFORE, Case, Column, Published, Table

HOLDS = 90.0
"""ASR in percent from which an attack has taken hold, unless less was published for it."""

_ACCURACIES = {"ba": "clean_accuracy", "nine": "nontarget_accuracy", "target": "target_class_accuracy"}

Row = dict[str, Any]
Found = Mapping[tuple[str, str, int], Mapping[str, Any]]
"""Results of cells by case, column and seed."""


def rows(table: Table, found: Found, seeds: Sequence[int], published: Mapping[tuple[str, str], Published]) -> list[Row]:
    """A row for every case and column of which a cell was run.

    Args:
        table: its cases and columns.
        found: results of cells, as `running.measure` gives them, with "case", "column" and "seed".
        seeds: that were asked for.
        published: by attack and column.
    """
    made: list[Row] = []
    for case in table.cases:
        weak = _weak(table, case, found, seeds, published)
        for column in table.columns:
            if case.attack is None and column.needs_target:
                continue
            beside = None if case.pooled else published.get((case.attack or "", column.name))
            made.append(_row(case, column, found, seeds, beside) | {"weak": weak})
    return [row for row in made if row["seeds"] or row["failed"]]


def pooled(made: Sequence[Row], table: Table, published: Mapping[tuple[str, str], Published]) -> list[Row]:
    """A row for every column over the pooled cases, each of which counts once, by its mean over the seeds.

    `worst` is the highest ASR of a case, for undefended victims the lowest.
    """
    names = {case.name for case in table.cases if case.pooled}
    found: list[Row] = []
    for column in table.columns:
        parts = [row for row in made if row["case"] in names and row["column"] == column.name and row["asr"]]
        if not parts:
            continue
        attacks = [part["asr"]["mean"] for part in parts]
        beside = published.get(("", column.name))
        worst = min(attacks) if column.name == BEFORE else max(attacks)
        over = spread(attacks, 0, 100)
        verdicts = [part["verdict"] for part in parts if part["verdict"]]
        found.append(
            {
                "column": column.name,
                "defense": column.title,
                "oracle": parts[0]["oracle"],
                "patterns": len(parts),
                "cells": sum(len(part["seeds"]) for part in parts),
                "failed": sum(part["failed"] for part in parts),
                "missing": sum(part["missing"] for part in parts),
                "asr": over,
                "worst": worst,
                "ba": spread([part["ba"]["mean"] for part in parts], 0, 100),
                "ba_change": _over([part["ba_change"] for part in parts]),
                "seconds": spread([part["seconds"]["mean"] for part in parts], 0),
                "verdict": {name: sum(one[name] for one in verdicts) for name in ("right", "of")} if verdicts else None,
                "published": _published(beside),
                "difference": {
                    "asr": _minus(over["mean"], beside and beside.asr),
                    "worst": _minus(worst, beside and beside.worst),
                },
            }
        )
    return found


def line(result: Mapping[str, Any]) -> str:
    """A cell's figures in one line, for a terminal."""
    names = {"ASR": "asr", "BA": "clean_accuracy"}
    parts = [f"{name} {100 * _part(result)[key]:.1f}" for name, key in names.items() if _part(result)[key] is not None]
    verdict = _part(result).get("verdict")
    return ", ".join([*parts, *([f"verdict {'right' if verdict['correct'] else 'wrong'}"] if verdict else [])])


def _row(case: Case, column: Column, found: Found, seeds: Sequence[int], beside: Published | None) -> Row:
    results = {seed: found[case.name, column.name, seed] for seed in seeds if (case.name, column.name, seed) in found}
    done = [result for result in results.values() if result["state"] == "done"]
    asr = _figure(done, "asr")
    accuracy = {name: _figure(done, key) for name, key in _ACCURACIES.items()}
    change = _spread([_change(result) for result in done]) if column.plugin else None
    ours = accuracy["nine" if beside and beside.nine else "ba"]
    return {
        "case": case.name,
        "attack": case.title,
        "column": column.name,
        "defense": column.title,
        "oracle": done[0].get("oracle", []) if done else [],
        "seeds": [seed for seed, result in results.items() if result["state"] == "done"],
        "failed": len(results) - len(done),
        "missing": len(seeds) - len(results),
        "asr": asr,
        **accuracy,
        "ba_change": change,
        "ra": _figure(done, "ra"),
        "der": _spread([_percent(_part(result).get("der")) for result in done], 0, 100),
        "seconds": _spread([_part(result)["seconds"] for result in done], 0),
        "images": _spread([_part(result)["images"] for result in done]),
        "peak_memory_bytes": _spread([_part(result)["peak_memory_bytes"] for result in done]),
        "poison": done[0]["poison"] if done else None,
        "isolation_precision": _spread([_isolation(result) for result in done], 0, 100),
        "verdict": _verdicts(done),
        "collapsed": bool(change and change["mean"] < -COLLAPSE),
        "published": _published(beside),
        "difference": {
            "asr": _minus(_mean(asr), beside and beside.asr),
            "accuracy": _minus(_mean(ours), beside and beside.accuracy),
        },
    }


def _weak(
    table: Table, case: Case, found: Found, seeds: Sequence[int], published: Mapping[tuple[str, str], Published]
) -> bool:
    """Whether the attack did not take hold: ASR below 90% and below what was published."""
    if case.attack is None:
        return False
    undefended = _row(case, table.columns[0], found, seeds, None)["asr"]
    beside = published.get(("" if case.pooled else case.attack, BEFORE))
    bar = HOLDS if beside is None or beside.asr is None else min(HOLDS, beside.asr)
    return undefended is not None and undefended["mean"] < bar


def _part(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The defense's part of a result, or the victim's where there is no defense."""
    return result.get("defense") or result["victim"]


def _figure(done: Sequence[Mapping[str, Any]], key: str) -> Row | None:
    return _spread([_percent(_part(result)[key]) for result in done], 0, 100)


def _change(result: Mapping[str, Any]) -> float:
    return 100 * (result["defense"]["clean_accuracy"] - result["victim"]["clean_accuracy"])


def _isolation(result: Mapping[str, Any]) -> float | None:
    isolation = _part(result).get("isolation")
    return _percent(isolation["precision"]) if isolation else None


def _verdicts(done: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """How many verdicts are right, of how many."""
    verdicts = [verdict for result in done if (verdict := _part(result).get("verdict"))]
    return {"right": sum(verdict["correct"] for verdict in verdicts), "of": len(verdicts)} if verdicts else None


def _published(beside: Published | None) -> Row | None:
    if beside is None:
        return None
    return {name: getattr(beside, name) for name in ("asr", "accuracy", "nine", "worst", "source")}


def _spread(values: Sequence[float | None], least: float = -inf, most: float = inf) -> Row | None:
    present = [value for value in values if value is not None]
    return spread(present, least, most) if present else None


def _over(spreads: Sequence[Row | None]) -> Row | None:
    return _spread([_mean(one) for one in spreads])


def _mean(found: Row | None) -> float | None:
    return None if found is None else found["mean"]


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _minus(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours - theirs
