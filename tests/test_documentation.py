"""What README.md and CONTRIBUTING.md show must work: commands, plugin, configuration file, tables."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch

from bdcore.cli import COMMANDS, commands
from bdcore.config import resolve
from bdcore.plugins import Host

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

SET_UP = ["pip install . && bdcore run --plugin mcldef", "pip install '.[test]' && pytest"]
QUICK = ["--model", "wrn10_1", "--set", "train.epochs=1", "--device", "cpu"]


def blocks(text: str, language: str = "") -> list[str]:
    """Fenced code blocks of a language."""
    return [content for found, content in FENCE.findall(text) if found == language]


def block(language: str, holding: str) -> str:
    """The one block of the README in `language` that holds a text."""
    (found,) = [content for content in blocks(README, language) if holding in content]
    return found


def shown_commands(text: str) -> list[str]:
    """Every `bdcore ...` in blocks and in the text, without what surrounds it in a shell."""
    lines = [line for content in blocks(text) for line in content.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    parts = [part.partition(">")[0].removeprefix("$ ").strip() for line in lines for part in line.split("&&")]
    return sorted({part for part in parts if part.startswith("bdcore ")})


COMMANDS_SHOWN = sorted({*shown_commands(README), *shown_commands(CONTRIBUTING)})


@pytest.fixture
def pruning(site):
    """A site with the README's plugin, as its pyproject.toml declares it."""
    project = tomllib.loads(block("toml", "[project]"))["project"]
    code = block("python", "@hookimpl")
    entry_points = project["entry-points"]["bdcore"]
    files = {f"{module}.py": code for module in entry_points.values()}
    site.add(project["name"], entry_points, files, version=project["version"], requires=project["dependencies"])
    return site


def test_the_readme_shows_two_set_up_commands_near_its_top():
    assert [content.strip() for content in blocks(README)[:2]] == SET_UP
    assert [line for line in README.splitlines() if line.startswith("pip install")] == SET_UP
    assert all(README.index(command) < README.index("\n## ") for command in SET_UP)


def test_contributing_begins_with_three_commands():
    assert len(blocks(CONTRIBUTING)[0].splitlines()) == 3


def test_the_plugin_of_the_readme_runs_and_its_model_loads(pruning, tmp_path):
    out = tmp_path / "out"
    asked = ["run", "--plugin", "prune", *QUICK, "--set", "prune.share=0.5", "--out", str(out)]
    done = pruning.bdcore(*asked, BDCORE_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^prune: attack success [\d.]+% -> [\d.]+%", done.stdout, re.MULTILINE)

    loading = block("python", "load_file").replace('"results/mine"', repr(str(out))).replace("mcldef", "prune")
    names: dict = {}
    exec(compile(loading, "README.md", "exec"), names)
    model = names["model"]
    assert not model.training
    *_, (_, head) = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert int((head.weight == 0).all(0).sum()) == head.in_features // 2, "half of the features are silenced"
    assert model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)


@pytest.mark.parametrize("command", COMMANDS_SHOWN)
def test_a_command_that_is_shown_is_valid(command, pruning, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(block("toml", "# run.toml"))
    _, name, *arguments = shlex.split(command)
    assert name in COMMANDS
    group = commands.make_context("bdcore", [name])
    chosen = commands.get_command(group, name)
    assert chosen is not None
    options = chosen.make_context(name, arguments, parent=group).params
    if name == "run":
        options.pop("as_json")
        config = resolve(Host(), **options)
        assert config.defenses


def test_commands_are_found_in_the_documents():
    assert "bdcore run --plugin mcldef" in COMMANDS_SHOWN
    assert "bdcore doctor" in COMMANDS_SHOWN
    assert "bdcore run --plugin badnets --plugin finetune" in COMMANDS_SHOWN


def test_every_first_party_plugin_has_a_row_with_its_kind():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]["bdcore"]
    table = README.partition("\n## What there is\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", table, re.MULTILINE))
    host = Host()
    assert rows == {name: host.load(name).kind.replace("dataset", "data set") for name in declared}


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "benchmarks/README.md",
        "csrc/README.md",
        "tests/emulator/README.md",
    ],
)
def test_links_and_files_that_are_named_exist(document):
    text = (ROOT / document).read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    headings = {
        "#" + re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)
    }
    assert {link for link in links if link.startswith("#")} <= headings
    links = [link for link in links if not link.startswith("#")]
    named = re.findall(r"`((?:bdcore|plugins|tests|benchmarks|\.ci)/[\w/.]+)`", text)
    paths = [path for path in [*links, *named] if "NAME" not in path]
    assert [path for path in paths if not (ROOT / path).exists()] == []
