"""Run folders read back, every file that the record names checked."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from safetensors.numpy import load

from bdcore.analysis.records import SCHEMAS, Artifact, Record
from bdcore.errors import StoreError, UsageError
from bdcore.store import sha256_file

Array = NDArray[Any]

_CUT_SHORT = "The folder was altered or not copied whole: copy it anew, or repeat the run."
_PIXELS = 64_000_000  # a picture of ours is far smaller; one that claims more is no picture to unpack


@dataclass(frozen=True)
class Features:
    """Features of some test images in one model: float64 [n, D] clean, [m, D] triggered."""

    clean: Array
    triggered: Array


@dataclass(frozen=True)
class Run:
    """A run folder.

    Args:
        folder: where it is.
        record: its record, checked.
        raw: the same as JSON gave it.
        features: by model ("victim", or a defense's name).
        labels, triggered_labels: true classes, int64 [n] and [m], of what `features` has.
        poisoned: int64 [K], places of the poisoned training samples; None where the record does not keep them.
        suspects: by defense: int64 [S], the places that it isolated, and float64 [N] scores where it gave any.
        pictures: PNG files by name.
    """

    folder: Path
    record: Record
    raw: Mapping[str, Any]
    features: Mapping[str, Features]
    labels: Array
    triggered_labels: Array
    poisoned: Array | None
    suspects: Mapping[str, tuple[Array, Array | None]]
    pictures: Mapping[str, bytes]


def read_run(path: Path) -> Run:
    """A run folder, given as such or by its record.json.

    Raises:
        UsageError: there is no such folder or record, or it is none that can be read.
        StoreError: a file that the record names is missing, altered or not of the form it must have.
    """
    file = path if path.name == "record.json" and not path.is_dir() else path / "record.json"
    raw = _read_json(file)
    record = _checked(file, raw)
    folder = file.parent
    files = {name: _verified(folder, artifact) for name, artifact in record.artifacts.items()}
    where = {name: file for name, file in files.items() if name in ("poison", "features") or name.endswith("-suspects")}
    tensors = {name: _tensors(file) for name, file in where.items()}
    poisoned = _places(where["poison"], tensors["poison"].get("index")) if "poison" in tensors else None
    if poisoned is not None and record.dataset and poisoned.max(initial=-1) >= record.dataset.train:
        raise StoreError(f"{where['poison']}: names samples beyond the training set. {_CUT_SHORT}")
    features, labels, triggered = {}, np.zeros(0, np.int64), np.zeros(0, np.int64)
    if "features" in tensors:
        features, labels, triggered = _features(where["features"], tensors["features"])
    suspects = {
        name.removesuffix("-suspects"): _suspects(where[name], tensors[name])
        for name in tensors
        if name.endswith("-suspects")
    }
    pictures = {name: _picture(folder, file) for name, file in record.figures.items()}
    return Run(folder, record, raw, features, labels, triggered, poisoned, suspects, pictures)


def _read_json(file: Path) -> Mapping[str, Any]:
    if not file.parent.is_dir():
        raise UsageError(f"there is no run folder {file.parent}. `bdcore run` prints where its record is.")
    if not file.is_file():
        raise UsageError(
            f"{file.parent} is no run folder: it has no record.json. `bdcore run` prints where its record is."
        )
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise StoreError(f"cannot read {file}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is damaged, or no record: {error}. Repeat the run.") from error
    if not isinstance(value, dict) or "schema" not in value:
        raise UsageError(f"{file} is no record of bdcore: it has no schema.")
    return cast("dict[str, Any]", value)


def _checked(file: Path, raw: Mapping[str, Any]) -> Record:
    schema = raw["schema"]
    if type(schema) is not int or schema not in SCHEMAS:
        known = " and ".join(map(str, SCHEMAS))
        raise UsageError(
            f"{file} is a record of schema {str(schema)[:40]}, this bdcore reads {known}: take the version of bdcore "
            "that wrote it, or a newer one."
        )
    try:
        return Record.model_validate(raw)
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise UsageError(f"{file} is damaged: nested too deeply.") from error
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        says = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{file} is damaged, or no record: {f'{place}: ' if place else ''}{says}.") from error


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder itself: a record from elsewhere must not put other files of its reader into a page."""
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise StoreError(f"{folder / 'record.json'} names the file {name!r}, which is none of its folder's.")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise StoreError(f"{path} is missing, or no plain file. {_CUT_SHORT}")
    return path


def _verified(folder: Path, artifact: Artifact) -> Path:
    path = _inside(folder, artifact.path)
    if sha256_file(path) != artifact.sha256:
        raise StoreError(f"{path} is not what the record says: its SHA-256 differs. {_CUT_SHORT}")
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}.") from error


def _tensors(path: Path) -> dict[str, Array]:
    try:
        return load(_read(path))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise StoreError(f"{path} is no safetensors file that can be read: {error}. {_CUT_SHORT}") from error


def _places(path: Path, index: Array | None) -> Array:
    """Places in a set of samples, int64 [K]."""
    if index is None or index.ndim != 1 or index.dtype != np.int64 or (index < 0).any():
        raise StoreError(f"{path}: `index` must be there, int64 [K], not below 0. {_CUT_SHORT}")
    return index


def _suspects(path: Path, tensors: Mapping[str, Array]) -> tuple[Array, Array | None]:
    index, scores = _places(path, tensors.get("index")), tensors.get("scores")
    if scores is None:
        return index, None
    if scores.ndim != 1 or scores.dtype.kind != "f" or index.max(initial=-1) >= len(scores):
        raise StoreError(f"{path}: `scores` must be floats [N], one for every sample. {_CUT_SHORT}")
    return index, scores.astype(np.float64)


def _features(path: Path, tensors: Mapping[str, Array]) -> tuple[dict[str, Features], Array, Array]:
    clean = _places(path, tensors.get("labels"))
    # A run without attack has no triggered images.
    triggered = _places(path, tensors.get("triggered_labels", np.zeros(0, np.int64)))
    found: dict[str, Features] = {}
    for name, values in tensors.items():
        if not name.endswith(".clean"):
            continue
        model = name.removesuffix(".clean")
        other = tensors.get(f"{model}.triggered", values[:0])
        if values.ndim != 2 or values.dtype.kind != "f" or len(values) != len(clean):
            raise StoreError(f"{path}: `{name}` must be floats [n, D] beside `labels` [n]. {_CUT_SHORT}")
        if other.ndim != 2 or other.shape != (len(triggered), values.shape[1]):
            raise StoreError(f"{path}: `{model}.triggered` must be floats [m, D] beside `triggered_labels` [m].")
        found[model] = Features(values.astype(np.float64), other.astype(np.float64))
    return found, clean, triggered


def _picture(folder: Path, name: str) -> bytes:
    path = _inside(folder, name)
    content = _read(path)
    try:
        with Image.open(BytesIO(content), formats=["PNG"]) as picture:
            if picture.width * picture.height > _PIXELS:
                raise StoreError(f"{path} is too large for a picture of a run: {picture.width} x {picture.height}.")
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise StoreError(f"{path} is no PNG that can be read: {error}. {_CUT_SHORT}") from error
    return content
