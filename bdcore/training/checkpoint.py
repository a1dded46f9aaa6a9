"""Checkpoints of a training phase: what an exact resume needs, in safetensors."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bdcore.artifacts import fingerprint
from bdcore.context import Context
from bdcore.store import Damaged, digest, load_tensors, save_tensors


def save_checkpoint(
    path: Path,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    state: dict[str, int | bool | str],
    context: Context,
) -> None:
    """Write parameters, buffers, the optimisers' states and `state` to `path`, atomically."""
    tensors: dict[str, Tensor] = {f"module.{name}": value for name, value in module.state_dict().items()}
    for which, optimizer in enumerate(optimizers):
        for number, slots in optimizer.state_dict()["state"].items():
            kept = {slot: value for slot, value in slots.items() if value is not None}
            tensors |= {f"optimizer{which}.{number}.{slot}": value for slot, value in kept.items()}
    cost = {"images": context.meter.images, "seconds": context.meter.seconds}
    metadata = {"state": json.dumps(state), "cost": json.dumps(cost)}
    save_tensors(path, tensors, metadata | {"sha256": _checksum(tensors, metadata)})


def load_checkpoint(
    path: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], recipe: str, context: Context
) -> dict[str, int | bool | str] | None:
    """Restore what `save_checkpoint` wrote.

    Returns:
        Its `state`; None, and nothing altered, where there is no file, a damaged one or one of another recipe.
    """
    if not path.exists():
        return None
    try:
        tensors, metadata = load_tensors(path)
        if metadata.pop("sha256", None) != _checksum(tensors, metadata):
            raise Damaged(f"{path} does not match its checksum")
    except Damaged as error:
        context.warn(f"checkpoint {path.name} was damaged ({error}); its phase is trained anew, with the same result")
        return None
    state: dict[str, int | bool | str] = json.loads(metadata["state"])
    if state["recipe"] != recipe:
        return None
    module.load_state_dict({k.removeprefix("module."): v for k, v in tensors.items() if k.startswith("module.")})
    for which, optimizer in enumerate(optimizers):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer{which}."):
                _, number, slot = key.split(".", 2)
                slots.setdefault(int(number), {})[slot] = _laid_out(value, parameters[int(number)])
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    cost = json.loads(metadata["cost"])
    context.meter.resume(cost["images"], cost["seconds"])
    return state


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over all that a checkpoint holds."""
    return digest([fingerprint(tensors), dict(metadata)])


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """A slot in the memory layout of its parameter: files hold rows in order, and fused optimisers read memory in step
    with a channels-last parameter without looking at strides."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
