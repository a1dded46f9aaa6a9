"""Our figures beside the published ones: `python -m benchmarks.reproduce mcldef|mesa|abl|grid`.

Every cell of a table is an ordinary run, with its record under runs/. Its figures are kept in the table's JSON file,
which is written anew with the Markdown after each cell: whatever ends the command, the same command goes on from there.
What the tables hold and what the budgets mean stands in reproduction/tables.toml.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file
    sys.path.append(str(Path(__file__).parents[1]))

from bdcore.errors import BdcoreError, UsageError
from bdcore.plugins import Host
from benchmarks.report import surroundings
from benchmarks.reproduction import figures, rendering, running, tables
from benchmarks.reproduction.ledger import Ledger

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure one table, or render what is there of it."""
    try:
        _reproduce(_arguments())
    except BdcoreError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("reproduce: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reproduce",
        usage="%(prog)s TABLE [OPTION ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", help="mcldef, mesa, abl or grid")
    parser.add_argument("--budget", default="small", help="small (two CPU cores, the default), medium or full (a GPU)")
    parser.add_argument("--dataset", default="cifar10", metavar="NAME[:ARGUMENT]", help="as of `bdcore run`")
    parser.add_argument("--seeds", type=_numbers, default=[0, 1, 2], metavar="0,1,2", help="default: 0,1,2")
    parser.add_argument("--attacks", type=_names, metavar="A,B", help="some of the table's, or no_attack")
    parser.add_argument("--defenses", type=_names, metavar="A,B", help="some of the table's; none is always measured")
    parser.add_argument("--patterns", type=_numbers, metavar="0,1,7-9", help="of the table mesa")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="worker processes, default 1")
    parser.add_argument("--device", metavar="auto|cpu|cuda[:N]", help="default: auto")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="begin no cell after so long")
    parser.add_argument("--render", action="store_true", help="measure nothing, write what is there")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--tables", type=Path, default=tables.TABLES, metavar="FILE.toml", help="tables of your own")
    given = parser.parse_args()
    if given.jobs < 1:
        raise UsageError(f"--jobs {given.jobs}: must be at least 1.")
    if given.deadline is not None and not given.deadline >= 0:
        raise UsageError(f"--deadline {given.deadline}: must be at least 0 seconds.")
    return given


def _reproduce(given: argparse.Namespace) -> None:
    part = {"attacks": given.attacks, "defenses": given.defenses, "patterns": given.patterns}
    images = _images(given.dataset)
    wanted = tables.load(given.table, given.budget, file=given.tables, **part).cells(given.seeds, images)
    suffix = "" if images == "cifar10" else f"-{images}"
    ledger = Ledger(given.results / f"{given.table}-{given.budget}{suffix}.json")
    whole = tables.load(given.table, given.budget, file=given.tables, everything=True)
    seeds = sorted({*given.seeds, *(result["seed"] for result in ledger.cells.values())})
    cells = whole.cells(seeds, images)
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, _cores() // given.jobs))
    machine, host = running.Machine(given.dataset, given.device, threads), Host()
    jobs = [] if given.render else [running.check(cell, machine, host) for cell in wanted]
    codes = {cell.key: running.sources(cell, machine, host) for cell in cells if cell.key in ledger.cells}
    codes |= {job.cell.key: job.code for job in jobs}
    publication = tables.published(given.table) if images == "cifar10" else {}

    def write() -> None:
        found = ledger.results(cells)
        made = figures.rows(whole, found, seeds, publication)
        over = figures.pooled(made, whole, publication)
        absent = [str(cell) for cell in wanted if cell.key not in ledger.cells]
        failed = [f"{cell}: {found[cell.place]['error']}" for cell in cells if ledger.failed(cell)]
        other = sum(result["code"] != codes[cell.key] for cell in cells if (result := found.get(cell.place)))
        text = rendering.page(
            whole, images, made, over, ledger.measured_by(found), {"Failed": failed, "Not run": absent}, found, other
        )
        facts = {"table": whole.name, "budget": whole.budget, "shortened": whole.shortened, "images": images}
        ledger.write({**facts, "rows": made, "pooled": over, "not_run": absent}, text)

    if given.render:
        write()
        return
    pending = _pending(jobs, ledger)
    print(f"{len(wanted)} cells, {len(pending)} to run", file=sys.stderr)
    if pending:
        running.check_images(machine, pending[0].cell)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    ledger.begin({**surroundings(), "jobs": given.jobs, "threads": threads})
    began = time.monotonic()

    def finished(job: running.Job, result: running.Result) -> None:
        ledger.put(job, result)
        write()
        took = f"{result['wall_seconds']:.0f} s, ended at {time.monotonic() - began:.0f} s"
        print(f"{job.cell}: {result.get('error') or figures.line(result)} ({took})", file=sys.stderr, flush=True)

    deadline = None if given.deadline is None else began + given.deadline
    left = running.run_all(pending, machine, given.jobs, deadline, finished)
    write()
    print(f"{len(left)} cells not run; wrote {ledger.path.with_suffix('.md')} and .json", file=sys.stderr)


def _pending(jobs: Sequence[running.Job], ledger: Ledger) -> list[running.Job]:
    """Jobs without figures; and the victims of those that defend, which come from the cache or are made again."""
    missing = [job for job in jobs if not ledger.finished(job)]
    victims = {job.victim for job in missing}
    return [job for job in jobs if job in missing or (not job.defended and job.victim in victims)]


def _cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _images(dataset: str) -> str:
    """The data set's name, whether it is loaded by a plugin of that name or from a file of that name."""
    name, _, argument = dataset.partition(":")
    return Path(argument).stem if name == "npz" else name


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _numbers(text: str) -> list[int]:
    """0,1,7-9 as numbers, each once and in order."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"{text!r} must be numbers from 0 on, as 0,1,2 or 0-2.")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(found)


if __name__ == "__main__":
    main()
