"""Trackers against real local stores: an event file read by TensorBoard, an SQLite store read by MLflow's client."""

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bdcore.cli import main
from bdcore.config import resolve
from bdcore.context import Progress
from bdcore.errors import UsageError
from bdcore.pipeline import run
from bdcore.plugins import Host
from bdcore_plugins.trackers import kept

# MLflow asks SQLAlchemy for what that calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

LIBRARIES = {"tensorboard": ["tensorboard"], "mlflow": ["mlflow", "sqlalchemy", "alembic"]}
TRACKERS = [name for name, libraries in LIBRARIES.items() if all(find_spec(library) for library in libraries)]
tensorboard = pytest.mark.skipif("tensorboard" not in TRACKERS, reason="needs the extra bdcore[tensorboard]")
mlflow = pytest.mark.skipif("mlflow" not in TRACKERS, reason="needs the extra bdcore[mlflow]")

Tracked = tuple[dict[str, Any], Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the runs below keep everything: the working folder, with a cache of its own."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("BDCORE_CACHE", str(folder / "cache"))
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder


def track(out: Path, experiment: str, *settings: str) -> dict[str, Any]:
    host = Host()
    quick = ["train.epochs=2", "finetune.epochs=1", *settings]
    if "mlflow" in TRACKERS:
        quick.append(f"mlflow.experiment={experiment}")
    config = resolve(
        host, plugins=["finetune", *TRACKERS], model="wrn10_1", device="cpu", settings=quick, out=out, seed=1
    )
    return run(config, host)


@pytest.fixture(scope="module")
def tracked(place: Path) -> Tracked:
    """A run that trains, heard epoch by epoch."""
    return track(place / "run", "heard"), place / "run"


@pytest.fixture(scope="module")
def repeated(tracked: Tracked, place: Path) -> Tracked:
    """The same run again, whose stages the cache answers for; its event file takes the earlier one's place."""
    return track(place / "run", "cached"), place / "run"


@pytest.fixture(scope="module")
def failed(place: Path) -> Path:
    """A run that fails after it has begun: digits have no class 99."""
    with pytest.raises(UsageError, match="99"):
        track(place / "failed", "failed", "attack.target=99")
    return place / "failed"


def points(record: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """The loss of both phases of the runs, by the name that trackers give it."""
    curves = record["curves"]
    train = [(one["epoch"], one["figures"]["loss"]) for one in curves["train"]]
    defend = [(one["epoch"], one["figures"]["loss"]) for one in curves["defend finetune"]]
    assert [epoch for epoch, _ in train] == [1, 2]
    assert [epoch for epoch, _ in defend] == [1]
    return {"train/loss": train, "defend-finetune/finetune/loss": defend}


@tensorboard
class TestTensorBoard:
    def events(self, folder: Path) -> Any:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        assert len(list((folder / "tensorboard").iterdir())) == 1, "one event file a run, also of a repeated one"
        return EventAccumulator(str(folder / "tensorboard")).Reload()

    def session(self, events: Any) -> tuple[dict[str, Any], str]:
        """Hyperparameters, and how the run ended."""
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        content = events.PluginTagToContent("hparams")
        start = plugin_data_pb2.HParamsPluginData.FromString(content[metadata.SESSION_START_INFO_TAG])
        end = plugin_data_pb2.HParamsPluginData.FromString(content[metadata.SESSION_END_INFO_TAG])
        values = {
            name: getattr(value, value.WhichOneof("kind")) for name, value in start.session_start_info.hparams.items()
        }
        return values, api_pb2.Status.Name(end.session_end_info.status)

    @pytest.mark.parametrize("run", ["tracked", "repeated"])
    def test_curves_have_a_point_an_epoch(self, run: str, request: pytest.FixtureRequest):
        record, folder = request.getfixturevalue(run)
        events = self.events(folder)
        for name, curve in points(record).items():
            assert [(point.step, pytest.approx(point.value, rel=1e-5)) for point in events.Scalars(name)] == curve

    def test_final_figures_and_cost_of_victim_and_defense(self, tracked: Tracked):
        record, folder = tracked
        events = self.events(folder)
        (defense,) = record["defenses"]
        for part, of in (("victim", record["victim"]), ("finetune", defense)):
            for figure in ("clean_accuracy", "asr", "seconds", "peak_memory_bytes"):
                (point,) = events.Scalars(f"{part}/{figure}")
                assert (point.step, point.value) == (0, pytest.approx(of[figure], rel=1e-6))

    def test_hyperparameters_and_success(self, tracked: Tracked):
        _, folder = tracked
        values, status = self.session(self.events(folder))
        assert status == "STATUS_SUCCESS"
        assert (values["train.epochs"], values["run.seed"], values["attack.target"]) == (2, 1, 0)
        assert (values["dataset.name"], values["run.model"], values["finetune.lr"]) == ("digits", "wrn10_1", 0.01)
        assert json.loads(values["plugins"]) == ["badnets", "finetune"]

    def test_pictures_and_record(self, tracked: Tracked):
        from io import BytesIO

        record, folder = tracked
        events = self.events(folder)
        assert set(events.Tags()["images"]) == set(record["figures"]) == {"attack"}
        shown = Image.open(BytesIO(events.Images("attack")[0].encoded_image_string))
        assert np.array_equal(np.asarray(shown), np.asarray(Image.open(folder / "attack.png").convert("RGB")))
        (text,) = events.Tensors("record/text_summary")
        said = text.tensor_proto.string_val[0].decode().removeprefix("```json\n").removesuffix("\n```")
        assert json.loads(said) == {name: value for name, value in record.items() if name != "curves"}

    def test_a_failed_run_ends_as_one(self, failed: Path):
        events = self.events(failed)
        values, status = self.session(events)
        assert (values["attack.target"], status) == (99, "STATUS_FAILURE")
        (text,) = events.Tensors("failure/text_summary")
        assert "99" in text.tensor_proto.string_val[0].decode()
        assert not (failed / "record.json").exists()

    def test_a_folder_for_the_events_of_many_runs(self, tracked: Tracked, place: Path):
        record, _ = tracked
        track(place / "again", "elsewhere", "tensorboard.folder=all events")
        assert [folder.name for folder in (place / "all events").iterdir()] == [record["run"]["id"]]
        assert not (place / "again" / "tensorboard").exists()

    def test_a_folder_that_is_a_file_is_told_before_any_work(self, tmp_path: Path, place: Path):
        (tmp_path / "taken").touch()
        with pytest.raises(UsageError, match=r"taken.*--set tensorboard\.folder=DIR"):
            track(tmp_path / "out", "taken", f"tensorboard.folder={tmp_path / 'taken'}")
        assert not (tmp_path / "out").exists()


@mlflow
class TestMLflow:
    def find(self, place: Path, experiment: str) -> tuple[Any, Any]:
        """A client of the store that MLflow chooses where nothing is said, and the one run of an experiment."""
        from mlflow import MlflowClient

        assert (place / "mlflow.db").is_file()
        client = MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
        (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
        return client, run

    @pytest.mark.parametrize(("run", "experiment"), [("tracked", "heard"), ("repeated", "cached")])
    def test_curves_have_a_point_an_epoch(self, run: str, experiment: str, place: Path, request: pytest.FixtureRequest):
        record, _ = request.getfixturevalue(run)
        client, kept = self.find(place, experiment)
        for name, curve in points(record).items():
            history = client.get_metric_history(kept.info.run_id, name)
            assert sorted((point.step, pytest.approx(point.value, rel=1e-5)) for point in history) == curve

    def test_final_figures_options_and_status(self, tracked: Tracked, place: Path):
        record, _ = tracked
        _, kept = self.find(place, "heard")
        assert (kept.info.status, kept.info.run_name) == ("FINISHED", record["run"]["id"])
        (defense,) = record["defenses"]
        for part, of in (("victim", record["victim"]), ("finetune", defense)):
            for figure in ("clean_accuracy", "asr", "seconds", "peak_memory_bytes"):
                assert kept.data.metrics[f"{part}/{figure}"] == of[figure]
        options = {"train.epochs": "2", "attack.target": "0", "dataset.name": "digits", "finetune.flip": "False"}
        assert options.items() <= kept.data.params.items()
        assert json.loads(kept.data.params["plugins"]) == ["badnets", "finetune"]

    def test_pictures_and_record(self, tracked: Tracked, place: Path, tmp_path: Path):
        record, folder = tracked
        client, kept = self.find(place, "heard")
        files = {file.path for file in client.list_artifacts(kept.info.run_id)}
        assert files == {"record.json", *record["figures"].values()}
        for file in files:
            there = Path(client.download_artifacts(kept.info.run_id, file, str(tmp_path)))
            assert there.read_bytes() == (folder / file).read_bytes()

    def test_a_failed_run_ends_as_one(self, failed: Path, place: Path):
        _, kept = self.find(place, "failed")
        assert kept.info.status == "FAILED"
        assert "99" in kept.data.tags["bdcore.error"]

    def test_an_interrupted_run_was_killed(self, place: Path):
        from bdcore_plugins.trackers.mlflow import MLflow

        tracker = MLflow(MLflow.Config(experiment="interrupted"))
        tracker.bdcore_run_started({"run": {"seed": 1}}, "a-run", place)
        tracker.bdcore_run_failed(KeyboardInterrupt())
        assert self.find(place, "interrupted")[1].info.status == "KILLED"

    def test_more_options_than_a_request_takes_and_longer_ones(self, place: Path):
        from bdcore_plugins.trackers.mlflow import MLflow

        tracker = MLflow(MLflow.Config(experiment="many"))
        config = {"section": {f"option{number}": number for number in range(250)}, "long": "x" * 10_000}
        tracker.bdcore_run_started(config, "a-run", place)
        params = self.find(place, "many")[1].data.params
        assert {params[f"section.option{number}"] for number in range(250)} == {str(number) for number in range(250)}
        assert set(params["long"]) == {"x"}

    def test_a_store_that_is_none_is_told_before_any_work(self, tmp_path: Path, place: Path):
        with pytest.raises(UsageError, match=r"--set mlflow\.uri=URI"):
            track(tmp_path / "out", "nowhere", "mlflow.uri=nowhere://here")
        assert not (tmp_path / "out" / "record.json").exists()


def test_the_figures_of_an_inspection():
    scan = {
        "model": {"path": "net.pt", "arch": {"classes": 10}, "clean_accuracy": 0.9},
        "verdict": {"backdoored": True, "target": 3, "class_name": "cat", "confidence": 0.97, "evidence": [1.0, 9.0]},
        "triggers": [{"target": 3, "asr": 1.0}],
    }
    assert kept.figures(scan) == {
        "model/clean_accuracy": 0.9,
        "verdict/backdoored": 1.0,
        "verdict/target": 3.0,
        "verdict/confidence": 0.97,
    }
    unlabelled = {"model": {"clean_accuracy": None}, "defenses": [{"name": "mine", "agreement": 0.8, "verdict": None}]}
    assert kept.figures(unlabelled) == {"mine/agreement": 0.8}


def test_points_are_kept_once_heard_or_not():
    curves = kept.Curves()
    first = Progress("purify: 1", 1, 2, {"loss": 0.5, "other loss": 0.25}, 1.0, 1.0)
    names = ("defend-mine/purify--1/loss", "defend-mine/purify--1/other-loss")
    assert list(curves.heard("defend mine", first)) == [(names[0], 0.5, 1), (names[1], 0.25, 1)]
    epochs = [
        {"phase": "purify: 1", "epoch": 1, "epochs": 2, "figures": {"loss": 0.5, "other loss": 0.25}},
        {"phase": "purify: 1", "epoch": 2, "epochs": 2, "figures": {"loss": 0.125, "other loss": None}},
    ]
    assert list(curves.unheard({"curves": {"defend mine": epochs}})) == [(names[0], 0.125, 2)]


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
def test_a_missing_library_is_told_with_the_command_that_installs_it(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(tracker, tracker), None)
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as caught:
        main(["run", "--plugin", "finetune", "--plugin", tracker, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: plugin '{tracker}' needs a library that is missing")
    assert said.endswith(f"pip install 'bdcore[{tracker}]'.")
    assert not (tmp_path / "out").exists()
