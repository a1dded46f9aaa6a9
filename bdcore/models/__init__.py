"""Classifiers by name, with the normalisation inside; the penultimate features of any of them; weights from files."""

from bdcore.models.checkpoints import Checkpoint, load_into, manifest_of, read_checkpoint, write_checkpoint
from bdcore.models.classifier import Classifier, metered
from bdcore.models.head import split_head
from bdcore.models.registry import build, check_name, code_of, names

__all__ = [
    "Checkpoint",
    "Classifier",
    "build",
    "check_name",
    "code_of",
    "load_into",
    "manifest_of",
    "metered",
    "names",
    "read_checkpoint",
    "split_head",
    "write_checkpoint",
]
