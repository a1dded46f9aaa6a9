"""`bdcore doctor`: what a run would find here, and what a bug report should contain."""

import json
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any, cast

import click
from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from bdcore.cli.plugins import show
from bdcore.machine import processor_name
from bdcore.plugins import Host


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(as_json: bool) -> None:
    """Show versions, devices, threads, the cache folder, operators and plugins.

    A part that cannot be examined says why; the others are shown all the same.
    """
    findings = {name: _examine(part) for name, part in _PARTS.items()}
    if as_json:
        click.echo(json.dumps(findings, indent=2))
        return
    console = Console(soft_wrap=True)
    for name, found in findings.items():
        console.print(Text(name, style="bold"))
        if name == "plugins" and isinstance(found, list):
            show(cast(list[dict[str, str | None]], found))
        else:
            for line in _lines(found):
                console.print(Text(f"  {line}"))
        console.print()


def _versions() -> dict[str, str]:
    """bdcore, Python, the system, and everything that bdcore requires."""
    required = [Requirement(line) for line in requires("bdcore") or []]
    names = [requirement.name for requirement in required if requirement.marker is None]
    found = {"bdcore": version("bdcore"), "python": platform.python_version(), "system": platform.platform()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> dict[str, Any]:
    """The CPU, the CUDA devices, and where there are none the reason."""
    import torch

    from bdcore.training.precision import native_bf16

    cpu = {
        "model": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "native_bf16": native_bf16(torch.device("cpu")),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    with warnings.catch_warnings(record=True) as said:  # torch warns of a driver that it cannot use
        warnings.simplefilter("always")
        reason = _why_no_cuda()
    if reason is not None:
        return {"cpu": cpu, "cuda": [], "why_no_cuda": " ".join([reason, *(str(w.message) for w in said)])}
    cuda: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = cast(Any, torch.cuda.get_device_properties(index))  # pyright: ignore[reportUnknownMemberType]
        cuda.append(
            {
                "device": f"cuda:{index}",
                "model": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "native_bf16": native_bf16(torch.device("cuda", index)),
            }
        )
    return {"cpu": cpu, "cuda": cuda}


def _why_no_cuda() -> str | None:
    """Why torch can use no CUDA device; None where it can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())
    return f"torch finds no device (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r})"


def _threads() -> dict[str, Any]:
    import torch

    return {
        "torch": torch.get_num_threads(),
        "torch_interop": torch.get_num_interop_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
    }


def _cache() -> dict[str, Any]:
    """The folder where finished stages are kept, whether a file can be written there, and the space that is left."""
    from bdcore.store import Store

    folder = Store().root
    standing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=standing) as trial:  # permissions alone say nothing of a full disk
            trial.write(b"bdcore")
            trial.flush()
        writable = "yes"
    except OSError as error:
        writable = f"no: {error.strerror}"
    free = shutil.disk_usage(standing).free
    return {"folder": str(folder), "exists": folder.exists(), "writable": writable, "free_bytes": free}


def _native() -> dict[str, str]:
    """Of each compiled part what it was built with, or why it is not in use."""
    from bdcore.ops.native import load

    parts = load()
    found = {part: status.detail for part, status in parts.items()}
    if parts["cpu"].loaded and parts["host"].loaded:
        found["instructions"] = import_module("bdcore.ops._host").cpu_level()
    return {**found, "BDCORE_OPS": os.environ.get("BDCORE_OPS", "not set")}


def _operators() -> dict[str, str]:
    """What each operator runs as on a CPU and on a GPU."""
    import torch

    from bdcore.ops import OPERATORS
    from bdcore.ops.registration import implementation

    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key  # pyright: ignore[reportPrivateUsage]
    running = {device: implementation(device) for device in ("cpu", "cuda")}
    return {
        name: ", ".join(
            f"{device} {how if has_kernel(name, device.upper()) else 'reference'}" for device, how in running.items()
        )
        for name in OPERATORS
    }


_PARTS: Mapping[str, Callable[[], Any]] = {
    "versions": _versions,
    "devices": _devices,
    "threads": _threads,
    "cache": _cache,
    "native": _native,
    "operators": _operators,
    "plugins": lambda: Host().listing(),
}


def _examine(part: Callable[[], Any]) -> Any:
    """What `part` finds, or the reason why it cannot: an installation that is broken is what this command is for."""
    try:
        return part()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _lines(found: Any, indent: str = "") -> list[str]:
    """A finding as lines of text, nested ones indented."""
    if not isinstance(found, dict):
        return [f"{indent}{found}"]
    lines: list[str] = []
    for key, value in cast(dict[str, Any], found).items():
        if not isinstance(value, dict | list):
            lines.append(f"{indent}{key}: {_plain(key, value)}")
            continue
        entries: list[Any] = cast(list[Any], value) if isinstance(value, list) else [value]
        lines.append(f"{indent}{key}:" if entries else f"{indent}{key}: none")
        for entry in entries:
            lines += _lines(entry, indent + "  ")
    return lines


def _plain(key: str, value: object) -> object:
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{value:,} ({value / 2**30:.1f} GiB)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value
