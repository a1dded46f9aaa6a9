"""`bdcore options`: the options that a plugin's author wrote down are those that are listed, in real processes."""

import json

import pytest
from pydantic import BaseModel, Field

from bdcore.cli.options import values
from bdcore.config import RunSettings
from bdcore.plugins import Host

OWN = """
from enum import Enum
from pathlib import Path
from typing import Literal

from bdcore import Defense, Outcome, PluginConfig, hookimpl
from pydantic import Field


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Own(Defense):
    name = "own"

    class Config(PluginConfig):
        share: float = Field(0.25, ge=0, lt=1, description="share of all")
        steps: int = Field(7, ge=1, le=9, description="how many")
        way: Literal["up", "down"] | None = Field(None, description="[red]where to[/red]")
        colour: Colour = Field(Colour.BLUE, description="which one")
        sizes: tuple[int, ...] = Field(default_factory=lambda: (1, 2), description="sides")
        picture: Path | None = Field(None, description="a file")
        quiet: bool = Field(False, description="say nothing")

    def __call__(self, given, context):
        return Outcome()


@hookimpl
def bdcore_defense():
    return Own
"""

EXPECTED = [
    ("own.share", 0.25, "number >= 0, < 1", "share of all"),
    ("own.steps", 7, "whole number 1 to 9", "how many"),
    ("own.way", None, "up, down", "[red]where to[/red]"),
    ("own.colour", "blue", "red, blue", "which one"),
    ("own.sizes", [1, 2], "[whole number, ...]", "sides"),
    ("own.picture", None, "path", "a file"),
    ("own.quiet", False, "true, false", "say nothing"),
]


@pytest.fixture(scope="module")
def disk(new_site):
    """A plugin with options of every type, and one that cannot be imported."""
    made = new_site()
    made.add("own-dist", {"own": "own_plugin"}, {"own_plugin.py": OWN}, version="1.2.3")
    made.add("raises-dist", {"raises": "raises_plugin"}, {"raises_plugin.py": "raise RuntimeError('no')"})
    return made


def test_options_of_somebodys_plugin(disk):
    done = disk.bdcore("options", "own", "--json")
    assert done.returncode == 0, done.stderr
    (section,) = json.loads(done.stdout)
    assert {key: section[key] for key in ("section", "kind", "distribution", "version")} == {
        "section": "own",
        "kind": "defense",
        "distribution": "own-dist",
        "version": "1.2.3",
    }
    assert [tuple(one.values()) for one in section["options"]] == EXPECTED


def test_the_table_says_the_same_in_lines_that_are_never_cut(disk):
    done = disk.bdcore("options", "own", "digits", COLUMNS="40")
    assert done.returncode == 0, done.stderr
    heading, columns, *lines = done.stdout.splitlines()
    assert heading == "own: defense of own-dist 1.2.3"
    assert columns.split() == ["option", "default", "values", "description"]
    for line, (option, default, valid, description) in zip(lines, EXPECTED, strict=False):
        shown = "-" if default is None else default if isinstance(default, str) else json.dumps(default)
        assert line.split() == [option, *shown.split(), *valid.split(), *description.split()]
    assert "digits: data set of bdcore" in done.stdout
    assert "train.flip=false" in done.stdout


def test_without_a_section_all_are_listed(disk):
    done = disk.bdcore("options", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["section"]: row for row in json.loads(done.stdout)}
    assert {name: rows[name]["keys"] for name in ("run", "train", "own", "badnets", "digits")} == {
        "run": "run.*",
        "train": "train.*",
        "own": "own.*",
        "badnets": "attack.*",
        "digits": "dataset.*",
    }
    assert rows["own"]["status"] == "ok"
    assert "RuntimeError: no" in rows["raises"]["status"]
    table = disk.bdcore("options").stdout
    assert [line.split()[0] for line in table.partition("\n\n")[0].splitlines()] == ["section", *rows]


def test_what_cannot_be_listed_is_one_error(disk):
    for name, said in {
        "onw": "unknown section 'onw'. Did you mean own? Valid: abl, ",
        "raises": "cannot be used: RuntimeError: no",
        "attack": "attack.* are the options of the attack that a run has: name that one, for instance badnets",
    }.items():
        done = disk.bdcore("options", "train", name)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert said in done.stderr


def test_every_option_of_a_run_and_of_every_plugin_has_words(site):
    from bdcore.cli.options import overview, section

    host = Host()
    for row in overview(host):
        found = section(host, row["section"])
        for option in found["options"]:
            assert option["option"].startswith(row["keys"].removesuffix("*"))
            assert option["description"]
            assert option["values"] not in ("", "any", "table"), option
    (run,) = [section(host, "run")["options"]]
    assert [option["option"] for option in run] == [f"run.{name}" for name in RunSettings.model_fields]


class Shape(BaseModel):
    """A table within an option."""

    side: int


class Unusual(BaseModel):
    """Types that few options have."""

    pair: tuple[int, float] = (1, 2.0)
    either: int | str = Field(0, description="both")
    shape: Shape = Shape(side=1)
    table: dict[str, int] = Field({}, description="by name")
    word: str = Field("a", pattern="^[a-z]$")
    low: float = Field(1.0, gt=0)
    anything: object = None


def test_unusual_types_have_words_too():
    schema = Unusual.model_json_schema()
    assert {name: values(one, schema["$defs"]) for name, one in schema["properties"].items()} == {
        "pair": "[whole number, number]",
        "either": "whole number or text",
        "shape": "table",
        "table": "table",
        "word": "text matching ^[a-z]$",
        "low": "number > 0",
        "anything": "any",
    }
    loop = {"type": "array", "items": {"$ref": "#/$defs/Loop"}}
    assert values({"$ref": "#/$defs/Loop"}, {"Loop": loop}) == "[any, ...]"
