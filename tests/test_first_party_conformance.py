"""Every plugin of ours passes the conformance kit, in its shortest form."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from bdcore.plugins import Host
from bdcore.testing import ATTACK_CHECKS, DATASET_CHECKS, DEFENSE_CHECKS, check_attack, check_dataset, check_defense

DEFENSES: dict[str, dict[str, Any]] = {
    "finetune": {"epochs": 2},
    "mcldef": {"inversion_epochs": 5, "epochs": 2, "target": 0},
    "mesa": {"steps": 4, "search_steps": 4, "epochs": 2, "min_steps": 2, "hidden": 16, "batch_size": 16, "target": 0},
    "abl": {"isolation_epochs": 2, "finetuning_epochs": 2, "unlearning_epochs": 1, "isolation_rate": 0.02},
}
"""Short forms. The target is told: a search for it takes a run for each class, and this short finds none."""
SEARCHING: dict[str, dict[str, Any]] = {
    "mcldef": {"inversion_epochs": 1},
    "mesa": {"steps": 4, "search_steps": 4, "epochs": 2, "min_steps": 2, "hidden": 16, "batch_size": 16},
}
"""For the check `inspect`."""

THREAT_MODEL = {"inputs_unchanged", "undeclared_inputs", "no_files"}
"""Checks that none of ours may refuse."""

# A clean-label attack can poison the samples of one class alone: of 400 images in ten classes at most 40.
FEW = {"poison_rate": 0.04}
ATTACKS: dict[str, dict[str, Any]] = {
    "badnets": {},
    "blended": {},
    "sig": FEW,
    "label_consistent": {**FEW, "steps": 2, "training_epochs": 2, "training_steps": 1},
    "feature_collision": {**FEW, "steps": 2},
    "trojan": {"epochs": 2},
    "latent": {"epochs": 2},
    "dfst": {"style_epochs": 2, "rounds": 1, "detox_epochs": 1},
    "dynamic": {"mask_epochs": 2},
    "wanet": {},
    "composite": {},
}
VARYING = {"composite"}
"""Attacks whose trigger is drawn for each image."""

DATASETS = ("digits", "npz", "folder")
"""All but CIFAR-10, whose files are not to be had everywhere; tests/test_datasets.py has it on made ones."""

LARGE = {"colour_32x32", "colour_40x24"}
DEAR = {"dfst", "dynamic", "feature_collision", "label_consistent"}
"""Attacks that take long on larger images."""


def cases(plugins: Iterable[str], checks: Iterable[str]) -> list[Any]:
    return [
        pytest.param(
            name, check, id=f"{name}-{check}", marks=[pytest.mark.slow] if name in DEAR and check in LARGE else []
        )
        for name in plugins
        for check in checks
    ]


def settle(results: dict[str, str], check: str) -> None:
    verdict, _, remark = results[check].partition(": ")
    if verdict == "skipped":
        pytest.skip(remark)
    assert verdict == "passed"


def cls(name: str) -> Any:
    return Host().load(name).cls


def test_none_of_ours_is_left_out():
    host = Host()
    ours = [host.load(name) for name, found in host.find().items() if found.distribution == "bdcore"]
    kinds = {kind: {one.name for one in ours if one.kind == kind} for kind in ("defense", "attack", "dataset")}
    assert kinds == {"defense": set(DEFENSES), "attack": set(ATTACKS), "dataset": {*DATASETS, "cifar10"}}


@pytest.mark.parametrize(("name", "check"), cases(DEFENSES, DEFENSE_CHECKS))
def test_defense(name: str, check: str):
    settings = SEARCHING.get(name, DEFENSES[name]) if check == "inspect" else DEFENSES[name]
    results = check_defense(cls(name), settings, check=check)
    if check in THREAT_MODEL:
        assert results == {check: "passed"}
    settle(results, check)


@pytest.mark.parametrize(("name", "check"), cases(ATTACKS, ATTACK_CHECKS))
def test_attack(name: str, check: str):
    settle(check_attack(cls(name), ATTACKS[name], check=check, trigger_varies=name in VARYING), check)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What stands behind the colon: real digits as a file and as folders of pictures, no image twice."""
    folder = tmp_path_factory.mktemp("data")
    scans, labels = load_digits(return_X_y=True)
    _, first = np.unique(scans, axis=0, return_index=True)
    first = np.sort(first)[:120]
    grey, labels = (scans[first].reshape(-1, 1, 8, 8) * 15).astype(np.uint8), labels[first]
    np.savez(folder / "digits.npz", x_train=grey[:90], y_train=labels[:90], x_test=grey[90:], y_test=labels[90:])
    for number, (image, label) in enumerate(zip(grey, labels, strict=True)):
        place = folder / "digits" / ("train" if number < 90 else "test") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(place / f"{number}.png")
    return {"digits": None, "npz": str(folder / "digits.npz"), "folder": str(folder / "digits")}


@pytest.mark.parametrize(("name", "check"), cases(DATASETS, DATASET_CHECKS))
def test_dataset(
    name: str, check: str, arguments: dict[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path))
    # Some of the scans that scikit-learn carries are there twice.
    overlap = 0.03 if name == "digits" else 0
    settle(check_dataset(cls(name), check=check, argument=arguments[name], overlap=overlap), check)
