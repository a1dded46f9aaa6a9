"""How sure a verdict is: the chance of a backdoor given the evidence, from models of which the truth was known.

`calibration.json` holds what `python -m benchmarks.scan_calibration` measured: the evidence that a plugin with its
default options found in clean and in backdoored models, and Platt's sigmoid through it (Platt, "Probabilistic Outputs
for Support Vector Machines", 1999, with his smoothed targets, which keep it finite where the classes do not overlap).
"""

import json
from functools import cache
from math import exp
from pathlib import Path
from typing import Any

from bdcore.artifacts import Verdict
from bdcore.config import Chosen


def calibrated(chosen: Chosen, verdict: Verdict) -> tuple[float | None, dict[str, Any] | None]:
    """The chance that `verdict` is right, and what that figure rests on.

    Args:
        chosen: the plugin that gave the verdict, with its options.
        verdict: with the evidence for each class.

    Returns:
        (confidence in [0, 1], {"on": what models, "models": how many, "clean": how many of them, "auroc", "brier",
        "true_positives", "false_positives": shares at the plugin's own threshold}); (None, None) where the plugin, or
        an option of it that changes evidence, was never calibrated.
    """
    known = _known().get(chosen.plugin.name)
    if known is None or not verdict.evidence:
        return None, None
    options = chosen.config.model_dump(mode="json")
    if any(options.get(name) != value for name, value in known["options"].items()):
        return None, None
    chance = 1 / (1 + exp(-(known["intercept"] + known["slope"] * max(verdict.evidence))))
    stated = {name: known[name] for name in ("on", "models", "clean", "auroc", "brier")}
    stated |= {name: known[name] for name in ("true_positives", "false_positives")}
    return round(chance if verdict.backdoored else 1 - chance, 4), stated


@cache
def _known() -> dict[str, Any]:
    """What was measured, by plugin."""
    return json.loads(Path(__file__).with_name("calibration.json").read_text("utf-8"))
