"""Which class does the backdoor lead to? One sub-model for each class, side by side, and a rule over their success.

Triggers are sought for every class alike. Where there is a backdoor, a patch succeeds nearly always for its class and
rarely for the others; where there is none, it may still succeed for a class now and then (a light patch on dark ground
is a stroke of some digit), but then not nearly always, or not for one class alone. So the target is the class of the
highest success if that success

1. is at least `success`, and
2. lies more than `anomaly` median absolute deviations above the median over all classes.

The deviation counts as at least `_LEAST_SPREAD`: where all other classes are at 0, the spread of the measured shares
would make an outlier of anything.
"""

import torch
from torch import Tensor

from bdcore import Context, DefenseError, Labelled, Verdict

from .approximator import Approximator, Form
from .patches import measure_success

BETA = 0.9  # the threshold that sub-models are trained for in the search
_FEW = 5  # with fewer classes a deviation from the median says nothing
_LEAST_SPREAD = 0.05
_STACKED_PIXELS = 16 * 32 * 32  # so many pixels of a batch are classified side by side, which bounds the memory
_PATCHES = 256  # drawn of each sub-model to measure its success


def search_target(
    model: torch.nn.Module,
    clean: Labelled,
    classes: int,
    shape: tuple[int, int, int],
    form: Form,
    steps: int,
    success: float,
    anomaly: float,
    context: Context,
) -> Verdict:
    """Train a sub-model for each class, and judge.

    Args:
        model: the classifier, frozen and in eval mode.
        clean: the clean set.
        classes: how many.
        shape: (C, h, w) of a patch.
        form: how sub-models are trained.
        steps: updates of each generator.
        success, anomaly: the rule's two bars.
        context: where and how to compute.

    Returns:
        The verdict; its evidence is each class's success.

    Raises:
        DefenseError: there are fewer than five classes; nothing is trained.
    """
    if classes < _FEW:
        raise DefenseError(
            f"{classes} classes are too few to tell an outlier among them, for which the rule needs {_FEW}: whether "
            "there is a backdoor cannot be judged. Where the target is known, mesa.target=CLASS purifies without a "
            "search."
        )
    found: list[float] = []
    together = max(1, _STACKED_PIXELS // (clean.images.shape[2] * clean.images.shape[3]))
    for number, group in enumerate(torch.arange(classes).split(together)):
        targets: list[int] = group.tolist()
        stack = Approximator(targets, [BETA] * len(targets), shape, form, context.generator("search", number))
        stack.train_on(f"search-{number}", model, clean.images, steps, context)
        found += successes(stack, model, clean, context)
    return judge(torch.tensor(found, dtype=torch.float64), success, anomaly)


def successes(stack: Approximator, model: torch.nn.Module, clean: Labelled, context: Context) -> list[float]:
    """The success that each trained sub-model's patches have on clean images of other classes."""
    patches = stack.sample(_PATCHES, context.generator("samples")).detach()
    return [
        measure_success(model, of_one, target, clean, context, context.generator("success", target))
        for of_one, target in zip(patches, stack.targets.tolist(), strict=True)
    ]


def judge(success_rates: Tensor, success: float, anomaly: float) -> Verdict:
    """The rule above, on float64 [classes] in [0, 1]."""
    best = int(success_rates.argmax())
    # The mean of the two middle values where the number is even; torch's median would take the lower.
    middle = success_rates.quantile(0.5)
    spread = 1.4826 * (success_rates - middle).abs().quantile(0.5)
    deviation = (success_rates[best] - middle) / spread.clamp(min=_LEAST_SPREAD)
    found = bool(success_rates[best] >= success and deviation > anomaly)
    evidence = tuple(round(value, 3) for value in success_rates.tolist())
    return Verdict(found, best if found else None, evidence)
