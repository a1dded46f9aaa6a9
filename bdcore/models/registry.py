"""Classifiers by name: our own for small images, those of torchvision and timm, and people's own code.

wrnDEPTH_WIDTH, preact_resnet18, preact_resnet34     for small images
NAME                                                 of torchvision
timm:NAME                                            of timm, where that is installed
MODULE:FUNCTION                                      code of one's own, from the working folder
...,OPTION=VALUE,...                                 options of the network; a VALUE is TOML, or else a string
"""

import copy
import importlib.metadata
import importlib.util
import re
import tomllib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import cast

import torch
from torch import nn

from bdcore.artifacts import Architecture
from bdcore.errors import UsageError, unknown_name
from bdcore.models import own_code
from bdcore.models.classifier import Classifier
from bdcore.models.preact_resnet import preact_resnet
from bdcore.models.wrn import wrn

_WRN = re.compile(r"wrn([1-9]\d*)_([1-9]\d*)")
_PREACT = {"preact_resnet18": 18, "preact_resnet34": 34}
_WRN_EXAMPLES = ("wrn10_1", "wrn16_1", "wrn16_2", "wrn16_4", "wrn28_2", "wrn28_10", "wrn40_1", "wrn40_2")
_TIMM = "timm:"
# Set by the host, or they read files and fetch weights, which would be somebody's training in an untrained network.
_RESERVED = {
    "torchvision": {"num_classes", "weights", "weights_backbone", "progress"},
    "timm": {"num_classes", "in_chans", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"}
    | {"cache_dir", "model_name", "scriptable", "exportable", "no_jit"},
}


def build(arch: Architecture, seed: int) -> Classifier:
    """An untrained classifier on the CPU, in train mode.

    Its parameters follow from `arch` and `seed` alone; the global random state is left as it was. Networks of
    torchvision are built without weights and auxiliary heads; for grey data they get the one channel three times.
    Where a network has a fixed image size that is an option, it is set from `arch.shape` unless the name gives one.

    Raises:
        UsageError: the name or an option is unknown, timm or one's own module is missing or fails, the network does not
            take images of `arch.shape`, or does not answer with `arch.classes` logits.
    """
    base, options = _parse(arch.name)
    check_name(arch.name)
    # The CPU's own generator: torch.manual_seed would reseed every other device as well.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if _kind(base) == "small":
            net, channels = _small(arch, base), arch.shape[0]
        else:
            net, channels = _of_others(arch, base, options, seed)
    repeat = channels // arch.shape[0]
    return Classifier(net.train(), arch.shape, arch.mean * repeat, arch.std * repeat)


def check_name(name: str) -> None:
    """Raise UsageError, with the valid names and the nearest ones, where no model has this name; one's own code is
    imported for that."""
    base, options = _parse(name)
    kind = _kind(base)
    if kind == "small" and options:
        raise UsageError(f"model {name!r}: {base} has no options")
    for key in options:
        if key in _RESERVED.get(kind, set()):
            raise UsageError(f"model {name!r}: {key} is not yours to set; the network is untrained and fits the data")
    if kind == "timm":
        _check_timm(base)
    elif kind == "own":
        own_code.find_function(base)
    elif match := _WRN.fullmatch(base):
        depth = int(match[1])
        if depth < 10 or (depth - 4) % 6:
            raise UsageError(
                f"model {name!r}: a wide residual network's depth is 10, 16, 22, 28, 34, 40, ... (6n + 4), not {depth}"
            )
    elif base not in _PREACT and base not in _torchvision_names():
        raise UsageError(
            unknown_name("model", base, names()) + f" (wrnDEPTH_WIDTH: any depth 6n + 4, any width; {_TIMM}NAME; "
            f"MODULE:FUNCTION.){_hint_at_timm(base)}"
        )


def names() -> list[str]:
    """All valid names but those of timm and of people's own code, sorted; of the wide residual networks, which are
    endless, the usual ones."""
    return sorted([*_WRN_EXAMPLES, *_PREACT, *_torchvision_names()])


def is_own_code(name: str) -> bool:
    """Whether a name is MODULE:FUNCTION, which runs code when it is built."""
    return _kind(_parse(name)[0]) == "own"


def code_of(name: str) -> str:
    """What tells the code behind a name from other code: SHA-256 of the source of one's own, the version of timm for
    its networks, "" for the others."""
    base, _ = _parse(name)
    match _kind(base):
        case "own":
            return own_code.code_hash(base)
        case "timm":
            return f"timm {importlib.metadata.version('timm')}"
        case _:
            return ""


def _parse(name: str) -> tuple[str, dict[str, object]]:
    """NAME and options of NAME,OPTION=VALUE,..."""
    base, *texts = name.split(",")
    options: dict[str, object] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key.isidentifier() or key in options:
            raise UsageError(
                f"model {name!r}: {text!r} is no option, or given twice; they are written NAME,OPTION=VALUE,..., "
                f"as {_TIMM}vit_tiny_patch16_224,patch_size=4"
            )
        options[key] = _value(value)
    return base.strip(), options


def _value(text: str) -> object:
    """A number, boolean or quoted string of TOML, else `text` itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value: object = parsed["value"]
    return value if len(parsed) == 1 and isinstance(value, str | bool | int | float) else text


def _kind(base: str) -> str:
    if _WRN.fullmatch(base) or base in _PREACT:
        return "small"
    if base.startswith(_TIMM):
        return "timm"
    return "own" if ":" in base else "torchvision"


def _small(arch: Architecture, base: str) -> nn.Module:
    channels = arch.shape[0]
    match = _WRN.fullmatch(base)
    if match:
        return wrn(int(match[1]), int(match[2]), channels, arch.classes)
    return preact_resnet(_PREACT[base], channels, arch.classes)


def _of_others(arch: Architecture, base: str, options: dict[str, object], seed: int) -> tuple[nn.Module, int]:
    """A network of others that was seen to classify images of the data's form, and how many channels it takes."""
    channels, height, width = arch.shape
    size: object = height if height == width else (height, width)
    makers: list[tuple[Callable[[], nn.Module], int]]
    match _kind(base):
        case "torchvision":
            makers = [(partial(_of_torchvision, arch, base, size, options), 3)]
        case "timm":
            makers = [(partial(_of_timm, arch, base, size, options), channels)]
        case _:
            given = partial(own_code.call, base, classes=arch.classes, size=(height, width), options=options)
            makers = [(partial(given, channels=channels), channels)]
            if channels == 1 and not own_code.takes_channels(base):  # it may be for colour images alone
                makers.append((partial(given, channels=3), 3))
    reasons: list[str] = []
    for make, takes in makers:
        torch.default_generator.manual_seed(seed)
        net = make()
        reason = _unfit(net, (takes, height, width), arch.classes)
        if reason is None and _kind(base) == "own":
            reason = _not_copied(net)
        if reason is None:
            return net, takes
        reasons.append(reason)
    raise UsageError(f"model {arch.name!r} {reasons[0]}.{_advice(base, options)}")


def _of_torchvision(arch: Architecture, base: str, size: object, options: dict[str, object]) -> nn.Module:
    if arch.shape[0] not in (1, 3):
        raise UsageError(
            f"model {arch.name!r} takes images of 3 channels (or 1, repeated), the data has {arch.shape[0]}: "
            f"use wrnDEPTH_WIDTH, preact_resnet18 or {_TIMM}NAME, which take any number"
        )
    from torchvision.models import get_model

    fixed: dict[str, object] = {}
    if base.startswith("vit_"):
        if not isinstance(size, int):
            raise UsageError(f"model {arch.name!r} takes square images alone, and the data's are {arch.shape[1:]}")
        fixed = {"image_size": size}
    elif base.startswith("maxvit_"):
        fixed = {"input_size": arch.shape[1:]}
    elif base in ("googlenet", "inception_v3"):
        fixed = {"aux_logits": False, "init_weights": True}  # without the second, both warn
    given = {**fixed, **options}
    with _blamed(arch.name, given):
        return get_model(base, weights=None, num_classes=arch.classes, **given)


def _of_timm(arch: Architecture, base: str, size: object, options: dict[str, object]) -> nn.Module:
    import timm

    create = cast("Callable[..., nn.Module]", timm.create_model)
    make = partial(create, base.removeprefix(_TIMM), num_classes=arch.classes, in_chans=arch.shape[0])
    state = torch.get_rng_state()
    with _blamed(arch.name, options):
        try:
            return make(**{"img_size": size, **options})
        except TypeError as error:
            if "img_size" in options or "'img_size'" not in str(error):
                raise
        torch.set_rng_state(state)
        return make(**options)  # a network for images of any size has no such option


@contextmanager
def _blamed(name: str, given: Mapping[str, object]) -> Generator[None]:
    """Turn whatever a library's constructor raises into one error that names what it was given."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        shown = ", ".join(f"{key}={value}" for key, value in given.items()) or "its own defaults"
        raise UsageError(
            f"model {name!r} cannot be made with {shown}: {_told(error)}. Options are the keyword "
            "arguments of its class; for small images often patch_size or window_size must be set."
        ) from error


def _unfit(net: nn.Module, shape: tuple[int, int, int], classes: int) -> str | None:
    """Why a network cannot classify images of this shape, a clause; None where it does so."""
    try:
        with torch.no_grad():
            answer = net.eval()(torch.zeros(2, *shape))
    except Exception as error:
        return f"does not take images of {shape}: {_told(error)}"
    if not isinstance(answer, torch.Tensor):
        return f"answers with a {type(answer).__name__}, where logits [B, {classes}] are needed"
    cutter: object = getattr(net, "patch_embed", None)
    patches: object = getattr(cutter, "patch_size", None)
    padded = getattr(cutter, "dynamic_img_pad", False)
    if (
        isinstance(patches, tuple)
        and not padded
        and any(side % patch for side, patch in zip(shape[1:], patches, strict=False))
    ):
        return (
            f"cuts images into patches of {patches}, so the last rows or columns of {shape[1:]} are never seen, and a "
            "trigger may stand there: give it another patch_size"
        )
    if answer.shape != (2, classes) or not answer.is_floating_point():
        return f"answers two images with {answer.dtype} {tuple(answer.shape)}, where logits (2, {classes}) are needed"
    return None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"


def _not_copied(net: nn.Module) -> str | None:
    """Why a network cannot be copied, as attacks and defenses do; None where it can."""
    try:
        copy.deepcopy(net)
    except Exception as error:
        return f"cannot be copied by copy.deepcopy: {_told(error)}"
    return None


def _advice(base: str, options: Mapping[str, object]) -> str:
    sized = [key for key in ("img_size", "image_size", "input_size") if key in options]
    if sized:
        return f" Leave {sized[0]} out: it is set from the data."
    return "" if ":" in base else " Use larger images, or wrnDEPTH_WIDTH or preact_resnet18, which take any size."


def _check_timm(base: str) -> None:
    if importlib.util.find_spec("timm") is None:
        raise UsageError(f"model {base!r}: timm is not installed. Install it: pip install timm")
    import timm

    name = base.removeprefix(_TIMM)
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(_TIMM + found for found in near)}?" if near else ""
        raise UsageError(
            f"model {base!r}: timm {timm.__version__} has no {name!r}.{hint} `python -c 'import timm; "
            "print(timm.list_models())'` lists all."
        )


def _hint_at_timm(base: str) -> str:
    """Whether timm knows a name that torchvision does not; it is imported to tell, and only then."""
    if not base or importlib.util.find_spec("timm") is None:
        return ""
    import timm

    return f" Did you mean {_TIMM}{base}?" if timm.is_model(base) else ""


def _torchvision_names() -> Sequence[str]:
    from torchvision import models  # late: a run on networks of our own does not wait for it

    return models.list_models(module=models)
