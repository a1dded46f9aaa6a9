"""Why the weights of a file do not fit a network, in words, with the names and shapes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from bdcore.models.pickles import shown

_SHOWN = 5


def explain_mismatch(
    path: Path,
    net: nn.Module,
    prefix: str,
    missing: Sequence[str],
    unexpected: Sequence[str],
    different: Mapping[str, tuple[Tensor, Tensor]],
) -> str:
    """One message: the likely reason, then what is missing, what is too much, and what has another shape or dtype.

    Args:
        path: the file.
        net: the network that was to be filled.
        prefix: what stood before the network's names in the file.
        missing: the network's names that the file lacks.
        unexpected: names of the file that the network lacks.
        different: for names of both, the file's tensor and the network's.
    """
    known = len(net.state_dict())
    parts = [f"{path} does not fit {type(net).__name__}: {_reason(net, missing, unexpected, different, known)}."]
    if missing:
        parts.append(f"Missing: {_some(missing)}.")
    if unexpected:
        parts.append(f"Not expected: {_some([shown(name) for name in unexpected])}.")
    if different:
        lines = [f"{name} is {_form(given)} where {_form(own)} is needed" for name, (given, own) in different.items()]
        parts.append(f"Different: {_some(lines, '; ')}.")
    if prefix:
        parts.append(f"(Names without the prefix {shown(prefix)!r} of the file.)")
    return " ".join(parts)


def _reason(
    net: nn.Module,
    missing: Sequence[str],
    unexpected: Sequence[str],
    different: Mapping[str, tuple[Tensor, Tensor]],
    known: int,
) -> str:
    if missing or unexpected:
        return _other_names(missing, unexpected, known)
    if any(given.shape == own.shape for given, own in different.values()):
        return "it holds integers where the network computes with fractions: quantised weights are not read"
    first, last = _first(net), _last(net, different)
    if last:
        given, own = different[last[0]]
        return f"it was trained for {len(given)} classes, and this network is built for {len(own)}"
    if set(different) == {first} and different[first][0].ndim == 4:
        given, own = different[first]
        return f"it takes images of {given.shape[1]} channels, and this network is built for {own.shape[1]}"
    if any("pos_embed" in name or "position" in name for name in different):
        return (
            "it was made for another image or patch size: give the network's own as options of its name, for instance "
            "timm:NAME,img_size=224,patch_size=16"
        )
    return "it is of another width, or another member of the same family"


def _other_names(missing: Sequence[str], unexpected: Sequence[str], known: int) -> str:
    if len(missing) > known / 2:
        return "it is of another architecture, or saved from a module around or inside this one"
    if missing and unexpected:
        return "it is of another architecture, or of another version of its library"
    return f"it is of a {'smaller' if missing else 'larger'} architecture, or holds {'less' if missing else 'more'}"


def _first(net: nn.Module) -> str:
    convolutions = (name for name, module in net.named_modules() if isinstance(module, nn.Conv2d))
    return f"{next(convolutions, '')}.weight"


def _last(net: nn.Module, different: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
    """The names that differ, if they are a last layer's and differ in its rows alone."""
    layers = {name.rpartition(".")[0] for name in different}
    rows = {(len(given), len(own)) for given, own in different.values() if given.ndim and own.ndim}
    inner = all(given.shape[1:] == own.shape[1:] for given, own in different.values())
    linear = all(isinstance(net.get_submodule(layer), nn.Linear | nn.Conv2d) for layer in layers)
    return list(different) if len(layers) <= 2 and len(rows) == 1 and inner and linear else []


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _some(names: Sequence[str], separator: str = ", ") -> str:
    first = separator.join(names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{first} and {more} more" if more > 0 else first
