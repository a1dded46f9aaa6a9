"""What README.md, CONTRIBUTING.md and docs/ show must work: every command, plugin, piece of code, file, table, message.

The commands run in a world of tiny files, with settings appended that make them quick; MCLDef's search is cut short.
"""

import inspect
import json
import os
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import bdcore
from bdcore import hookspecs
from bdcore.cli import COMMANDS, main
from bdcore.config import resolve
from bdcore.plugins import Host
from bdcore.testing import ATTACK_CHECKS, DATASET_CHECKS, DEFENSE_CHECKS, check_attack, check_dataset, check_defense

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
OTHERS = ["CHANGELOG.md", "benchmarks/README.md", "csrc/README.md", "tests/emulator/README.md"]
TEXT = {page: (ROOT / page).read_text("utf-8") for page in [*PAGES, *OTHERS]}
README, AUTHORS, OWN, RECORD = (
    TEXT[p] for p in (PAGES[0], *(f"docs/{p}.md" for p in ("plugin-authors", "own-model", "record")))
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

SET_UP = ["pip install . && bdcore run --plugin mcldef", "pip install '.[test]' && pytest -n auto"]

# What two defenses of people's own say and return is known beforehand, so that records hold something in every place.
JUDGE = """
import copy
import torch
from bdcore import Defense, Outcome, PluginConfig, Recipe, Trigger, Verdict, fit, hookimpl
from pydantic import Field

class Judge(Defense):
    name = "judge"

    class Config(PluginConfig):
        found: bool = Field(True, description="whether there is a backdoor")

    def inspect(self, given, context):
        context.warn("what is said was known beforehand")
        scale = torch.nn.Linear(1, 1)
        loss = lambda batch: scale(batch["labels"][:, None].float()).square().mean()
        fit("look", scale, {"labels": given.clean.labels}, loss, Recipe(epochs=2, lr=1e-3), context)
        if not self.config.found:
            return Outcome(verdict=Verdict(False, None, (0.5,) * given.classes))
        evidence = tuple(9.0 * (one == 3) for one in range(given.classes))
        trigger = Trigger(3, delta=torch.full(given.clean.images.shape[1:], 0.25))
        return Outcome(None, Verdict(True, 3, evidence), (trigger,), {"size": 4.5})

    def __call__(self, given, context):
        found = self.inspect(given, context)
        model = copy.deepcopy(given.model) if self.config.found else None
        return Outcome(model, found.verdict, found.triggers, found.notes)

@hookimpl
def bdcore_defense():
    return Judge
"""
SORTER = """
import torch
from bdcore import Context, Defense, Outcome, Recipe, Suspects, build, fit, hookimpl

class Sorter(Defense):
    name = "sorter"
    needs = frozenset({"suspect", "arch"})

    def __call__(self, given, context):
        model, data = build(given.arch, 3), given.suspect
        columns = {"images": data.images, "labels": data.labels}
        loss = lambda batch: torch.nn.functional.cross_entropy(model(batch["images"]), batch["labels"])
        fit("train", model, columns, loss, Recipe(epochs=1, lr=0.01), context)
        return Outcome(model.eval(), suspects=Suspects(torch.arange(4), torch.arange(float(len(data)))))

@hookimpl
def bdcore_defense():
    return Sorter
"""


def blocks(text: str, language: str = "") -> list[str]:
    """Fenced code blocks of a language."""
    return [content for found, content in FENCE.findall(text) if found == language]


def plugins() -> dict[str, str]:
    """The whole plugins that are shown, by name."""
    shown = [content for content in blocks(AUTHORS, "python") if "@hookimpl\ndef bdcore_" in content]
    return {re.findall(r'^    name = "(\w+)"$', content, re.MULTILINE)[0]: content for content in shown}


def shell_lines(text: str) -> list[str]:
    """Every simple command of the blocks that are for a shell, and every `bdcore ...` in the text."""
    lines = [line for content in blocks(text) for line in content.splitlines()]
    lines += [inline for inline in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)) if re.match(r"bdcore \w+ .", inline)]
    return [part.strip() for line in lines for part in re.split(r"&&|\|\|", line)]


