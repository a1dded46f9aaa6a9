"""The result of a run on stdout: a table in percent, and what it means in plain words."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bdcore.analysis.summary import Figures, percent, points, sentences


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


def _table(record: Figures) -> Table:
    victim = record["victim"]
    oracles = _oracles(record)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("BA", "change", "ASR", "RA", "DER", "target", "verdict", "seconds"):
        table.add_column(column, justify="left" if column == "verdict" else "right", no_wrap=True)
    table.add_row(
        "no defense", percent(victim["clean_accuracy"]), "-", *_attack_cells(victim), "-", f"{victim['seconds']:.1f}"
    )
    for defense in record["defenses"]:
        table.add_row(
            Text(defense["name"] + ("†" if defense["name"] in oracles else "")),
            percent(defense["clean_accuracy"]),
            f"{points(defense['clean_accuracy'], victim['clean_accuracy']):+.1f}",
            *_attack_cells(defense),
            _verdict_cell(defense["verdict"]),
            f"{defense['seconds']:.1f}",
        )
    return table


def _attack_cells(row: Figures) -> list[str]:
    """ASR, RA, DER, target-class accuracy; the victim has no DER."""
    return [percent(row.get(figure)) for figure in ("asr", "ra", "der", "target_class_accuracy")]


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
        labelled = "" if share is None else f", {percent(share)}% of those labelled with the target class"
        yield f"Poisoned: {poison['count']:,} training images, {percent(poison['rate'])}% of all{labelled}."
    for name, told in _oracles(record).items():
        yield f"† {name} was told what a defender does not know: {', '.join(told)}."


def _oracles(record: Figures) -> dict[str, list[str]]:
    return {plugin["name"]: plugin["oracle"] for plugin in record["plugins"] if plugin["oracle"]}
