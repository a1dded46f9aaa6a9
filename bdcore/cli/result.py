"""The result of a run on stdout: a table in percent, and what it means in plain words."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

# The part of a record that is read here; its figures are fractions of 1, None where there is nothing to measure.
Figures = Mapping[str, Any]

_DAMAGED = 0.2
"""Share of the victim's accuracy whose loss says that the classifier is damaged."""
_STILL_THERE = 0.5
"""Share of the victim's attack success that says, where it remains, that the backdoor is still there."""
_TOOK_HOLD = 0.5
"""Attack success below which there was no backdoor worth the name."""


def show(record: Figures) -> None:
    """Print table and sentences of a record on stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=100_000)  # a file has no margin at which to wrap
    console.print(_table(record), "", sep="\n")
    for line in _legend(record):
        console.print(line, style="dim", markup=False)
    for sentence in sentences(record):
        warns = sentence.startswith("warning")
        console.print(sentence, style="yellow" if warns else None, markup=False)


def sentences(record: Figures) -> Iterator[str]:
    """What each defense did, in words, with a warning where its figures would mislead."""
    victim = record["victim"]
    asr = victim["asr"]
    if asr is not None and asr < _TOOK_HOLD:
        yield (
            f"warning: the attack did not take hold (attack success {_percent(asr)}%), "
            "so what a defense reaches says little."
        )
    for defense in record["defenses"]:
        name = defense["name"]
        before, after = victim["clean_accuracy"], defense["clean_accuracy"]
        attack = "no attack" if asr is None else f"attack success {_percent(asr)}% -> {_percent(defense['asr'])}%"
        points = _points(after, before)
        change = f"{abs(points):.1f} points {'lost' if points < 0 else 'gained'}" if points else "no change"
        yield f"{name}: {attack}, accuracy {_percent(before)}% -> {_percent(after)}% ({change})."
        if after < (1 - _DAMAGED) * before:
            yield f"warning: {name} damaged the classifier; a low attack success of such a one is no merit."
        if asr is not None and asr >= _TOOK_HOLD and defense["asr"] >= _STILL_THERE * asr:
            yield f"warning: {name} did not remove the backdoor."
        if defense["verdict"]:
            yield _describe_verdict(name, defense["verdict"])
        if defense["isolation"]:
            yield _describe_isolation(name, defense["isolation"], attacked=asr is not None)


def _describe_verdict(name: str, verdict: Figures) -> str:
    towards = "" if verdict["target"] is None else f" towards class {verdict['target']}"
    says = f"backdoored{towards}" if verdict["backdoored"] else "not backdoored"
    if verdict["correct"]:
        return f"{name}: says that the model is {says}, which is right."
    return f"warning: {name} says that the model is {says}, which is wrong."


def _describe_isolation(name: str, isolation: Figures, *, attacked: bool) -> str:
    count = f"{name}: set {isolation['isolated']:,} training images aside"
    if not attacked:
        return f"{count}, none of them poisoned: there is no attack."
    auroc = "" if isolation["auroc"] is None else f"; as a ranking of all images AUROC {isolation['auroc']:.3f}"
    return (
        f"{count}, {_percent(isolation['precision'])}% of them poisoned "
        f"({_percent(isolation['recall'])}% of all poisoned ones{auroc})."
    )


def _table(record: Figures) -> Table:
    victim = record["victim"]
    oracles = _oracles(record)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("BA", "change", "ASR", "RA", "DER", "target", "verdict", "seconds"):
        table.add_column(column, justify="left" if column == "verdict" else "right", no_wrap=True)
    table.add_row(
        "no defense", _percent(victim["clean_accuracy"]), "-", *_attack_cells(victim), "-", f"{victim['seconds']:.1f}"
    )
    for defense in record["defenses"]:
        table.add_row(
            Text(defense["name"] + ("†" if defense["name"] in oracles else "")),
            _percent(defense["clean_accuracy"]),
            f"{_points(defense['clean_accuracy'], victim['clean_accuracy']):+.1f}",
            *_attack_cells(defense),
            _verdict_cell(defense["verdict"]),
            f"{defense['seconds']:.1f}",
        )
    return table


def _attack_cells(row: Figures) -> list[str]:
    """ASR, RA, DER, target-class accuracy; the victim has no DER."""
    return [_percent(row.get(figure)) for figure in ("asr", "ra", "der", "target_class_accuracy")]


def _verdict_cell(verdict: Figures | None) -> str:
    if verdict is None:
        return "-"
    said = "clean" if not verdict["backdoored"] else "backdoor"
    if verdict["target"] is not None:
        said = f"class {verdict['target']}"
    return said if verdict["correct"] else f"{said} (wrong)"


def _legend(record: Figures) -> Iterator[str]:
    yield (
        "In percent. BA: accuracy on clean test images, change in points; ASR: triggered images sent to the target; "
        "RA: triggered images given their true class; DER: defense effectiveness; target: BA on the target class."
    )
    poison = record["poison"]
    if poison:
        share = poison["class_rate"]
        labelled = "" if share is None else f", {_percent(share)}% of those labelled with the target class"
        yield f"Poisoned: {poison['count']:,} training images, {_percent(poison['rate'])}% of all{labelled}."
    for name, told in _oracles(record).items():
        yield f"† {name} was told what a defender does not know: {', '.join(told)}."


def _oracles(record: Figures) -> dict[str, list[str]]:
    return {plugin["name"]: plugin["oracle"] for plugin in record["plugins"] if plugin["oracle"]}


def _percent(figure: float | None) -> str:
    return "-" if figure is None else f"{100 * figure:.1f}"


def _points(after: float, before: float) -> float:
    """Difference of two accuracies in points, as it shows between their rounded figures."""
    return round(100 * after, 1) - round(100 * before, 1)
