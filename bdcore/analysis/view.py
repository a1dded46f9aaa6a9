"""What a page says of one run, section by section, and what it leaves out and why."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdcore.analysis.drawing import Drawing
from bdcore.analysis.figures import Row, curves, embedding, evidence, isolation, scores
from bdcore.analysis.intervals import Interval, wilson
from bdcore.analysis.records import Cost, Defended, Record, Used, Victim
from bdcore.analysis.repeat import command
from bdcore.analysis.runs import Run
from bdcore.analysis.summary import summary

_PHASES = 8
"""Phases of one stage whose curves are drawn, the last ones."""

AS_IT_CAME = "as it came"
"""Name of somebody's own model before any defense."""

_NEEDS = {
    "model": "the suspicious model",
    "clean": "a few clean images",
    "suspect": "the training set, perhaps poisoned",
    "arch": "the architecture",
}


@dataclass(frozen=True)
class Measured:
    """A share of 1 with its interval, None where the record does not say how many samples it is of."""

    share: float
    interval: Interval | None


@dataclass(frozen=True)
class Classifier:
    """A row of the scores: the victim, or what a defense made of it."""

    name: str
    accuracy: Measured | None
    asr: Measured | None
    agreement: Measured | None
    scores: Victim | Defended
    defense: Defended | None
    oracle: tuple[str, ...]


@dataclass(frozen=True)
class Told:
    """What a defense was given."""

    name: str
    given: tuple[str, ...]
    oracle: tuple[str, ...]


@dataclass(frozen=True)
class Shot:
    """A picture of the run folder."""

    png: bytes
    width: int
    title: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Section:
    """Figures under one heading, or why there are none."""

    heading: str
    lead: str
    drawings: tuple[Drawing, ...]
    missing: str


@dataclass(frozen=True)
class View:
    """One run, ready to be laid out."""

    anchor: str
    title: str
    subtitle: str
    record: Record
    sentences: tuple[str, ...]
    classifiers: tuple[Classifier, ...]
    interval_note: str
    told: tuple[Told, ...]
    shots: tuple[Shot, ...]
    shots_missing: str
    sections: tuple[Section, ...]
    scores: Drawing | None
    costs: tuple[tuple[str, Cost], ...]
    command: str

    @property
    def drawings(self) -> list[Drawing]:
        """Every figure."""
        found = [drawing for section in self.sections for drawing in section.drawings]
        return [self.scores, *found] if self.scores else found


def view(run: Run, anchor: str) -> View:
    """What to say of a run; `anchor` is unique on its page."""
    record = run.record
    rows = classifiers(record)
    measured = [
        Row(row.name, *_parts(row.accuracy), *_parts(row.asr)) for row in rows if row.accuracy or row.asr
    ]  # fmt: skip
    return View(
        anchor=anchor,
        title=title(record),
        subtitle=_subtitle(record),
        record=record,
        sentences=(*summary(run.raw), *_warned(record)),
        classifiers=rows,
        interval_note=_interval_note(record),
        told=tuple(_told(record)),
        shots=tuple(_shots(run)),
        shots_missing=_shots_missing(run),
        sections=tuple(_sections(run)),
        scores=scores(measured) if measured else None,
        costs=tuple(_costs(record)),
        command=command(record.command, record.config),
    )


def title(record: Record) -> str:
    """What the run is about, in words."""
    defenses = _listed([defense.name for defense in record.defenses])
    if record.command == "scan":
        return f"Scan of {_file(record)}"
    if record.command == "defend":
        return f"{defenses} on {_file(record)}"
    assert record.dataset
    attacks = [plugin.name for plugin in record.plugins if plugin.kind == "attack"]
    attack = attacks[0] if attacks else "no attack"
    return f"{f'{defenses} against {attack}' if defenses else attack} on {record.dataset.name}"


def classifiers(record: Record) -> tuple[Classifier, ...]:
    """The victim and what each defense made of it, with intervals where the record says of how many images."""
    oracles = {plugin.name: plugin.oracle for plugin in record.plugins}
    tested = triggered = None
    if record.dataset:
        tested, triggered = record.dataset.test, record.poison.triggered if record.poison else None
    elif record.clean:
        tested = record.clean.images
    rows: list[Classifier] = []
    if record.victim:
        victim = record.victim
        accuracy = _measured(victim.clean_accuracy, tested)
        rows.append(Classifier("no defense", accuracy, _measured(victim.asr, triggered), None, victim, None, ()))
    if record.model and record.model.clean_accuracy is not None:
        share = record.model.clean_accuracy
        came = Defended(name=AS_IT_CAME, clean_accuracy=share, verdict=None, isolation=None, triggers=())
        rows.append(Classifier(AS_IT_CAME, _measured(share, tested), None, None, came, None, ()))
    for done in record.defenses:
        rows.append(
            Classifier(
                done.name,
                _measured(done.clean_accuracy, tested),
                _measured(done.asr, triggered),
                _measured(done.agreement, tested),
                done,
                done,
                oracles.get(done.name, ()),
            )
        )
    return tuple(rows)


