"""Attacks in whole runs: what is refused before any training, and what an attack costs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_observer import Observer
from sklearn.datasets import load_digits

from bdcore import DataError
from bdcore.config import resolve
from bdcore.errors import UsageError
from bdcore.pipeline import run
from bdcore.plugins import Host

SAMPLES = 200


@pytest.fixture
def scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a folder for data."""
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def go(
    folder: Path, attack: str | None, *settings: str, observer: Observer | None = None, without: int | None = None
) -> dict[str, Any]:
    """A quick run on digits of 8 x 8 pixels, perhaps without test images of one class."""
    images, labels = load_digits(return_X_y=True)
    grey, parts = (images.reshape(-1, 1, 8, 8) * 15).astype(np.uint8), (slice(SAMPLES), slice(SAMPLES, 300))
    kept = labels[parts[1]] != without
    np.savez(
        folder / "digits.npz", x_train=grey[parts[0]], y_train=labels[parts[0]], x_test=grey[parts[1]][kept],
        y_test=labels[parts[1]][kept],
    )  # fmt: skip
    host = Host()
    host.observe(observer or Observer())
    config = resolve(
        host, plugins=[attack] if attack else [], no_attack=attack is None, dataset=f"npz:{folder / 'digits.npz'}",
        model="wrn10_1", device="cpu", precision="fp32", settings=["train.epochs=2", *settings], out=folder / "out",
    )  # fmt: skip
    return run(config, host)


@pytest.mark.parametrize(
    ("attack", "settings", "says"),
    [
        ("trojan", ["attack.target=10"], "trojan wants class 10, but npz:digits has the classes 0 to 9"),
        ("latent", ["attack.poison_rate=1"], "latent can poison only"),
        ("feature_collision", ["attack.class_rate=0.001"], r"attack\.class_rate=0\.001 .* is not even one"),
        ("badnets", ["run.victim=fine_tuned", "attack.target=10"], "badnets wants class 10"),
    ],
)
def test_impossible_wishes_are_refused_before_any_training(scans: Path, attack: str, settings: list[str], says: str):
    observer = Observer()
    with pytest.raises(UsageError, match=says):
        go(scans, attack, *settings, observer=observer)
    assert [stage for stage, _ in observer.stages] == ["data"]
    assert observer.epochs == []


def test_classes_without_test_images_are_refused_before_any_training(scans: Path):
    observer = Observer()
    with pytest.raises(DataError, match="no image of class 2 to mix"):
        go(scans, "composite", observer=observer, without=2)
    assert observer.epochs == []


class TestCost:
    def test_of_a_surrogate_and_of_forwards_that_make_poisons(self, scans: Path):
        settings = ("attack.poison_rate=0.05", "attack.steps=3")
        record = go(scans, "feature_collision", *settings)
        count = record["poison"]["count"]
        assert count == 10
        # The surrogate's two epochs; of each poison its aim, its base, and the base after each of 3 steps.
        assert record["attack"]["images"] == 2 * SAMPLES + 5 * count
        assert record["victim"]["images"] == 2 * SAMPLES
        assert record["attack"]["seconds"] > 0
        assert record["attack"]["peak_memory_bytes"] > 50e6
        assert go(scans, "feature_collision", *settings)["attack"] == record["attack"], "the cache answers the same"

    def test_of_an_attack_that_asks_no_network(self, scans: Path):
        assert go(scans, "badnets")["attack"]["images"] == 0

    def test_of_a_victim_that_is_fine_tuned(self, scans: Path):
        settings = ("run.victim=fine_tuned", "run.fine_tuning_epochs=3")
        record = go(scans, "badnets", *settings)
        assert record["victim"]["images"] == 3 * SAMPLES
        assert record["attack"]["images"] == 5 * SAMPLES

    def test_without_attack_there_is_none(self, scans: Path):
        assert go(scans, None)["attack"] is None
