"""bdcore: a pluggy host for backdoor attacks and defenses on image classifiers.

The names below are all that a plugin needs. They load on first use, so that `import bdcore` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from bdcore.hookspecs import hookimpl

if TYPE_CHECKING:
    from bdcore.artifacts import (
        Architecture,
        Dataset,
        DefenseInput,
        Labelled,
        Outcome,
        Suspects,
        Trigger,
        Triggered,
        Verdict,
    )
    from bdcore.context import Context, Progress
    from bdcore.contract import (
        Attack,
        AttackConfig,
        AttackInput,
        CleanLabelAttack,
        CleanLabelConfig,
        DatasetPlugin,
        Defense,
        Observer,
        PluginConfig,
    )
    from bdcore.errors import DataError, DefenseError, UsageError
    from bdcore.models import build, split_head
    from bdcore.ops import (
        BatchNormReLU,
        LowestK,
        blend_trigger,
        info_nce,
        isolation_loss,
        load_batch,
        lowest_k,
        model_contrastive_loss,
        put_trigger,
    )
    from bdcore.poisoning import batch_shares, patch_side, read_picture
    from bdcore.samples import Samples, read_npz, read_samples
    from bdcore.training import Batch, Recipe, fit, forward_batches, frozen_copy

_HOME = {
    "Architecture": "artifacts",
    "Dataset": "artifacts",
    "DefenseInput": "artifacts",
    "Labelled": "artifacts",
    "Outcome": "artifacts",
    "Suspects": "artifacts",
    "Trigger": "artifacts",
    "Triggered": "artifacts",
    "Verdict": "artifacts",
    "Context": "context",
    "Progress": "context",
    "Attack": "contract",
    "AttackConfig": "contract",
    "AttackInput": "contract",
    "CleanLabelAttack": "contract",
    "CleanLabelConfig": "contract",
    "DatasetPlugin": "contract",
    "Defense": "contract",
    "Observer": "contract",
    "PluginConfig": "contract",
    "DataError": "errors",
    "DefenseError": "errors",
    "UsageError": "errors",
    "build": "models",
    "split_head": "models",
    "BatchNormReLU": "ops",
    "LowestK": "ops",
    "blend_trigger": "ops",
    "info_nce": "ops",
    "isolation_loss": "ops",
    "load_batch": "ops",
    "lowest_k": "ops",
    "model_contrastive_loss": "ops",
    "put_trigger": "ops",
    "batch_shares": "poisoning",
    "patch_side": "poisoning",
    "read_picture": "poisoning",
    "Samples": "samples",
    "read_npz": "samples",
    "read_samples": "samples",
    "Batch": "training",
    "Recipe": "training",
    "fit": "training",
    "forward_batches": "training",
    "frozen_copy": "training",
}

__all__ = [
    "Architecture",
    "Attack",
    "AttackConfig",
    "AttackInput",
    "Batch",
    "BatchNormReLU",
    "CleanLabelAttack",
    "CleanLabelConfig",
    "Context",
    "DataError",
    "Dataset",
    "DatasetPlugin",
    "Defense",
    "DefenseError",
    "DefenseInput",
    "Labelled",
    "LowestK",
    "Observer",
    "Outcome",
    "PluginConfig",
    "Progress",
    "Recipe",
    "Samples",
    "Suspects",
    "Trigger",
    "Triggered",
    "UsageError",
    "Verdict",
    "batch_shares",
    "blend_trigger",
    "build",
    "fit",
    "forward_batches",
    "frozen_copy",
    "hookimpl",
    "info_nce",
    "isolation_loss",
    "load_batch",
    "lowest_k",
    "model_contrastive_loss",
    "patch_side",
    "put_trigger",
    "read_npz",
    "read_picture",
    "read_samples",
    "split_head",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'bdcore' has no attribute {name!r}")
    value = getattr(import_module(f"bdcore.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
