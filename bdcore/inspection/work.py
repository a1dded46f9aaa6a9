"""Hand a model and images of the user's own to defenses, and write down what came of it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from bdcore.analysis.page import render
from bdcore.analysis.pictures import contact_sheet, trigger_picture
from bdcore.analysis.runs import read_run
from bdcore.artifacts import Labelled, Outcome, Trigger, Triggered, Verdict
from bdcore.config import Chosen
from bdcore.context import Context
from bdcore.contract import Defense
from bdcore.errors import DefenseError
from bdcore.inspection.calibration import calibrated
from bdcore.inspection.output import check_output, folder_of, output_of, run_id, unfinished, write_model
from bdcore.inspection.request import Request
from bdcore.inspection.subject import Subject, read_subject
from bdcore.observing import observe
from bdcore.ops import put_trigger
from bdcore.ops.registration import implementation
from bdcore.plugins import Host, blamed
from bdcore.record import SCHEMA, check_folder, described, made_with, write_run_folder
from bdcore.stages.defend import defend
from bdcore.stages.evaluate import answers, features, recovered, sampled, share
from bdcore.staging import Result, Stages, form, identity, instance, oracles, pack, restore, triggers
from bdcore.store import Entry, sha256_file, write_bytes

_SHOWN = 8
"""Images on which a recovered trigger is drawn."""


def scan(request: Request, host: Host) -> dict[str, Any]:
    """Is the model backdoored, towards which class, by what trigger?

    Returns:
        The record, which also stands in the folder's record.json.

    Raises:
        BdcoreError: where there can be no answer.
    """
    return _Work(request, host).done()


def defend_own(request: Request, host: Host) -> dict[str, Any]:
    """Put every defense of the request on the model as it came, and write what each returns.

    Returns, Raises:
        As `scan`.
    """
    return _Work(request, host).done()


class _Work(Stages):
    """One inspection: the subject read, the defenses' stages, what they are worth on the user's own images."""

    def __init__(self, request: Request, host: Host) -> None:
        settings = request.settings
        super().__init__(host, settings.device, settings.precision, settings.seed, compile=False)
        self.request = request

    def done(self) -> dict[str, Any]:
        """All of it, told to the observers."""
        request, host, folder = self.request, self.host, folder_of(self.request)
        check_folder(folder, request.record())
        check_output(request, folder)
        for chosen in request.observers:
            observe(host, chosen)
        try:
            host.hook.bdcore_run_started(config=request.record(), run_id=run_id(request), folder=folder)
            subject = self.subject()
            record = self.scan(subject, folder) if request.command == "scan" else self.defend(subject, folder)
        except BaseException as error:
            host.hook.bdcore_run_failed(error=error)
            raise
        host.hook.bdcore_run_finished(record=record)
        return record

    def subject(self) -> Subject:
        """Model and images."""
        with self.told("data") as told:
            told.cached = False
            return read_subject(self.request, self.context("data"))

    def scan(self, subject: Subject, folder: Path) -> dict[str, Any]:
        """The verdict of the one defense, and the triggers that it rests on."""
        (chosen,) = self.request.defenses
        entry = self.outcome(chosen, subject)
        verdict = entry.payload["verdict"]
        if verdict is None or not (verdict["backdoored"] or verdict["evidence"]):
            raise DefenseError(
                f"{chosen.plugin.name} cannot judge this model: it gave no evidence for or against a backdoor."
            )
        found = Verdict(verdict["backdoored"], verdict["target"], tuple(verdict["evidence"]))
        confidence, calibration = calibrated(chosen, found)
        record = {
            **self.head(subject),
            "verdict": {
                **asdict(found),
                "class_name": subject.class_name(found.target),
                "confidence": confidence,
            },
            "calibration": calibration,
            "triggers": [asdict(one) for one in self.worth(entry, subject, None)],
            "notes": entry.payload["notes"],
            **entry.payload["cost"],
        }
        return self.write(folder, record, {chosen.plugin.name: entry}, {}, subject)

    def defend(self, subject: Subject, folder: Path) -> dict[str, Any]:
        """What every defense returns, its model written where the user wants it."""
        rows: list[dict[str, Any]] = []
        entries: dict[str, Entry] = {}
        models: dict[str, nn.Module] = {}
        for chosen in self.request.defenses:
            name = chosen.plugin.name
            entry = entries[name] = self.outcome(chosen, subject)
            if "model" in entry.files:
                models[name] = restore(entry, subject.victim.arch).to(self.device)
            rows.append(self.row(name, entry, models.get(name), subject))
        paths = {name: output_of(self.request, name) for name in models}
        for row in rows:
            path = paths.get(row["name"])
            row["model"] = path and {"path": str(path), "sha256": write_model(path, models[row["name"]], subject)}
        record = self.write(folder, {**self.head(subject), "defenses": rows}, entries, models, subject)
        for path in paths.values():
            unfinished(path).replace(path)
        return record

    def outcome(self, chosen: Chosen, subject: Subject) -> Entry:
        """What a defense makes of the subject, from the cache or anew."""
        defense = cast(Defense, instance(chosen))
        command = self.request.command
        handed = {"clean": subject.clean, "suspect": subject.suspect}
        depends = {
            "command": command,
            "defense": identity(chosen),
            "victim": subject.victim.fingerprint if "model" in defense.needs else None,
            "arch": form(subject.victim.arch),
            **{part: data.fingerprint for part, data in handed.items() if data and part in defense.needs},
            **self.base,
        }
        nothing = Labelled(torch.empty(0, *subject.victim.arch.shape, dtype=torch.uint8), torch.empty(0).long())

        def build_it(context: Context) -> Result:
            with blamed(chosen.plugin):
                outcome: Outcome = defend(
                    defense,
                    subject.victim,
                    subject.clean or nothing,
                    subject.suspect or nothing,
                    context,
                    inspect=command == "scan",
                )
            return pack(outcome, context)

        return self.stage(f"{command} {chosen.plugin.name}", depends, build_it)

    def row(self, name: str, entry: Entry, model: nn.Module | None, subject: Subject) -> dict[str, Any]:
        """What a defense says, and what its model does on the clean images, which it has seen."""
        verdict = entry.payload["verdict"]
        accuracy = agreement = None
        if model is not None and subject.clean is not None:
            after = answers(model, subject.clean.images, self.context("evaluate"))
            accuracy = share(after == subject.clean.labels) if subject.labelled else None
            agreement = share(after == subject.predicted) if subject.predicted is not None else None
        named = verdict and {**verdict, "class_name": subject.class_name(verdict["target"])}
        isolation = None
        if "suspects" in entry.files:
            isolated = len(entry.tensors("suspects")["index"])
            isolation = {"isolated": isolated, "list": _list_of(name) if subject.suspect_files else None}
        return {
            "name": name,
            "clean_accuracy": accuracy,
            "agreement": agreement,
            "verdict": named,
            "isolation": isolation,
            "triggers": [asdict(one) for one in self.worth(entry, subject, model)],
            "notes": entry.payload["notes"],
            **entry.payload["cost"],
        }

    def worth(self, entry: Entry, subject: Subject, after: nn.Module | None) -> list["_Found"]:
        """What the recovered triggers do to the clean images: on the model as it came, and on the purified one."""
        those = triggers(entry)
        if not those or subject.clean is None:
            return []
        context = self.context("evaluate triggers")
        before = recovered(subject.victim.model, subject.clean, those, context)
        left = recovered(after, subject.clean, those, context) if after is not None else [None] * len(those)
        return [
            _Found(one.target, subject.class_name(one.target), one.asr, then.asr if then else None, one.size)
            for one, then in zip(before, left, strict=True)
        ]

    def head(self, subject: Subject) -> dict[str, Any]:
        """What every record of an inspection begins with."""
        request, arch = self.request, subject.victim.arch
        told = {chosen.plugin.name: oracles(chosen) for chosen in request.defenses}
        clean, suspect = subject.clean, subject.suspect
        return {
            "schema": SCHEMA,
            "command": request.command,
            "run": {"id": run_id(request)},
            "config": request.record(),
            "seed": request.settings.seed,
            "plugins": described(request.defenses, told),
            "model": {
                "path": str(request.model) if request.model else None,
                "sha256": sha256_file(request.model) if request.model else None,
                "form": subject.checkpoint.form if subject.checkpoint else None,
                "arch": asdict(arch),
                "normalisation": subject.normalisation,
                "classes": list(subject.classes),
                "clean_accuracy": subject.accuracy,
            },
            "clean": clean
            and {
                "source": request.clean,
                "images": len(clean),
                "classes": len(clean.labels.unique()),
                "labelled": subject.labelled,
                "fingerprint": clean.fingerprint,
            },
            "suspect": suspect
            and {"source": request.suspect, "images": len(suspect), "fingerprint": suspect.fingerprint},
            "curves": self.curves,
            "warnings": self.warnings,
            **made_with(self.device, self.precision, implementation(self.device.type)),
        }

    def write(
        self,
        folder: Path,
        record: Mapping[str, Any],
        entries: Mapping[str, Entry],
        models: Mapping[str, nn.Module],
        subject: Subject,
    ) -> dict[str, Any]:
        """The folder with triggers, suspects, pictures, features, the record and, drawn from these, the report; beside
        the suspects' places their files, where each image is one."""
        files = {
            f"{name}-{part}": entry.path(part)
            for name, entry in entries.items()
            for part in entry.files
            if part != "model"
        }
        pictures: dict[str, Image.Image] = {}
        first: Trigger | None = None
        for name, entry in entries.items():
            for trigger in triggers(entry):
                pictures[f"{name}-class{trigger.target}"] = trigger_picture(trigger)
                first = first or trigger
                if subject.clean is not None:
                    shown = subject.clean.images[subject.clean.labels != trigger.target][:_SHOWN]
                    if len(shown):
                        pictures[f"{name}-class{trigger.target}-images"] = contact_sheet(
                            shown, self.with_trigger(trigger, shown)
                        )
        tensors = {"features": self.features(first, models, subject)}
        kept = {name: content for name, content in tensors.items() if content}
        complete = write_run_folder(folder, record, files, kept, subject.victim.arch, pictures)
        for name, entry in entries.items():
            if "suspects" in entry.files and subject.suspect_files:
                write_bytes(folder / _list_of(name), _files_suspected(entry, subject.suspect_files))
        write_bytes(folder / "report.html", render([read_run(folder)]).html.encode("utf-8", "replace"))
        return complete

    def with_trigger(self, trigger: Trigger, images: Tensor) -> Tensor:
        """The same images with a recovered trigger, uint8."""
        generator = self.context("pictures").generator("triggers")
        return (put_trigger(trigger.to(torch.device("cpu")), images, generator) * 255).round().byte()

    def features(self, trigger: Trigger | None, models: Mapping[str, nn.Module], subject: Subject) -> dict[str, Tensor]:
        """Penultimate features of some clean images, and of those with the recovered trigger, before and after."""
        clean = subject.clean
        if clean is None or subject.checkpoint is None:
            return {}
        few = sampled(clean, None)
        if trigger is not None:
            others = few["labels"] != trigger.target
            images, labels = few["clean"][others], few["labels"][others]
            if len(images):
                carried = Triggered(self.with_trigger(trigger, images), labels, torch.full_like(labels, trigger.target))
                few = sampled(Labelled(few["clean"], few["labels"]), carried)
        found: dict[str, Tensor] = {}
        context = self.context("evaluate features")
        for name, model in {"victim": subject.victim.model, **models}.items():
            found |= {f"{name}.{part}": value for part, value in features(model, few, context).items()}
        labels = {name: value for name, value in few.items() if name.endswith("labels")}
        return {**found, **labels} if found else {}


def _list_of(defense: str) -> str:
    return f"{defense}-suspects.txt"


def _files_suspected(entry: Entry, files: Sequence[str]) -> bytes:
    """The files that a defense set aside, a line each, the most suspicious first where it gave scores."""
    tensors = entry.tensors("suspects")
    index = tensors["index"]
    if "scores" in tensors:
        index = index[tensors["scores"][index].argsort(descending=True, stable=True)]
    places: list[int] = index.tolist()
    return b"".join(os.fsencode(files[place]) + b"\n" for place in places)


@dataclass(frozen=True)
class _Found:
    """A recovered trigger: its class, the share of the other classes' images that it sends there before and after the
    defense, and its size in pixels."""

    target: int
    class_name: str | None
    asr: float | None
    asr_after: float | None
    size: float
