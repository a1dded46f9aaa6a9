"""The stages in order: what is computed, what the cache answers, what a run leaves behind."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from run_observer import Observer
from sklearn.datasets import load_digits

from bdcore.analysis.page import render
from bdcore.analysis.runs import read_run
from bdcore.cli import main
from bdcore.config import resolve
from bdcore.errors import BdcoreError, PluginError, StoreError, UsageError
from bdcore.pipeline import run
from bdcore.plugins import Host
from bdcore.store import sha256_file

if TYPE_CHECKING:
    from conftest import Site

QUICK = ("train.epochs=2", "finetune.epochs=1", "finetune.min_steps=1")
FEATURES = ["evaluate features", "evaluate features"]  # the victim's and the purified model's
STAGES = ["data", "poison", "train", "evaluate", "defend finetune", "evaluate", *FEATURES]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real handwritten digits, 8 x 8: 600 to train, 300 to test."""
    images, labels = load_digits(return_X_y=True)
    grey = (images.reshape(-1, 1, 8, 8) * 15).astype(np.uint8)
    file = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(file, x_train=grey[:600], y_train=labels[:600], x_test=grey[600:900], y_test=labels[600:900])
    return file


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> tuple[Path, dict[str, Any]]:
    """A cache in which one run was made, and that run's record."""
    cache = tmp_path_factory.mktemp("warm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDCORE_CACHE", str(cache))
        record, observer = go(digits, cache / "out")
    assert observer.computed == STAGES
    assert observer.epochs == ["train"] * 2 + ["defend finetune"]
    assert observer.ends == ["started", "finished"]
    return cache, record


