"""Classifiers by name: `wrnDEPTH_WIDTH`, `preact_resnet18`, `preact_resnet34`, any classifier of torchvision."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bdcore.artifacts import Architecture
from bdcore.errors import UsageError, unknown_name
from bdcore.models.classifier import Classifier
from bdcore.models.preact_resnet import preact_resnet
from bdcore.models.wrn import wrn

_WRN = re.compile(r"wrn([1-9]\d*)_([1-9]\d*)")
_PREACT = {"preact_resnet18": 18, "preact_resnet34": 34}
_WRN_EXAMPLES = ("wrn10_1", "wrn16_1", "wrn16_2", "wrn16_4", "wrn28_2", "wrn28_10", "wrn40_1", "wrn40_2")


def build(arch: Architecture, seed: int) -> Classifier:
    """An untrained classifier on the CPU, in train mode.

    Its parameters follow from `arch` and `seed` alone; the global random state is left as it was. Networks of
    torchvision are built without weights and auxiliary heads; for grey data they get the one channel three times.

    Raises:
        UsageError: the name is unknown, or a torchvision network is asked to take 2 or more than 3 channels.
    """
    check_name(arch.name)
    # The CPU's own generator: torch.manual_seed would reseed every other device as well.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net, channels = _network(arch)
    repeat = channels // arch.shape[0]
    return Classifier(net, arch.shape, arch.mean * repeat, arch.std * repeat)


def check_name(name: str) -> None:
    """Raise UsageError, with the valid names and the nearest ones, where no model has this name."""
    match = _WRN.fullmatch(name)
    if match:
        depth = int(match[1])
        if depth < 10 or (depth - 4) % 6:
            raise UsageError(
                f"model {name!r}: a wide residual network's depth is 10, 16, 22, 28, 34, 40, ... (6n + 4), not {depth}"
            )
    elif name not in _PREACT and name not in _torchvision_names():
        raise UsageError(unknown_name("model", name, names()) + " (wrnDEPTH_WIDTH: any depth 6n + 4, any width.)")


def names() -> list[str]:
    """All valid names, sorted; of the wide residual networks, which are endless, the usual ones."""
    return sorted([*_WRN_EXAMPLES, *_PREACT, *_torchvision_names()])


def _network(arch: Architecture) -> tuple[nn.Module, int]:
    """The network that `arch` names, and how many channels it takes."""
    channels = arch.shape[0]
    match = _WRN.fullmatch(arch.name)
    if match:
        return wrn(int(match[1]), int(match[2]), channels, arch.classes), channels
    if arch.name in _PREACT:
        return preact_resnet(_PREACT[arch.name], channels, arch.classes), channels
    if channels not in (1, 3):
        raise UsageError(
            f"model {arch.name!r} takes images of 3 channels (or 1, repeated), the data has {channels}: "
            "use wrnDEPTH_WIDTH or preact_resnet18, which take any number"
        )
    from torchvision.models import get_model

    options: dict[str, Any] = {}
    if arch.name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}  # without the second, both warn
    return get_model(arch.name, weights=None, num_classes=arch.classes, **options), 3


def _torchvision_names() -> Sequence[str]:
    from torchvision import models  # late: a run on networks of our own does not wait for it

    return models.list_models(module=models)