def _measured(share: float | None, count: int | None) -> Measured | None:
    return None if share is None else Measured(share, wilson(share, count) if count else None)


def _parts(measured: Measured | None) -> tuple[float | None, Interval | None]:
    return (measured.share, measured.interval) if measured else (None, None)


def _subtitle(record: Record) -> str:
    if record.command == "run":
        assert record.dataset
        data = record.dataset
        settings: Any = record.config.get("run")
        model = settings.get("model") if isinstance(settings, dict) else None
        parts = [
            str(model or ""),
            f"seed {record.seed}",
            f"{data.train:,} training and {data.test:,} test images of {data.classes} classes",
        ]
        if record.poison:
            parts.append(f"{record.poison.count:,} training images poisoned ({100 * record.poison.rate:.1f}%)")
        return " · ".join(part for part in parts if part)
    parts = [str(record.model.arch.get("name", "")) if record.model else ""]
    parts += [f"{given.images:,} {what} images" for what, given in
              (("clean", record.clean), ("suspect", record.suspect)) if given]  # fmt: skip
    return " · ".join(part for part in parts if part)


def _interval_note(record: Record) -> str:
    if record.command == "scan":
        return ""
    where = "test images" if record.command == "run" else "the clean images"
    note = f"Small figures are 95% Wilson intervals over {where}; they say nothing of what another seed would give."
    if record.victim and record.victim.asr is not None and not (record.poison and record.poison.triggered):
        note += " The record does not say how many triggered images there were, so attack success has no interval."
    return note


def _costs(record: Record) -> Iterator[tuple[str, Cost]]:
    if record.attack:
        yield "attack", record.attack
    if record.victim:
        yield "victim", record.victim
    if record.command == "scan":
        yield "scan", record
    for done in record.defenses:
        yield done.name, done


def _told(record: Record) -> Iterator[Told]:
    for plugin in record.plugins:
        if plugin.kind == "defense":
            yield Told(plugin.name, tuple(_given(record, plugin)), plugin.oracle)


def _given(record: Record, plugin: Used) -> Iterator[str]:
    if plugin.needs is None:
        yield "not recorded: an older bdcore wrote this"
        return
    settings: Any = record.config.get("run")
    share = settings.get("clean_fraction") if isinstance(settings, dict) else None
    for need in plugin.needs:
        if need == "clean" and record.clean:
            yield f"{record.clean.images:,} clean images"
        elif need == "clean" and record.dataset and isinstance(share, int | float):
            yield f"clean images: {100 * share:.3g}% of the training set, about {record.dataset.train * share:,.0f}"
        else:
            yield _NEEDS.get(need, need)


def _shots(run: Run) -> Iterator[Shot]:
    for name, png in run.pictures.items():
        width = int.from_bytes(png[16:20], "big")  # of the header, which was checked when it was read
        found = re.fullmatch(r"(.+)-class(\d+)(-images)?", name)
        if name == "attack":
            alt = "contact sheet: test images, the same with the trigger, and what the trigger changes"
            yield Shot(png, width, "The attack", alt, "Test images, the same triggered, and the difference, enhanced.")
        elif found and found[3]:
            alt = (
                f"contact sheet: clean images, the same with the trigger that {found[1]} recovered, and what it changes"
            )
            yield Shot(
                png,
                width,
                f"{found[1]}: class {found[2]}, on images",
                alt,
                "Clean images, the same with what was recovered.",
            )
        elif found:
            alt = f"trigger towards class {found[2]} that {found[1]} recovered"
            yield Shot(png, width, f"{found[1]}: class {found[2]}", alt, _worth(run.record, found[1], int(found[2])))
        else:
            yield Shot(png, width, name, f"picture {name} of the run", "")


def _worth(record: Record, defense: str, target: int) -> str:
    lists = [done.triggers for done in record.defenses if done.name == defense] or [record.triggers]
    for trigger in lists[0]:
        if trigger.target == target:
            success = "" if trigger.asr is None else f", sends {100 * trigger.asr:.1f}% of images there"
            if trigger.asr_after is not None:
                success += f", after the defense {100 * trigger.asr_after:.1f}%"
            return f"Recovered trigger towards class {target}: changes {trigger.size:,.1f} pixels{success}."
    return f"Recovered trigger towards class {target}."


