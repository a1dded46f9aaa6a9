"""`bdcore scan` and `bdcore defend` on models and images of one's own, by the command line."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bdcore.artifacts import Architecture, Labelled
from bdcore.cli import main
from bdcore.context import Context
from bdcore.errors import StoreError, UsageError
from bdcore.inspection.normalisation import NAMED, likeliest, normalise, parse
from bdcore.models import Classifier, build

# A defense that says what its options tell it to, and negates the last layer, which turns every answer around.
JUDGE = """
import copy
import torch
from pydantic import Field
from bdcore import Defense, Outcome, PluginConfig, Suspects, Trigger, Verdict, hookimpl

class Judge(Defense):
    name = "judge"
    needs = frozenset({"model", "clean"})

    class Config(PluginConfig):
        target: int | None = Field(None, description="what is found")
        evidence: bool = Field(True, description="whether there is any")

    def inspect(self, given, context):
        found = self.config.target is not None
        evidence = tuple(9.0 * (one == self.config.target) for one in range(given.classes))
        evidence = evidence if self.config.evidence else ()
        verdict = Verdict(found, self.config.target, evidence)
        shape = given.clean.images.shape[1:]
        triggers = (Trigger(self.config.target, delta=torch.full(shape, 0.25)),) if found else ()
        return Outcome(verdict=verdict, triggers=triggers, notes={"labels": int(given.clean.labels.sum())})

    def __call__(self, given, context):
        model = copy.deepcopy(given.model)
        head = [part for part in model.modules() if isinstance(part, torch.nn.Linear)][-1]
        head.weight.data.neg_()
        found = self.inspect(given, context)
        return Outcome(model, found.verdict, found.triggers, found.notes)

@hookimpl
def bdcore_defense():
    return Judge
"""

# Isolates the first samples and trains nothing: a defense of the training set, which needs no model.
SORTER = """
import torch
from bdcore import Defense, Outcome, Suspects, build, hookimpl

class Sorter(Defense):
    name = "sorter"
    needs = frozenset({"suspect", "arch"})

    def __call__(self, given, context):
        assert given.model is None and given.clean is None
        model = build(given.arch, 3).eval()
        return Outcome(model, suspects=Suspects(torch.arange(4)))

@hookimpl
def bdcore_defense():
    return Sorter
"""

# Holds the darkest images to be poisoned, and lists them by their places.
DARK = """
import torch
from bdcore import Defense, Outcome, Suspects, hookimpl

class Dark(Defense):
    name = "dark"
    needs = frozenset({"suspect", "arch"})

    def __call__(self, given, context):
        scores = -given.suspect.images.float().mean((1, 2, 3))
        return Outcome(suspects=Suspects(scores.argsort(descending=True)[:5].sort().values, scores))

@hookimpl
def bdcore_defense():
    return Dark
"""

NETWORKS = """
from torch import nn

def tiny(num_classes):
    pooled = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*pooled, nn.Linear(4, num_classes))
