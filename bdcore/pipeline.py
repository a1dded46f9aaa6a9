"""The stages in order, each answered from the cache where nothing that it depends on has changed.

    data -> (surrogate ->) poison -> train -> evaluate the victim -> for each defense: defend -> evaluate

A stage's key is a hash of all that its result depends on: options, seed, the content of what came before, the code of
the plugin and of bdcore, torch's version, device and precision. Two runs that share a victim train it once.
"""

import hashlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from functools import cache
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
    Outcome,
    Poisoned,
    Recovered,
    Scores,
    Trigger,
    Triggered,
    Verdict,
    Victim,
    fingerprint,
)
from bdcore.config import Chosen, RunConfig
from bdcore.context import Context, Meter, Progress, derive_seed
from bdcore.contract import Attack, AttackInput, DatasetPlugin, Defense, Plugin
from bdcore.errors import BdcoreError
from bdcore.machine import peak_memory_bytes, reset_peak_memory
from bdcore.models import build, metered
from bdcore.ops.registration import implementation
from bdcore.plugins import Host, Loaded, explain
from bdcore.record import Defended, check_folder, make_record, write_run_folder
from bdcore.stages import data
from bdcore.stages.defend import defend
from bdcore.stages.evaluate import evaluate, recovered
from bdcore.stages.poison import poison, poison_all, prepare
from bdcore.stages.train import FINE_TUNING, fine_tune, train
from bdcore.store import Entry, Store, digest, sha256_file
from bdcore.training.precision import Precision, choose_device, choose_precision

_Result = tuple[dict[str, Any], dict[str, dict[str, Tensor]]]  # payload, files of tensors

# Whom to tell, and of which stage. Plugins' contexts hold plain functions that look here, so nothing leads from a
# defense's context to the run.
_LISTENER: ContextVar[tuple[Any, str]] = ContextVar("listener")


def run(config: RunConfig, host: Host) -> dict[str, Any]:
    """Do what `config` says, or find it done; write the run folder.

    Returns:
        The record, which also stands in the folder's record.json.

    Raises:
        BdcoreError: where the run cannot be done; what was finished stays cached, and checkpoints too.
    """
    folder = run_folder(config)
    host.hook.bdcore_run_started(config=config.record())
    try:
        check_folder(folder, config)
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
    return "-".join([*names, f"seed{config.run.seed}", digest(config.record())[:8]])


def run_folder(config: RunConfig) -> Path:
    """Where the run is written: `config.out`, or runs/ID in the working folder."""
    return config.out or Path("runs") / run_id(config)


