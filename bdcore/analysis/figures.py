"""The figures of a run: each a panel that is readable on a phone, and beside others on a desk."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter
from numpy.typing import NDArray

from bdcore.analysis.drawing import COLOURS, SERIES, Drawing, label, styled
from bdcore.analysis.embedding import Company, company, embed
from bdcore.analysis.intervals import Interval
from bdcore.analysis.records import Epoch
from bdcore.analysis.runs import Features

Array = NDArray[Any]

_WIDTH = 3.7
_SHARES = ("accuracy", "success", "asr")
"""Endings of names of figures that are fractions of 1 and drawn by themselves."""
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_LABELLED_CLASSES = 20


def embedding(name: str, features: Features, labels: Array, true: Array, target: int | None) -> Drawing:
    """Clean test images by class and triggered ones, in the plane, with a caption that says among whom these lie.

    Args:
        name: "victim", or a defense's.
        features: finite ones.
        labels, true: int64 [n] and [m], true classes of the clean and the triggered images.
        target: the attacker's class, where it is a single one.
    """
    clean, triggered = embed(features.clean, features.triggered)
    among = company(features.clean, labels, features.triggered, true, target) if len(triggered) else None
    with styled():
        figure, axes = _panel(3.1)
        figure.set_layout_engine("none")  # the other would make room for what lies beyond the axes, and fail
        axes.set_position((0.02, 0.1, 0.96, 0.88))
        axes.set_axis_off()
        of_target = labels == target if target is not None else np.zeros(len(labels), bool)
        axes.plot(*clean[~of_target].T, "o", ms=3.2, mew=0, color=COLOURS["faint"], alpha=0.75, label="clean")
        if of_target.any():
            axes.plot(*clean[of_target].T, "o", ms=3.8, mew=0, color=COLOURS["blue"], label=f"clean, class {target}")
        if len(triggered):
            axes.plot(*triggered.T, "x", ms=4.2, mew=1.1, color=COLOURS["vermillion"], alpha=0.85, label="triggered")
        classes = np.unique(labels)
        for number in classes if len(classes) <= _LABELLED_CLASSES else classes[:0]:
            middle = np.median(clean[labels == number], 0)
            colour = COLOURS["blue"] if number == target else COLOURS["ink"]
            axes.text(
                float(middle[0]),
                float(middle[1]),
                str(number),
                ha="center",
                va="center",
                color=colour,
                weight="bold",
                fontsize=12,
            )
        figure.legend(loc="lower center", ncols=3, handletextpad=0.2, columnspacing=1.2)
    title = "no defense" if name == "victim" else label(name)
    alt = f"t-SNE of the features of {len(clean)} clean and {len(triggered)} triggered test images, {title}."
    return Drawing(f"features-{name}", title, f"{alt} {_told(among)}", _told(among), figure)


def curves(stage: str, phase: str, epochs: Sequence[Epoch]) -> Drawing:
    """Losses and, below, accuracies of one phase of training, by epoch."""
    shares, losses = _lines(epochs, share=True), _lines(epochs, share=False)
    panels = [lines for lines in (losses, shares) if lines]
    with styled():
        figure = Figure(figsize=(_WIDTH, 0.7 + 1.5 * max(1, len(panels))))
        rows = figure.subplots(max(1, len(panels)), 1, sharex=True, squeeze=False)[:, 0]
        for axes, lines in zip(rows, panels, strict=False):
            for number, (what, (places, values)) in enumerate(lines.items()):
                style = {"color": COLOURS[SERIES[number % len(SERIES)]], "linestyle": _DASHES[number % len(_DASHES)]}
                axes.plot(places, values, label=label(what), marker="o" if len(values) < 3 else "", ms=4, **style)
            axes.legend(loc="best", ncols=2 if len(lines) > 2 else 1, handlelength=1.8)
            if lines is shares:
                axes.set_ylim(-0.03, 1.03)
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            else:
                _scale_losses(axes, lines)
        rows[-1].set_xlabel("epoch")
        rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    last = {what: values[-1] for lines in panels for what, (_, values) in lines.items()}
    ends = ", ".join(f"{label(what)} {value:.3g}" for what, value in last.items())
    count = f"{len(epochs)} {'epoch' if len(epochs) == 1 else 'epochs'}"
    caption = f"{count}; at the end {ends}." if ends else f"{count} without figures."
    title = label(stage) if stage == phase else f"{label(stage)}: {label(phase)}"
    return Drawing(f"curves-{stage}-{phase}", title, f"Curves over the epochs of {title}. {caption}", caption, figure)


def isolation(name: str, scores: Array, poisoned: Array, isolated: Array) -> Drawing:
    """How suspicious a defense found clean and poisoned training samples: counts on a logarithmic scale."""
    flags = np.zeros(len(scores), bool)
    flags[poisoned] = True
    finite = np.isfinite(scores)
    low, high = (float(scores[finite].min()), float(scores[finite].max())) if finite.any() else (0.0, 1.0)
    shown = np.nan_to_num(scores, nan=low, posinf=high, neginf=low)
    edges = np.histogram_bin_edges(shown, bins=40)
    with styled():
        figure, axes = _panel(2.6)
        for part, colour, hatch, what in (
            (~flags, "blue", "", f"clean ({int((~flags).sum()):,})"),
            (flags, "vermillion", "////", f"poisoned ({int(flags.sum()):,})"),
        ):
            counts = np.histogram(shown[part], edges)[0]
            axes.stairs(counts, edges, fill=True, color=COLOURS[colour], alpha=0.45, hatch=hatch, label=what)
            axes.stairs(counts, edges, color=COLOURS[colour], linewidth=1.4)
        threshold = _threshold(scores, isolated)
        if threshold is not None:
            axes.axvline(threshold, color=COLOURS["ink"], linestyle="--", linewidth=1.2, label="set aside above")
        _logarithmic(axes)
        axes.set_ylim(bottom=0.7)
        axes.set(xlabel="score: how suspicious", ylabel="training images")
        figure.legend(loc="outside upper left", ncols=2)
    beyond = "" if finite.all() else f" {int((~finite).sum()):,} scores that are not finite stand at the ends."
    caption = (
        f"{len(isolated):,} of {len(scores):,} training images set aside, "
        f"{int(flags[isolated].sum()):,} of them poisoned.{beyond}"
    )
    alt = f"Histogram of the scores of clean and poisoned samples by {label(name)}. {caption}"
    return Drawing(f"isolation-{name}", label(name), alt, caption, figure)


def evidence(name: str, values: Sequence[float | None], accused: int | None) -> Drawing:
    """Evidence of a backdoor towards each class, larger: more suspicious; the accused class stands out."""
    heights = np.array([math.nan if value is None else value for value in values])
    with styled():
        figure, axes = _panel(2.3)
        places = np.arange(len(heights))
        bars = axes.bar(places, np.nan_to_num(heights), color=COLOURS["faint"], width=0.75)
        if accused is not None and accused < len(heights):
            bars[accused].set_facecolor(COLOURS["vermillion"])
        axes.grid(False, axis="x")
        axes.axhline(0, color=COLOURS["faint"], linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        if len(heights) <= _LABELLED_CLASSES:
            axes.set_xticks(places)
        axes.set(xlabel="class", ylabel="evidence")
    most = int(np.nanargmax(heights)) if np.isfinite(heights).any() else None
    strongest = "There is none." if most is None else f"Most speaks against class {most} ({heights[most]:.3g})."
    alt = f"Bars of the evidence of {label(name)} against each of {len(heights)} classes. {strongest}"
    return Drawing(f"evidence-{name}", label(name), alt, strongest, figure)


class Row(NamedTuple):
    """A classifier's accuracy and attack success, None where there is none, and their intervals where known."""

    name: str
    accuracy: float | None
    accuracy_interval: Interval | None
    asr: float | None
    asr_interval: Interval | None


