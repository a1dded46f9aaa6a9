"""Figures as SVG that takes its colours from the page, and as PNG."""

import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO, StringIO
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS = {
    "ink": "#1c2430",
    "muted": "#66707f",
    "grid": "#e1e5ea",
    "faint": "#a9b2be",
    "blue": "#0072b2",
    "vermillion": "#d55e00",
    "green": "#009e73",
    "purple": "#a3458c",
    "orange": "#b87b00",
}
"""By name, for light paper: Okabe's and Ito's, two of them darker, which those who see colours differently can tell
apart. A page sets each name as a CSS variable; in a PNG they are as they stand here."""

SERIES = ("blue", "vermillion", "green", "purple", "orange")
"""Colours for lines, in order."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bdcore",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "text.parse_math": False,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["faint"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["faint"],
    "ytick.color": COLOURS["faint"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": COLOURS["ink"],
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_PIXELS_PER_INCH = 200
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Drawing:
    """A figure of a run.

    Args:
        name: tells it from the others of its run.
        title: what it is of, in a few words.
        alt: what it shows, for who cannot see it.
        caption: what to see in it.
        figure: matplotlib's, made inside `styled`.
    """

    name: str
    title: str
    alt: str
    caption: str
    figure: Figure

    def svg(self, prefix: str = "") -> str:
        """An <svg> element for a page that sets the variables of `COLOURS`; equal figures give equal text.

        Args:
            prefix: begins every id inside, so that no other figure of the page has the same.
        """
        text = StringIO()
        with styled():
            FigureCanvasSVG(self.figure).print_svg(text, metadata={"Date": None, "Creator": None})
        return _themed(text.getvalue(), self.alt, prefix)

    @property
    def png(self) -> bytes:
        """A PNG file on white paper."""
        content = BytesIO()
        with styled():
            FigureCanvasAgg(self.figure)  # from now on the figure's canvas
            # Without the library's version in it, equal figures give equal files.
            self.figure.savefig(
                content, format="png", dpi=_PIXELS_PER_INCH, facecolor="white", metadata={"Software": None}
            )
        return content.getvalue()


@contextmanager
def styled() -> Generator[None]:
    """How figures look, while they are made and drawn."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks shows as boxes in a PNG; on a page the reader's fonts draw it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def label(text: str, longest: int = 28) -> str:
    """A name from elsewhere, fit to stand in a figure: printable and short."""
    plain = "".join(sign if sign.isprintable() else "\ufffd" for sign in text)
    return plain if len(plain) <= longest else f"{plain[: longest - 1]}…"


def _themed(svg: str, alt: str, prefix: str) -> str:
    """Matplotlib's document as an element: colours by variable, fonts and size the page's, no ids that nobody uses."""
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = set(re.findall(r"url\(#([\w-]+)\)", svg)) | set(re.findall(r'href="#([\w-]+)"', svg))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        # A variable counts in a style alone, so what has its colour as an attribute gets one.
        painted = [f"{name}: {element.attrib.pop(name)}" for name in ("fill", "stroke") if name in element.attrib]
        style = "; ".join([*painted, *([element.attrib["style"]] if "style" in element.attrib else [])])
        if style:
            element.set("style", _restyled(style))
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", alt)
    return ElementTree.tostring(root, encoding="unicode")


def _restyled(style: str) -> str:
    for name, colour in COLOURS.items():
        style = style.replace(colour, f"var(--{name})")
    style = re.sub(r"font: ?([\d.]+)px [^;]*", r"font-size: \1px", style)
    return re.sub(r"font-family: [^;]*;? ?", "", style)
