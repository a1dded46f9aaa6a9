"""Checkpoints of a training phase: what an exact resume needs, in safetensors."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from bdcore.artifacts import fingerprint
from bdcore.context import Context
from bdcore.store import Damaged, load_tensors, save_tensors


def save_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, int | bool | str], context: Context
) -> None:
    """Write parameters, buffers, the optimiser's state and `state` to `path`, atomically."""
    tensors: dict[str, Tensor] = {f"module.{name}": value for name, value in module.state_dict().items()}
    for number, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{slot}": value for slot, value in slots.items() if value is not None}
    cost = {"images": context.meter.images, "seconds": context.meter.seconds}
    metadata = {"state": json.dumps(state), "cost": json.dumps(cost), "sha256": fingerprint(tensors)}
    save_tensors(path, tensors, metadata)


def load_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, recipe: str, context: Context
) -> dict[str, int | bool | str] | None:
    """Restore what `save_checkpoint` wrote; None, and nothing altered, where it is absent, damaged or of another recipe."""
    if not path.exists():
        return None
    try:
        tensors, metadata = load_tensors(path)
        if metadata.get("sha256") != fingerprint(tensors):
            raise Damaged(f"{path} does not match its checksum")
    except Damaged as error:
        context.warn(f"checkpoint {path.name} is damaged ({error}); this phase starts again, with the same result")
        return None
    state: dict[str, int | bool | str] = json.loads(metadata["state"])
    if state["recipe"] != recipe:
        return None
    module.load_state_dict({k.removeprefix("module."): v for k, v in tensors.items() if k.startswith("module.")})
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, number, slot = key.split(".", 2)
            slots.setdefault(int(number), {})[slot] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    cost = json.loads(metadata["cost"])
    context.meter.resume(cost["images"], cost["seconds"])
    return state
