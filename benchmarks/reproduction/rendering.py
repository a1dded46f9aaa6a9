"""The Markdown of a table."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bdcore.analysis.summary import COLLAPSE
from benchmarks.report import described, markdown
from benchmarks.reproduction.figures import HOLDS, Row
from benchmarks.reproduction.tables import Table

NAMES = {"cifar10": "CIFAR-10"}

Text = dict[str, str]


def page(
    table: Table,
    images: str,
    made: Sequence[Row],
    over: Sequence[Row],
    runs: Sequence[Mapping[str, Any]],
    absent: Mapping[str, Sequence[str]],
    found: Mapping[Any, Mapping[str, Any]],
    other: int,
) -> str:
    """The whole file.

    Args:
        table: what it is about.
        images: name of the data set.
        made: rows of `figures.rows`.
        over: rows of `figures.pooled`; none where nothing is pooled.
        runs: the commands that measured the cells, each with machine and versions.
        absent: lines on cells that give no figure, by heading.
        found: the results that the rows are of.
        other: how many of these were measured by other sources than those at hand.
    """
    lines = [f"# {table.title} on {NAMES.get(images, images)}", "", table.says, ""]
    lines += [f"Budget {table.budget}: {table.shortened}. Every run: `{_settings(table.settings)}`"]
    for run in runs:
        shared = f"{run['jobs']} worker processes of {run['threads']} threads" if run["jobs"] > 1 else "one process"
        lines += ["", *described(run), "", f"Measured by {shared}, {run['cells']} of the cells."]
    sections = {
        "Over all patterns": [_pooled(row, table.patterns) for row in over],
        "ASR / BA": _matrix(table, made),
        "Figures": [_detailed(row) for row in made],
        "Further figures": [_further(row) for row in made if row["seeds"]],
    }
    for heading, rows in sections.items():
        lines += ["", f"## {heading}", "", *markdown(_told(rows))] if rows else []
    lists = {"Warnings": _warnings(found), **absent, "Notes": [*_notes(table, made, over), *_remarks(found, other)]}
    for heading, listed in lists.items():
        lines += ["", f"## {heading}", "", *(f"- {line}" for line in listed)] if listed else []
    return "\n".join(lines) + "\n"


def _told(rows: Sequence[Text]) -> list[Text]:
    """The rows without the columns that say nothing in any of them."""
    return [{name: row[name] for name in row if any(one[name] != "-" for one in rows)} for row in rows]


def _matrix(table: Table, made: Sequence[Row]) -> list[Text]:
    """Attacks by defenses."""
    cells = {(row["case"], row["column"]): row for row in made}
    found: list[Text] = []
    for case in table.cases:
        row = {"attack": case.title}
        for column in table.columns:
            mine = [one for one in made if one["column"] == column.name]
            if mine:
                name = _defense(column.title, max(mine, key=lambda one: len(one["oracle"])))
                row[name] = _pair(cells[case.name, column.name]) if (case.name, column.name) in cells else "-"
        if any(one["case"] == case.name for one in made):
            found.append(row)
    return found


def _pair(row: Row) -> str:
    if not row["ba"]:
        return "failed"
    asr = f"{row['asr']['mean']:.1f} / " if row["asr"] else ""
    return f"{asr}{row['ba']['mean']:.1f}{_marks(row)}"


def _detailed(row: Row) -> Text:
    theirs, nine = row["published"], bool(row["published"] and row["published"]["nine"])
    return {
        "attack": row["attack"],
        "poisons": _poison(row["poison"]),
        "defense": _defense(row["defense"], row),
        "ASR": _spread(row["asr"]) + _marks(row),
        "published": _number(theirs and theirs["asr"]),
        "difference": _signed(row["difference"]["asr"]),
        "BA": _spread(row["ba"]),
        "BA, nine classes": _spread(row["nine"]) if nine else "-",
        "BA published": _number(theirs and theirs["accuracy"]) + (" (nine)" if nine else ""),
        "BA difference": _signed(row["difference"]["accuracy"]),
        "isolation precision": _spread(row["isolation_precision"]),
        "verdict": _verdict(row["verdict"], attacked=bool(row["asr"])),
        "seeds": _seeds(row),
        "seconds": _spread(row["seconds"]),
    }


def _further(row: Row) -> Text:
    memory = row["peak_memory_bytes"]["mean"] / 2**30
    return {
        "attack": row["attack"],
        "defense": _defense(row["defense"], row),
        "BA change": _spread(row["ba_change"]),
        "BA, other classes": _spread(row["nine"]),
        "BA, target class": _spread(row["target"]),
        "RA": _spread(row["ra"]),
        "DER": _spread(row["der"]),
        "images": f"{row['images']['mean'] / 1000:,.0f}",
        "peak memory, GiB": f"{memory:.2f}",
    }


def _pooled(row: Row, of: int) -> Text:
    theirs = row["published"]
    return {
        "defense": _defense(row["defense"], row),
        "patterns": f"{row['patterns']} of {of}",
        "runs": _seeds({**row, "seeds": range(row["cells"])}),
        "ASR": _spread(row["asr"]),
        "published": _number(theirs and theirs["asr"]),
        "difference": _signed(row["difference"]["asr"]),
        "worst ASR": f"{row['worst']:.1f}",
        "published worst": _number(theirs and theirs["worst"]),
        "difference of these": _signed(row["difference"]["worst"]),
        "BA": _spread(row["ba"]),
        "BA change": _spread(row["ba_change"]),
        "verdict": _verdict(row["verdict"], attacked=True),
        "seconds": _spread(row["seconds"]),
    }


def _notes(table: Table, made: Sequence[Row], over: Sequence[Row]) -> list[str]:
    sources = {row["published"]["source"]: None for row in [*made, *over] if row["published"]}
    notes = [
        "In percent, mean over seeds; of three or more: mean ± standard deviation [95% interval of the mean by "
        "Student's t, cut off at 0 and 100]. ASR: triggered test images of the other classes sent to the target. BA: "
        "accuracy on all clean test images; nine classes: without the target class, as some papers count it, and then "
        "compared with that. Differences are ours minus published.",
        "BA change: against the undefended victim of the same seed. RA: triggered images given their true class. DER: "
        "defense effectiveness rating. Verdict: targets found, or on clean models false targets. Isolation precision: "
        "share of the isolated samples that are poisoned. Images: thousands through the network. Peak memory: of the "
        "device, on a CPU of the whole process.",
        "Seconds: of the defense, for undefended rows of the victim's training.",
        f"† the attack did not take hold: undefended ASR below {HOLDS:.0f}% and below its published figure. "
        f"‡ accuracy collapsed: more than {COLLAPSE:.0f} points lost, whatever is left of the attack.",
    ]
    shown = {row["attack"] for row in made if row["case"] not in {c.name for c in table.cases if c.pooled}}
    shown |= {row["defense"] for row in made}
    notes += [
        f"{part.title}: `{_settings(part.settings)}`."
        for part in [*table.cases, *table.columns]
        if part.settings and part.title in shown
    ]
    if over:
        notes.append(
            "Over all patterns: each counts once, by its mean over seeds; the worst is the highest ASR of a pattern, "
            "for undefended victims the lowest."
        )
    if any(row["oracle"] for row in made):
        notes.append("(oracle: ...): told what a defender does not know.")
    return [*notes, *(f"Published: {source}." for source in sources)]


def _settings(settings: Mapping[str, object]) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())


def _remarks(found: Mapping[Any, Mapping[str, Any]], other: int) -> list[str]:
    """What was computed with what."""
    done = [result for result in found.values() if result["state"] == "done"]
    if not done:
        return []
    devices = {f"{one['name']} in {one['precision']}": None for one in (result["device"] for result in done)}
    data = sorted({result["fingerprint"][:12] for result in done})
    remarks = [f"Computed on {', '.join(devices)}; the images have the fingerprint {', '.join(data)}."]
    if other:
        remarks.append(f"{other} of the {len(found)} cells were measured by other sources than those that wrote this.")
    return remarks


def _warnings(found: Mapping[Any, Mapping[str, Any]]) -> list[str]:
    """What the cells' runs warned of."""
    return [
        f"{case}, {column}, seed {seed}: {message}"
        for (case, column, seed), result in found.items()
        for message in result["warnings"]
    ]