def shown_commands() -> list[str]:
    """Every call of bdcore that the pages show, whole ones alone, without what surrounds it in a shell."""
    lines = [line.partition(" > ")[0] for page in PAGES for line in shell_lines(TEXT[page])]
    whole = [line for line in lines if line.startswith("bdcore ") and not re.search(r"\b[A-Z]{3,}\b|\||--help", line)]
    return sorted(set(whole))


def call(*arguments: str) -> tuple[int, str, str]:
    """`bdcore ARGUMENTS` in this process: exit code, stdout, stderr."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert "Traceback" not in err.getvalue()
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


def knowing(net: nn.Module, images: torch.Tensor) -> nn.Module:
    """The network with a last layer, by least squares, that gives the first of ten images class 0, the second 1 ..."""
    layer = [module for module in net.eval().modules() if isinstance(module, nn.Linear)][-1]
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    with torch.no_grad():
        net(images)
        hook.remove()
        rows = torch.cat([seen[0], torch.ones(len(images), 1)], 1)
        solved = torch.linalg.lstsq(rows, 10 * torch.eye(10)[torch.arange(len(images)) % 10]).solution
        layer.weight.copy_(solved[:-1].T)
        layer.bias.copy_(solved[-1])
    return net


def lay_files(folder: Path) -> None:
    """Everything that the commands name, small."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8, generator=generator)
    for number, image in enumerate(images):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        for place in (
            f"photos/digit{number % 10}",
            "unlabelled",
            f"downloaded/{number % 10}",
            f"parts/test/{number % 10}",
        ):
            (folder / place).mkdir(parents=True, exist_ok=True)
            picture.save(folder / place / f"{number}.png")
        (folder / "one" / "thing").mkdir(parents=True, exist_ok=True)
        (folder / "sizes").mkdir(exist_ok=True)
        picture.save(folder / "one" / "thing" / f"{number}.png")
        picture.resize((32 + number, 32)).save(folder / "sizes" / f"{number}.png")
        (folder / "many" / str(number + 5)).mkdir(parents=True)
        picture.save(folder / "many" / str(number + 5) / "a.png")
    (folder / "parts" / "train").mkdir()
    shutil.copytree(folder / "parts" / "test", folder / "parts" / "train", dirs_exist_ok=True)
    labels = np.arange(10)
    np.savez(folder / "clean.npz", x=images.numpy(), y=labels)
    np.savez(folder / "few.npz", x=images.numpy(), y=labels % 3)
    train = {"x_train": images.repeat(20, 1, 1, 1).numpy(), "y_train": np.tile(labels, 20)}
    np.savez(folder / "images.npz", x_test=255 - images.numpy(), y_test=labels, **train)
    (folder / "run.toml").write_text(block(README, "toml", "# run.toml"))
    (folder / "mynet.py").write_text(block(OWN, "python", "# mynet.py"))
    make: dict[str, Any] = {}
    exec((folder / "mynet.py").read_text(), make)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    seen = (images.float() / 255 - mean) / std
    torch.manual_seed(0)
    for name, net in {
        "suspicious": torchvision.models.resnet18(num_classes=10),
        "vit": timm.create_model("test_vit", num_classes=10, img_size=32, patch_size=4),
        "mynet": make["make"](10),
        "wide": make["make"](10, width=64),
        "headless": torchvision.models.squeezenet1_1(num_classes=10),
    }.items():
        torch.save((net if name == "headless" else knowing(net, seen)).state_dict(), folder / f"{name}.pt")
    torch.save(nn.Sequential(nn.Linear(2, 2)), folder / "whole.pt")
    torch.save({"weight": torch.zeros(2), "run": os.system}, folder / "hostile.pt")
    few = make["make"](3)
    torch.save(few.state_dict(), folder / "few.pt")


def block(text: str, language: str, holding: str) -> str:
    """The one block of a page in `language` that holds a text."""
    (found,) = [content for content in blocks(text, language) if holding in content]
    return found


