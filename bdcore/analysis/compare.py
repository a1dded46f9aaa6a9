"""Several runs beside each other: a row for each classifier, and means over the seeds of one configuration."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bdcore.analysis.drawing import Drawing
from bdcore.analysis.figures import Row, scores
from bdcore.analysis.intervals import Interval, student_t
from bdcore.analysis.records import Record
from bdcore.analysis.runs import Run
from bdcore.analysis.view import Classifier, classifiers, title


@dataclass(frozen=True)
class Compared:
    """A classifier of one run; `anchor` leads to what the page says of that run."""

    anchor: str
    run: str
    data: str
    attack: str
    model: str
    seed: int | None
    classifier: Classifier


@dataclass(frozen=True)
class Mean:
    """A figure over seeds: mean and Student's t-interval."""

    mean: float
    interval: Interval
    alike: bool


@dataclass(frozen=True)
class Seeds:
    """One classifier of one configuration over several seeds."""

    run: str
    name: str
    seeds: tuple[int, ...]
    accuracy: Mean | None
    asr: Mean | None


@dataclass(frozen=True)
class Comparison:
    """What several runs say together."""

    title: str
    rows: tuple[Compared, ...]
    seeds: tuple[Seeds, ...]
    drawing: Drawing


def compare(runs: Sequence[Run]) -> Comparison:
    """Rows in the order of the runs; runs whose options differ in the seed alone are averaged."""
    rows = tuple(row for number, run in enumerate(runs, 1) for row in _rows(f"run{number}", run.record))
    drawn = [
        Row(
            f"{number}. {row.attack}, {row.classifier.name}",
            row.classifier.accuracy.share if row.classifier.accuracy else None,
            row.classifier.accuracy.interval if row.classifier.accuracy else None,
            row.classifier.asr.share if row.classifier.asr else None,
            row.classifier.asr.interval if row.classifier.asr else None,
        )
        for number, row in enumerate(rows, 1)
    ]
    return Comparison(f"{len(runs)} runs compared", rows, tuple(_over_seeds(runs)), scores(drawn))


def _rows(anchor: str, record: Record) -> Iterator[Compared]:
    attacks = [plugin.name for plugin in record.plugins if plugin.kind == "attack"]
    settings: Any = record.config.get("run")
    model = str(settings.get("model", "-")) if isinstance(settings, dict) else "-"
    data = record.dataset.name if record.dataset else "-"
    if record.model:
        model, data = str(record.model.arch.get("name", "-")), record.clean.source if record.clean else "-"
    for classifier in classifiers(record):
        attack = attacks[0] if attacks else ("none" if record.command == "run" else "-")
        yield Compared(anchor, record.run.id, data, attack, model, record.seed, classifier)


def _over_seeds(runs: Sequence[Run]) -> Iterator[Seeds]:
    alike: dict[str, dict[int, Run]] = {}
    for run in runs:
        record = run.record
        if record.command == "run" and record.seed is not None:
            alike.setdefault(_but_for_the_seed(record), {}).setdefault(record.seed, run)
    for by_seed in alike.values():
        if len(by_seed) < 2:
            continue
        columns = zip(*(classifiers(run.record) for run in by_seed.values()), strict=True)
        for column in columns:
            first = next(iter(by_seed.values())).record
            yield Seeds(
                title(first),
                column[0].name,
                tuple(by_seed),
                _mean([one.accuracy.share for one in column if one.accuracy]),
                _mean([one.asr.share for one in column if one.asr]),
            )


def _but_for_the_seed(record: Record) -> str:
    config = dict(record.config)
    settings = config.get("run")
    if isinstance(settings, dict):
        config["run"] = {key: value for key, value in settings.items() if key != "seed"}
    defenses = [defense.name for defense in record.defenses]
    return json.dumps([config, defenses, record.dataset.name if record.dataset else None], sort_keys=True)


def _mean(values: Sequence[float]) -> Mean | None:
    if len(values) < 2:
        return None
    return Mean(sum(values) / len(values), student_t(values), max(values) == min(values))
