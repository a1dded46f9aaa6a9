"""Classifiers by name, with the normalisation inside, and the penultimate features of any of them."""

from bdcore.models.classifier import Classifier, metered
from bdcore.models.head import split_head
from bdcore.models.registry import build, check_name, names

__all__ = ["Classifier", "build", "check_name", "metered", "names", "split_head"]
