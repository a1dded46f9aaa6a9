"""A run killed at any moment, in real processes: it resumes, and ends with the bytes of one that was not killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

if TYPE_CHECKING:
    from conftest import Site

# Writes each finished epoch to the file named by TOLD, and makes epochs long enough to be killed in on any machine.
OBSERVER = """
import os
import time

from bdcore import Observer, hookimpl

class Told(Observer):
    name = "told"

    @hookimpl
    def bdcore_epoch_finished(self, stage, progress):
        with open(os.environ["TOLD"], "a") as file:
            file.write(f"{stage},{progress.epoch}\\n")
        time.sleep(0.1)

@hookimpl
def bdcore_observer():
    return Told
"""
EPOCHS = {"train": 12, "defend finetune": 12}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real handwritten digits, 8 x 8: 600 to train, 300 to test."""
    images, labels = load_digits(return_X_y=True)
    grey = (images.reshape(-1, 1, 8, 8) * 15).astype(np.uint8)
    file = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(file, x_train=grey[:600], y_train=labels[:600], x_test=grey[600:900], y_test=labels[600:900])
    return file


class Runs:
    """One run's options, and processes that do it."""

    def __init__(self, site: "Site", digits: Path, folder: Path) -> None:
        site.add("bd-told", {"told": "bd_told"}, {"bd_told.py": OBSERVER})
        self.folder = folder
        self.path = str(site.folder)
        self.arguments = [
            str(Path(sys.executable).with_name("bdcore")), "run", "--plugin", "finetune", "--plugin", "told",
            "--dataset", f"npz:{digits}", "--model", "wrn10_1", "--device", "cpu", "--precision", "fp32",
            "--set", "train.crop=1", "--set", f"train.epochs={EPOCHS['train']}",
            "--set", f"finetune.epochs={EPOCHS['defend finetune']}",
        ]  # fmt: skip

    def start(self, name: str) -> "subprocess.Popen[str]":
        """Begin the run with cache, output and log in folders of this name."""
        environment = os.environ | {
            "BDCORE_CACHE": str(self.folder / name / "cache"),
            "TOLD": str(self.folder / name / "told"),
            "PYTHONPATH": self.path,
            "OMP_NUM_THREADS": "1",
        }
        (self.folder / name).mkdir(exist_ok=True)
        arguments = [*self.arguments, "--out", str(self.folder / name / "out")]
        return subprocess.Popen(
            arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def finish(self, name: str, process: "subprocess.Popen[str]") -> dict[str, Any]:
        """Wait for the run's end; its record."""
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        return json.loads((self.folder / name / "out" / "record.json").read_text())

    def kill(self, name: str, stage: str) -> None:
        """Begin the run and kill it without warning once `stage` has left a checkpoint."""
        process = self.start(name)
        work = self.folder / name / "cache" / "work"
        deadline = time.monotonic() + 60
        while not list(work.glob(f"{stage.replace(' ', '-')}-*/*.safetensors")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL

    def told(self, name: str) -> list[tuple[str, int]]:
        """Finished epochs of all processes, in order."""
        lines = (self.folder / name / "told").read_text().splitlines()
        return [(line.split(",")[0], int(line.split(",")[1])) for line in lines]


def test_killed_in_training_and_in_the_defense(site: "Site", digits: Path, tmp_path: Path):
    runs = Runs(site, digits, tmp_path)
    uninterrupted = runs.start("straight")
    counts: list[int] = []
    for stage in EPOCHS:
        runs.kill("killed", stage)
        counts.append(len(runs.told("killed")))
    assert not (tmp_path / "killed" / "out" / "record.json").exists()
    resumed = runs.finish("killed", runs.start("killed"))
    straight = runs.finish("straight", uninterrupted)

    assert resumed["artifacts"] == straight["artifacts"]
    assert resumed["curves"] == straight["curves"]
    assert {stage: len(epochs) for stage, epochs in straight["curves"].items()} == EPOCHS
    for ours, theirs in zip(
        [resumed["victim"], *resumed["defenses"]], [straight["victim"], *straight["defenses"]], strict=True
    ):
        for name in set(ours) - {"seconds", "peak_memory_bytes"}:  # images through the network among them
            assert ours[name] == theirs[name], name
    assert straight["defenses"][0]["images"] == 30 * 10 * EPOCHS["defend finetune"]

    told = runs.told("killed")
    for count, (stage, epochs) in zip(counts, EPOCHS.items(), strict=True):
        assert told[count][0] == stage
        assert 1 < told[count][1] < epochs, "it went on from a checkpoint"
    assert not list((tmp_path / "killed" / "cache" / "work").glob("*/*")), "checkpoints are removed"
