"""Run cells in worker processes: what one cell gives, and in which order and where cells run.

A worker lives as long as there is work, so that torch is imported once in each. Victims come before the defenses that
share them, and of the attacks that share an auxiliary classifier one goes before the others: no two workers wait for
the same training. A cell that fails is recorded with its error, be it that its process died; another worker takes over.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from typing import Any, cast

from bdcore import staging
from bdcore.config import RunConfig, resolve
from bdcore.contract import Attack, DatasetPlugin
from bdcore.errors import BdcoreError, UsageError
from bdcore.pipeline import run
from bdcore.plugins import Host
from bdcore.store import digest
from benchmarks.reproduction.tables import Cell

Result = dict[str, Any]
"""What a cell gave, as JSON: what `measure` returns."""


@dataclass(frozen=True)
class Machine:
    """How cells are run.

    Args:
        dataset: NAME or NAME:ARGUMENT.
        device: as `run.device`; None for the default.
        threads: of each worker.
    """

    dataset: str
    device: str | None
    threads: int


@dataclass(frozen=True)
class Job:
    """A cell that can run.

    Args:
        cell: what it is.
        code: hash of the sources that its figures depend on.
        victim: hash of all that decides its victim.
        defended: whether a defense is part of it.
        surrogate: hash of the auxiliary classifier that its attack needs; None where it needs none.
    """

    cell: Cell
    code: str
    victim: str
    defended: bool
    surrogate: str | None


def check(cell: Cell, machine: Machine, host: Host) -> Job:
    """Load the cell's plugins and check all of its settings, without running it.

    Raises:
        UsageError: naming the cell, where a plugin is missing or an option is wrong.
    """
    try:
        config = _resolve(cell, host, machine)
    except UsageError as error:
        raise UsageError(f"{cell}: {error}") from error
    record = config.record()
    basis = {name: record[name] for name in ("run", "dataset", "train")}
    attack = cast(type[Attack], config.attack.plugin.cls) if config.attack else None
    fine_tuned = config.run.victim == "fine_tuned"
    return Job(
        cell,
        _code(config),
        digest({**basis, "attack": record.get("attack"), "name": attack.name if attack else None}),
        bool(config.defenses),
        digest({**basis, "run": basis["run"] | {"victim": None}})
        if attack and (fine_tuned or attack.surrogate)
        else None,
    )


def sources(cell: Cell, machine: Machine, host: Host) -> str | None:
    """`Job.code` of the cell; None where its plugins cannot be used as things are."""
    try:
        return check(cell, machine, host).code
    except UsageError:
        return None


def check_images(machine: Machine, cell: Cell) -> None:
    """Load the data set once, so that a missing one ends the command before any work.

    Raises:
        DataError: there is nothing to load, or its form is wrong.
    """
    config = _resolve(cell, Host(), machine)
    assert config.dataset.plugin.cls is not None
    plugin = cast(DatasetPlugin, config.dataset.plugin.cls(config.dataset.config))
    plugin.load(config.dataset_argument)


def measure(cell: Cell, machine: Machine) -> Result:
    """One cell by the ordinary pipeline.

    Returns:
        Its victim's and its defense's part of the record, or the error that ended it; what the run warned of; seconds
        in all, what the cache answered included as it is.
    """
    began = time.perf_counter()
    host = Host()
    result: Result = {"warnings": []}
    try:
        record = run(_resolve(cell, host, machine), host)
        result["state"] = "done"
        result |= {part: record[part] for part in ("victim", "poison", "device")}
        result["fingerprint"] = record["dataset"]["fingerprint"]
        result["warnings"] = [f"{stage}: {text}" for stage, texts in record["warnings"].items() for text in texts]
        if record["defenses"]:
            result["defense"] = record["defenses"][0]
            result["oracle"] = record["plugins"][-1]["oracle"]
    except BdcoreError as error:
        result |= {"state": "failed", "error": str(error)}
    except Exception as error:  # one cell must not end the others; what went wrong stands in its row
        result |= {"state": "failed", "error": f"{type(error).__name__}: {error}"}
    return {**result, "wall_seconds": round(time.perf_counter() - began, 2)}


def run_all(
    jobs: Sequence[Job],
    machine: Machine,
    workers: int,
    deadline: float | None,
    finished: Callable[[Job, Result], None],
) -> list[Job]:
    """Run `jobs` in `workers` processes.

    Args:
        jobs: in the order in which they are wanted.
        machine: data and device.
        workers: processes at a time.
        deadline: of `time.monotonic`, after which no cell is begun; None for none.
        finished: called with each job and its result as it ends, one at a time.

    Returns:
        The jobs that were not begun.
    """
    queue = Queue(jobs)
    staff: dict[Connection, _Worker] = {}
    try:
        while True:
            late = deadline is not None and time.monotonic() >= deadline
            idle = [worker for worker in staff.values() if worker.job is None]
            while not late and (idle or len(staff) < workers) and (job := queue.take()):
                if not idle:
                    idle.append(_Worker.start(machine))
                    staff[idle[-1].pipe] = idle[-1]
                idle.pop().give(job)
            busy = [worker.pipe for worker in staff.values() if worker.job]
            if not busy:
                return queue.waiting
            for pipe in cast(list[Connection], wait(busy)):
                worker = staff[pipe]
                job, result = worker.take()
                if result["state"] == "failed":  # after some errors of a GPU a process can do no more
                    worker.process.kill()
                    del staff[pipe]
                finished(job, result)
                for other, failure in queue.end(job, result):
                    finished(other, failure)
    finally:
        for worker in staff.values():
            worker.process.kill()


class Queue:
    """Jobs that wait, each until what it needs is there."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.waiting = sorted(jobs, key=lambda job: (job.cell.seed, job.defended))
        victims = {job.victim: job for job in self.waiting if not job.defended}
        self._after: dict[str, str] = {
            job.cell.key: victims[job.victim].cell.key for job in self.waiting if job.defended and job.victim in victims
        }
        first: dict[str, Job] = {}
        for job in self.waiting:
            if job.surrogate and not job.defended and first.setdefault(job.surrogate, job) is not job:
                self._after[job.cell.key] = first[job.surrogate].cell.key
        self._ended: set[str] = set()

    def take(self) -> Job | None:
        """The first job that can begin; None where there is none yet, or none at all."""
        for job in self.waiting:
            if self._after.get(job.cell.key) in {None, *self._ended}:
                self.waiting.remove(job)
                return job
        return None

    def end(self, job: Job, result: Result) -> Iterator[tuple[Job, Result]]:
        """Note that `job` is over; where a victim could not be made, the defenses that wait for it fail with it."""
        self._ended.add(job.cell.key)
        if job.defended or result["state"] == "done":
            return
        for other in [other for other in self.waiting if other.defended and other.victim == job.victim]:
            self.waiting.remove(other)
            error = f"its victim failed: {result['error']}"
            yield other, {"state": "failed", "error": error, "warnings": [], "wall_seconds": 0.0}


