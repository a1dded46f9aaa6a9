"""Weights that others saved: safetensors, and `.pt`/`.pth` files of `torch.save`, read, loaded and written back.

Nothing in a file runs; one that would is refused with the reason. What surrounds the weights is understood: dicts such
as {"epoch": 90, "state_dict": ...}, and prefixes such as "module." of DataParallel or "_orig_mod." of torch.compile.
"""

import json
import os
import stat
from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, cast

import safetensors
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from bdcore.artifacts import Architecture
from bdcore.errors import UsageError
from bdcore.models.archives import read_archive
from bdcore.models.classifier import Classifier
from bdcore.models.mismatch import explain_mismatch
from bdcore.models.pickles import Refused, shown
from bdcore.models.registry import is_own_code
from bdcore.store import save_tensors, sha256_file, write_bytes

# Averaged weights first: where a file has both, they are what its author evaluates and ships.
_WRAPPINGS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "net")
_MEAN_STD = ("mean", "std")
_DEEPEST_PREFIX = 6


@dataclass(frozen=True)
class Checkpoint:
    """Weights as a file holds them.

    Args:
        path: the file.
        form: "safetensors", or "pt" for any of torch.save.
        state: tensors on the CPU, by their names in the file, in its order and in its dtypes.
        wrapping: the keys that lead to the weights, for instance ("state_dict",).
        beside: for each of these levels the numbers and texts that stand beside the next key.
        metadata: of a safetensors file.
    """

    path: Path
    form: Literal["safetensors", "pt"]
    state: dict[str, Tensor]
    wrapping: tuple[str, ...] = ()
    beside: tuple[dict[str, Any], ...] = ()
    metadata: Mapping[str, str] | None = None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of weights; its form is told by its content, not by its name.

    Raises:
        UsageError: the file is missing, is no checkpoint, would run code, claims more memory than it holds, is damaged,
            or holds more than one set of weights.
    """
    try:
        return _read(path)
    except Refused as refused:
        raise UsageError(f"{path} is not read: {refused}.") from refused
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error


def load_into(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Fill a network with the weights of a checkpoint, in the network's own dtypes and on its device.

    Args:
        module: the network, or a Classifier: then its `net` is filled, and its normalisation too where the checkpoint
            holds one (those that bdcore wrote do).
        checkpoint: its names may have a prefix before the network's names. Absent `num_batches_tracked`, weights tied
            to present ones, and surplus buffers that the network computes itself are tolerated.

    Raises:
        UsageError: names, shapes or dtypes differ; the message lists them with the likely reason. The network may then
            hold some of the weights.
    """
    net, state, normalisation = module, dict(checkpoint.state), {}
    if isinstance(module, Classifier):
        net = module.net
        state, normalisation = _network_of(state)
    prefix = _prefix(state, net.state_dict())
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    outside = [name for name in state if not name.startswith(prefix)]
    own = net.state_dict()
    different = [name for name, tensor in own.items() if name in inside and not _fits(inside[name], tensor)]
    if not different:
        try:
            answer = net.load_state_dict(inside, strict=False)
        except RuntimeError as error:  # a network's own rules for older names can fail as well
            raise UsageError(
                f"{checkpoint.path} does not fit {type(net).__name__}: {' '.join(str(error).split())}."
            ) from error
        missing, unexpected = answer.missing_keys, answer.unexpected_keys
    else:
        missing, unexpected = [name for name in own if name not in inside], [name for name in inside if name not in own]
    missing = [name for name in missing if not _dispensable(name, own, inside)]
    # Older versions of a network may have saved buffers that it makes by itself.
    computed = {name for name, _ in net.named_buffers(remove_duplicate=False)} - own.keys()
    unexpected = [name for name in unexpected if name not in computed] + outside
    if different or missing or unexpected:
        shapes = {name: (inside[name], own[name]) for name in different}
        raise UsageError(explain_mismatch(checkpoint.path, net, prefix, missing, unexpected, shapes))
    if isinstance(module, Classifier) and normalisation:
        _load_normalisation(module, normalisation, checkpoint.path)


