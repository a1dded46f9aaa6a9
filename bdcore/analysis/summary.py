"""A record in plain words, with a warning wherever its figures alone would mislead."""

from collections.abc import Iterator, Mapping
from typing import Any

# The part of a record that is read here; its figures are fractions of 1, None where there is nothing to measure.
Figures = Mapping[str, Any]

COLLAPSE = 10.0
"""Points of accuracy whose loss is a failure of a defense, whatever is left of the attack."""
_STILL_THERE = 0.5
"""Share of the victim's attack success that says, where it remains, that the backdoor is still there."""
_TOOK_HOLD = 0.5
"""Attack success below which there was no backdoor worth the name."""


def sentences(record: Figures) -> Iterator[str]:
    """What each defense of a run did, in words; a sentence that begins with "warning" says what would mislead."""
    victim = record["victim"]
    asr = victim["asr"]
    if asr is not None and asr < _TOOK_HOLD:
        yield (
            f"warning: the attack did not take hold (attack success {percent(asr)}%), "
            "so what a defense reaches says little."
        )
    for defense in record["defenses"]:
        name = defense["name"]
        before, after = victim["clean_accuracy"], defense["clean_accuracy"]
        attack = "no attack" if asr is None else f"attack success {percent(asr)}% -> {percent(defense['asr'])}%"
        change = points(after, before)
        told = f"{abs(change):.1f} points {'lost' if change < 0 else 'gained'}" if change else "no change"
        yield f"{name}: {attack}, accuracy {percent(before)}% -> {percent(after)}% ({told})."
        if change < -COLLAPSE:
            yield f"warning: {name} damaged the classifier; a low attack success of such a one is no merit."
        if asr is not None and asr >= _TOOK_HOLD and defense["asr"] >= _STILL_THERE * asr:
            yield f"warning: {name} did not remove the backdoor."
        if defense["verdict"]:
            yield _describe_verdict(name, defense["verdict"])
        if defense["isolation"]:
            yield _describe_isolation(name, defense["isolation"], attacked=asr is not None)


def summary(record: Figures) -> Iterator[str]:
    """As `sentences`, of a record of any command."""
    command = record.get("command", "run")
    if command == "run":
        yield from sentences(record)
        return
    if command == "scan":
        yield _scanned(record)
    for defense in record.get("defenses", ()):
        yield from _defended(defense)


def percent(figure: float | None) -> str:
    """A fraction of 1 in percent with one decimal; "-" where there is none."""
    return "-" if figure is None else f"{100 * figure:.1f}"


def points(after: float, before: float) -> float:
    """Difference of two fractions in percentage points, as it shows between their rounded figures."""
    return round(100 * after, 1) - round(100 * before, 1)


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
        f"{count}, {percent(isolation['precision'])}% of them poisoned "
        f"({percent(isolation['recall'])}% of all poisoned ones{auroc})."
    )


def _scanned(record: Figures) -> str:
    verdict = record["verdict"]
    sure = verdict.get("confidence")
    confidence = "" if sure is None else f" Confidence {percent(sure)}%."
    if not verdict["backdoored"]:
        return f"No backdoor was found.{confidence} A scan can miss triggers that its method does not look for."
    return f"The model looks backdoored{_towards(verdict)}.{confidence}"


def _defended(defense: Figures) -> Iterator[str]:
    """What a defense did to somebody's own model; whether it removed a backdoor cannot be measured there."""
    name, verdict = defense["name"], defense["verdict"]
    accuracy, agreement = defense["clean_accuracy"], defense.get("agreement")
    parts: list[str] = []
    if agreement is not None:
        parts.append(f"{percent(agreement)}% of the clean images keep their class")
    if accuracy is not None:
        parts.append(f"accuracy on them is {percent(accuracy)}%")
    if parts:
        yield f"{name}: {', '.join(parts)}."
    if verdict:
        says = f"backdoored{_towards(verdict)}" if verdict["backdoored"] else "not backdoored"
        yield f"{name}: says that the model is {says}."
    if defense["isolation"]:
        yield f"{name}: set {defense['isolation']['isolated']:,} training images aside."


def _towards(verdict: Figures) -> str:
    if verdict["target"] is None:
        return ""
    name = verdict.get("class_name")
    return f" towards class {verdict['target']}{f' ({name})' if name else ''}"