@pytest.fixture(scope="module")
def world(new_site: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with all files, with the plugins that are shown installed, and what a few commands leave."""
    folder, site = tmp_path_factory.mktemp("world"), new_site()
    with pytest.MonkeyPatch.context() as patch, chdir(folder), ExitStack() as stack:
        stack.callback(patch.undo)
        stack.callback(site.forget, folder)
        patch.setenv("BDCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.syspath_prepend(site.folder)
        patch.setattr("bdcore_plugins.defenses.mcldef.target_search._SHORT", 1)
        patch.setattr("bdcore_plugins.defenses.mcldef.target_search._LONG", 1)
        lay_files(folder)
        assert call("new", "defense", "mine")[0] == 0
        made = tomllib.loads(Path("bdcore-mine/pyproject.toml").read_text())["project"]
        mine = {"bdcore_mine.py": Path("bdcore-mine/bdcore_mine.py").read_text()}
        site.add(made["name"], made["entry-points"]["bdcore"], mine, requires=made["dependencies"])
        pruning = tomllib.loads(block(AUTHORS, "toml", "[project]"))
        assert pruning["tool"]["setuptools"]["py-modules"] == list(
            pruning["project"]["entry-points"]["bdcore"].values()
        )
        for name, code in plugins().items():
            project = pruning["project"] if name == "prune" else {}
            entry = project.get("entry-points", {}).get("bdcore", {name: f"bdcore_{name}"})
            files = {f"{module}.py": code for module in entry.values()}
            site.add(project.get("name", f"shown-{name}"), entry, files, requires=project.get("dependencies", ()))
        site.add("known", {"judge": "bd_judge", "sorter": "bd_sorter"}, {"bd_judge.py": JUDGE, "bd_sorter.py": SORTER})
        for command in (
            ("run", "--plugin", "prune", *quick("run", [])),
            ("run", "--plugin", "prune", "--out", "results/mine", *quick("run", [])),
            ("defend", "--plugin", "judge", "--model", "suspicious.pt", "--arch", "resnet18", "--normalize", "imagenet",
             "--clean", "folder:photos", "--out", "purified.pt", "--device", "cpu"),
        ):  # fmt: skip
            status, _, said = call(*command)
            assert status == 0, said
        yield folder


MODEL = ("--model", "mynet.pt", "--arch", "mynet:make")


def quick(name: str, arguments: list[str]) -> list[str]:
    """What is appended to a command so that it takes a second."""
    text = " ".join(arguments)
    named = {chosen for option, chosen in pairwise(arguments) if option == "--plugin"}
    settings: list[str] = []
    if name == "run":
        settings += ["train.epochs=1"]
        settings += [f"{one}.epochs=1" for one in ("mine", "finetune") if one in named]
    if "mcldef" in named or (name == "scan" and not named):
        settings += [f"mcldef.{one}=1" for one in ("inversion_epochs", "epochs") if f"mcldef.{one}=" not in text]
    if "abl" in named:
        settings += [
            "abl.isolation_rate=0.2",
            *(f"abl.{one}_epochs=1" for one in ("isolation", "finetuning", "unlearning")),
        ]
    if "finetune" in named and name == "defend":
        settings += ["finetune.epochs=1"]
    options = [part for setting in settings for part in ("--set", setting)]
    if name == "run":
        data = [] if "--dataset" in arguments else ["--dataset", "npz:images.npz"]
        return [*options, *data, "--model", "wrn10_1", "--device", "cpu"]
    if name in ("scan", "defend"):
        small = ["--arch", "wrn10_1"] if "abl" in named else []
        return [*options, *small, "--images", "10", "--device", "cpu"]
    return []


@pytest.mark.parametrize("command", shown_commands())
def test_a_command_that_is_shown_works(command: str, world: Path):
    _, name, *arguments = shlex.split(command)
    assert name in COMMANDS
    if name == "new":
        assert arguments[0] in ("defense", "attack", "dataset")
        assert arguments[1:] == ["mine"], "the world was made with it"
        return
    if name == "report":
        arguments = [str(path) for part in arguments for path in (sorted(world.glob(part)) or [world / part])]
        arguments = [path for path in arguments if Path(path, "record.json").exists()] + ["--out", "page.html"]
    if name == "run":
        config = resolve(Host(), **_options(arguments))
        assert config.defenses
        own = {"mine", *plugins()} & {chosen.plugin.name for chosen in (*config.defenses, *config.observers)}
        if not own and "--json" not in arguments and "--config" not in arguments:
            return  # of the first party, and tested at length elsewhere
    given = [word for option, word in pairwise(arguments) if option == "--out"]
    place = f"of-{shown_commands().index(command)}{Path(given[0]).suffix if given and name == 'defend' else ''}"
    where = ["--out", place] if name in ("run", "scan", "defend") and (given or name != "defend") else []
    status, out, said = call(name, *arguments, *quick(name, arguments), *where)
    assert status in ((0, 3) if name == "scan" else (0,)), said
    assert out
    if "--json" in arguments:
        assert json.loads(out)["command"] == name


def _options(arguments: list[str]) -> dict[str, Any]:
    from bdcore.cli.run import command as run

    options = run.make_context("run", list(arguments)).params
    options.pop("as_json")
    return options


def test_only_known_programs_are_called():
    known = {"bdcore", "pip", "pytest", "cd", "test", "ruff", "pyright", "lint-imports", "python"}
    assert {shlex.split(line)[0] for page in PAGES for line in shell_lines(TEXT[page]) if line} <= known
    assert {language for page in PAGES for language, _ in FENCE.findall(TEXT[page])} <= {
        "",
        "text",
        "python",
        "toml",
        "json",
    }
    assert "bdcore run --plugin mcldef" in shown_commands()
    assert sum(one.startswith("bdcore scan") for one in shown_commands()) > 5


def test_set_up_stands_near_the_top():
    assert [content.strip() for content in blocks(README)[:2]] == SET_UP
    assert [line for line in README.splitlines() if line.startswith("pip install")] == SET_UP
    assert all(README.index(command) < README.index("\n## ") for command in SET_UP)
    assert len(blocks(TEXT["CONTRIBUTING.md"])[0].splitlines()) == 3


CODE = [(page, number) for page in PAGES for number in range(len(blocks(TEXT[page], "python")))]


@pytest.mark.parametrize(("page", "number"), CODE)
def test_code_that_is_shown_runs(page: str, number: int, world: Path, capsys: pytest.CaptureFixture[str]):
    code = blocks(TEXT[page], "python")[number]
    if "scan.json" in code:
        status, out, _ = call(
            "scan", "--plugin", "judge", *MODEL, "--clean", "folder:photos", "--json", "--device", "cpu"
        )
        assert status == 3
        Path("scan.json").write_text(out)
    if "clean-report" in code:
        assert isolated()[0] == 0
    names: dict[str, Any] = {}
    exec(compile(code.replace('"mcldef', '"prune').replace("mcldef.", "prune."), page, "exec"), names)
    if "load_state_dict" in code:
        model = names["model"]
        assert not model.training
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    if "test_conformance" in names:
        names["test_conformance"](partial(check_defense, check="outcome"))
    if "record.json" in code:
        assert "prune" in capsys.readouterr().out


def test_the_plugins_that_are_shown_do_what_they_say(world: Path):
    assert set(plugins()) == {"prune", "frame", "parity", "stages"}
    host = Host()
    classes: dict[str, Any] = {name: host.load(name).cls for name in plugins()}
    check_defense(classes["prune"], check="no_prints")
    check_attack(classes["frame"], check="stamp")
    for check in ("form", "classes", "no_overlap", "argument_errors"):
        check_dataset(classes["parity"], check=check)
    out = ["--plugin", "prune", "--plugin", "frame", "--plugin", "stages", "--out", "staged"]
    assert call("run", *out, "--set", "prune.share=0.5", *quick("run", []))[0] == 0
    assert Path("staged/stages.tsv").read_text().splitlines()[0] == "stage\tcached\tseconds"
    assert "\ndefend prune\t" in Path("staged/stages.tsv").read_text()
    (head,) = [value for value in load_file("staged/prune.safetensors").values() if value.ndim == 2]
    assert int((head == 0).all(0).sum()) == head.shape[1] // 2, "half of the features are silenced"


SUSPECT = ("--suspect", "folder:downloaded")
CALIBRATION = {
    "on": "digits",
    "models": 4,
    "clean": 2,
    "auroc": 1.0,
    "brier": 0.1,
    "true_positives": 1.0,
    "false_positives": 0.0,
}


@pytest.fixture(scope="module")
def records(world: Path) -> dict[str, list[dict[str, Any]]]:
    """Real records by command: one that has something in every place, and one in which as much as can be is null."""
    judged = {"judge": {**CALIBRATION, "options": {}, "intercept": -3.0, "slope": 1.0}}
    clean, tiny = ("--clean", "folder:photos", "--device", "cpu"), quick("run", [])
    asked = {
        "run": [("--plugin", "badnets", "--plugin", "judge", "--plugin", "sorter", *tiny),
                ("--no-attack", "--plugin", "judge", "--plugin", "sorter", "--set", "judge.found=false", *tiny)],
        "scan": [("--plugin", "judge", *MODEL, *clean),
                 ("--plugin", "judge", "--set", "judge.found=false", *MODEL, *clean)],
        "defend": [("--plugin", "judge", "--plugin", "sorter", *MODEL, *SUSPECT, *clean),
                   ("--plugin", "judge", "--set", "judge.found=false", *MODEL, "--clean", "folder:unlabelled",
                    "--out", "unlabelled.pt", "--device", "cpu"),
                   ("--plugin", "sorter", "--arch", "wrn10_1", *SUSPECT, "--device", "cpu")],
    }  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bdcore.inspection.calibration._known", lambda: judged)
        for name, several in asked.items():
            for arguments in several:
                status, out, said = call(name, *arguments, "--json")
                assert status in (0, 3), said
                found.setdefault(name, []).append(json.loads(out))
    return found


def documented(command: str) -> dict[str, str]:
    """Keys and their types that docs/record.md lists for records of a command."""
    rows: dict[str, str] = {}
    for part in RECORD.split("\n## ")[1:]:
        heading, _, content = part.partition("\n")
        if heading == "Keys of all three" or (heading.startswith("Keys") and f"`{command}`" in heading):
            rows |= dict(re.findall(r"^\| `([^`]+)` \| ([\w ]+) \|", content, re.MULTILINE))
    return rows


KINDS: dict[str, Callable[[Any], bool]] = {
    "integer": lambda value: type(value) is int,
    "number": lambda value: type(value) in (int, float),
    "fraction": lambda value: type(value) in (int, float) and 0 <= value <= 1,
    "text": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "list": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
}


def parts(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a record with the path of its keys; what stands in `config` in plain lists is one."""
    if path:
        yield path, value
    if isinstance(value, dict) and path != "config":
        for key, one in value.items():
            yield from parts(one, f"{path}.{key}" if path else key)
    if isinstance(value, list):
        for one in value:
            yield from (inner for inner in parts(one, f"{path}[]") if inner[0] != f"{path}[]")


def pattern(key: str) -> str:
    """A documented key as a pattern; words in capitals stand for names."""
    return re.sub(r"\b[A-Z]+\b", r"[^.]+", re.escape(key))


@pytest.mark.parametrize("command", ["run", "scan", "defend"])
def test_the_record_page_lists_what_records_hold(command: str, records: Mapping[str, list[dict[str, Any]]]):
    listed = documented(command)
    seen: dict[str, set[str]] = {key: set() for key in listed}
    for record in records[command]:
        for path, value in parts(record):
            keys = [key for key in listed if re.fullmatch(pattern(key), path)]
            assert keys, f"{path} is in a record of {command} and not on the page"
            kinds = listed[keys[0]].split(" or ")
            assert any(KINDS[kind](value) for kind in kinds), f"{path}: {value!r} is no {listed[keys[0]]}"
            seen[keys[0]].add("null" if value is None else "value")
    assert [key for key, met in seen.items() if not met] == [], "on the page and in no record"
    always = [key for key, met in seen.items() if met == {"null"} and listed[key] != "null"]
    assert always == [], "these are null in all records that were made"


def test_the_record_that_is_shown_is_a_part_of_one(records: Mapping[str, list[dict[str, Any]]]):
    for content in blocks(RECORD, "json"):
        shown = json.loads(content)
        listed = documented(shown["command"])
        for path, value in parts(shown):
            kinds = [kind for key, kind in listed.items() if re.fullmatch(pattern(key), path)]
            assert kinds, path
            assert any(KINDS[kind](value) for kind in kinds[0].split(" or "))


def test_the_page_names_the_files_of_a_folder(records: Mapping[str, list[dict[str, Any]]]):
    table = RECORD.partition("\n## Files of the folder\n")[2]
    named = re.findall(r"`([\w-]+\.(?:safetensors|png))`", table.replace("PLUGIN", "judge").replace("classN", "class3"))
    written = {
        path
        for record in records["run"] + records["scan"] + records["defend"]
        for path in [*(one["path"] for one in record["artifacts"].values()), *record["figures"].values()]
    }
    assert (
        set(named) - {"judge-suspects.safetensors"} | {"sorter-suspects.safetensors", "sorter.safetensors"} == written
    )


def isolated() -> tuple[int, str, str]:
    """The command of the page that hands over a training set."""
    (shown,) = [line for line in shell_lines(OWN) if line.startswith("bdcore defend --plugin abl --arch")]
    arguments = shlex.split(shown)[2:]
    return call("defend", *arguments, *quick("defend", arguments))


def test_suspects_that_are_shown_are_files(world: Path):
    _, out, said = isolated()
    (shown,) = [one for one in blocks(OWN, "text") if one.startswith("abl: ")]
    assert [plain(line) for line in out.splitlines()] == [plain(line) for line in shown.splitlines()], said
    listed = Path("clean-report/abl-suspects.txt").read_text("utf-8").splitlines()
    assert len(listed) == 2
    assert all(Path(file).is_file() and file.startswith("downloaded/") for file in listed)
    kept = load_file("clean-report/abl-suspects.safetensors")
    by_name = sorted(Path("downloaded").glob("*/*.png"), key=lambda file: (file.parent.name, file.name))
    assert [str(by_name[place]) for place in kept["scores"].argsort(descending=True).tolist()[:2]] == listed


def plain(line: str) -> str:
    """A line of output without what differs from model to model."""
    line = re.sub(r"^Looked at \S+|\w+\.pt\b", "NAME", line)
    line = re.sub(r"\S*/\S+", "PATH", re.sub(r" \((confidence \d+%|digit\d)\)", "", line.replace("judge", "mcldef")))
    return re.sub(r"-?\d[\d,]*(\.\d+)?", "#", line)


@pytest.mark.parametrize("command", ["scan", "defend"])
def test_output_that_is_shown_has_the_words_of_the_program(command: str, world: Path):
    out = ["--out", "shown.pt" if command == "defend" else "shown"]
    asked = [
        "--plugin",
        "judge",
        *MODEL,
        "--clean",
        "folder:photos",
        "--normalize",
        "imagenet",
        "--device",
        "cpu",
        *out,
    ]
    real = [plain(line) for line in call(command, *asked)[1].splitlines()]
    first = {"scan": "BACKDOORED", "defend": "Looked at"}[command]
    for text in (README, OWN):
        (shown,) = [one for one in blocks(text, "text") if one.startswith(first)]
        for line in shown.splitlines():
            if "onfidence is" in line:
                continue
            words = plain(line.replace("imagenet, which suits the clean images best", "imagenet, as told"))
            assert words in real


MESSAGES = {
    "a state dict does not say which network it belongs to": (
        "scan",
        "--model",
        "suspicious.pt",
        "--clean",
        "folder:photos",
    ),
    "it holds an object of": ("scan", "--model", "whole.pt", "--arch", "resnet18", "--clean", "folder:photos"),
    "take it for hostile": ("scan", "--model", "hostile.pt", "--arch", "resnet18", "--clean", "folder:photos"),
    "there is no module": ("scan", "--model", "mynet.pt", "--arch", "mynets:make", "--clean", "folder:photos"),
    "it is of another architecture": (
        "scan",
        "--model",
        "suspicious.pt",
        "--arch",
        "wrn10_1",
        "--clean",
        "folder:photos",
    ),
    "unknown model": ("scan", "--model", "suspicious.pt", "--arch", "resnet_18", "--clean", "folder:photos"),
    "say which size to bring them to": ("scan", *MODEL, "--clean", "folder:sizes"),
    "which are parts of a data set and no classes": ("scan", *MODEL, "--clean", "folder:parts"),
    "has a single class folder": ("scan", *MODEL, "--clean", "folder:one"),
    "the model's classes are 0 to": ("scan", *MODEL, "--clean", "folder:many"),
    "of the clean images right. Unless it is that bad": ("scan", "--plugin", "judge", *MODEL, "--clean", "npz:few.npz"),
    "how the model normalises cannot be found out": (
        "scan",
        "--plugin",
        "judge",
        *MODEL,
        "--clean",
        "folder:unlabelled",
    ),
    "classes are too few to tell an outlier": (
        "scan",
        "--model",
        "few.pt",
        "--arch",
        "mynet:make",
        "--clean",
        "npz:few.npz",
    ),
    "there is nothing to purify against": (
        "defend",
        "--plugin",
        "mcldef",
        "--set",
        "mcldef.target=0",
        "--set",
        "mcldef.inversion_epochs=1",
        *MODEL,
        "--clean",
        "folder:photos",
        "--out",
        "never.pt",
    ),
    "is not overwritten": ("defend", "--plugin", "judge", *MODEL, "--clean", "folder:photos", "--out", "mynet.pt"),
    "is the record of a run with other options": (
        "scan",
        "--plugin",
        "judge",
        *MODEL,
        "--clean",
        "folder:photos",
        "--out",
        "results/mine",
    ),
    "judges no model: it trains one on data": ("scan", "--plugin", "abl", *MODEL, "--clean", "folder:photos"),
    "needs the training set that may be poisoned": ("defend", "--plugin", "abl", "--arch", "wrn10_1"),
    "a training set needs labels": (
        "defend",
        "--plugin",
        "sorter",
        "--arch",
        "wrn10_1",
        "--suspect",
        "folder:unlabelled",
        "--out",
        "no.safetensors",
    ),
    "cannot be split into features and a final linear layer": (
        "defend",
        "--plugin",
        "prune",
        "--model",
        "headless.pt",
        "--arch",
        "squeezenet1_1",
        "--clean",
        "folder:photos",
        "--out",
        "split.pt",
    ),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_table_is_what_the_program_says(message: str, world: Path):
    name, *arguments = MESSAGES[message]
    _, _, said = call(name, *arguments, "--device", "cpu")
    assert message in said


def test_the_table_of_messages_is_whole():
    table = OWN.partition("\n## When something is wrong\n")[2]
    assert re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE) == list(MESSAGES)


def test_every_hook_stands_with_its_arguments():
    rows = re.findall(r"^\| `(bdcore_\w+)` \| (.*?) \|", AUTHORS, re.MULTILINE)
    hooks = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("bdcore_")}
    told = {name: list(inspect.signature(hook).parameters) for name, hook in hooks.items()}
    assert {name: re.findall(r"`(\w+)`", arguments) for name, arguments in rows} == {
        name: arguments for name, arguments in told.items() if arguments
    }
    assert all(f"def {name}" in AUTHORS for name, arguments in told.items() if not arguments)


