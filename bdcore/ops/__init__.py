"""Torch operators of bdcore: schema, reference and gradient in Python, kernels in csrc/ compiled at install time.

Each operator has a file here. Where no compiled kernel is loaded its pure-PyTorch reference computes, with the same
meaning; `registration` says how one or the other is chosen.
"""

from bdcore.ops.batch_norm_relu import BatchNormReLU, batch_norm_relu
from bdcore.ops.blend_trigger import blend_trigger
from bdcore.ops.info_nce import info_nce
from bdcore.ops.isolation_loss import isolation_loss
from bdcore.ops.load_batch import load_batch
from bdcore.ops.lowest_k import LowestK, lowest_k
from bdcore.ops.model_contrastive_loss import model_contrastive_loss
from bdcore.ops.native import load
from bdcore.ops.put_trigger import put_trigger
from bdcore.ops.registration import registered

load()

OPERATORS: tuple[str, ...] = tuple(f"bdcore::{name}" for name in registered)
"""Qualified names of all operators, forward and backward; `torch.ops.bdcore.NAME` calls them."""

__all__ = [
    "OPERATORS",
    "BatchNormReLU",
    "LowestK",
    "batch_norm_relu",
    "blend_trigger",
    "info_nce",
    "isolation_loss",
    "load_batch",
    "lowest_k",
    "model_contrastive_loss",
    "put_trigger",
]
