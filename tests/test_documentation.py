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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
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
README, AUTHORS, OWN, RECORD = (TEXT[p] for p in (PAGES[0], *(f"docs/{p}.md" for p in ("plugin-authors", "own-model", "record"))))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

SET_UP = ["pip install . && bdcore run --plugin mcldef", "pip install '.[test]' && pytest -n auto"]

# What two defenses of people's own say and return is known beforehand, so that records hold something in every place.
JUDGE = """
import copy
import torch
from bdcore import Defense, Outcome, PluginConfig, Trigger, Verdict, hookimpl
from pydantic import Field

class Judge(Defense):
    name = "judge"

    class Config(PluginConfig):
        found: bool = Field(True, description="whether there is a backdoor")

    def inspect(self, given, context):
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
    lines += [inline for inline in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)) if inline.startswith("bdcore ")]
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
        solved = torch.linalg.lstsq(rows, 10 * torch.eye(10)[torch.arange(len(images)) % 10], driver="gelsd").solution
        layer.weight.copy_(solved[:-1].T)
        layer.bias.copy_(solved[-1])
    return net


def lay_files(folder: Path) -> None:
    """Everything that the commands name, small."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=generator)
    for number, image in enumerate(images):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        for place in (f"photos/{number % 10}", "unlabelled", f"downloaded/{number % 10}", f"parts/test/{number % 10}"):
            (folder / place).mkdir(parents=True, exist_ok=True)
            picture.save(folder / place / f"{number}.png")
        (folder / "one" / "thing").mkdir(parents=True, exist_ok=True)
        (folder / "sizes").mkdir(exist_ok=True)
        picture.save(folder / "one" / "thing" / f"{number}.png")
        picture.resize((32 + number, 32)).save(folder / "sizes" / f"{number}.png")
        (folder / "many" / str(number)).mkdir(parents=True)
        picture.save(folder / "many" / str(number) / "a.png")
    (folder / "parts" / "train").mkdir()
    shutil.copytree(folder / "parts" / "test", folder / "parts" / "train", dirs_exist_ok=True)
    labels = np.arange(20) % 10
    np.savez(folder / "clean.npz", x=images.numpy(), y=labels)
    np.savez(folder / "few.npz", x=images.numpy(), y=labels % 3)
    train = {"x_train": images.repeat(3, 1, 1, 1).numpy(), "y_train": np.tile(labels, 3)}
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
        assert pruning["tool"]["setuptools"]["py-modules"] == list(pruning["project"]["entry-points"]["bdcore"].values())
        for name, code in plugins().items():
            project = pruning["project"] if name == "prune" else {}
            entry = project.get("entry-points", {}).get("bdcore", {name: f"bdcore_{name}"})
            files = {f"{module}.py": code for module in entry.values()}
            site.add(project.get("name", f"shown-{name}"), entry, files, requires=project.get("dependencies", ()))
        site.add("known", {"judge": "bd_judge", "sorter": "bd_sorter"}, {"bd_judge.py": JUDGE, "bd_sorter.py": SORTER})
        for command in (
            ("run", "--plugin", "prune", "--out", "results/mine", *quick("run", [])),
            ("defend", "--plugin", "judge", *MODEL, "--clean", "folder:photos", "--out", "purified.pt", "--device", "cpu"),
        ):
            status, _, said = call(*command)
            assert status == 0, said
        yield folder


MODEL = ("--model", "suspicious.pt", "--arch", "resnet18")


def quick(name: str, arguments: list[str]) -> list[str]:
    """What is appended to a command so that it takes a second."""
    text = " ".join(arguments)
    named = {chosen for option, chosen in zip(arguments, arguments[1:], strict=False) if option == "--plugin"}
    settings: list[str] = []
    if name == "run":
        settings += ["train.epochs=1"]
        settings += [f"{one}.epochs=1" for one in ("mine", "finetune") if one in named]
    if "mcldef" in named or (name == "scan" and not named):
        settings += [f"mcldef.{one}=1" for one in ("inversion_epochs", "epochs") if f"mcldef.{one}=" not in text]
    if "abl" in named:
        settings += ["abl.isolation_rate=0.2", *(f"abl.{one}_epochs=1" for one in ("tuning", "finetuning", "unlearning"))]
    if "finetune" in named and name == "defend":
        settings += ["finetune.epochs=1"]
    options = [part for setting in settings for part in ("--set", setting)]
    if name == "run":
        data = [] if "--dataset" in arguments else ["--dataset", "npz:images.npz"]
        return [*options, *data, "--model", "wrn10_1", "--device", "cpu"]
    if name in ("scan", "defend"):
        return [*options, "--images", "10", "--device", "cpu"]
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
        assert resolve(Host(), **_options(arguments)).defenses or "--plugin" not in arguments
    where = ["--out", f"out/{abs(hash(command))}"] if name in ("run", "scan") else []
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
    assert {language for page in PAGES for language, _ in FENCE.findall(TEXT[page])} <= {"", "text", "python", "toml", "json"}
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
        status, out, _ = call("scan", "--plugin", "judge", *MODEL, "--clean", "folder:photos", "--json", "--device", "cpu")
        assert status == 3
        Path("scan.json").write_text(out)
    names: dict[str, Any] = {}
    exec(compile(code.replace('"mcldef', '"prune').replace("mcldef.", "prune."), page, "exec"), names)
    if "load_file" in code or "torchvision.models" in code:
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
    from safetensors.torch import load_file

    head = load_file("staged/prune.safetensors")["net.fc.weight" if False else _head("staged/prune.safetensors")]
    assert int((head == 0).all(0).sum()) == head.shape[1] // 2, "half of the features are silenced"


def _head(path: str) -> str:
    from safetensors.torch import load_file

    return [name for name, value in load_file(path).items() if value.ndim == 2][-1]