def scores(rows: Sequence[Row]) -> Drawing:
    """Accuracy and attack success of each classifier with their intervals, one below the other."""
    with styled():
        figure = Figure(figsize=(4.9, 0.7 + 0.26 * len(rows)))
        left, right = figure.subplots(1, 2, sharey=True)
        places = np.arange(len(rows))
        for axes, title, colour, marker, column in (
            (left, "accuracy", "blue", "o", 1),
            (right, "attack success", "vermillion", "s", 3),
        ):
            for place, row in enumerate(rows):
                value, interval = row[column], row[column + 1]
                if isinstance(interval, Interval):
                    axes.plot(interval, (place, place), color=COLOURS[colour], linewidth=2.4, alpha=0.55)
                if isinstance(value, float | int):
                    axes.plot([value], [place], marker, color=COLOURS[colour], ms=5)
            axes.set_xlim(-0.02, 1.02)
            axes.set_xticks([0, 0.5, 1])
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_title(title, loc="left")
        left.set_yticks(places, [label(row.name, 44) for row in rows])
        left.invert_yaxis()
    alt = "Accuracy and attack success of each classifier with their intervals; the table has the figures."
    return Drawing("scores", "Accuracy and attack success", alt, "With 95% intervals, as in the table.", figure)


def _panel(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height))
    return figure, figure.subplots()


def _lines(epochs: Sequence[Epoch], *, share: bool) -> dict[str, tuple[list[int], list[float]]]:
    """By name: epochs and values, where there are any."""
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for epoch in epochs:
        for what, value in epoch.figures.items():
            if value is not None and what.endswith(_SHARES) == share:
                places, values = lines.setdefault(what, ([], []))
                places.append(epoch.epoch)
                values.append(value)
    return lines


def _scale_losses(axes: Axes, lines: Mapping[str, tuple[list[int], list[float]]]) -> None:
    """A logarithmic scale where losses span more than two decades."""
    values = [value for _, line in lines.values() for value in line]
    if min(values) > 0 and max(values) > 100 * min(values):
        _logarithmic(axes)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _threshold(scores: Array, isolated: Array) -> float | None:
    """The lowest score that was set aside, where those set aside are just the ones above it."""
    if not len(isolated):
        return None
    lowest = float(scores[isolated].min())
    rest = np.delete(scores, isolated)
    return lowest if math.isfinite(lowest) and (not len(rest) or float(rest.max()) <= lowest) else None


def _told(among: Company | None) -> str:
    if among is None:
        return "No image is triggered: there is no attack."
    own = f"{100 * among.own:.0f}% among those of their own class"
    if among.target is None:
        return f"Of the triggered images {own} (5 nearest clean images)."
    target = f"{100 * among.target:.0f}% lie among those of the target class"
    return f"Of the triggered images {target}, {own} (5 nearest clean images)."