def _defense(title: str, row: Row | None) -> str:
    return f"{title} (oracle: {', '.join(row['oracle'])})" if row and row["oracle"] else title


def _marks(row: Row) -> str:
    return "†" * row["weak"] + "‡" * row["collapsed"]


def _poison(poison: Mapping[str, Any] | None) -> str:
    if not poison:
        return "-"
    share = f"{100 * poison['rate']:.3g}%"
    return share if poison["class_rate"] is None else f"{share}, {100 * poison['class_rate']:.3g}% of the target class"


def _seeds(row: Mapping[str, Any]) -> str:
    all_of_them = len(row["seeds"]) + row["failed"] + row["missing"]
    text = f"{len(row['seeds'])}" if len(row["seeds"]) == all_of_them else f"{len(row['seeds'])} of {all_of_them}"
    return text + (f", {row['failed']} failed" if row["failed"] else "")


def _verdict(verdict: Mapping[str, int] | None, *, attacked: bool) -> str:
    if not verdict:
        return "-"
    if attacked:
        return f"target found {verdict['right']} of {verdict['of']}"
    return f"false target {verdict['of'] - verdict['right']} of {verdict['of']}"


def _spread(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "-"
    text = f"{found['mean']:.1f}"
    return text + (f" ± {found['sd']:.1f} [{found['low']:.1f}, {found['high']:.1f}]" if "sd" in found else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"
