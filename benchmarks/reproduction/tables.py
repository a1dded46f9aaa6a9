"""Which cells a table has: one run each of an attack, a defense or none, and a seed, with all their settings.

`tables.toml` holds the tables and budgets, `published.toml` the figures that ours stand beside.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bdcore.errors import UsageError, unknown_name
from bdcore.store import digest

TABLES = Path(__file__).with_name("tables.toml")
PUBLISHED = Path(__file__).with_name("published.toml")

BEFORE = "none"
"""The defense that is none: the victim as it is."""
CLEAN = "no_attack"
"""The case without an attack: what a defense harms, or finds, where nothing is wrong."""
_OF_ATTACKS = ("attack.", "run.victim", "run.fine_tuning_")  # keys that mean nothing without one


@dataclass(frozen=True)
class Case:
    """A row of a table: an attack with its options, or none.

    Args:
        name: the attack's, or `no_attack`, or the attack's and a number where it is one of several patterns.
        title: what the row is called.
        attack: the attack plugin; None where the training set stays clean.
        settings: of this case alone, by key.
        pooled: whether it is one of several whose figures are taken together.
    """

    name: str
    title: str
    attack: str | None
    settings: Mapping[str, object]
    pooled: bool = False


@dataclass(frozen=True)
class Column:
    """A defense with its options, or none.

    Args:
        name: what `--defenses` calls it.
        title: what the table calls it.
        plugin: the defense plugin; None for the undefended victim.
        settings: by key.
        needs_target: whether it has no meaning without an attack, because it is told the target.
        optional: whether it is run only where `--defenses` names it.
    """

    name: str
    title: str
    plugin: str | None
    settings: Mapping[str, object]
    needs_target: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Cell:
    """One run: what `bdcore.config.resolve` is to be told.

    Args:
        case, column: names of its row and column.
        seed: of the run.
        plugins: attack and defense.
        settings: all, by key.
        images: the data set's name, without where it lies.
    """

    case: str
    column: str
    seed: int
    plugins: tuple[str, ...]
    settings: Mapping[str, object]
    images: str

    @cached_property
    def key(self) -> str:
        """A hash of what the cell is; the same wherever the data set lies and whatever computes it."""
        what = [self.case, list(self.plugins), dict(self.settings), self.seed, self.images]
        return digest(what)[:16]

    @property
    def no_attack(self) -> bool:
        """Whether the training set stays clean."""
        return self.case == CLEAN

    @property
    def place(self) -> tuple[str, str, int]:
        """Row, column and seed."""
        return self.case, self.column, self.seed

    def texts(self) -> list[str]:
        """The settings in the form KEY=VALUE."""
        return [f"{key}={json.dumps(value)}" for key, value in self.settings.items()]

    def __str__(self) -> str:
        return f"{self.case}, {self.column}, seed {self.seed}"


@dataclass(frozen=True)
class Table:
    """One table under one budget, with the cases and defenses that were asked for.

    Args:
        name, title, says: of the table; `says` is its setting in a sentence.
        budget, shortened: the budget's name, and what it changes in a sentence.
        settings: of every cell, by key.
        cases: rows, the one without an attack last.
        columns: defenses, none first.
        patterns: of how many patterns the pooled cases are some; 0 where there are none.
    """

    name: str
    title: str
    says: str
    budget: str
    shortened: str
    settings: Mapping[str, object]
    cases: tuple[Case, ...]
    columns: tuple[Column, ...]
    patterns: int = 0

    def cells(self, seeds: Sequence[int], images: str) -> list[Cell]:
        """Every cell; those of one seed before those of the next, undefended ones first."""
        return [
            self._cell(case, column, seed, images)
            for seed in seeds
            for column in self.columns
            for case in self.cases
            if case.attack or not column.needs_target
        ]

    def _cell(self, case: Case, column: Column, seed: int, images: str) -> Cell:
        settings = {**self.settings, **case.settings, **column.settings}
        if case.attack is None:
            settings = {key: value for key, value in settings.items() if not key.startswith(_OF_ATTACKS)}
        plugins = tuple(name for name in (case.attack, column.plugin) if name)
        return Cell(case.name, column.name, seed, plugins, settings, images)


def table_names(file: Path = TABLES) -> list[str]:
    """The tables that there are."""
    return list(_read(file)["tables"])


def load(
    name: str,
    budget: str,
    *,
    attacks: Sequence[str] | None = None,
    defenses: Sequence[str] | None = None,
    patterns: Sequence[int] | None = None,
    everything: bool = False,
    file: Path = TABLES,
) -> Table:
    """The table `name` under `budget`.

    Args:
        name, budget: as in the file.
        attacks: some of its attacks, or `no_attack`; None for all.
        defenses: some of its defenses, besides the undefended victims; None for all but optional ones.
        patterns: numbers of the patterns to take, where the table has patterns.
        everything: all patterns and optional defenses.
        file: tables of another kind.

    Raises:
        UsageError: for an unknown name, or patterns where the table has none.
    """
    every = _read(file)
    _known("table", [name], every["tables"])
    _known("budget", [budget], every["budgets"])
    table, limits = every["tables"][name], every["budgets"][budget]
    shortened = limits.get("plugins", {})

    def settings(part: Mapping[str, Any]) -> dict[str, object]:
        return {**_flat(part.get("settings", {})), **_flat(part.get(budget, {}))}

    if patterns is not None and "patterns" not in table:
        raise UsageError(f"the table {name} has no patterns to choose from; leave out --patterns.")
    if everything and "patterns" in table:
        patterns = range(table["patterns"]["of"])
    cases: list[Case] = []
    for attack in table["attacks"]:
        title = every["attacks"][attack]["title"]
        cases += _cases(attack, title, settings(every["attacks"][attack]), table.get("patterns"), patterns)
    cases.append(Case(CLEAN, "no attack", None, {}))
    columns = [
        Column(
            one["name"],
            one["title"],
            one["plugin"],
            {**_flat(shortened.get(one["plugin"], {}), f"{one['plugin']}."), **settings(one)},
            one.get("needs_target", False),
            budget in one.get("optional", ()),
        )
        for one in table["defenses"]
    ]
    if attacks is not None:
        _known(f"attack of the table {name}", attacks, [*table["attacks"], CLEAN])
        cases = [case for case in cases if (case.attack or CLEAN) in attacks]
    if defenses is not None:
        _known(f"defense of the table {name}", defenses, [BEFORE, *(column.name for column in columns)])
    if defenses is not None:
        columns = [column for column in columns if column.name in defenses]
    elif not everything:
        columns = [column for column in columns if not column.optional]
    return Table(
        name,
        table["title"],
        table["says"],
        budget,
        limits["says"],
        {**_flat(limits["settings"]), **settings(table)},
        tuple(cases),
        (Column(BEFORE, "none", None, {}), *columns),
        table["patterns"]["of"] if "patterns" in table else 0,
    )


@dataclass(frozen=True)
class Published:
    """A published pair of figures, in percent.

    Args:
        asr: attack success; None where it is not published.
        accuracy: clean accuracy; None where it is not published.
        nine: whether that is over the classes without the target.
        worst: attack success on the least favourable pattern.
        source: where it stands.
    """

    asr: float | None
    accuracy: float | None
    nine: bool
    worst: float | None
    source: str


def published(table: str, file: Path = PUBLISHED) -> dict[tuple[str, str], Published]:
    """Published figures of a table, by attack (or "" for all patterns together) and defense."""
    content = _read(file)
    found: dict[tuple[str, str], Published] = {}
    for block in content.get("figures", []):
        if table in block["tables"]:
            for attack, (asr, accuracy) in block["asr_and_accuracy"].items():
                nine = block["accuracy"] == "nine"
                found[attack, block["defense"]] = Published(asr, accuracy, nine, None, block["source"])
    for block in content.get("pooled", []):
        if table in block["tables"]:
            found["", block["defense"]] = Published(block["mean"], None, False, block["worst"], block["source"])
    return found


def _cases(
    attack: str,
    title: str,
    settings: Mapping[str, object],
    patterns: Mapping[str, Any] | None,
    chosen: Sequence[int] | None,
) -> list[Case]:
    """The attack's one case, or one for each pattern."""
    if patterns is None:
        return [Case(attack, title, attack, settings)]
    numbers = patterns["chosen"] if chosen is None else chosen
    outside = [number for number in numbers if not 0 <= number < patterns["of"]]
    if outside:
        raise UsageError(f"there is no pattern {outside[0]}: they are numbered 0 to {patterns['of'] - 1}.")
    own = {**settings, **_flat(patterns["settings"])}
    return [
        Case(f"{attack}-{number}", f"{patterns['title']} {number}", attack, {**own, patterns["option"]: number}, True)
        for number in numbers
    ]


def _known(what: str, names: Sequence[str], valid: Sequence[str] | Mapping[str, Any]) -> None:
    for name in names:
        if name not in valid:
            raise UsageError(unknown_name(what, name, valid))


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested tables as one, keys joined with dots."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}.") from error
