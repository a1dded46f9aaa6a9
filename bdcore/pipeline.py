"""The stages in order, each answered from the cache where nothing that it depends on has changed.

    data -> (surrogate ->) poison -> train -> evaluate the victim -> for each defense: defend -> evaluate

Two runs that share a victim train it once.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from bdcore.analysis.pictures import contact_sheet, trigger_picture
from bdcore.artifacts import (
    Architecture,
    Dataset,
    Labelled,
    Poisoned,
    Recovered,
    Scores,
    Triggered,
    Victim,
    fingerprint,
)
from bdcore.config import Chosen, RunConfig
from bdcore.context import Context
from bdcore.contract import Attack, AttackInput, DatasetPlugin, Defense
from bdcore.models import metered
from bdcore.observing import observe
from bdcore.ops.registration import implementation
from bdcore.plugins import Host, blamed
from bdcore.record import Defended, check_folder, make_record, total_cost, write_run_folder
from bdcore.stages import data
from bdcore.stages.defend import defend
from bdcore.stages.evaluate import evaluate, features, recovered, sampled
from bdcore.stages.poison import check, poison, poison_all, prepare
from bdcore.stages.train import FINE_TUNING, fine_tune, train
from bdcore.staging import (
    Result,
    Stages,
    code,
    cost,
    form,
    identity,
    instance,
    oracles,
    pack,
    restore,
    triggers,
)
from bdcore.store import Entry, digest


def run(config: RunConfig, host: Host) -> dict[str, Any]:
    """Do what `config` says, or find it done; write the run folder.

    Returns:
        The record, which also stands in the folder's record.json.

    Raises:
        BdcoreError: where the run cannot be done; what was finished stays cached, and checkpoints too.
    """
    folder = run_folder(config)
    check_folder(folder, config.record())
    for chosen in config.observers:
        observe(host, chosen)
    try:
        host.hook.bdcore_run_started(config=config.record(), run_id=run_id(config), folder=folder)
        record = _Run(config, host).record(folder)
    except BaseException as error:
        host.hook.bdcore_run_failed(error=error)
        raise
    host.hook.bdcore_run_finished(record=record)
    return record


def poisoned(config: RunConfig, host: Host) -> tuple[Dataset, Poisoned]:
    """The data set of a run, and what its attack makes of it, from the cache or anew; no victim is trained, but where
    the attacker does that.

    Raises:
        BdcoreError: as `run`.
    """
    parts = _Run(config, host)
    dataset, _ = parts.loaded()
    return dataset, parts.attacked(dataset)[0]


def run_id(config: RunConfig) -> str:
    """A name for the run: what it is about, and a hash of its options."""
    names = [config.dataset.plugin.name, config.attack.plugin.name if config.attack else "clean", config.run.model]
    names += [chosen.plugin.name for chosen in config.defenses]
    plain = [re.sub(r"[^\w=.-]+", "_", name) for name in names]  # a model of one's own is MODULE:FUNCTION
    return "-".join([*plain, f"seed{config.run.seed}", digest(config.record())[:8]])


def run_folder(config: RunConfig) -> Path:
    """Where the run is written: `config.out`, or runs/ID in the working folder."""
    return config.out or Path("runs") / run_id(config)


class _Run(Stages):
    """One run: its settings resolved, and the stages as methods that return what is cached or build it."""

    def __init__(self, config: RunConfig, host: Host) -> None:
        super().__init__(host, config.run.device, config.run.precision, config.run.seed, config.run.compile)
        self.config = config

    def record(self, folder: Path) -> dict[str, Any]:
        """All stages, then the run folder."""
        config = self.config
        dataset, clean = self.loaded()
        poisoned, trained, arch, spent = self.attacked(dataset)
        if trained is None:
            trained = self.trained("train", poisoned.train, arch)
        victim_scores = self.scores(trained, trained, arch, dataset.test, poisoned)
        defended: list[Defended] = []
        for chosen in config.defenses:
            entry = self.defended(chosen, trained, arch, clean, poisoned.train)
            scores = self.scores(entry, trained, arch, dataset.test, poisoned)
            found = self.recovered(entry, trained, arch, dataset.test)
            defended.append(Defended(chosen, entry, scores, found))
        record = make_record(
            run_id(config), config, {chosen.plugin.name: oracles(chosen) for chosen in config.defenses}, dataset,
            poisoned, spent, trained, victim_scores, defended, self.device, self.precision,
            implementation(self.device.type), self.curves, self.warnings,
        )  # fmt: skip
        files = {"victim": trained.path("model")}
        for done in defended:
            for part in done.entry.files:
                plugin = done.chosen.plugin.name
                files[plugin if part == "model" else f"{plugin}-{part}"] = done.entry.path(part)
        tensors = self.features(trained, defended, arch, dataset.test, poisoned)
        if poisoned.triggered is not None:
            tensors["poison"] = {"index": poisoned.poisoned.nonzero()[:, 0]}
        return write_run_folder(folder, record, files, tensors, arch, _pictures(dataset.test, poisoned, defended))

    def loaded(self) -> tuple[Dataset, Labelled]:
        """The data set, and the defender's clean samples."""
        config = self.config
        with self.told("data") as told:
            told.cached = False
            with blamed(config.dataset.plugin):
                plugin = cast(DatasetPlugin, instance(config.dataset))
                dataset = data.load(plugin, config.dataset_argument)
            return dataset, data.clean_set(dataset, config.run.clean_fraction, self.context("data"))

    def attacked(self, dataset: Dataset) -> tuple[Poisoned, Entry | None, Architecture, dict[str, float | int] | None]:
        """The training set as the victim sees it, of which only what the attack changes is stored; the victim where the
        attacker made it; the architecture; what the attack cost, an attacker's own classifier included."""
        clean, run = dataset.train, self.config.run
        if self.config.attack is None:
            untouched = torch.zeros(len(clean), dtype=torch.bool)
            arch = data.architecture(run.model, clean, dataset.classes)
            return Poisoned(clean, untouched, None, None), None, arch, None
        chosen = self.config.attack
        attack = cast(Attack, instance(chosen))
        kind = type(attack)
        fine_tuned = run.victim == "fine_tuned"
        tuning = FINE_TUNING.model_copy(update={"lr": run.fine_tuning_lr, "epochs": run.fine_tuning_epochs})
        arch = data.architecture(run.model, clean, dataset.classes)
        depends = {"data": dataset.fingerprint, "attack": identity(chosen), "seed": run.seed}
        depends |= {"bdcore": code(), "torch": torch.__version__, "operators": implementation("cpu")}
        if fine_tuned or kind.prepare is not Attack.prepare:
            depends |= {
                "arch": form(arch),
                "recipe": self.config.train.model_dump(),
                "tuned": tuning.model_dump() if fine_tuned else None,
                **self.base,
            }
        with blamed(chosen.plugin):
            check(dataset, attack)  # before anything is trained for it
        # Also where the cache has the poison: the record names its curves and cost.
        surrogate = self.trained("surrogate", clean, arch) if fine_tuned or kind.surrogate else None

        def build_it(context: Context) -> Result:
            known = restore(surrogate, arch).to(self.device) if surrogate else None
            given = AttackInput(clean, dataset.classes, arch, self.config.train, known if kind.surrogate else None)
            with metered(context.meter):
                with blamed(chosen.plugin):
                    victim = prepare(dataset, attack, given, context)
                    made = poison(dataset, attack, context)
                if fine_tuned:
                    assert known is not None
                    with blamed(chosen.plugin):
                        poisons, chances = poison_all(dataset, attack, context)
                    victim = fine_tune(known, clean, poisons, chances, tuning, context)
            changed = made.poisoned.nonzero()[:, 0]
            tensors = {"index": changed, "images": made.train.images[changed], "labels": made.train.labels[changed]}
            assert made.triggered is not None
            files = {"poison": tensors, "triggered": made.triggered.tensors()}
            if victim is not None:
                files["model"] = victim.state_dict()
            return {"target": made.target, "cost": cost(context)}, files

        entry = self.stage("poison", depends, build_it)
        changes = entry.tensors("poison")
        images, labels = clean.images.clone(), clean.labels.clone()
        images[changes["index"]] = changes["images"]
        labels[changes["index"]] = changes["labels"]
        flags = torch.zeros(len(labels), dtype=torch.bool)
        flags[changes["index"]] = True
        triggered = Triggered(**entry.tensors("triggered"))
        poisoned = Poisoned(Labelled(images, labels), flags, triggered, entry.payload["target"])
        spent = total_cost([one.payload["cost"] for one in (surrogate, entry) if one])
        if "model" in entry.files:
            return poisoned, entry, arch, spent
        # Whoever trains on a poisoned set normalises by what he sees.
        return poisoned, None, data.architecture(run.model, poisoned.train, dataset.classes), spent

    def trained(self, stage: str, data_set: Labelled, arch: Architecture) -> Entry:
        """The parameters of a classifier trained by the run's recipe: the victim's, or those of an attacker's own."""
        recipe = self.config.train
        depends = {"data": data_set.fingerprint, "arch": form(arch), "recipe": recipe.model_dump(), **self.base}

        def build_it(context: Context) -> Result:
            with metered(context.meter):
                victim = train(data_set, arch, recipe, context)
            return {"cost": cost(context)}, {"model": victim.model.state_dict()}

        return self.stage(stage, depends, build_it)

    def defended(self, chosen: Chosen, trained: Entry, arch: Architecture, clean: Labelled, suspect: Labelled) -> Entry:
        """What a defense made of the victim."""
        defense = cast(Defense, instance(chosen))
        depends = {
            "defense": identity(chosen),
            "victim": trained.sha256("model"),
            "arch": form(arch),
            "clean": clean.fingerprint,
            "suspect": suspect.fingerprint if "suspect" in defense.needs else None,
            **self.base,
        }

        def build_it(context: Context) -> Result:
            victim = Victim(restore(trained, arch), arch)
            with blamed(chosen.plugin):
                outcome = defend(defense, victim, clean, suspect, context)
            return pack(outcome, context)

        return self.stage(f"defend {chosen.plugin.name}", depends, build_it)

    def scores(self, entry: Entry, trained: Entry, arch: Architecture, test: Labelled, poisoned: Poisoned) -> Scores:
        """Scores of the model in `entry`, or of the victim where a defense left it alone."""
        if "model" not in entry.files:
            entry = trained
        triggered = poisoned.triggered
        depends = {
            "model": entry.sha256("model"),
            "arch": form(arch),
            "test": test.fingerprint,
            "triggered": fingerprint(triggered.tensors()) if triggered else None,
            "target": poisoned.target,
            **{name: self.base[name] for name in ("bdcore", "torch", "device", "operators")},
        }

        def build_it(context: Context) -> Result:
            scores = evaluate(restore(entry, arch), test, triggered, poisoned.target, context)
            return asdict(scores), {}

        return Scores(**self.stage("evaluate", depends, build_it).payload)

    def recovered(self, entry: Entry, trained: Entry, arch: Architecture, test: Labelled) -> list[Recovered]:
        """What the triggers in `entry` are worth on the victim."""
        those = triggers(entry)
        if not those:
            return []
        depends = {
            "triggers": entry.sha256("triggers"),
            "targets": entry.payload["targets"],
            "model": trained.sha256("model"),
            "arch": form(arch),
            "test": test.fingerprint,
            **{name: self.base[name] for name in ("bdcore", "torch", "device", "operators", "seed")},
        }

        def build_it(context: Context) -> Result:
            found = recovered(restore(trained, arch), test, those, context)
            return {"triggers": [asdict(one) for one in found]}, {}

        entry = self.stage("evaluate triggers", depends, build_it)
        return [Recovered(**one) for one in entry.payload["triggers"]]

    def features(
        self, trained: Entry, defended: Sequence[Defended], arch: Architecture, test: Labelled, poisoned: Poisoned
    ) -> dict[str, dict[str, Tensor]]:
        """What each classifier makes of some test images, clean and triggered, under the name "features"; nothing where
        the architecture has no penultimate features."""
        few = sampled(test, poisoned.triggered)
        found: dict[str, Tensor] = {}
        models = {"victim": trained} | {one.chosen.plugin.name: one.entry for one in defended}
        for name, entry in models.items():
            if "model" not in entry.files:
                continue
            depends = {
                "model": entry.sha256("model"),
                "arch": form(arch),
                "images": fingerprint(few),
                **{name: self.base[name] for name in ("bdcore", "torch", "device", "operators")},
            }

            def build_it(context: Context, entry: Entry = entry) -> Result:
                seen = features(restore(entry, arch), few, context)
                return {}, {"features": seen} if seen else {}

            kept = self.stage("evaluate features", depends, build_it)
            if "features" in kept.files:
                found |= {f"{name}.{part}": value for part, value in kept.tensors("features").items()}
        if not found:
            return {}
        labels = {name: value for name, value in few.items() if name.endswith("labels")}
        return {"features": {**found, **labels}}


def _pictures(test: Labelled, poisoned: Poisoned, defended: list[Defended]) -> dict[str, Image.Image]:
    """What the trigger does to the first test images, and the triggers that defenses recovered."""
    pictures: dict[str, Image.Image] = {}
    triggered = poisoned.triggered
    if triggered is not None and triggered.source is not None:
        pictures["attack"] = contact_sheet(test.images[triggered.source[:8]], triggered.images[:8])
    for done in defended:
        for trigger in triggers(done.entry):
            pictures[f"{done.chosen.plugin.name}-class{trigger.target}"] = trigger_picture(trigger)
    return pictures