@dataclass
class _Worker:
    """A process that measures one cell after the other."""

    process: Any
    pipe: Connection
    job: Job | None = field(default=None)

    @classmethod
    def start(cls, machine: Machine) -> "_Worker":
        """A new process; torch is not forked, because CUDA and threads do not survive that."""
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, machine), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def give(self, job: Job) -> None:
        """Begin a job."""
        self.job = job
        try:
            self.pipe.send(job.cell)
        except OSError:
            return  # the process is gone: `take` finds the pipe closed

    def take(self) -> tuple[Job, Result]:
        """The job that has ended, and its result; the process is joined where it died of the job."""
        job, self.job = self.job, None
        assert job is not None
        try:
            return job, self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            error = f"its process ended with exit code {self.process.exitcode} (a negative one is a signal)"
            return job, {"state": "failed", "error": error, "warnings": [], "wall_seconds": 0.0}


def _work(pipe: Connection, machine: Machine) -> None:
    """What a worker does: measure each cell that comes, until the pipe is closed."""
    parent = parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    # A parent that is killed cannot end its workers: they would go on, beside those of the command when it is repeated.
    Thread(target=leave_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(machine.threads)
    while True:
        try:
            cell = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        pipe.send(measure(cell, machine))
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the others share the device


def _resolve(cell: Cell, host: Host, machine: Machine) -> RunConfig:
    return resolve(
        host,
        plugins=cell.plugins,
        dataset=machine.dataset,
        seed=cell.seed,
        no_attack=cell.no_attack,
        settings=cell.texts(),
        device=machine.device,
    )


def _code(config: RunConfig) -> str:
    """SHA-256 over what a cell's figures depend on besides its settings: the sources of bdcore and of its plugins, and
    the run's options as they are where the cell sets none."""
    attacks = [config.attack] if config.attack else []
    plugins = [chosen.plugin.code for chosen in (config.dataset, *attacks, *config.defenses)]
    options = config.record()["run"] | {"device": None}
    return digest([*(_source(file) for file in staging.sources()), *plugins, options])[:16]


_SOURCES: dict[Path, str] = {}


def _source(file: Path) -> str:
    if file not in _SOURCES:
        _SOURCES[file] = sha256(file.read_bytes()).hexdigest()
    return _SOURCES[file]
