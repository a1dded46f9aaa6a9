"""Where the results of an inspection go, and a purified model in the form in which the model came."""

from dataclasses import asdict
from pathlib import Path

from torch import nn

from bdcore.errors import UsageError
from bdcore.inspection.request import Request
from bdcore.inspection.subject import Subject
from bdcore.models import Classifier, write_checkpoint
from bdcore.store import digest, save_tensors, write_json


def folder_of(request: Request) -> Path:
    """Where record and pictures go: `out` of a scan; of a defense, NAME-report beside the model that it writes."""
    if request.command == "scan":
        return request.out or Path("runs") / run_id(request)
    assert request.out is not None
    return request.out.with_name(f"{request.out.stem}-report")


def run_id(request: Request) -> str:
    """A name for the inspection: what it is about, and a hash of its options."""
    about = request.model.stem if request.model else str(request.arch)
    names = [chosen.plugin.name for chosen in request.defenses]
    return "-".join([request.command, about.replace(":", "_"), *names, digest(request.record())[:8]])


def output_of(request: Request, defense: str) -> Path:
    """Where a defense's model goes: `out`, or beside it under the defense's name where there are several."""
    assert request.out is not None
    if len(request.defenses) == 1:
        return request.out
    return request.out.with_name(f"{request.out.stem}-{defense}{request.out.suffix}")


def check_output(request: Request, folder: Path) -> None:
    """Raise, before any work, where a model would overwrite what is not this request's own earlier result."""
    if request.command == "scan" or (folder / "record.json").exists():  # `check_folder` found it to be the same request
        return
    for chosen in request.defenses:
        path = output_of(request, chosen.plugin.name)
        if path.exists():
            raise UsageError(f"{path} exists already and is not overwritten: choose another --out, or remove it.")
        if not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent} for --out: make it, or choose another.")
        suffix = request.model.suffix if request.model else ".safetensors"
        if path.suffix != suffix:
            form = f"has the form of the model that came in ({request.model})" if request.model else "is safetensors"
            raise UsageError(f"--out {path}: what is written {form}; name it *{suffix}.")


def write_model(path: Path, model: nn.Module, subject: Subject) -> str:
    """Write a purified model in the form that the model came in, under `unfinished(path)`; the SHA-256 of the file.

    One that bdcore wrote, or that was trained from nothing, gets a manifest beside it that says how to build it.
    """
    assert isinstance(model, Classifier)
    like, part = subject.checkpoint, unfinished(path)
    if like is not None:
        sha256 = write_checkpoint(part, like, model.state_dict())
        if not (subject.whole and like.form == "safetensors"):
            return sha256
    else:
        sha256 = save_tensors(part, model.state_dict())
    manifest = {"format": "safetensors", "arch": asdict(subject.victim.arch), "path": path.name, "sha256": sha256}
    write_json(path.with_suffix(".json"), manifest)
    return sha256


def unfinished(path: Path) -> Path:
    """What a model is called until the record stands that says whose it is: killed before that, the same command can
    be repeated, which would take a file at `path` for somebody else's."""
    return path.with_name(f"{path.name}.part")
