"""The reproduction tables: what they run, in which order, and what survives an interruption."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from bdcore.config import resolve
from bdcore.plugins import Host

if TYPE_CHECKING:
    from conftest import Site

ROOT = Path(__file__).parents[1]

LAB = """
import os, signal, time
from pathlib import Path
from bdcore import Defense, DefenseError, Outcome, Verdict, hookimpl
import bdcore

class Lab(Defense):
    name = "NAME"
    needs = frozenset({"model"})

    def __call__(self, given, context):
        log, hold = Path(os.environ["LAB_LOG"]), Path(os.environ["LAB_HOLD"])
        with log.open("a") as file:
            file.write("NAME\\n")
        while hold.exists() and log.read_text().count("NAME") == 2:
            time.sleep(0.05)
        context.warn("NAME has its doubts.")
        if "NAME" == "broken":
            raise DefenseError("no honest answer today.")
        if "NAME" == "dead":
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome(verdict=Verdict(True, 0))

@hookimpl
def bdcore_defense():
    return Lab
"""

TABLES = """
budgets.small = { says = "one epoch", settings = { train.epochs = 1, run.clean_fraction = 0.5 } }
budgets.full = { says = "two epochs", settings = { train.epochs = 2 } }
attacks.badnets = { title = "BadNets" }
[tables.lab]
title = "Lab"
says = "A laboratory."
attacks = ["badnets"]
defenses = [
    { name = "noted", title = "Noted", plugin = "noted" },
    { name = "broken", title = "Broken", plugin = "broken", needs_target = true },
    { name = "dead", title = "Dead", plugin = "dead", needs_target = true },
]
"""


@pytest.fixture(scope="module", autouse=True)
def _path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(ROOT)])  # at the end: bdcore itself is the installed one
        yield


@pytest.fixture
def tables(_path: None) -> ModuleType:
    return importlib.import_module("benchmarks.reproduction.tables")


@pytest.fixture
def running(_path: None) -> ModuleType:
    return importlib.import_module("benchmarks.reproduction.running")


# ------------------------------------------------------------------------------------------- interrupted and repeated


class Laboratory:
    """A table of its own with defenses that note when they run, and a data set of little digits."""

    def __init__(self, site: "Site", folder: Path) -> None:
        self.site, self.folder = site, folder
        names = ("noted", "broken", "dead")
        site.add("lab", {name: f"lab_{name}" for name in names}, {f"lab_{n}.py": LAB.replace("NAME", n) for n in names})
        images, labels = load_digits(return_X_y=True)
        grey = (images.reshape(-1, 1, 8, 8) * 15).astype(np.uint8)
        np.savez(
            folder / "little.npz", x_train=grey[:60], y_train=labels[:60], x_test=grey[60:90], y_test=labels[60:90]
        )
        (folder / "tables.toml").write_text(TABLES)
        self.log, self.hold = folder / "log", folder / "hold"
        self.log.touch()

    arguments = (
        *("lab", "--tables", "tables.toml", "--dataset", "npz:little.npz"),
        *("--seeds", "0", "--results", "out", "--device", "cpu"),
    )

    def start(self, *more: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-P", "-m", "benchmarks.reproduce", *self.arguments, *more]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.site.folder), str(ROOT)]),
            "BDCORE_CACHE": str(self.folder / "cache"),
            "LAB_LOG": str(self.log),
            "LAB_HOLD": str(self.hold),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(command, cwd=self.folder, env=environment, stderr=subprocess.PIPE, text=True)

    def runs(self) -> list[str]:
        return self.log.read_text().split()

    def content(self) -> dict[str, Any]:
        return json.loads((self.folder / "out" / "lab-small-little.json").read_text())

    def page(self) -> str:
        return (self.folder / "out" / "lab-small-little.md").read_text()

    def states(self) -> dict[tuple[str, str], str]:
        return {(cell["case"], cell["column"]): cell["state"] for cell in self.content()["cells"].values()}


@pytest.fixture(scope="module")
def laboratory(new_site: Any, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(new_site(), tmp_path_factory.mktemp("laboratory"))


def wait_until(condition: Any, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


def test_killed_and_repeated(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """One story, because every command starts two processes with torch: killed, repeated, asked for again."""
    laboratory.hold.touch()
    command = laboratory.start()
    wait_until(lambda: len(laboratory.runs()) == 2 or command.poll() is not None)
    assert laboratory.runs() == ["noted"] * 2, command.communicate()[1]
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children")
    workers = [int(one) for one in children.read_text().split()] if children.exists() else []
    command.send_signal(signal.SIGKILL)
    command.communicate()
    # Both victims and the first defense were there; what ran is lost, and no worker goes on.
    done = dict.fromkeys([("badnets", "none"), ("no_attack", "none"), ("badnets", "noted")], "done")
    assert laboratory.states() == done
    assert "- badnets, dead, seed 0" in laboratory.page().partition("## Not run")[2]
    wait_until(lambda: not any(b"reproduce" in command_line(pid) for pid in workers), 30)

    laboratory.hold.unlink()
    errors = laboratory.start("--jobs", "2").communicate()[1]
    assert laboratory.runs().count("noted") == 3, "the finished cell is not run again, the lost one is"
    states = laboratory.states()
    assert {place: state for place, state in states.items() if state == "done"} == done | {
        ("no_attack", "noted"): "done"
    }
    failed = dict.fromkeys([("badnets", "broken"), ("badnets", "dead")], "failed")
    assert {place: state for place, state in states.items() if state == "failed"} == failed
    assert "badnets, broken, seed 0: no honest answer today." in errors
    page = laboratory.page()
    assert "- badnets, broken, seed 0: no honest answer today.\n" in page
    assert "- badnets, dead, seed 0: its process ended with exit code -9" in page
    assert "## Not run" not in page
    assert "target found 1 of 1" in page
    assert "false target 1 of 1" in page
    assert "- badnets, noted, seed 0: defend noted: noted has its doubts.\n" in page.partition("## Warnings")[2]
    assert "| 0 of 1, 1 failed |" in page
    assert len(laboratory.content()["commands"]) == 2, "each cell keeps the command that measured it"

    monkeypatch.chdir(laboratory.folder)
    monkeypatch.syspath_prepend(laboratory.site.folder)
    assert reproduce(monkeypatch, *laboratory.arguments, "--defenses", "noted") == 0
    assert "4 cells, 0 to run" in capsys.readouterr().err
    assert laboratory.states() == states, "what was not asked for is kept"


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# ------------------------------------------------------------------------------------------------------------- order


def job(key: str, victim: str, defended: bool, surrogate: str | None = None, seed: int = 0) -> Any:
    return SimpleNamespace(
        cell=SimpleNamespace(key=key, seed=seed), code="", victim=victim, defended=defended, surrogate=surrogate
    )


@settings(deadline=None, max_examples=50)
@given(
    attacks=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6),
    seeds=st.integers(1, 2),
    workers=st.integers(1, 5),
    choices=st.randoms(use_true_random=False),
)
def test_no_two_workers_train_the_same(attacks: list[tuple[int, bool]], seeds: int, workers: int, choices: Any):
    running = importlib.import_module("benchmarks.reproduction.running")
    jobs: list[Any] = []
    for seed in range(seeds):
        for number, (defenses, surrogate) in enumerate(attacks):
            victim, aid = f"{seed}/{number}", f"surrogate {seed}" if surrogate else None
            jobs += [job(f"{victim}/{d}", victim, True, aid, seed) for d in range(defenses)]
            jobs.append(job(victim, victim, False, aid, seed))
    queue = running.Queue(jobs)
    trained: set[str] = set()
    busy: list[Any] = []
    ended: list[str] = []
    while queue.waiting or busy:
        while len(busy) < workers and (taken := queue.take()):
            needed = {taken.victim, taken.surrogate} - {None} - trained
            assert not any(needed & {other.victim, other.surrogate} for other in busy)
            busy.append(taken)
        assert busy, "there is always something to do"
        over = busy.pop(choices.randrange(len(busy)))
        trained |= {over.victim, over.surrogate}
        assert not list(queue.end(over, {"state": "done"}))
        ended.append(over.cell.key)
    assert sorted(ended) == sorted(one.cell.key for one in jobs)


def test_where_a_victim_fails_so_do_its_defenses(running: ModuleType):
    queue = running.Queue([job("a", "a", False), job("a/1", "a", True), job("b", "b", False), job("b/1", "b", True)])
    first = queue.take()
    ((lost, result),) = queue.end(first, {"state": "failed", "error": "out of memory"})
    assert lost.cell.key == "a/1"
    assert result["state"] == "failed"
    assert result["error"] == "its victim failed: out of memory"
    assert [one.cell.key for one in queue.waiting] == ["b", "b/1"]


# ---------------------------------------------------------------------------------------------------------- arguments


def reproduce(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    module = importlib.import_module("benchmarks.reproduce")
    try:
        module.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("mclef",), "unknown table 'mclef'. Did you mean mcldef?"),
        (("abl", "--budget", "huge"), "unknown budget 'huge'"),
        (("abl", "--attacks", "badnet"), "unknown attack of the table abl 'badnet'. Did you mean badnets"),
        (("abl", "--defenses", "mesa"), "unknown defense of the table abl 'mesa'"),
        (("abl", "--patterns", "1"), "the table abl has no patterns"),
        (("mesa", "--patterns", "51"), "there is no pattern 51: they are numbered 0 to 50"),
        (("mesa", "--patterns", "7-3"), "'7-3' must be numbers"),
        (("abl", "--seeds", "zero"), "'zero' must be numbers"),
        (("abl", "--jobs", "0"), "--jobs 0: must be at least 1"),
        (("abl", "--deadline", "-1"), "--deadline -1.0: must be at least 0"),
        (("mcldef", "--defenses", "finetune", "--dataset", "mnist"), "unknown data set 'mnist'"),
        (("mcldef", "--defenses", "finetune", "--dataset", "digits"), "unknown option of dataset 'limit'"),
        (("mcldef", "--defenses", "finetune", "--dataset", "npz:absent.npz"), "there is no file absent.npz"),
    ],
)
def test_bad_arguments_are_one_clear_line(
    arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert reproduce(monkeypatch, *arguments, "--results", "out") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "cells," not in line]
    assert len(errors) == 1
    assert says in errors[0]
    assert not list(tmp_path.iterdir())


def test_after_the_deadline_nothing_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (40, 3, 32, 32), dtype=np.uint8), np.arange(40) % 10
    np.savez(tmp_path / "cifar10.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    arguments = ("mcldef", "--dataset", "npz:cifar10.npz", "--attacks", "badnets", "--defenses", "mcldef,finetune")
    assert reproduce(monkeypatch, *arguments, "--deadline", "0", "--seeds", "0-1", "--results", "out") == 0
    assert "6 cells, 6 to run\n6 cells not run;" in capsys.readouterr().err.replace("wrote", "")
    page = (tmp_path / "out" / "mcldef-small.md").read_text()
    for column in ("none", "mcldef", "finetune"):
        for seed in (0, 1):
            assert f"- badnets, {column}, seed {seed}\n" in page
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("budget", ["small", "medium", "full"])
@pytest.mark.parametrize("name", ["mcldef", "mesa", "abl", "grid"])
def test_every_cell_is_a_valid_run(tables: ModuleType, running: ModuleType, name: str, budget: str):
    host, machine = Host(), running.Machine("npz:cifar10.npz", "cpu", 1)
    table = tables.load(name, budget, everything=True)
    jobs = [running.check(cell, machine, host) for cell in table.cells([0], "cifar10")]
    assert len({job.cell.key for job in jobs}) == len(jobs)
    attacks = {case.attack for case in table.cases}
    assert None in attacks, "what a defense harms where nothing is wrong is part of every table"
    # Whatever the columns set, each defense but those that bring a model of their own has its undefended victim.
    victims = {job.victim for job in jobs if not job.defended}
    optional = {column.name for column in table.columns if column.optional and "run.model" in column.settings}
    assert all(job.victim in victims for job in jobs if job.cell.column not in optional)
    told = {column.name for column in table.columns if column.needs_target}
    assert not any(job.cell.case == "no_attack" and job.cell.column in told for job in jobs)


def test_settings_of_a_budget_for_a_plugin_reach_its_defenses_alone(tables: ModuleType, tmp_path: Path):
    (tmp_path / "tables.toml").write_text(
        """
