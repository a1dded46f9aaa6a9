"""Which class does the backdoor lead to? Invert for all, briefly, and look for the one whose trigger is far smaller.

The classes are inverted side by side, in rounds, as arms are pulled in K-Arm optimisation (Shen et al., "Backdoor
Scanning for Deep Neural Networks through K-Arm Optimization", ICML 2021): a short round over all, then a longer one
over the most promising; the caller inverts the chosen class alone to the end. For K classes that is 200 K + 400
ceil(K / 3) steps of one class, each round's rounded up to whole epochs, and no more than the 200 K where the target is
clear by then. It grows with K as inverting all in full does, which costs K times 100 epochs; on 2,500 images one
inversion has 4,000 steps, so there the search of ten classes, 3,600 steps, costs about as much as one inversion.

The rule is Neural Cleanse's (Wang et al., S&P 2019): a class whose trigger is more than so many median absolute
deviations below the median is the target. Two things differ. Sizes are compared as logarithms: they are positive and
span orders of magnitude, so that on the linear scale a deviation of two below the median may lie below zero. And the
size must also be less than a third of the median: among ten classes of a clean model, two deviations are no rarity.
"""

from math import ceil, log

import torch
from torch import Tensor, nn

from bdcore import Context, DefenseError, Verdict

from .inversion import Inversion, invert

_SHORT, _LONG = 200, 400  # steps of the two rounds
_FEW = 5  # with fewer classes a deviation from the median says nothing
_RATIO = 3.0
_STACKED_PIXELS = 16 * 32 * 32  # so many pixels of a trigger are inverted side by side, which bounds the memory


def search_target(model: nn.Module, stack: Inversion, images: Tensor, anomaly: float, context: Context) -> Verdict:
    """Invert all classes of `stack` as far as the decision needs; the state reached stays in it.

    Args:
        model: frozen, in eval mode.
        stack: one trigger a class, class k at place k.
        images: the clean set, uint8 [N, C, H, W].
        anomaly: deviations below the median from which on a class is the target.
        context: where and how to compute.

    Returns:
        The verdict; its evidence is each class's deviation below the median, above `anomaly` only where its trigger is
        small enough as well.

    Raises:
        DefenseError: there are fewer than five classes; nothing is inverted.
    """
    classes = len(stack.targets)
    if classes < _FEW:
        raise DefenseError(
            f"{classes} classes are too few to tell an outlier among them, for which the rule needs {_FEW}: whether "
            "there is a backdoor cannot be judged. Where the target is known, mcldef.target=CLASS purifies without a "
            "search."
        )
    everyone = torch.arange(classes)
    _round("short", _SHORT, model, stack, everyone, images, context)
    sizes = _log_sizes(stack)
    verdict = _judge(sizes, anomaly)
    if verdict.target is not None:
        return verdict
    # Nothing stands out yet. The smallest triggers shrank fastest, all having begun alike: they get more time.
    promising = sizes.argsort()[: ceil(classes / 3)]
    _round("long", _LONG, model, stack, promising, images, context)
    later = _log_sizes(stack)
    # The others are credited with what the promising ones gained, lest those look small for having had more time.
    rest = torch.ones(classes, dtype=torch.bool)
    rest[promising] = False
    later[rest] += (later - sizes)[promising].median()
    return _judge(later, anomaly)


def _round(
    name: str, steps: int, model: nn.Module, stack: Inversion, places: Tensor, images: Tensor, context: Context
) -> None:
    """So many steps for the classes at `places`, as many side by side as memory allows."""
    recipe = type(stack).recipe
    batches = ceil(len(images) / recipe.batch_size)
    epochs = ceil(steps / (batches * ceil(recipe.min_steps / batches)))
    together = max(1, _STACKED_PIXELS // (stack.shape[1] * stack.shape[2]))
    for number, group in enumerate(places.split(together)):
        part = stack.take(group)
        invert(f"search-{name}-{number}", model, part, images, epochs, epochs, context)
        stack.put(group, part)


def _log_sizes(stack: Inversion) -> Tensor:
    """Logarithm of each best trigger's size, [T]; of the whole image where none succeeded."""
    largest = float(stack.shape[1] * stack.shape[2])
    return stack.size.cpu().double().clamp(1 / 255, largest).log()


def _judge(sizes: Tensor, anomaly: float) -> Verdict:
    """The outlier rule on logarithms of sizes, [T]. Evidence is the deviations below the median, but no more of them
    than the factor below it is worth, so that both parts of the rule say: more than `anomaly`."""
    # The mean of the two middle values where T is even; torch's median would take the lower.
    middle = sizes.quantile(0.5)
    spread = 1.4826 * (sizes - middle).abs().quantile(0.5)
    deviations = (middle - sizes) / spread.clamp(min=1e-3)
    evidence = deviations.minimum(anomaly * (middle - sizes) / log(_RATIO))
    smallest = int(sizes.argmin())
    found = bool(evidence[smallest] > anomaly)
    return Verdict(found, smallest if found else None, tuple(round(value, 3) for value in evidence.tolist()))