def write_checkpoint(path: Path, like: Checkpoint, state: Mapping[str, Tensor]) -> str:
    """Write weights in the form of a checkpoint that was read: format, wrapping, prefix, order of names and dtypes.

    Of what surrounded the weights, numbers and texts are kept. Other weights (a second, averaged set) and the state of
    an optimiser are not: they belong to the network as it was before.

    Args:
        path: written atomically.
        like: what `state` was loaded from.
        state: of the network, or of the Classifier around it.

    Returns:
        The file's SHA-256.

    Raises:
        StoreError: the file cannot be written.
        ValueError: `state` is not of a network that `like` fits.
    """
    given = _names_of_file(like, state)
    kept = {name: given[name].to(tensor.dtype) for name, tensor in like.state.items() if name in given}
    added = {name: tensor for name, tensor in given.items() if not (name in kept or _dispensable(name, given, kept))}
    plain = {name: _alone(tensor) for name, tensor in (kept | added).items()}
    if like.form == "safetensors":
        return save_tensors(path, plain, like.metadata)
    content: Any = _as_before(plain, like.state)
    for key, beside in zip(reversed(like.wrapping), reversed(like.beside), strict=True):
        content = {name: content if name == key else value for name, value in beside.items()}
    buffer = BytesIO()
    torch.save(content, buffer)
    return write_bytes(path, buffer.getbuffer())


