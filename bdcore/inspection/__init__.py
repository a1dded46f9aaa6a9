"""Somebody's own model, images and training data under a defense: no attack of ours, no test set, no truth."""

from bdcore.inspection.output import folder_of
from bdcore.inspection.request import Request, ask
from bdcore.inspection.work import defend_own, scan

__all__ = ["Request", "ask", "defend_own", "folder_of", "scan"]