class _Run:
    """One run: its settings resolved, and the stages as methods that return what is cached or build it."""

    def __init__(self, config: RunConfig, host: Host) -> None:
        self.config = config
        self.host = host
        self.store = Store(warn=lambda message: host.hook.bdcore_warning(message=message))
        self.device = choose_device(config.run.device)
        self.precision: Precision = choose_precision(config.run.precision, self.device)
        self.base = {
            "bdcore": _code(),
            "torch": torch.__version__,
            "device": self.device.type,
            "precision": self.precision,
            "operators": implementation(self.device.type),
            "compile": config.run.compile,
            "seed": config.run.seed,
        }

    def record(self, folder: Path) -> dict[str, Any]:
        """All stages, then the run folder."""
        config = self.config
        dataset, clean = self.loaded()
        poisoned, trained, arch = self.attacked(dataset)
        if trained is None:
            trained = self.trained("train", poisoned.train, arch)
        victim_scores = self.scores(trained, trained, arch, dataset.test, poisoned)
        defended: list[Defended] = []
        for chosen in config.defenses:
            entry = self.defended(chosen, trained, arch, clean, poisoned.train)
            scores = self.scores(entry, trained, arch, dataset.test, poisoned)
            triggers = self.recovered(entry, trained, arch, dataset.test)
            defended.append(Defended(chosen, entry, scores, triggers))
        oracles = {chosen.plugin.name: _oracles(chosen) for chosen in config.defenses}
        record = make_record(
            run_id(config), config, oracles, dataset, poisoned, trained, victim_scores, defended,
            self.device, self.precision, implementation(self.device.type),
        )  # fmt: skip
        files = {"victim": trained.path("model")}
        for done in defended:
            for part in done.entry.files:
                plugin = done.chosen.plugin.name
                files[plugin if part == "model" else f"{plugin}-{part}"] = done.entry.path(part)
        return write_run_folder(folder, record, files, arch, _pictures(dataset.test, poisoned, defended))

    def loaded(self) -> tuple[Dataset, Labelled]:
        """The data set, and the defender's clean samples."""
        config = self.config
        with self.told("data"):
            with _blamed(config.dataset.plugin):
                plugin = cast(DatasetPlugin, _instance(config.dataset))
                dataset = data.load(plugin, config.dataset_argument)
            return dataset, data.clean_set(dataset, config.run.clean_fraction, self.context("data"))

    def attacked(self, dataset: Dataset) -> tuple[Poisoned, Entry | None, Architecture]:
        """The training set as the victim sees it, of which only what the attack changes is stored; the victim where the
        attacker made it; the architecture."""
        clean, model = dataset.train, self.config.run.model
        if self.config.attack is None:
            untouched = torch.zeros(len(clean), dtype=torch.bool)
            return Poisoned(clean, untouched, None, None), None, data.architecture(model, clean, dataset.classes)
        chosen = self.config.attack
        kind = type(cast(Attack, _instance(chosen)))
        fine_tuned = self.config.run.victim == "fine_tuned"
        arch = data.architecture(model, clean, dataset.classes)
        depends = {"data": dataset.fingerprint, "attack": _identity(chosen), "seed": self.config.run.seed}
        depends |= {"bdcore": _code(), "torch": torch.__version__, "operators": implementation("cpu")}
        if fine_tuned or kind.prepare is not Attack.prepare:
            depends |= {
                "arch": asdict(arch),
                "recipe": self.config.train.model_dump(),
                "tuned": fine_tuned,
                **self.base,
            }
        surrogate = self.trained("surrogate", clean, arch) if fine_tuned or kind.surrogate else None

        def build_it(context: Context) -> _Result:
            attack = cast(Attack, _instance(chosen))
            known = _load(surrogate, arch).to(self.device) if surrogate else None
            given = AttackInput(clean, dataset.classes, arch, self.config.train, known if kind.surrogate else None)
            with _blamed(chosen.plugin):
                victim = prepare(dataset, attack, given, context)
                made = poison(dataset, attack, context)
            if fine_tuned:
                assert known is not None
                with _blamed(chosen.plugin):
                    poisons = poison_all(dataset, attack, context)
                with metered(context.meter):
                    rate = attack.config.poison_rate
                    victim = fine_tune(known, clean, poisons, rate, FINE_TUNING, context)
            changed = made.poisoned.nonzero()[:, 0]
            tensors = {"index": changed, "images": made.train.images[changed], "labels": made.train.labels[changed]}
            assert made.triggered is not None
            files = {"poison": tensors, "triggered": made.triggered.tensors()}
            if victim is not None:
                files["model"] = victim.state_dict()
            return {"target": made.target, "cost": _cost(context)}, files

        entry = self.stage("poison", depends, build_it)
        changes = entry.tensors("poison")
        images, labels = clean.images.clone(), clean.labels.clone()
        images[changes["index"]] = changes["images"]
        labels[changes["index"]] = changes["labels"]
        flags = torch.zeros(len(labels), dtype=torch.bool)
        flags[changes["index"]] = True
        triggered = Triggered(**entry.tensors("triggered"))
        poisoned = Poisoned(Labelled(images, labels), flags, triggered, entry.payload["target"])
        if "model" in entry.files:
            return poisoned, entry, arch
        # Whoever trains on a poisoned set normalises by what he sees.
        return poisoned, None, data.architecture(model, poisoned.train, dataset.classes)

    def trained(self, stage: str, data_set: Labelled, arch: Architecture) -> Entry:
        """The parameters of a classifier trained by the run's recipe: the victim's, or those of an attacker's own."""
        recipe = self.config.train
        depends = {"data": data_set.fingerprint, "arch": asdict(arch), "recipe": recipe.model_dump(), **self.base}

        def build_it(context: Context) -> _Result:
            with metered(context.meter):
                victim = train(data_set, arch, recipe, context)
            return {"cost": _cost(context)}, {"model": victim.model.state_dict()}

        return self.stage(stage, depends, build_it)

    def defended(self, chosen: Chosen, trained: Entry, arch: Architecture, clean: Labelled, suspect: Labelled) -> Entry:
        """What a defense made of the victim."""
        defense = cast(Defense, _instance(chosen))
        depends = {
            "defense": _identity(chosen),
            "victim": trained.sha256("model"),
            "arch": asdict(arch),
            "clean": clean.fingerprint,
            "suspect": suspect.fingerprint if "suspect" in defense.needs else None,
            **self.base,
        }

        def build_it(context: Context) -> _Result:
            victim = Victim(_load(trained, arch), arch)
            with _blamed(chosen.plugin):
                outcome = defend(defense, victim, clean, suspect, context)
            return _pack(outcome, context)

        return self.stage(f"defend {chosen.plugin.name}", depends, build_it)

    def scores(self, entry: Entry, trained: Entry, arch: Architecture, test: Labelled, poisoned: Poisoned) -> Scores:
        """Scores of the model in `entry`, or of the victim where a defense left it alone."""
        if "model" not in entry.files:
            entry = trained
        triggered = poisoned.triggered
        depends = {
            "model": entry.sha256("model"),
            "arch": asdict(arch),
            "test": test.fingerprint,
            "triggered": fingerprint(triggered.tensors()) if triggered else None,
            "target": poisoned.target,
            **{name: self.base[name] for name in ("bdcore", "torch", "device", "operators")},
        }

        def build_it(context: Context) -> _Result:
            scores = evaluate(_load(entry, arch), test, triggered, poisoned.target, context)
            return asdict(scores), {}

        return Scores(**self.stage("evaluate", depends, build_it).payload)

    def recovered(self, entry: Entry, trained: Entry, arch: Architecture, test: Labelled) -> list[Recovered]:
        """What the triggers in `entry` are worth on the victim."""
        triggers = _triggers(entry)
        if not triggers:
            return []
        depends = {
            "triggers": entry.sha256("triggers"),
            "targets": entry.payload["targets"],
            "model": trained.sha256("model"),
            "arch": asdict(arch),
            "test": test.fingerprint,
            **{name: self.base[name] for name in ("bdcore", "torch", "device", "operators", "seed")},
        }

        def build_it(context: Context) -> _Result:
            found = recovered(_load(trained, arch), test, triggers, context)
            return {"triggers": [asdict(one) for one in found]}, {}

        entry = self.stage("evaluate triggers", depends, build_it)
        return [Recovered(**one) for one in entry.payload["triggers"]]

    def stage(self, stage: str, depends: Mapping[str, Any], build_it: Callable[[Context], _Result]) -> Entry:
        """The cached result of a stage, or a new one, with checkpoints where it was interrupted."""
        key, kind = digest(depends), stage.replace(" ", "-")
        with self.told(stage) as cached:
            entry = self.store.read(kind, key)
            if entry is None:
                with self.store.building(kind, key) as folder:
                    entry = self.store.read(kind, key)  # another process may have finished it while this one waited
                    if entry is None:
                        cached[0] = False
                        reset_peak_memory(self.device)
                        entry = self.store.write(kind, key, *build_it(self.context(stage, folder)))
        return entry

    def context(self, stage: str, folder: Path | None = None) -> Context:
        """A context with a seed of its own, so that a defense draws none of the numbers that the attacker drew."""
        return Context(
            device=self.device,
            precision=self.precision,
            seed=derive_seed(self.config.run.seed, stage),
            folder=folder,
            report=_report,
            warn=_warn,
            meter=Meter(),
            compile=self.config.run.compile,
        )

    @contextmanager
    def told(self, stage: str) -> Generator[list[bool]]:
        """Let observers know of the stage; what is yielded says whether the cache answered."""
        cached = [stage != "data"]
        meter = Meter()
        token = _LISTENER.set((self.host.hook, stage))
        try:
            yield cached
        finally:
            _LISTENER.reset(token)
        self.host.hook.bdcore_stage_finished(stage=stage, cached=cached[0], seconds=meter.seconds)