def manifest_of(path: Path) -> Architecture | None:
    """The architecture of a model that bdcore saved, from the NAME.json beside NAME.safetensors; None where there is
    no such file.

    Raises:
        UsageError: the manifest is damaged, belongs to other weights, or names code to run.
    """
    manifest = path.with_suffix(".json")
    if path.suffix != ".safetensors" or not manifest.is_file():
        return None
    try:
        content = json.loads(manifest.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{manifest} cannot be read ({error}); name the architecture with --arch.") from error
    if not isinstance(content, dict) or "arch" not in content:
        return None
    found = cast("dict[str, Any]", content)
    try:
        arch = TypeAdapter(Architecture).validate_python(found["arch"])
    except ValidationError as error:
        raise UsageError(f"{manifest} is damaged: its arch is {found['arch']!r}. Name it with --arch.") from error
    if found.get("sha256") != sha256_file(path):
        raise UsageError(
            f"{manifest} was written for other weights than {path} holds: name the architecture with --arch."
        )
    if is_own_code(arch.name):
        raise UsageError(
            f"{manifest} names code to run, {arch.name}. A file is not trusted with that: if you are to run it, say so "
            f"with --arch {arch.name}"
        )
    return arch


def _read(path: Path) -> Checkpoint:
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise Refused("it is a folder; name the file of weights in it")
    if not stat.S_ISREG(found.st_mode):  # to open a FIFO would wait for somebody who writes
        raise Refused("it is no regular file")
    if found.st_size == 0:
        raise Refused("it is empty")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if found.st_size > memory:
        raise Refused(f"it has {found.st_size} bytes, and this machine's memory {memory}")
    with open(path, "rb") as file:
        head = file.read(9)
        file.seek(0)
        if head[8:9] == b"{":
            return _read_safetensors(path)
        content = read_archive(file)
    wrapping: list[str] = []
    beside: list[dict[str, Any]] = []
    while True:
        key = _next_wrapping(content)
        if key is None:
            return Checkpoint(path, "pt", _tensors(content), tuple(wrapping), tuple(beside))
        wrapping.append(key)
        beside.append({name: value for name, value in content.items() if name == key or _is_plain(value)})
        content = beside[-1][key]
        beside[-1][key] = None


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
    except (safetensors.SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise Refused(f"it is no whole safetensors file ({shown(str(error))})") from error
    if not state:
        raise Refused("it holds no tensors")
    return Checkpoint(path, "safetensors", state, metadata=metadata)


def _next_wrapping(content: Any) -> str | None:
    """The key under which the weights are; None where `content` itself is the state dict."""
    if not isinstance(content, dict):
        raise Refused(f"it holds a {type(content).__name__}, and a dict of tensors is needed: save model.state_dict()")
    found = cast("dict[Any, Any]", content)
    groups = {key: cast("dict[Any, Any]", group) for key, group in found.items() if isinstance(group, dict)}
    for key in _WRAPPINGS:
        if _has_weights(groups.get(key, {})):
            return key
    if any(isinstance(value, Tensor) for value in found.values()):
        return None
    whole = [key for key, group in groups.items() if isinstance(key, str) and _is_whole(group)]
    if len(whole) == 1:
        return whole[0]
    listed = ", ".join(repr(shown(str(key))) for key in list(found)[:8])
    if whole:
        raise Refused(
            f"it holds several sets of weights, {', '.join(map(shown, whole[:8]))}: save one state dict alone"
        )
    raise Refused(f"it holds no state dict; its keys are {listed or '(none)'}")


def _has_weights(group: dict[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in group.values()) or any(key in group for key in _WRAPPINGS)


def _is_whole(group: dict[Any, Any]) -> bool:
    """Whether a dict under any other key is a state dict, or the wrapping of one."""
    tensors = [isinstance(value, Tensor) for value in group.values()]
    return (bool(tensors) and all(tensors)) or any(
        isinstance(group.get(key), dict) and _has_weights(group[key]) for key in _WRAPPINGS
    )


def _tensors(content: dict[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, which stays an OrderedDict with the versions of its modules if it is one."""
    state: dict[str, Tensor] = OrderedDict() if isinstance(content, OrderedDict) else {}
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            state[name] = value.detach()
    return _as_before(state, content)


def _as_before(state: Mapping[str, Tensor], like: Mapping[Any, Any]) -> dict[str, Tensor]:
    """`state` in the class of another state dict, with its versions of modules."""
    if not isinstance(like, OrderedDict):
        return dict(state)
    ordered = OrderedDict(state)
    if hasattr(like, "_metadata"):
        ordered._metadata = cast(Any, like)._metadata  # type: ignore[attr-defined]
    return ordered


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


def _network_of(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state of a network, and the mean and std around it where `state` is a whole Classifier's."""
    names = [name for name in state if name not in _MEAN_STD]
    if len(state) == len(names) + len(_MEAN_STD) and names and all(name.startswith("net.") for name in names):
        return {name.removeprefix("net."): state[name] for name in names}, {name: state[name] for name in _MEAN_STD}
    return dict(state), {}


def _prefix(names: Iterable[str], own: Iterable[str]) -> str:
    """What stands before the network's own names in a file; of several possible prefixes the one that fits most names,
    and of these the shortest."""
    wanted = set(own)
    found = Counter[str]()
    for name in names:
        parts = name.split(".")
        for depth in range(min(len(parts), _DEEPEST_PREFIX)):
            if ".".join(parts[depth:]) in wanted:
                found["".join(f"{part}." for part in parts[:depth])] += 1
    return min(found, key=lambda prefix: (-found[prefix], len(prefix)), default="")


def _names_of_file(like: Checkpoint, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network, or of the Classifier around it, by the names that they have in a file."""
    network, normalisation = _network_of(state)
    held, around = _network_of(like.state)
    if around:
        return {f"net.{name}": tensor for name, tensor in network.items()} | around | normalisation
    prefix = _prefix(held, network)
    given = {f"{prefix}{name}": tensor for name, tensor in network.items()}
    if not given.keys() & held.keys():
        raise ValueError(f"the state has none of the names of {like.path}")
    return given


def _alone(tensor: Tensor) -> Tensor:
    """A tensor on the CPU without what else may stand in its memory."""
    plain = tensor.detach().cpu().contiguous()
    return plain if plain.untyped_storage().nbytes() == plain.numel() * plain.itemsize else plain.clone()


def _fits(given: Tensor, own: Tensor) -> bool:
    return given.shape == own.shape and given.dtype.is_floating_point == own.dtype.is_floating_point


def _dispensable(name: str, own: Mapping[str, Tensor], present: Container[str]) -> bool:
    """Whether a network is whole without the tensor `name`, given those that are `present`."""
    if name.endswith("num_batches_tracked"):
        return True
    place = own[name].data_ptr()
    return place != 0 and any(other in present and own[other].data_ptr() == place for other in own if other != name)


def _load_normalisation(model: Classifier, given: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in given.items():
        own: Tensor = getattr(model, name)
        if tensor.numel() != own.numel():
            raise UsageError(
                f"{path}: its {name} is for images of {tensor.numel()} channels, the network takes {own.numel()}."
            )
        own.copy_(tensor.view_as(own))