@pytest.fixture
def cache(warm: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that cache, in use."""
    copied = tmp_path / "cache"
    shutil.copytree(warm[0], copied)
    monkeypatch.setenv("BDCORE_CACHE", str(copied))
    return copied


def go(
    data: Path, out: Path, plugins: Sequence[str] = ("finetune",), settings: Sequence[str] = (), **options: Any
) -> tuple[dict[str, Any], Observer]:
    """One quick run in this process."""
    host, observer = Host(), Observer()
    host.observe(observer)
    named = {text.partition("=")[0] for text in settings}
    kept = [text for text in QUICK if text.partition("=")[0] not in named]
    kept = [text for text in kept if not text.startswith("finetune") or "finetune" in plugins]
    config = resolve(
        host, plugins=plugins, dataset=f"npz:{data}", model="wrn10_1", device="cpu", precision="fp32",
        settings=[*kept, *settings], out=out, **options,
    )  # fmt: skip
    return run(config, host), observer


def command(data: Path, out: Path, plugin: str, capfd: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    """The same with the command line; exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        main([
            "run", "--plugin", plugin, "--dataset", f"npz:{data}", "--model", "wrn10_1", "--device", "cpu",
            "--precision", "fp32", "--out", str(out), "--set", "train.epochs=2",
            *(["--set", "finetune.epochs=1", "--set", "finetune.min_steps=1"] if plugin == "finetune" else []),
        ])  # fmt: skip
    said = capfd.readouterr()
    return ended.value.code, said.out, said.err


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what a clock or the machine's memory decides."""
    loose = ("seconds", "peak_memory_bytes")
    rows = [record["victim"], *record["defenses"]]
    return record | {"rows": [{k: v for k, v in row.items() if k not in loose} for row in rows]} | {
        "victim": None, "defenses": None,
    }  # fmt: skip


class TestRecord:
    def test_schema(self, warm: tuple[Path, dict[str, Any]], digits: Path):
        folder, record = warm[0] / "out", warm[1]
        assert json.loads((folder / "record.json").read_text()) == record == json.loads(json.dumps(record))
        assert set(record) == {
            "schema", "command", "run", "config", "seed", "plugins", "dataset", "poison", "attack", "victim",
            "defenses", "curves", "warnings", "versions", "device", "artifacts", "figures",
        }  # fmt: skip
        assert record["poison"]["count"] == 60
        assert record["poison"]["rate"] == 0.1
        names = [(plugin["name"], plugin["kind"], plugin["oracle"]) for plugin in record["plugins"]]
        assert names == [("npz", "dataset", []), ("badnets", "attack", []), ("finetune", "defense", [])]
        assert all({"distribution", "version"} < set(plugin) for plugin in record["plugins"])
        dataset = record["dataset"]
        assert (dataset["train"], dataset["test"], dataset["classes"]) == (600, 300, 10)
        assert len(dataset["fingerprint"]) == 64
        assert {"clean_accuracy", "asr", "ra"} <= set(record["victim"])
        (defense,) = record["defenses"]
        assert {
            "name", "clean_accuracy", "asr", "ra", "der", "target_class_accuracy", "verdict", "isolation", "seconds",
            "peak_memory_bytes", "images",
        } <= set(defense)  # fmt: skip
        for row in (record["victim"], defense):
            for name in ("clean_accuracy", "asr", "ra", "target_class_accuracy"):
                assert 0 <= row[name] <= 1
        assert 0 <= defense["der"] <= 1
        assert record["seed"] == 0
        assert set(record["artifacts"]) == {"victim", "finetune", "poison", "features"}
        assert record["figures"] == {"attack": "attack.png"}
        with Image.open(folder / "attack.png") as sheet:
            assert sheet.width > 8 * 90
        for artifact in record["artifacts"].values():
            assert sha256_file(folder / artifact["path"]) == artifact["sha256"]

    def test_cost_counts_every_image(self, warm: tuple[Path, dict[str, Any]]):
        record = warm[1]
        assert record["victim"]["images"] == 2 * 600
        assert record["defenses"][0]["images"] == 30, "one pass over 5% of 600"
        assert record["defenses"][0]["peak_memory_bytes"] > 50e6
        assert 0 < record["defenses"][0]["seconds"] < 60

    def test_der_follows_from_the_figures(self, warm: tuple[Path, dict[str, Any]]):
        victim, defense = warm[1]["victim"], warm[1]["defenses"][0]
        fall = max(0, victim["asr"] - defense["asr"])
        loss = max(0, victim["clean_accuracy"] - defense["clean_accuracy"])
        assert defense["der"] == pytest.approx((fall - loss + 1) / 2)

    @pytest.mark.usefixtures("cache")
    def test_an_attack_on_nothing_trains_the_clean_victim(self, digits: Path, tmp_path: Path):
        poisoned, _ = go(digits, tmp_path / "none", plugins=["badnets"], settings=["attack.poison_rate=0"])
        clean, observer = go(digits, tmp_path / "clean", no_attack=True)
        assert "train" not in observer.computed
        assert poisoned["artifacts"]["victim"]["sha256"] == clean["artifacts"]["victim"]["sha256"]
        assert poisoned["victim"]["asr"] < 0.5

    def test_without_attack_only_harm_is_measured(self, cache: Path, digits: Path, tmp_path: Path):
        record, observer = go(digits, tmp_path / "out", no_attack=True)
        assert [stage for stage, _ in observer.stages] == [stage for stage in STAGES if stage != "poison"]
        (defense,) = record["defenses"]
        for row in (record["victim"], defense):
            assert row["asr"] is row["ra"] is row["target_class_accuracy"] is None
            assert 0 < row["clean_accuracy"] <= 1
        assert defense["der"] is None
        assert record["poison"] is None
        assert [plugin["kind"] for plugin in record["plugins"]] == ["dataset", "defense"]


class TestCache:
    @pytest.mark.usefixtures("cache")
    def test_a_second_run_computes_nothing(self, warm: tuple[Path, dict[str, Any]], digits: Path, tmp_path: Path):
        record, observer = go(digits, tmp_path / "out")
        assert observer.stages == [(stage, stage != "data") for stage in STAGES]
        assert record == warm[1]

    @pytest.mark.usefixtures("cache")
    @pytest.mark.parametrize(
        ("settings", "computed"),
        [
            (["finetune.lr=0.02"], ["defend finetune", "evaluate", "evaluate features"]),
            (["train.lr=0.05"], ["train", "evaluate", "defend finetune", "evaluate", *FEATURES]),
            (["attack.target=1"], ["poison", "train", "evaluate", "defend finetune", "evaluate", *FEATURES]),
            (["run.clean_fraction=0.1"], ["defend finetune", "evaluate", "evaluate features"]),
            (["run.seed=1"], ["poison", "train", "evaluate", "defend finetune", "evaluate", *FEATURES]),
        ],
    )
    def test_what_changes_decides_what_is_computed(
        self, digits: Path, tmp_path: Path, settings: list[str], computed: list[str]
    ):
        _, observer = go(digits, tmp_path / "out", settings=settings)
        assert observer.computed == ["data", *computed]

    @pytest.mark.usefixtures("cache")
    def test_an_attack_alone_shares_its_victim(self, warm: tuple[Path, dict[str, Any]], digits: Path, tmp_path: Path):
        record, observer = go(digits, tmp_path / "out", plugins=["badnets"])
        assert observer.computed == ["data"]
        assert record["defenses"] == []
        assert record["artifacts"]["victim"]["sha256"] == warm[1]["artifacts"]["victim"]["sha256"]

    @pytest.mark.usefixtures("cache")
    def test_a_fine_tuned_victim_is_made_of_one_clean_classifier(self, digits: Path, tmp_path: Path):
        settings = ["run.victim=fine_tuned", "run.fine_tuning_epochs=3"]
        record, observer = go(digits, tmp_path / "slow", plugins=["badnets"], settings=settings)
        assert observer.computed[:3] == ["data", "surrogate", "poison"]
        assert observer.epochs == ["surrogate"] * 2 + ["poison"] * 3
        settings.append("run.fine_tuning_lr=0.05")
        faster, observer = go(digits, tmp_path / "fast", plugins=["badnets"], settings=settings)
        assert observer.computed[:2] == ["data", "poison"]
        assert faster["victim"]["asr"] > record["victim"]["asr"]

    @pytest.mark.usefixtures("cache")
    def test_the_content_of_a_picture_counts(self, digits: Path, tmp_path: Path):
        picture = tmp_path / "trigger.png"
        settings = [f"attack.picture={json.dumps(str(picture))}"]
        computed: list[list[str]] = []
        for level in (40, 40, 250):
            Image.fromarray(np.full((8, 8), level, np.uint8)).save(picture)
            _, observer = go(digits, tmp_path / "out", plugins=["blended"], settings=settings)
            computed.append(observer.computed)
        made = ["poison", "train", "evaluate", "evaluate features"]
        assert computed == [["data", *made], ["data"], ["data", *made]]

    @pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
    def test_a_damaged_result_is_said_and_rebuilt_the_same(
        self, warm: tuple[Path, dict[str, Any]], cache: Path, digits: Path, tmp_path: Path, damage: str
    ):
        (model,) = cache.glob("stages/train/*/model.safetensors")
        content = model.read_bytes()
        if damage == "truncated":
            model.write_bytes(content[:-100])
        elif damage == "altered":
            model.write_bytes(content[:-100] + bytes([content[-100] ^ 4]) + content[-99:])
        else:
            model.unlink()
        record, observer = go(digits, tmp_path / "out")
        assert observer.computed == ["data", "train"]
        (said,) = observer.warnings
        assert "train/" in said
        assert "rebuilt" in said
        assert model.read_bytes() == content
        assert figures(record) == figures(warm[1])

    def test_damage_is_said_on_stderr(
        self, cache: Path, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ):
        (model,) = cache.glob("stages/defend-finetune/*/model.safetensors")
        model.write_bytes(model.read_bytes()[:1000])
        status, _, stderr = command(digits, tmp_path / "out", "finetune", capfd)
        assert status == 0
        (said,) = [line for line in stderr.splitlines() if "rebuilt" in line]
        assert "defend-finetune/" in said
        assert "altered or truncated" in said


class TestRunFolder:
    @pytest.mark.usefixtures("cache")
    def test_of_another_run_is_refused_before_any_work(self, digits: Path, tmp_path: Path):
        go(digits, tmp_path / "out")
        before = (tmp_path / "out" / "record.json").read_bytes()
        with pytest.raises(UsageError, match=r"record\.json is the record of a run with other options.*--out"):
            go(digits, tmp_path / "out", settings=["train.lr=0.03"])
        assert (tmp_path / "out" / "record.json").read_bytes() == before

    @pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "\udcff"])
    def test_a_foreign_record_is_refused(
        self, digits: Path, tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "empty"))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "record.json").write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(UsageError, match=r"record\.json is .*--out"):
            go(digits, tmp_path / "out")
        assert not (tmp_path / "empty").exists(), "no work was done"

    @pytest.mark.parametrize("place", ["out", "out/below"])
    def test_a_file_in_its_place_is_one_clear_error(
        self, digits: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "empty"))
        (tmp_path / "out").write_text("a file")
        with pytest.raises(StoreError, match=r"the run folder .*out.* cannot be used: .*--out"):
            go(digits, tmp_path / place)
        assert not (tmp_path / "empty").exists(), "no work was done"


