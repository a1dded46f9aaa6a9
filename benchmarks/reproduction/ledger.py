"""What has been measured for a table, kept in its JSON file: results by cell, and the commands that measured them.

A cell's entry stands under its key and holds a hash of the sources that measured it. Whoever repeats a command, here or
on another machine with the file at hand, runs only what is missing or was measured by other sources.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bdcore.errors import UsageError
from bdcore.store import write_bytes, write_json
from benchmarks.reproduction.running import Job, Result
from benchmarks.reproduction.tables import Cell

SCHEMA = 1


class Ledger:
    """The file of one table under one budget.

    Args:
        path: of the JSON file; read where it is there.

    Raises:
        UsageError: it cannot be read, or is not such a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content: dict[str, Any] = {"schema": SCHEMA, "commands": [], "cells": {}}
        if path.exists():
            try:
                content = json.loads(path.read_text("utf-8"))
                if content["schema"] != SCHEMA:
                    raise ValueError(f"its schema is {content['schema']}, not {SCHEMA}")
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise UsageError(
                    f"{path} holds no results of this kind ({error}): remove it or choose another folder."
                ) from error
        self.commands: list[dict[str, Any]] = content["commands"]
        self.cells: dict[str, Result] = content["cells"]

    def begin(self, command: Mapping[str, Any]) -> None:
        """Note the command whose results come next."""
        self.commands.append(dict(command))

    def put(self, job: Job, result: Result) -> None:
        """Keep a result."""
        cell = job.cell
        what = {"case": cell.case, "column": cell.column, "seed": cell.seed, "plugins": list(cell.plugins)}
        what |= {"settings": dict(cell.settings), "code": job.code, "command": len(self.commands) - 1}
        self.cells[cell.key] = {**what, **result}

    def finished(self, job: Job) -> bool:
        """Whether the cell has figures, measured by the sources as they are."""
        known = self.cells.get(job.cell.key)
        return known is not None and known["state"] == "done" and known["code"] == job.code

    def failed(self, cell: Cell) -> bool:
        """Whether the cell ended with an error."""
        return cell.key in self.cells and self.cells[cell.key]["state"] == "failed"

    def results(self, cells: Sequence[Cell]) -> dict[tuple[str, str, int], Result]:
        """What is known of `cells`, by case, column and seed."""
        return {cell.place: self.cells[cell.key] for cell in cells if cell.key in self.cells}

    def measured_by(self, results: Mapping[Any, Result]) -> list[dict[str, Any]]:
        """The commands that `results` are of, each with the number of its cells."""
        numbers = [result["command"] for result in results.values()]
        return [
            {**command, "cells": numbers.count(number)}
            for number, command in enumerate(self.commands)
            if number in numbers
        ]

    def write(self, facts: Mapping[str, Any], text: str) -> None:
        """Write the JSON file, `facts` on its top, and the Markdown file beside it, each by way of a temporary file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        used = sorted({result["command"] for result in self.cells.values()})
        places = {number: place for place, number in enumerate(used)}
        cells = {key: {**result, "command": places[result["command"]]} for key, result in self.cells.items()}
        content = {"schema": SCHEMA, **facts, "commands": [self.commands[number] for number in used], "cells": cells}
        write_json(self.path, content)
        write_bytes(self.path.with_suffix(".md"), text.encode())