budgets.small = { says = "short", settings = { train.epochs = 1 }, plugins.p = { x = 1, y.z = 2 } }
budgets.full = { says = "long", settings = { train.epochs = 9 } }
attacks = {}
[tables.t]
title = "T"
says = "S."
attacks = []
defenses = [
    { name = "as_given", title = "A", plugin = "p", settings = { p.w = 0 } },
    { name = "own", title = "B", plugin = "p", small.p.x = 5 },
    { name = "other", title = "C", plugin = "q" },
]
"""
    )
    found = {
        (budget, cell.column): dict(cell.settings)
        for budget in ("small", "full")
        for cell in tables.load("t", budget, file=tmp_path / "tables.toml").cells([0], "cifar10")
    }
    assert found["small", "as_given"] == {"train.epochs": 1, "p.w": 0, "p.x": 1, "p.y.z": 2}
    assert found["small", "own"] == {"train.epochs": 1, "p.x": 5, "p.y.z": 2}
    assert found["small", "other"] == found["small", "none"] == {"train.epochs": 1}
    assert found["full", "as_given"] == {"train.epochs": 9, "p.w": 0}
    assert found["full", "own"] == {"train.epochs": 9}


@pytest.mark.parametrize("budget", ["small", "medium", "full"])
def test_the_control_of_mesa_is_its_removal_but_for_the_triggers(tables: ModuleType, budget: str):
    found: dict[str, dict[str, Any]] = {}
    for cell in tables.load("mesa", budget, everything=True).cells([0], "cifar10"):
        if cell.case == "badnets-0" and cell.column in ("mesa", "mesa_baseline", "finetune"):
            config = resolve(Host(), plugins=cell.plugins, dataset="npz:cifar10.npz", settings=cell.texts())
            found[cell.column] = config.defenses[0].config.model_dump()
    control = found.pop("finetune")
    assert (control["weight_decay"], control["crop"], control["flip"]) == (0, 0, False), "MESA has none of these"
    for removal in found.values():
        for option in ("epochs", "lr", "schedule", "batch_size", "min_steps"):
            assert removal[option] == control[option], option


def test_every_published_figure_belongs_to_a_row(tables: ModuleType):
    for name in tables.table_names():
        table = tables.load(name, "full", everything=True)
        places = {(case.attack, column.name) for case in table.cases for column in table.columns}
        places |= {("", column.name) for column in table.columns} if table.patterns else set()
        found = tables.published(name)
        assert found, name
        assert set(found) <= places
        assert all(one.source for one in found.values())
    assert tables.published("abl")["badnets", "abl"].asr == 3.04
    assert tables.published("mesa")["", "mesa"].worst == 8.2


def test_one_file_in_two_places_is_the_same_data_set(tables: ModuleType):
    module = importlib.import_module("benchmarks.reproduce")
    assert module._images("npz:/here/cifar10.npz") == module._images("cifar10:there") == "cifar10"


def test_a_file_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "abl-small.json").write_text('{"schema": 99}')
    assert reproduce(monkeypatch, "abl", "--render", "--results", str(tmp_path)) == 2
    assert "abl-small.json holds no results of this kind" in capsys.readouterr().err
