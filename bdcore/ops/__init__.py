"""Torch operators of bdcore, each with a pure-PyTorch reference that computes wherever no faster kernel is loaded.

The reference is registered under the key that CPU and CUDA kernels override: a compiled library that adds those to the
same schema changes speed, not meaning, and nothing in Python.
"""

from bdcore.ops.blend_trigger import blend_trigger
from bdcore.ops.model_contrastive_loss import model_contrastive_loss

OPERATORS: tuple[str, ...] = (
    "bdcore::blend_trigger",
    "bdcore::blend_trigger_backward",
    "bdcore::model_contrastive_loss",
    "bdcore::model_contrastive_loss_backward",
)
"""Qualified names of all operators, forward and backward; `torch.ops.bdcore.NAME` calls them."""

__all__ = ["OPERATORS", "blend_trigger", "model_contrastive_loss"]