def _report(progress: Progress) -> None:
    hook, stage = _LISTENER.get()
    hook.bdcore_epoch_finished(stage=stage, progress=progress)


def _warn(message: str) -> None:
    hook, stage = _LISTENER.get()
    hook.bdcore_warning(message=f"{stage}: {message}")


def _instance(chosen: Chosen) -> Any:
    assert chosen.plugin.cls is not None
    with _blamed(chosen.plugin):
        return chosen.plugin.cls(chosen.config)


def _oracles(chosen: Chosen) -> tuple[str, ...]:
    with _blamed(chosen.plugin):
        return tuple(cast(Defense, _instance(chosen)).oracles())


def _identity(chosen: Chosen) -> dict[str, Any]:
    """What tells one plugin's work from another's: name, version, source and options."""
    plugin = chosen.plugin
    with _blamed(plugin):
        files = tuple(cast(Plugin, _instance(chosen)).files())
    return {
        "name": plugin.name,
        "version": plugin.version,
        "code": plugin.code,
        "config": chosen.config.model_dump(mode="json"),
        # A file that is not there is the plugin's to complain of.
        "files": [sha256_file(path) for path in files if path.is_file()],
    }


def _load(entry: Entry, arch: Architecture) -> torch.nn.Module:
    model = build(arch, 0)
    model.load_state_dict(entry.tensors("model"))
    return model.eval()


