"""A run's record and folder: what was done, what it achieved and cost, and the models."""

import contextlib
import errno
import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bdcore.artifacts import Architecture, Dataset, Poisoned, Recovered, Scores, Suspects, Verdict
from bdcore.config import Chosen, RunConfig
from bdcore.errors import StoreError, UsageError
from bdcore.machine import processor_name
from bdcore.stages.evaluate import defense_effectiveness, isolation, target_rank, verdict_correct
from bdcore.store import Entry, save_tensors, sha256_file, write_bytes, write_json

SCHEMA = 2


@dataclass(frozen=True)
class Defended:
    """A defense's stored outcome and what evaluation found of it."""

    chosen: Chosen
    entry: Entry
    scores: Scores
    triggers: list[Recovered]


def make_record(
    run_id: str,
    config: RunConfig,
    oracles: Mapping[str, tuple[str, ...]],
    dataset: Dataset,
    poisoned: Poisoned,
    spent: Mapping[str, float | int] | None,
    trained: Entry,
    victim: Scores,
    defended: list[Defended],
    device: torch.device,
    precision: str,
    operators: str,
    curves: Mapping[str, Any],
    warnings: Mapping[str, Any],
) -> dict[str, Any]:
    """The record without its artifacts: JSON values, figures as fractions of 1, null where nothing can be measured."""
    attacks = [config.attack] if config.attack else []
    plugins = [config.dataset, *attacks, *config.defenses]
    return {
        "schema": SCHEMA,
        "command": "run",
        "run": {"id": run_id},
        "config": config.record(),
        "seed": config.run.seed,
        "plugins": described(plugins, oracles),
        "dataset": {
            "name": dataset.name,
            "train": len(dataset.train),
            "test": len(dataset.test),
            "classes": dataset.classes,
            "fingerprint": dataset.fingerprint,
        },
        "poison": _poison(poisoned),
        "attack": dict(spent) if spent else None,
        "victim": {**asdict(victim), **trained.payload["cost"]},
        "defenses": [_defense(done, victim, poisoned) for done in defended],
        "curves": dict(curves),
        "warnings": dict(warnings),
        **made_with(device, precision, operators),
    }


def total_cost(costs: Sequence[Mapping[str, float | int]]) -> dict[str, float | int]:
    """What several stages, one after the other, cost together."""
    return {
        "seconds": round(sum(cost["seconds"] for cost in costs), 3),
        "peak_memory_bytes": max(cost["peak_memory_bytes"] for cost in costs),
        "images": sum(cost["images"] for cost in costs),
    }


def described(plugins: Iterable[Chosen], oracles: Mapping[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """Each plugin with who ships it, what it was given where it is a defense, and what it was told beyond that."""
    return [
        {
            "name": chosen.plugin.name,
            "kind": chosen.plugin.kind,
            "distribution": chosen.plugin.distribution,
            "version": chosen.plugin.version,
            "needs": sorted(getattr(chosen.plugin.cls, "needs", ())),
            "oracle": list(oracles.get(chosen.plugin.name, ())),
        }
        for chosen in plugins
    ]


def made_with(device: torch.device, precision: str, operators: str) -> dict[str, Any]:
    """Versions and device."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("bdcore", "torch", "torchvision", "numpy", "scikit-learn")},
        },
        "device": {
            "device": str(device),
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
            "threads": torch.get_num_threads(),
            "precision": precision,
            "operators": operators,
        },
    }


def check_folder(folder: Path, asked: Mapping[str, Any]) -> None:
    """Raise, before any work, where the folder holds the record of something else, or cannot be written; it is not made
    yet."""
    path = folder / "record.json"
    absent: list[Path] = []
    try:
        absent = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        if path.exists():
            known = json.loads(path.read_text("utf-8"))
            if not isinstance(known, dict) or known.get("config") != asked:
                raise UsageError(
                    f"{path} is the record of a run with other options. Choose another --out, or remove it."
                )
    except ValueError as error:
        raise UsageError(f"{path} is no record of a run ({error}). Choose another --out, or remove it.") from error
    except OSError as error:
        raise StoreError(f"the run folder {folder} cannot be used: {error}. Choose another with --out.") from error
    finally:
        for place in absent:
            with contextlib.suppress(OSError):  # another process has begun to use it
                place.rmdir()


def write_run_folder(
    folder: Path,
    record: Mapping[str, Any],
    files: Mapping[str, Path],
    tensors: Mapping[str, Mapping[str, Tensor]],
    arch: Architecture,
    pictures: Mapping[str, Image.Image],
) -> dict[str, Any]:
    """Write the files of stages and further tensors as NAME.safetensors, each model's form as NAME.json, pictures as
    NAME.png, and last the record.

    Returns:
        The record with its artifacts and figures, paths relative to the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    artifacts: dict[str, dict[str, str]] = {}
    for name, source in files.items():
        target = folder / f"{name}.safetensors"
        _copy(source, target)
        artifacts[name] = {"path": target.name, "sha256": sha256_file(target)}
        if source.stem == "model":
            manifest = {"format": "safetensors", "arch": asdict(arch), **artifacts[name], "run": record["run"]["id"]}
            write_json(folder / f"{name}.json", manifest)
    for name, content in tensors.items():
        target = folder / f"{name}.safetensors"
        artifacts[name] = {"path": target.name, "sha256": save_tensors(target, content)}
    figures: dict[str, str] = {}
    for name, picture in pictures.items():
        encoded = BytesIO()
        picture.save(encoded, "PNG")
        figures[name] = f"{name}.png"
        write_bytes(folder / figures[name], encoded.getvalue())
    complete = {**record, "artifacts": artifacts, "figures": figures}
    write_json(folder / "record.json", complete)
    return complete


def _defense(done: Defended, victim: Scores, poisoned: Poisoned) -> dict[str, Any]:
    entry = done.entry
    found: dict[str, Any] | None = entry.payload["verdict"]
    if found is not None:
        verdict = Verdict(found["backdoored"], found["target"], tuple(found["evidence"]))
        correct = verdict_correct(verdict, poisoned.triggered is not None, poisoned.target)
        found = {**found, "correct": correct, "target_rank": target_rank(verdict, poisoned.target)}
    return {
        "name": done.chosen.plugin.name,
        **asdict(done.scores),
        "der": defense_effectiveness(victim, done.scores),
        "verdict": found,
        "isolation": _isolation(entry, poisoned),
        "triggers": [asdict(trigger) for trigger in done.triggers],
        **entry.payload["cost"],
        "notes": entry.payload["notes"],
    }


def _poison(poisoned: Poisoned) -> dict[str, Any] | None:
    """How much is poisoned: of the whole training set, and of what is labelled with the target class."""
    if poisoned.triggered is None:
        return None
    of_target = poisoned.poisoned[poisoned.train.labels == poisoned.target] if poisoned.target is not None else None
    return {
        "count": int(poisoned.poisoned.sum()),
        "rate": float(poisoned.poisoned.double().mean()),
        "class_rate": float(of_target.double().mean()) if of_target is not None and len(of_target) else None,
        "triggered": len(poisoned.triggered.images),
    }


def _isolation(entry: Entry, poisoned: Poisoned) -> dict[str, Any] | None:
    if "suspects" not in entry.files:
        return None
    return asdict(isolation(Suspects(**entry.tensors("suspects")), poisoned.poisoned))


def _copy(source: Path, target: Path) -> None:
    """Copy by way of a temporary file, so that a reader never sees half of one."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"cannot write {target}: {error}. Free space, or choose another folder with --out.") from error