"""


@pytest.fixture
def asked(
    site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """Run a command line in this process: (exit code, stdout, stderr)."""
    site.add("bd-judge", {"judge": "bd_judge"}, {"bd_judge.py": JUDGE})
    site.add("bd-sorter", {"sorter": "bd_sorter"}, {"bd_sorter.py": SORTER})
    site.add("bd-dark", {"dark": "bd_dark"}, {"bd_dark.py": DARK})
    (site.folder / "networks_of_mine.py").write_text(NETWORKS)
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def ask(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([*arguments, *([] if "--device" in arguments else ["--device", "cpu", "--precision", "fp32"])])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(end.value.code or 0), said.out, said.err

    return ask


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images(tmp_path: Path) -> Tensor:
    """Images of four classes by their colour, in folders named after these, uint8 [40, 3, 12, 12] in reading order."""
    made = torch.randint(0, 60, (40, 3, 12, 12), dtype=torch.uint8, generator=seeded(0))
    for number, name in enumerate(("blue", "green", "grey", "red")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for place in range(10):
            image = made[10 * number + place]
            image[{"red": [0], "green": [1], "blue": [2], "grey": [0, 1, 2]}[name]] += 180
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{place}.png")
    return made


def network(classes: int = 4) -> nn.Sequential:
    """Tells the four colours apart by the means of the channels, exactly, whatever was trained."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )  # fmt: skip
    with torch.no_grad():
        conv, head = net[0], net[-1]
        conv.weight.zero_()
        conv.bias.zero_()
        head.weight.zero_()
        head.bias.zero_()
        for out, channel in enumerate((2, 1, None, 0)):  # blue, green, grey, red
            for one in range(3):
                conv.weight[out, one, 1, 1] = 1 / 3 if channel is None else (1.0 if one == channel else -1.0)
            head.weight[out, out] = 1.0
        head.weight[2, :2] = head.weight[2, 3] = -1.0
    return net


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint as training scripts leave them."""
    path = tmp_path / "net.pt"
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": v for name, v in network().state_dict().items()}}, path)
    return path


MINE = ("--arch", "networks_of_mine:tiny")


@pytest.mark.usefixtures("images")
class TestScan:
    def test_a_backdoor_ends_with_three(self, asked: Callable[..., Any], model: Path):
        status, out, _ = asked(
            "scan", "--plugin", "judge", "--set", "judge.target=3", "--model", str(model), *MINE,
            "--clean", "folder:photos", "--out", "found",
        )  # fmt: skip
        assert status == 3
        assert out.startswith(f"BACKDOORED, towards class 3 (red): {model}")
        assert "40 images of 4 classes, of which the model gets 100.0% right" in out
        assert "No confidence is given" in out
        record = json.loads(Path("found/record.json").read_text())
        assert record["verdict"]["target"] == 3
        assert record["verdict"]["class_name"] == "red"
        assert record["triggers"][0]["size"] == 0.25 * 12 * 12
        assert {path.name for path in Path("found").glob("judge-class3*.png")} == set(record["figures"].values())

    def test_no_backdoor_ends_with_zero(self, asked: Callable[..., Any], model: Path):
        status, out, _ = asked("scan", "--plugin", "judge", "--model", str(model), *MINE, "--clean", "folder:photos")
        assert status == 0
        assert out.startswith(f"no backdoor found: {model}")

    def test_json_is_all_on_stdout(self, asked: Callable[..., Any], model: Path):
        status, out, _ = asked(
            "scan", "--plugin", "judge", "--model", str(model), *MINE, "--clean", "folder:photos", "--json"
        )
        assert status == 0
        record = json.loads(out)
        assert record["command"] == "scan"
        assert record["model"]["classes"] == ["blue", "green", "grey", "red"]
        assert record["model"]["clean_accuracy"] == 1

    def test_without_evidence_there_is_no_answer(self, asked: Callable[..., Any], model: Path):
        status, out, err = asked(
            "scan", "--plugin", "judge", "--set", "judge.evidence=false", "--model", str(model), *MINE,
            "--clean", "folder:photos",
        )  # fmt: skip
        assert (status, out) == (1, "")
        assert "judge cannot judge this model" in err

    def test_a_plugin_that_judges_no_model_is_told_where_it_belongs(self, asked: Callable[..., Any], model: Path):
        asks = ["--model", str(model), *MINE, "--clean", "folder:photos"]
        status, out, err = asked("scan", "--plugin", "sorter", *asks)
        assert (status, out) == (2, "")
        instead = "bdcore defend --plugin sorter --arch NAME --suspect DATA"
        assert f"plugin 'sorter' judges no model: it trains one on data. Instead: {instead}" in err
        assert "give --suspect" not in err

    def test_images_without_classes(self, asked: Callable[..., Any], model: Path):
        flat = Path("flat")
        flat.mkdir()
        for number, path in enumerate(sorted(Path("photos").rglob("*.png"))):
            path.rename(flat / f"{number}.png")
        status, out, err = asked(
            "scan", "--plugin", "judge", "--model", str(model), *MINE, "--clean", "folder:flat", "--json"
        )
        assert status == 0, err
        record = json.loads(out)
        assert record["clean"]["labelled"] is False
        assert record["model"]["clean_accuracy"] is None
        assert record["notes"]["labels"] == 10 * (0 + 1 + 2 + 3), "the model's own answers"
        assert "--normalize" in err

    def test_doubt_about_what_was_told(self, asked: Callable[..., Any], model: Path):
        Path("photos/blue").rename("photos/zinc")  # now all classes have another number than the model's
        status, _, err = asked("scan", "--plugin", "judge", "--model", str(model), *MINE, "--clean", "folder:photos")
        assert status == 0
        assert "warning: data: the model gets 0.0% of the clean images right" in err

    def test_a_model_that_a_run_wrote_says_what_it_is(self, asked: Callable[..., Any]):
        arch = Architecture("wrn10_1", 4, (3, 12, 12), (0.5,) * 3, (0.25,) * 3)
        save_file(build(arch, 0).state_dict(), "victim.safetensors")
        sha256 = hashlib.sha256(Path("victim.safetensors").read_bytes()).hexdigest()
        manifest = {"format": "safetensors", "arch": asdict(arch), "path": "victim.safetensors", "sha256": sha256}
        Path("victim.json").write_text(json.dumps(manifest))
        status, out, _ = asked(
            "scan", "--plugin", "judge", "--model", "victim.safetensors", "--clean", "folder:photos", "--json"
        )
        assert status == 0
        assert json.loads(out)["model"]["arch"]["mean"] == [0.5] * 3
        status, _, err = asked(
            "scan",
            "--plugin",
            "judge",
            "--model",
            "victim.safetensors",
            "--arch",
            "resnet18",
            "--clean",
            "folder:photos",
        )
        assert status == 2
        assert "victim.safetensors does not fit" in err
        status, _, _ = asked("defend", "--plugin", "judge", "--model", "victim.safetensors", "--clean", "folder:photos")
        assert status == 0
        again = ("scan", "--plugin", "judge", "--model", "victim-purified.safetensors", "--clean", "folder:photos")
        assert asked(*again)[0] == 0, "what was written can be looked at in turn"


def negated(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: -value if name == "4.weight" else value for name, value in state.items()}


@pytest.mark.usefixtures("images")
class TestDefend:
    def test_the_model_comes_back_in_its_form(self, asked: Callable[..., Any], model: Path):
        before = model.read_bytes()
        arguments = ("defend", "--plugin", "judge", "--model", str(model), *MINE, "--clean", "folder:photos")
        status, out, _ = asked(*arguments, "--out", "pure.pt")
        assert status == 0
        assert "judge: wrote pure.pt" in out
        assert model.read_bytes() == before
        written = torch.load("pure.pt", weights_only=True)
        expected = {f"module.{name}": value for name, value in negated(network().state_dict()).items()}
        assert written["state_dict"].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(written["state_dict"][name], value), name
        record = json.loads(Path("pure-report/record.json").read_text())
        (row,) = record["defenses"]
        assert row["clean_accuracy"] == row["agreement"] == 0, "all answers are turned around"
        assert row["isolation"] is None
        assert asked(*arguments, "--out", "pure.pt")[0] == 0, "the same again is no overwriting"

    def test_what_ended_between_model_and_record_can_be_repeated(
        self, asked: Callable[..., Any], model: Path, monkeypatch: pytest.MonkeyPatch
    ):
        def full(*_: object) -> None:
            raise StoreError("no space left")

        arguments = ("defend", "--plugin", "judge", "--model", str(model), *MINE, "--clean", "folder:photos")
        with monkeypatch.context() as patch:
            patch.setattr("bdcore.inspection.work.write_run_folder", full)
            assert asked(*arguments, "--out", "pure.pt")[0] == 1
        assert not Path("pure.pt").exists()
        assert asked(*arguments, "--out", "pure.pt")[0] == 0
        assert torch.load("pure.pt", weights_only=True)
        assert not [*Path().glob("*.part")]

    def test_safetensors_stay_safetensors(self, asked: Callable[..., Any]):
        save_file(network().state_dict(), "net.safetensors")
        arguments = ("--model", "net.safetensors", *MINE, "--clean", "folder:photos")
        status, _, _ = asked("defend", "--plugin", "judge", *arguments)
        assert status == 0
        for name, value in load_file("net-purified.safetensors").items():
            assert torch.equal(value, negated(network().state_dict())[name]), name

    def test_a_trigger_is_tried_before_and_after(self, asked: Callable[..., Any], model: Path):
        status, out, _ = asked(
            "defend", "--plugin", "judge", "--set", "judge.target=3", "--model", str(model), *MINE,
            "--clean", "folder:photos", "--json",
        )  # fmt: skip
        assert status == 0
        (row,) = json.loads(out)["defenses"]
        (trigger,) = row["triggers"]
        assert trigger["asr"] == 0, "brighter images keep their colour"
        assert trigger["class_name"] == "red"
        assert 0 <= trigger["asr_after"] <= 1

    @pytest.mark.parametrize("names", [("blue", "green", "grey", "red"), ("10", "2", "9", "0")])
    def test_suspects_are_listed_by_their_files_the_most_suspicious_first(
        self, names: tuple[str, ...], asked: Callable[..., Any], images: Tensor
    ):
        for old, new in zip(("blue", "green", "grey", "red"), names, strict=True):
            Path("photos", old).rename(Path("photos", new))
        (Path("photos") / names[0] / "below").mkdir()
        (Path("photos") / names[0] / "7.png").rename(Path("photos") / names[0] / "below" / "0.png")
        asks = ["defend", "--plugin", "dark", "--arch", "wrn10_1", "--suspect", "folder:photos"]
        status, _, said = asked(*asks, "--out", "new.safetensors")
        assert status == 0, said
        listed = Path("new-report/dark-suspects.txt").read_text().splitlines()
        brightness = {path: float(np.asarray(Image.open(path)).mean()) for path in Path().glob("photos/**/*.png")}
        assert [Path(path) for path in listed] == sorted(brightness, key=lambda path: brightness[path])[:5]

    def test_suspects_that_are_no_files_are_named_by_their_places(self, asked: Callable[..., Any], images: Tensor):
        np.savez("set.npz", x=images.numpy(), y=np.arange(40) // 10)
        asks = ["defend", "--plugin", "dark", "--arch", "wrn10_1", "--suspect", "npz:set.npz"]
        status, out, said = asked(*asks, "--out", "new.safetensors")
        assert status == 0, said
        assert "look at these first: new-report/dark-suspects.safetensors\n" in out
        assert not Path("new-report/dark-suspects.txt").exists()
        darkest = images.float().mean((1, 2, 3)).argsort()[:5]
        assert set(load_file("new-report/dark-suspects.safetensors")["index"].tolist()) == set(darkest.tolist())

    def test_several_defenses_each_get_the_model_as_it_was(self, asked: Callable[..., Any], model: Path):
        status, _, _ = asked(
            "defend", "--plugin", "judge", "--plugin", "finetune", "--set", "finetune.epochs=1", "--model", str(model),
            *MINE, "--clean", "folder:photos", "--out", "pure.pt",
        )  # fmt: skip
        assert status == 0
        assert Path("pure-judge.pt").exists()
        tuned = torch.load("pure-finetune.pt", weights_only=True)["state_dict"]["module.4.weight"]
        assert float(tuned[0, 0]) > 0, "not what judge had turned around"

    def test_training_data_without_a_model(self, asked: Callable[..., Any]):
        status, out, _ = asked(
            "defend",
            "--plugin",
            "sorter",
            "--arch",
            "wrn10_1",
            "--suspect",
            "folder:photos",
            "--out",
            "new.safetensors",
        )
        assert status == 0
        said = "sorter: set aside 4 of 40 training images as the most suspicious, of clean data perhaps as many; "
        assert f"{said}look at these first: new-report/sorter-suspects.txt\n" in out
        arch = Architecture(**json.loads(Path("new.json").read_text())["arch"])
        assert (arch.classes, tuple(arch.shape)) == (4, (3, 12, 12))
        model = build(arch, 0)
        model.load_state_dict(load_file("new.safetensors"))
        for ours, theirs in zip(model.state_dict().values(), build(arch, 3).state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)

    def test_the_form_of_a_model_that_is_trained_here(self, asked: Callable[..., Any], images: Tensor):
        asks = ["--plugin", "sorter", "--arch", "wrn10_1", "--suspect", "folder:photos", "--out", "new.pt"]
        status, _, err = asked("defend", *asks)
        assert status == 2
        assert "--out new.pt: what is written is safetensors; name it *.safetensors." in err

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--clean", "folder:photos"], "needs a model: give --model FILE"),
            (["--model", "net.pt", "--arch", "wrn10_1"], "needs clean images: give --clean DATA"),
            (["--model", "net.pt", "--clean", "folder:photos"], "does not say which network it belongs to"),
            (["--model", "none.pt", *MINE, "--clean", "folder:photos"], "there is no file none.pt"),
            (["--model", "net.pt", "--arch", "resnet81", "--clean", "folder:photos"], "resnet18"),
            (["--model", "net.pt", *MINE, "--clean", "folder:photos", "--out", "pure.safetensors"], "name it *.pt"),
            (["--model", "net.pt", *MINE, "--clean", "folder:photos", "--out", "no/pure.pt"], "there is no folder no"),
            (["--model", "net.pt", *MINE, "--clean", "folder:photos", "--out", "net.pt"], "exists already"),
            (["--model", "net.pt", *MINE, "--clean", "folder:photos", "--size", "0"], "--size 0: must be"),
            (["--model", "net.pt", *MINE, "--clean", "folder:photos", "--normalize", "imagnet"], "imagenet"),
            (["--model", "net.pt", *MINE, "--clean", "folder:absent"], "folder absent: name the one that holds the"),
            (["--model", "net.pt", *MINE, "--clean", "npz:no.npz"], "no file no.npz: name a .npz file, which numpy"),
            (["--model", "net.pt", *MINE, "--clean", "folder:absent", "--normalize", "imagnet"], "unknown normalis"),
            (["--model", "notes.txt", *MINE, "--clean", "folder:photos"], "name the file with the model's weights"),
            (["--model", "net.pt", *MINE, "--clean", "folder:photos", "--plugin", "badnets"], "is of kind attack"),
        ],
    )
    def test_wrong_use_is_one_line_and_leaves_nothing(
        self, arguments: list[str], says: str, asked: Callable[..., Any], model: Path
    ):
        Path("notes.txt").write_text("no weights")
        there = sorted(Path().rglob("*"))
        status, out, err = asked("defend", "--plugin", "judge", *arguments)
        assert (status, out) == (2, "")
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert says in line
        assert sorted(path for path in Path().rglob("*") if "cache" not in path.parts) == there
        assert model.exists()

    def test_labels_beyond_the_models_classes(self, asked: Callable[..., Any], model: Path):
        Path("photos/red").rename("photos/red1")
        Path("photos/zinc").mkdir()
        Image.new("RGB", (12, 12)).save("photos/zinc/0.png")
        status, _, err = asked("defend", "--plugin", "judge", "--model", str(model), *MINE, "--clean", "folder:photos")
        assert status == 2
        assert "class 4 (zinc), the model's classes are 0 to 3" in err

    def test_the_images_do_not_fit_the_network(self, asked: Callable[..., Any]):
        torch.save(torchvision.models.vit_b_16(num_classes=4, image_size=32).state_dict(), "vit.pt")
        status, _, err = asked(
            "defend", "--plugin", "judge", "--model", "vit.pt", "--arch", "vit_b_16", "--clean", "folder:photos",
            "--size", "48",
        )  # fmt: skip
        assert status == 2
        assert "pos_embedding" in err


def test_the_number_of_classes_comes_from_the_checkpoint(asked: Callable[..., Any], images: Tensor):
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), "seven.pt")
    status, out, _ = asked(
        "scan", "--plugin", "judge", "--model", "seven.pt", "--arch", "resnet18", "--clean", "folder:photos", "--json"
    )
    assert status == 0
    record = json.loads(out)
    assert record["model"]["arch"]["classes"] == 7
    assert record["model"]["classes"] == [], "four names are not those of seven classes"


class TestNormalisation:
    def test_parse(self):
        assert parse("imagenet", 3)[0] == (0.485, 0.456, 0.406)
        assert parse("half", 1) == ((0.5,), (0.5,))
        assert parse("0.5/0.25", 3) == ((0.5,) * 3, (0.25,) * 3)
        assert parse("0.1,0.2,0.3/1,2,3", 3) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))

    @pytest.mark.parametrize("text", ["imagnet", "0.5", "a/b", "1,2/1", "0.5/0", "nan/1", "0.5/inf", "imagenet/1", "/"])
    def test_refused(self, text: str):
        with pytest.raises(UsageError):
            parse(text, 3)

    def test_three_means_do_not_suit_grey_images(self):
        with pytest.raises(UsageError, match="3 means and 3 spreads for images of 1 channels"):
            parse("imagenet", 1)

    def test_it_is_inside_the_classifier(self):
        arch = Architecture("x", 2, (3, 4, 4), (0.0,) * 3, (1.0,) * 3)
        model = Classifier(nn.Identity(), arch.shape, arch.mean, arch.std)
        images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=seeded(1))
        mean, std = NAMED["cifar10"]
        told = normalise(model, arch, mean, std)
        expected = torchvision.transforms.Normalize(mean, std)(images.float() / 255)
        torch.testing.assert_close(model(images), expected)
        assert (told.mean, told.std) == (mean, std)

    @pytest.mark.parametrize("name", NAMED)
    def test_the_one_that_was_trained_with_is_found(self, name: str):
        # A network whose answer is how bright an image is, in ten steps of the values that it was trained on.
        mean, std = parse(name, 3)

        class Steps(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                pixels = x * torch.tensor(std).view(1, 3, 1, 1) + torch.tensor(mean).view(1, 3, 1, 1)
                return -(pixels.mean((1, 2, 3))[:, None] * 40 - torch.arange(40.0)).abs()

        images = torch.arange(0, 250, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
        labels = (images[:, 0, 0, 0].float() / 255 * 40).round().long()
        arch = Architecture("steps", 40, (3, 4, 4), (0.0,) * 3, (1.0,) * 3)
        model = Classifier(Steps(), arch.shape, arch.mean, arch.std).eval()
        told, found = likeliest(model, arch, Labelled(images, labels), Context())
        assert found == name
        assert told.mean == mean
