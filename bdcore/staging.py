"""A stage: answered from the cache where nothing that it depends on has changed, else built, resumed, told and kept.

A stage's key is a hash of all that its result depends on: options, seed, the content of what came before, the code of
the plugin and of bdcore, torch's version, device and precision.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bdcore.artifacts import Architecture, Outcome, Trigger, Verdict
from bdcore.config import Chosen
from bdcore.context import Context, Meter, Progress, derive_seed
from bdcore.contract import Defense, Plugin
from bdcore.machine import peak_memory_bytes, reset_peak_memory
from bdcore.models import build, code_of
from bdcore.ops.registration import implementation
from bdcore.plugins import Host, blamed
from bdcore.store import Entry, Store, digest, sha256_file
from bdcore.training.precision import Precision, choose_device, choose_precision

Result = tuple[dict[str, Any], dict[str, dict[str, Tensor]]]
"""What builds a stage returns: a payload of JSON values, and files of tensors."""


class Stages:
    """Stages of one run: where they are kept, where and how they compute, and who is told.

    Args:
        host: whose observers are told.
        device, precision: as the user wrote them, perhaps "auto".
        seed: of the run.
        compile: whether training may use torch.compile.
    """

    def __init__(self, host: Host, device: str, precision: str, seed: int, compile: bool) -> None:
        self.host = host
        self.seed = seed
        self.compile = compile
        self.store = Store(warn=lambda message: host.hook.bdcore_warning(message=message))
        self.device = choose_device(device)
        self.precision: Precision = choose_precision(precision, self.device)
        self.curves: dict[str, list[dict[str, Any]]] = {}
        """Every finished epoch of the stages so far, by stage."""
        self.warnings: dict[str, list[str]] = {}
        """What the stages so far warned of, by stage."""
        self.base = {
            "bdcore": code(),
            "torch": torch.__version__,
            "device": self.device.type,
            "precision": self.precision,
            "operators": implementation(self.device.type),
            "compile": compile,
            "seed": seed,
        }
        """What every training's result depends on besides its own options."""

    def stage(self, stage: str, depends: Mapping[str, Any], build_it: Callable[[Context], Result]) -> Entry:
        """The cached result of a stage, or a new one, with checkpoints where it was interrupted."""
        key, kind = digest(depends), stage.replace(" ", "-")
        with self.told(stage) as told:
            entry = self.store.read(kind, key)
            if entry is None:
                with self.store.building(kind, key) as folder:
                    entry = self.store.read(kind, key)  # another process may have finished it while this one waited
                    if entry is None:
                        told.cached = False
                        told.journal = folder / "curves.jsonl"
                        reset_peak_memory(self.device)
                        payload, files = build_it(self.context(stage, folder))
                        curves = _curves(told.journal)
                        payload = {**payload, "curves": curves} if curves else payload
                        payload = {**payload, "warnings": told.warnings} if told.warnings else payload
                        entry = self.store.write(kind, key, payload, files)
            if told.cached:
                for message in entry.payload.get("warnings", []):  # what was wrong with the result still is
                    _warn(message)
        if "curves" in entry.payload:
            self.curves[stage] = entry.payload["curves"]
        return entry

    def context(self, stage: str, folder: Path | None = None) -> Context:
        """A context with a seed of its own, so that a defense draws none of the numbers that the attacker drew."""
        return Context(
            device=self.device,
            precision=self.precision,
            seed=derive_seed(self.seed, stage),
            folder=folder,
            report=_report,
            warn=_warn,
            meter=Meter(),
            compile=self.compile,
        )

    @contextmanager
    def told(self, stage: str) -> Generator["_Told"]:
        """Let observers know of the stage, as the cache's answer unless the caller says otherwise."""
        told = _Told(self.host.hook, stage)
        meter = Meter()
        token = _LISTENER.set(told)
        try:
            yield told
        finally:
            _LISTENER.reset(token)
        if told.warnings:
            self.warnings.setdefault(stage, []).extend(told.warnings)  # some run again for every defense
        self.host.hook.bdcore_stage_finished(stage=stage, cached=told.cached, seconds=meter.seconds)


@dataclass
class _Told:
    """Whom to tell of which stage, whether the cache answered, where its epochs are noted, and what it warned of."""

    hook: Any
    stage: str
    cached: bool = True
    journal: Path | None = None
    warnings: list[str] = field(default_factory=list)


