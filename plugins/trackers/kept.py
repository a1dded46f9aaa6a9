"""What a tracker keeps of a run, as flat names with one value each."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from bdcore import Progress

Point = tuple[str, float, int]
"""A point of a curve: its name, for instance "train/loss" or "defend-mcldef/purify/loss", its value, its epoch."""


def options(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """A configuration flat, as {"train.lr": 0.1}; what is neither number nor text stands as JSON."""
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in _leaves(config, ".")
    }


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The final figures and costs of a record, as {"victim/asr": 1.0, "mcldef/asr": 0.01}: those of the victim and of
    each defense; of an inspection the accuracy of the model that was handed in, and the verdict. True is 1; what was
    not measured is left out."""
    parts: dict[str, Any] = {name: record[name] for name in ("victim", "verdict") if name in record}
    if "model" in record:
        parts["model"] = {"clean_accuracy": record["model"]["clean_accuracy"]}
    parts |= {defense["name"]: defense for defense in record.get("defenses", [])}
    return {name: float(value) for name, value in _leaves(parts, "/") if isinstance(value, int | float)}


class Curves:
    """Every point of a run's curves once: as it is heard, or from the record where the cache answered for a stage."""

    def __init__(self) -> None:
        self._heard: set[tuple[str, int]] = set()

    def heard(self, stage: str, progress: Progress) -> Iterator[Point]:
        """The points of an epoch that was just finished."""
        return self._new(stage, progress.phase, progress.epoch, progress.figures)

    def unheard(self, record: Mapping[str, Any]) -> Iterator[Point]:
        """The points of a record that were not heard."""
        for stage, epochs in record["curves"].items():
            for epoch in epochs:
                yield from self._new(stage, epoch["phase"], epoch["epoch"], epoch["figures"])

    def _new(self, stage: str, phase: str, epoch: int, found: Mapping[str, float | None]) -> Iterator[Point]:
        place = stage if stage == phase else f"{stage}/{phase}"
        for name, value in found.items():
            curve = re.sub(r"[^\w./-]", "-", f"{place}/{name}")  # the characters that every tracker takes
            if value is not None and (curve, epoch) not in self._heard:
                self._heard.add((curve, epoch))
                yield curve, value, epoch


def _leaves(tree: Mapping[str, Any], between: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            inner: Mapping[str, Any] = value
            yield from ((f"{name}{between}{rest}", leaf) for rest, leaf in _leaves(inner, between))
        else:
            yield name, value
