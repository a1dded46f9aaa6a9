"""What MCLDef achieves and costs on the bundled digits: `python -m benchmarks.mcldef digits|curve|clean`.

Each figure comes from an ordinary run, with its record under runs/. Finished stages are cached, so an interrupted table
goes on where it was; its files are written anew after every run. A run that a defense ends with an error stays in the
table as that, and no mean is shown over fewer runs than were made.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bdcore.cli.display import shown
from bdcore.config import resolve
from bdcore.errors import BdcoreError, UsageError
from bdcore.pipeline import run
from bdcore.plugins import Host
from benchmarks import report

FORMS = ("paper", "mixed")
FRACTIONS = (0.05, 0.1, 0.2)

Seeded = list[dict[str, Any]]  # one run a seed, as `measure` returns them


def main() -> None:
    """Make one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    TABLES[given.table](given)


def digits(given: argparse.Namespace) -> None:
    """Both forms on the bundled digits."""
    cases = {f"{form} form": (f"mcldef.form={form}",) for form in FORMS}
    notes = ["WRN-16-1, BadNets with 10% poisons and target 0, 5% clean data, no oracle."]

    def tables(found: Mapping[str, Seeded]) -> dict[str, list[dict[str, str]]]:
        return {"Seeds": each_seed(found), "Means": means(found)}

    collect("mcldef-digits", "MCLDef on digits", cases, given, tables, notes)


def curve(given: argparse.Namespace) -> None:
    """Both forms over the amount of clean data."""
    cases = {
        f"{form} form, {fraction:.0%} clean": (f"mcldef.form={form}", f"run.clean_fraction={fraction}")
        for form in FORMS
        for fraction in FRACTIONS
    }
    notes = ["WRN-16-1, BadNets with 10% poisons and target 0, no oracle; digits has 1,437 training images."]

    def tables(found: Mapping[str, Seeded]) -> dict[str, list[dict[str, str]]]:
        return {"Means": means(found), "Seeds": each_seed(found)}

    collect("mcldef-curve", "MCLDef over the amount of clean data, digits", cases, given, tables, notes)


def clean(given: argparse.Namespace) -> None:
    """What a defense does where nothing is wrong."""
    cases = {"either form": ()}
    notes = [
        "WRN-16-1 trained on clean data; the right verdict is that there is no backdoor, and the model is then left as "
        "it is, so that the form makes no difference."
    ]

    def tables(found: Mapping[str, Seeded]) -> dict[str, list[dict[str, str]]]:
        return {"Seeds": each_seed(found)}

    collect("mcldef-clean", "MCLDef without an attack, digits", cases, given, tables, notes, no_attack=True)


TABLES: dict[str, Callable[[argparse.Namespace], None]] = {
    "digits": digits,
    "curve": curve,
    "clean": clean,
}


def collect(
    name: str,
    title: str,
    cases: Mapping[str, Sequence[str]],
    given: argparse.Namespace,
    tables: Callable[[Mapping[str, Seeded]], dict[str, list[dict[str, str]]]],
    notes: Sequence[str],
    **options: Any,
) -> None:
    """Run every case (settings by label) with every seed, and write the tables after each run."""
    found: dict[str, Seeded] = {}
    for case, settings in cases.items():
        for seed in given.seeds:
            found.setdefault(case, []).append(measure(case, settings, seed, **options))
            made = {heading: rows for heading, rows in tables(found).items() if rows}
            stored = [one for runs in found.values() for one in runs]
            report.write(name, title, made, [*notes, MEANING], seeds=given.seeds, runs=stored)


def measure(case: str, settings: Sequence[str], seed: int, **options: Any) -> dict[str, Any]:
    """One run with `mcldef`: its victim's and defense's part of the record, or the error that ended it."""
    host = Host()
    config = resolve(host, plugins=("mcldef",), seed=seed, settings=settings, **options)
    one = {"case": case, "seed": seed, "settings": list(settings)}
    try:
        with shown(host):
            record = run(config, host)
    except UsageError:
        raise
    except BdcoreError as error:
        print(f"{case}, seed {seed}: {error}", file=sys.stderr)
        return {**one, "error": str(error)}
    device = record["device"]
    return {**one, "victim": record["victim"], "defense": record["defenses"][0], "device": device}


MEANING = (
    "In percent. BA: accuracy on all clean test images; ASR: triggered images sent to the target; RA: triggered images "
    "given their true class; target: BA on the target class alone; DER: defense effectiveness rating. "
    "Several seeds: mean ± standard deviation [95% interval of the mean]."
)


def each_seed(found: Mapping[str, Seeded]) -> list[dict[str, str]]:
    """A row for every run."""
    rows: list[dict[str, str]] = []
    for case, runs in found.items():
        for one in runs:
            row = {"MCLDef": case, "seed": str(one["seed"]), **figures([one]), "verdict": verdict(one)}
            rows.append({**row, "seconds": "-" if "error" in one else f"{one['defense']['seconds']:.1f}"})
    return rows


def means(found: Mapping[str, Seeded]) -> list[dict[str, str]]:
    """A row for every case."""
    rows: list[dict[str, str]] = []
    for case, runs in found.items():
        right = sum(bool(part(one, "defense", "verdict") and one["defense"]["verdict"]["correct"]) for one in runs)
        sought = any(part(one, "defense", "verdict") for one in runs)
        row = {"MCLDef": case, "runs": str(len(runs)), **figures(runs)}
        row["verdict right"] = f"{right} of {len(runs)}" if sought else "-"
        rows.append({**row, "seconds": report.show([part(one, "defense", "seconds") for one in runs], 1)})
    return rows


def figures(runs: Seeded) -> dict[str, str]:
    """Columns of victim and defense, over one run or several."""

    def column(whose: str, figure: str) -> str:
        return report.show([part(one, whose, figure) for one in runs])

    changes = [
        difference(part(one, "defense", "clean_accuracy"), part(one, "victim", "clean_accuracy")) for one in runs
    ]
    columns = {
        "BA before": column("victim", "clean_accuracy"),
        "ASR before": column("victim", "asr"),
        "BA": column("defense", "clean_accuracy"),
        "BA change": report.show(changes),
    }
    names = {"ASR": "asr", "RA": "ra", "target": "target_class_accuracy", "DER": "der"}
    return columns | {name: column("defense", figure) for name, figure in names.items()}


def verdict(one: Mapping[str, Any]) -> str:
    """What a run's defense said, and whether it was right."""
    if "error" in one:
        return "failed"
    said = one["defense"]["verdict"]
    if said is None:
        return "target given"
    what = "no backdoor" if not said["backdoored"] else f"class {said['target']}"
    return what if said["correct"] else f"{what} (wrong)"


def part(one: Mapping[str, Any], whose: str, figure: str) -> Any:
    """A figure of a run; None where it ended with an error or has none."""
    return one.get(whose, {}).get(figure)


def difference(after: float | None, before: float | None) -> float | None:
    """after - before, None where one is missing."""
    return None if after is None or before is None else after - before


if __name__ == "__main__":
    main()
