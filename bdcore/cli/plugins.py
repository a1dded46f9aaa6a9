"""`bdcore plugins`: every plugin that is installed, and why one cannot be used."""

import json
from collections.abc import Sequence

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bdcore.plugins import Host

COLUMNS = ("name", "kind", "distribution", "version", "status")


@click.command("plugins")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list on stdout.")
def command(as_json: bool) -> None:
    """List every plugin with its kind, distribution, version and status.

    A plugin that cannot be used is listed with the reason; a run that does not name it is not affected.
    """
    rows = Host().listing()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        show(rows)


def show(rows: Sequence[dict[str, str | None]]) -> None:
    """Print a listing as a table on stdout, where that is no terminal in plain lines that are never cut."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=100_000)
    table = Table(box=SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, overflow="fold", no_wrap=not console.is_terminal or column == "name")
    for row in rows:
        style = "" if row["status"] == "ok" else "red"
        table.add_row(*(Text(row[column] or "-", style=style) for column in COLUMNS))
    console.print(table)