def _shots_missing(run: Run) -> str:
    return "" if run.pictures else "The record names no pictures: nothing was triggered and no trigger recovered."


def _warned(record: Record) -> Iterator[str]:
    """What the stages warned of, as `summary` warns."""
    for stage, messages in record.warnings.items():
        yield from (f"warning: {stage}: {message}" for message in messages)


def _sections(run: Run) -> Iterator[Section]:
    record = run.record
    old = "schema" in run.raw and run.raw["schema"] == 1
    yield _features(run, old)
    suspected = [done for done in record.defenses if done.isolation]
    if suspected and record.command == "run":
        yield _isolation(run, old)
    judged = [(done.name, done.verdict) for done in record.defenses if done.verdict]
    judged += [("scan", record.verdict)] if record.verdict else []
    if judged:
        drawn = [evidence(name, found.evidence, found.target) for name, found in judged if found.evidence]
        yield Section(
            "Evidence against each class",
            "What the verdict rests on; higher is more suspicious, and the scale is each method's own.",
            tuple(drawn),
            "" if drawn else "The verdict came without evidence by class.",
        )
    yield _curves(record, old)


def _features(run: Run, old: bool) -> Section:
    heading = "Features before and after"
    if not run.features:
        why = (
            "This record was written by an older bdcore, which kept no features."
            if old
            else "No features were kept: no network here ends with a linear layer, or no test set was there to show."
        )
        return Section(heading, "", (), why)
    target = _target(run.record)
    drawn: list[Drawing] = []
    broken: list[str] = []
    order = ["victim", *(done.name for done in run.record.defenses)]
    for model in sorted(run.features, key=lambda one: order.index(one) if one in order else len(order)):
        features = run.features[model]
        if not (np.isfinite(features.clean).all() and np.isfinite(features.triggered).all()):
            broken.append(model)
            continue
        drawn.append(embedding(model, features, run.labels, run.triggered_labels, target))
    lead = (
        "The layer before the classifier, in the plane by t-SNE: what lies together is alike to the network, while "
        "distances between groups mean little. Numbers stand at the classes. Which class the last layer then names is "
        "what attack success counts; it can differ from the company that triggered images are in."
    )
    missing = f"Features that are no finite numbers: {', '.join(broken)}." if broken else ""
    return Section(heading, lead, tuple(drawn), missing)


def _target(record: Record) -> int | None:
    """The attacker's class, where it is a single one."""
    if record.victim is None or record.victim.target_class_accuracy is None:
        return None
    attack: Any = record.config.get("attack")
    target = attack.get("target") if isinstance(attack, dict) else None
    return target if isinstance(target, int) else None


def _isolation(run: Run, old: bool) -> Section:
    heading = "Who was set aside"
    if run.poisoned is None:
        why = "which samples were poisoned" if not old else "which samples were poisoned: an older bdcore wrote it"
        return Section(heading, "", (), f"No histogram: the record does not keep {why}.")
    drawn: list[Drawing] = []
    silent: list[str] = []
    for name, (index, given) in run.suspects.items():
        if given is None or run.poisoned.max(initial=-1) >= len(given):
            silent.append(name)
        else:
            drawn.append(isolation(name, given, run.poisoned, index))
    missing = f"No scores of all samples to draw: {', '.join(silent)}." if silent else ""
    lead = "Scores of all training images; a good ranking holds the poisoned ones apart. Counts are logarithmic."
    return Section(heading, lead if drawn else "", tuple(drawn), missing)


def _curves(record: Record, old: bool) -> Section:
    heading = "Loss and accuracy while training"
    drawn: list[Drawing] = []
    left_out = 0
    for stage, epochs in record.curves.items():
        phases = {epoch.phase: [one for one in epochs if one.phase == epoch.phase] for epoch in epochs}
        left_out += max(0, len(phases) - _PHASES)
        for phase, found in list(phases.items())[-_PHASES:]:
            drawn.append(curves(stage, phase, sorted(found, key=lambda one: one.epoch)))
    if not drawn:
        why = "an older bdcore, which kept no curves, wrote this record" if old else "nothing was trained"
        return Section(heading, "", (), f"No curves: {why}.")
    missing = f"{left_out} further phases are in record.json." if left_out else ""
    return Section(heading, "Means over each epoch's batches, as training saw them.", tuple(drawn), missing)


def _file(record: Record) -> str:
    if record.model and record.model.path:
        return re.split(r"[/\\]", record.model.path)[-1]
    return f"a new {record.model.arch.get('name', 'model')}" if record.model else "a new model"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