# Plugins' contexts hold plain functions that look here, so nothing leads from a defense's context to the run.
_LISTENER: ContextVar[_Told] = ContextVar("listener")


def _report(progress: Progress) -> None:
    told = _LISTENER.get()
    if told.journal is not None:
        line = {"phase": progress.phase, "epoch": progress.epoch, "epochs": progress.epochs}
        with told.journal.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps({**line, "figures": progress.figures}) + "\n")
    told.hook.bdcore_epoch_finished(stage=told.stage, progress=progress)


def _warn(message: str) -> None:
    told = _LISTENER.get()
    told.warnings.append(message)
    told.hook.bdcore_warning(message=f"{told.stage}: {message}")


def _curves(journal: Path) -> list[dict[str, Any]]:
    """The epochs that were noted, each once: one that an interruption undid was done, and noted, again."""
    epochs: dict[tuple[str, int], dict[str, Any]] = {}
    for line in journal.read_text("utf-8").splitlines() if journal.exists() else ():
        try:
            noted = json.loads(line)
        except ValueError:  # cut short by a kill; that epoch was done again
            continue
        # What is no number has no place in a record, which is strict JSON.
        figures = {name: _number(value) for name, value in noted["figures"].items()}
        epochs[noted["phase"], noted["epoch"]] = {**noted, "figures": figures}
    return list(epochs.values())


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if abs(value) < float("inf") else None


def instance(chosen: Chosen) -> Any:
    """The plugin with its options."""
    with blamed(chosen.plugin):
        return chosen.plugin.cls(chosen.config)


def oracles(chosen: Chosen) -> tuple[str, ...]:
    """What a defense was told that a defender cannot know."""
    with blamed(chosen.plugin):
        return tuple(cast(Defense, instance(chosen)).oracles())


def identity(chosen: Chosen) -> dict[str, Any]:
    """What tells one plugin's work from another's: name, version, source and options."""
    plugin = chosen.plugin
    with blamed(plugin):
        files = tuple(cast(Plugin, instance(chosen)).files())
    return {
        "name": plugin.name,
        "version": plugin.version,
        "code": plugin.code,
        "config": chosen.config.model_dump(mode="json"),
        # A file that is not there is the plugin's to complain of.
        "files": [sha256_file(path) for path in files if path.is_file()],
    }


def form(arch: Architecture) -> dict[str, Any]:
    """What tells one architecture from another; of a user's own, its code as well."""
    return {**asdict(arch), "code": code_of(arch.name)}


def restore(entry: Entry, arch: Architecture) -> torch.nn.Module:
    """The classifier in `entry`, in eval mode."""
    model = build(arch, 0)
    model.load_state_dict(entry.tensors("model"))
    return model.eval()


def pack(outcome: Outcome, context: Context) -> Result:
    """An outcome as JSON and tensors."""
    verdict: Verdict | None = outcome.verdict
    payload = {
        "verdict": asdict(verdict) if verdict else None,
        "notes": dict(outcome.notes),
        "targets": [trigger.target for trigger in outcome.triggers],
        "cost": cost(context),
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


def triggers(entry: Entry) -> Sequence[Trigger]:
    """The triggers that `pack` stored."""
    if "triggers" not in entry.files:
        return []
    parts: list[dict[str, Tensor]] = [{} for _ in entry.payload["targets"]]
    for name, value in entry.tensors("triggers").items():
        number, part = name.split(".")
        parts[int(number)][part] = value
    return [Trigger(target, **found) for target, found in zip(entry.payload["targets"], parts, strict=True)]


def cost(context: Context) -> dict[str, float | int]:
    """What the stage has cost so far."""
    return {
        "seconds": round(context.meter.seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(context.device),
        "images": context.meter.images,
    }


def sources() -> list[Path]:
    """The Python files of bdcore that numbers depend on, sorted."""
    root = Path(__file__).parent
    single = ("artifacts", "context", "contract", "pipeline", "poisoning", "staging")
    files = [root / f"{name}.py" for name in single]
    for part in ("models", "ops", "stages", "training"):
        files += (root / part).rglob("*.py")
    return sorted(files)


@cache
def code() -> str:
    """SHA-256 over the sources and libraries of bdcore that numbers depend on."""
    root = Path(__file__).parent
    digests = hashlib.sha256()
    for file in sorted([*sources(), *(root / "ops").glob("*.so")]):
        digests.update(f"{file.relative_to(root)}|".encode() + file.read_bytes())
    return digests.hexdigest()