def _pack(outcome: Outcome, context: Context) -> _Result:
    """An outcome as JSON and tensors."""
    verdict: Verdict | None = outcome.verdict
    payload = {
        "verdict": asdict(verdict) if verdict else None,
        "notes": dict(outcome.notes),
        "targets": [trigger.target for trigger in outcome.triggers],
        "cost": _cost(context),
    }
    files: dict[str, dict[str, Tensor]] = {}
    if outcome.model is not None:
        files["model"] = outcome.model.state_dict()
    if outcome.triggers:
        files["triggers"] = {
            f"{number}.{part}": value
            for number, trigger in enumerate(outcome.triggers)
            for part, value in trigger.tensors().items()
        }
    if outcome.suspects is not None:
        files["suspects"] = {"index": outcome.suspects.index}
        if outcome.suspects.scores is not None:
            files["suspects"]["scores"] = outcome.suspects.scores
    return payload, files


def _triggers(entry: Entry) -> list[Trigger]:
    """The triggers that `_pack` stored."""
    if "triggers" not in entry.files:
        return []
    parts: list[dict[str, Tensor]] = [{} for _ in entry.payload["targets"]]
    for name, value in entry.tensors("triggers").items():
        number, part = name.split(".")
        parts[int(number)][part] = value
    return [Trigger(target, **found) for target, found in zip(entry.payload["targets"], parts, strict=True)]


def _cost(context: Context) -> dict[str, float | int]:
    return {
        "seconds": round(context.meter.seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(context.device),
        "images": context.meter.images,
    }


def _pictures(test: Labelled, poisoned: Poisoned, defended: list[Defended]) -> dict[str, Image.Image]:
    """What the trigger does to the first test images, and the triggers that defenses recovered."""
    pictures: dict[str, Image.Image] = {}
    triggered = poisoned.triggered
    if triggered is not None and triggered.source is not None:
        pictures["attack"] = contact_sheet(test.images[triggered.source[:8]], triggered.images[:8])
    for done in defended:
        for trigger in _triggers(done.entry):
            pictures[f"{done.chosen.plugin.name}-class{trigger.target}"] = trigger_picture(trigger)
    return pictures


@contextmanager
def _blamed(plugin: Loaded) -> Generator[None]:
    """Turn what goes wrong inside a plugin into one error that says whose it is and where."""
    try:
        yield
    except BdcoreError:
        raise
    except (Exception, SystemExit) as error:  # a plugin that exits has not finished
        assert plugin.cls is not None
        raise BdcoreError(
            f"{plugin.kind} {plugin.name!r} of {plugin.distribution} {plugin.version} failed: "
            f"{explain(error, plugin.cls.__module__)}. Report it to its authors; --traceback shows all."
        ) from error


@cache
def _code() -> str:
    """SHA-256 over the sources and libraries of bdcore that numbers depend on."""
    root = Path(__file__).parent
    files = [root / name for name in ("artifacts.py", "context.py", "contract.py", "pipeline.py")]
    for part in ("models", "ops", "stages", "training"):
        files += (root / part).rglob("*.py")
    files += (root / "ops").glob("*.so")
    digests = hashlib.sha256()
    for file in sorted(files):
        digests.update(f"{file.relative_to(root)}|".encode() + file.read_bytes())
    return digests.hexdigest()
