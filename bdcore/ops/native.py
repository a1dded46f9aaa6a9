"""The compiled operators: found beside this file and loaded once; where one is missing or fails, a reason is kept.

`_C_cpu.so` and `_C_cuda.so` add kernels for their device to the schemas of this package; `_host` is a Python module.
Nothing here raises: without the libraries the references run.
"""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Status:
    """Whether a compiled part is in use, and with what it was built or why it is not in use."""

    loaded: bool
    detail: str


@cache
def load() -> Mapping[str, Status]:
    """Load what can be loaded, once; the status of the parts `cpu`, `cuda` and `host`."""
    try:
        report = json.loads((_FOLDER / "_build.json").read_text(encoding="utf-8"))
        if not isinstance(report, dict) or not isinstance(report.get("parts"), dict):
            raise ValueError("it is no build report")
    except FileNotFoundError:
        report = {"parts": {}}
    except (OSError, ValueError) as error:
        report = {"parts": {}, "unreadable": f"the build report cannot be read ({error}): install bdcore again"}
    loaders: dict[str, Callable[[dict[str, Any]], None]] = {"cpu": _load_cpu, "cuda": _load_cuda, "host": _load_host}
    return {part: _try(part, loader, report) for part, loader in loaders.items()}


class _Unusable(Exception):
    """A built part does not fit what is installed."""


def _try(part: str, loader: Callable[[dict[str, Any]], None], report: dict[str, Any]) -> Status:
    facts = report["parts"].get(part)
    if facts is None:
        return Status(False, report.get("unreadable", "not built: bdcore runs from sources that were never installed"))
    if not facts["built"]:
        return Status(False, f"not built: {facts['reason']}")
    try:
        loader(facts)
    except (OSError, ImportError, _Unusable) as error:
        return Status(False, f"built, but not loaded: {error}")
    built = {"torch": report["torch"], **{name: value for name, value in facts.items() if name != "built"}}
    shown = (f"{name} {', '.join(value) if isinstance(value, list) else value}" for name, value in built.items())
    return Status(True, "built with " + "; ".join(shown))


def _load_cpu(facts: dict[str, Any]) -> None:
    _load_library("_C_cpu.so")


def _load_cuda(facts: dict[str, Any]) -> None:
    if torch.version.cuda is None:
        raise _Unusable(f"torch {torch.__version__} is built without CUDA")
    if facts["cuda"].split(".")[0] != torch.version.cuda.split(".")[0]:
        raise _Unusable(f"it was built with CUDA {facts['cuda']}, torch {torch.__version__} runs {torch.version.cuda}")
    _load_library("_C_cuda.so")


def _load_library(name: str) -> None:
    _check_whole(_FOLDER / name)
    torch.ops.load_library(_FOLDER / name)


def _load_host(facts: dict[str, Any]) -> None:
    for path in _FOLDER.glob("_host*.so"):
        _check_whole(path)
    import_module("bdcore.ops._host")


def _check_whole(path: Path) -> None:
    """Of an ELF file that was cut short the system's loader maps what is missing, and the process dies of SIGBUS."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\2":
        return  # the loader itself says what is wrong
    (table,) = struct.unpack_from("<Q", header, 0x28)  # of sections, which lies at the end of the file
    size, count = struct.unpack_from("<HH", header, 0x3A)
    if table + size * count > path.stat().st_size:
        raise _Unusable(f"{path.name} was cut short to {path.stat().st_size} bytes: install bdcore again")
