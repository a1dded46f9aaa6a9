"""Runs as one HTML page that needs nothing else: no network, no fonts, no files beside it."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from itertools import count

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from bdcore.analysis.compare import Comparison, compare
from bdcore.analysis.drawing import COLOURS, Drawing
from bdcore.analysis.runs import Run
from bdcore.analysis.summary import percent, points
from bdcore.analysis.view import View, view

_HEAVY = 300_000
"""Bytes from which on a picture is embedded as WebP, which eyes cannot tell from it."""

_DARK = {
    "ink": "#e8ebef",
    "muted": "#a3acb8",
    "grid": "#2c343e",
    "faint": "#5f6a77",
    "blue": "#5db4ec",
    "vermillion": "#ff8a4c",
    "green": "#43c99e",
    "purple": "#df8cc7",
    "orange": "#e6b04a",
}
"""The colours of figures on dark paper."""


@dataclass(frozen=True)
class Page:
    """A page, and the figures in it by name."""

    html: str
    drawings: dict[str, Drawing]


def render(runs: Sequence[Run]) -> Page:
    """One page of one run or of several compared; all that comes from records is escaped.

    Args:
        runs: at least one.
    """
    views = [view(run, f"run{number}") for number, run in enumerate(runs, 1)]
    compared = compare(runs) if len(runs) > 1 else None
    drawings: dict[str, Drawing] = {}
    for one in views:
        prefix = f"{one.anchor}-" if compared else ""
        drawings |= {f"{prefix}{drawing.name}": drawing for drawing in one.drawings}
    if compared:
        drawings["scores"] = compared.drawing
    return Page(_html(views, compared), drawings)


def _html(views: Sequence[View], compared: Comparison | None) -> str:
    environment = Environment(
        loader=PackageLoader("bdcore", "templates/report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = count()

    def svg(drawing: Drawing) -> Markup:
        return Markup(drawing.svg(f"f{next(numbers)}-"))

    environment.filters.update(
        percent=percent,
        picture=_embedded,
        svg=svg,
        quantity=_quantity,
        fact=_fact,
    )
    script, style = (_source(environment, name) for name in ("sort.js", "style.css"))
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        views=views,
        compared=compared,
        title=compared.title if compared else views[0].title,
        # Only this very script may run, and nothing may be fetched from anywhere.
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{hashed}'; "
        "base-uri 'none'; form-action 'none'",
        script=Markup(script),
        style=Markup(style),
        light=COLOURS,
        dark=_DARK,
        points=points,
        version=version("bdcore"),
    )


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _embedded(content: bytes) -> str:
    """A PNG as a data URI."""
    kind = "png"
    if len(content) > _HEAVY:
        with Image.open(BytesIO(content)) as picture:
            encoded = BytesIO()
            picture.convert("RGB").save(encoded, "WEBP", quality=85, method=4)
        kind, content = "webp", encoded.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _quantity(value: float | int | None) -> str:
    """A number with thousands set apart, "-" where there is none."""
    if value is None:
        return "-"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def _fact(value: object) -> str:
    """A recorded value: numbers to four digits, everything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