def test_every_check_of_the_kit_has_a_row():
    rows = dict(re.findall(r"^\| `(\w+)` \| ((?:all|defense|attack|data set)[\w, ]*) \|", AUTHORS, re.MULTILINE))
    of = {"defense": DEFENSE_CHECKS, "attack": ATTACK_CHECKS, "data set": DATASET_CHECKS}
    names = sorted({*DEFENSE_CHECKS, *ATTACK_CHECKS, *DATASET_CHECKS})
    expected = {name: [kind for kind, checks in of.items() if name in checks] for name in names}
    assert {name: list(of) if kinds == "all" else kinds.split(", ") for name, kinds in rows.items()} == expected


def test_every_public_name_is_mentioned():
    assert [name for name in bdcore.__all__ if not re.search(rf"\b{name}\b", AUTHORS)] == []


def test_every_first_party_plugin_has_a_row_with_its_kind():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]["bdcore"]
    table = README.partition("\n## Plugins\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", table, re.MULTILINE))
    host = Host()
    assert rows == {name: host.load(name).kind.replace("dataset", "data set") for name in declared}


@pytest.mark.parametrize("document", TEXT)
def test_links_and_files_that_are_named_exist(document: str):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", TEXT[document])) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", target.read_text("utf-8")), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}, link
    named = re.findall(r"`((?:bdcore|plugins|tests|benchmarks|docs|\.ci)/[\w/.]+)`", TEXT[document])
    assert [path for path in named if "NAME" not in path and "mine" not in path and not (ROOT / path).exists()] == []
