"""Intervals that hold the true figure with 95% confidence."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import ndtri, stdtrit


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


def wilson(share: float, count: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a proportion `share` in [0, 1] that was seen in `count` >= 1 independent samples.

    (p + z²/2n ± z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n); Wilson, JASA 22 (1927). Unlike the normal one it has a
    width at 0 and 1, where attack success mostly is. It speaks of which test images were drawn, not of other seeds.
    """
    z = float(ndtri((1 + confidence) / 2))
    shrink = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / shrink
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / shrink
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def student_t(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t-interval of the mean of at least two values in [0, 1], cut off at 0 and 1.

    mean ± t(n - 1) s / sqrt(n), with s the sample's standard deviation; Student, Biometrika 6 (1908). It speaks of
    other seeds. Values that are all alike give an interval without width, which says little where there are few.
    """
    count = len(values)
    mean = math.fsum(values) / count
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * spread / math.sqrt(count)
    return Interval(max(0.0, mean - half), min(1.0, mean + half))
