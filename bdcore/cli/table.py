"""Tables on stdout."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str | None]], colours: Iterable[str] = ()) -> None:
    """Print rows under their columns, None as a dash: on a terminal folded to its width, but for the first column;
    elsewhere in plain lines that are never cut. `colours` has one for each row, or is empty."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=100_000)
    table = Table(box=SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=not console.is_terminal or column == columns[0])
    listed = list(rows)
    for row, colour in zip(listed, list(colours) or [""] * len(listed), strict=True):
        table.add_row(*(Text("-" if value is None else value, style=colour) for value in row))
    console.print(table)
