"""`bdcore plugins`: every plugin that is installed, and why one cannot be used."""

import json
from collections.abc import Sequence

import click

from bdcore.cli.table import show_table
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
    styles = ["" if row["status"] == "ok" else "red" for row in rows]
    show_table(COLUMNS, ([row[column] or None for column in COLUMNS] for row in rows), styles)