class TestFailures:
    SOURCE = """
import sys
from bdcore import Defense, Outcome, hookimpl

class Broken(Defense):
    name = "broken"

    def __init__(self, config):
        super().__init__(config)
        {init}

    def oracles(self):
        {oracles}
        return ()

    def __call__(self, given, context):
        {call}
        return Outcome()

@hookimpl
def bdcore_defense():
    return Broken
"""

    def broken(self, site: "Site", *, init: str = "pass", oracles: str = "pass", call: str = "pass") -> None:
        source = self.SOURCE.format(init=init, oracles=oracles, call=call)
        site.add("bd-broken", {"broken": "bd_broken"}, {"bd_broken.py": source}, version="2.5")

    @pytest.mark.usefixtures("cache")
    @pytest.mark.parametrize("part", ["init", "oracles", "call"])
    @pytest.mark.parametrize("error", ["raise KeyError('mistake')", "sys.exit(0)"])
    def test_a_plugin_that_fails_is_named(self, site: "Site", digits: Path, tmp_path: Path, part: str, error: str):
        self.broken(site, **{part: error})
        line = (site.folder / "bd_broken.py").read_text().splitlines().index(f"        {error}") + 1
        said = rf"defense 'broken' of bd-broken 2\.5 failed: .*bd_broken\.py:{line} in"
        with pytest.raises(BdcoreError, match=said) as failure:
            go(digits, tmp_path / "out", plugins=["broken"])
        assert failure.value.exit_code == 1
        assert not (tmp_path / "out" / "record.json").exists()

    @pytest.mark.usefixtures("cache")
    def test_what_a_plugin_warned_of_is_kept_and_said_again(self, site: "Site", digits: Path, tmp_path: Path):
        self.broken(site, call="context.warn('half of it is guessed.')")
        for name, cached in (("first", False), ("second", True)):
            record, observer = go(digits, tmp_path / name, plugins=["broken"])
            assert ("defend broken", cached) in observer.stages
            assert "defend broken: half of it is guessed." in observer.warnings
            assert record["warnings"]["defend broken"] == ["half of it is guessed."]
        assert "half of it is guessed." in render([read_run(tmp_path / "second")]).html

    @pytest.mark.usefixtures("cache")
    def test_on_the_command_line(self, site: "Site", digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
        self.broken(site, call="raise KeyError('mistake')")
        status, stdout, stderr = command(digits, tmp_path / "out", "broken", capfd)
        assert status == 1
        assert stdout == ""
        assert "Traceback" not in stderr
        (said,) = [line for line in stderr.splitlines() if line.startswith("error:")]
        for part in ("broken", "bd-broken 2.5", "KeyError", "bd_broken.py:"):
            assert part in said

    @pytest.mark.usefixtures("cache")
    @pytest.mark.parametrize("notes", ["{'x': float('nan')}", "{'x': context.generator('x')}"])
    def test_notes_that_no_record_can_hold(self, site: "Site", digits: Path, tmp_path: Path, notes: str):
        self.broken(site, call=f"return Outcome(notes={notes})")
        with pytest.raises(BdcoreError, match="'broken' returned a verdict or notes that a record cannot hold"):
            go(digits, tmp_path / "out", plugins=["broken"])

    @pytest.mark.parametrize("name", ["victim", "record"])
    def test_a_plugin_cannot_have_the_name_of_a_file_of_the_run(self, site: "Site", name: str):
        site.add("bd-broken", {name: "bd_broken"}, {"bd_broken.py": self.SOURCE.replace("broken", name)})
        with pytest.raises(PluginError, match=f"'{name}' cannot be the name of a plugin"):
            Host().load(name)

    @pytest.mark.usefixtures("cache")
    def test_observers_learn_of_it(self, site: "Site", digits: Path, tmp_path: Path):
        self.broken(site, call="raise KeyError('mistake')")
        host, observer = Host(), Observer()
        host.observe(observer)
        config = resolve(host, plugins=["broken"], dataset=f"npz:{digits}", model="wrn10_1", device="cpu",
                         precision="fp32", settings=["train.epochs=2"], out=tmp_path / "out")  # fmt: skip
        with pytest.raises(BdcoreError):
            run(config, host)
        assert observer.ends == ["started", "failed"]
        assert "defend broken" not in dict(observer.stages)
