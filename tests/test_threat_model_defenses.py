"""Every defense of ours under the threat model: what it did not declare changes nothing, and it opens no file of the
run."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from bdcore import Outcome, build
from bdcore.artifacts import Dataset, Labelled, Victim
from bdcore.config import resolve
from bdcore.context import Context
from bdcore.contract import Attack, Defense
from bdcore.pipeline import run
from bdcore.plugins import Host
from bdcore.stages.data import architecture, clean_set
from bdcore.stages.defend import defend
from bdcore.stages.poison import poison
from bdcore.stages.train import train
from bdcore.training import Recipe

SETTINGS: dict[str, dict[str, Any]] = {
    "finetune": {"epochs": 1},
    "mcldef": {"inversion_epochs": 2, "epochs": 1, "target": 7},
    "mesa": {"steps": 4, "search_steps": 4, "epochs": 1, "min_steps": 2, "hidden": 16, "batch_size": 16, "target": 7},
    "abl": {"isolation_epochs": 1, "finetuning_epochs": 1, "unlearning_epochs": 1, "isolation_rate": 0.02},
}
"""Short forms of every defense. The target is told where a search would end before the rest has run."""


def ours() -> dict[str, type[Defense]]:
    host = Host()
    loaded = [host.load(name) for name, found in host.find().items() if found.distribution == "bdcore"]
    return {plugin.name: cast(type[Defense], plugin.cls) for plugin in loaded if plugin.kind == "defense"}


@dataclass(frozen=True)
class World:
    """All that a defense could be handed."""

    victim: Victim
    clean: Labelled
    suspect: Labelled


def world(seed: int, poison_rate: float) -> World:
    images, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy((images.reshape(-1, 1, 8, 8) * 15).astype(np.uint8))
    order = torch.randperm(len(grey), generator=torch.Generator().manual_seed(seed))
    data = Labelled(grey[order], torch.from_numpy(labels)[order])
    dataset = Dataset("digits", data.select(torch.arange(600)), data.select(torch.arange(600, 900)), 10)
    badnets = cast(type[Attack], Host().load("badnets").cls)
    attack = badnets(badnets.Config(target=seed % 10, poison_rate=poison_rate))
    poisoned = poison(dataset, attack, Context(seed=seed))
    arch = architecture("wrn10_1", poisoned.train, 10)
    victim = train(poisoned.train, arch, Recipe(epochs=6, batch_size=64, lr=0.1), Context(seed=seed))
    return World(victim, clean_set(dataset, 0.2, Context(seed=seed)), poisoned.train)


@pytest.fixture(scope="module")
def worlds() -> tuple[World, World]:
    return world(seed=7, poison_rate=0.2), world(seed=8, poison_rate=0.1)


def tensors(outcome: Outcome) -> dict[str, Tensor]:
    found = dict(outcome.model.state_dict()) if outcome.model is not None else {}
    for number, trigger in enumerate(outcome.triggers):
        found |= {f"trigger{number}.{name}": value for name, value in trigger.tensors().items()}
    if outcome.suspects is not None:
        found["index"] = outcome.suspects.index
        if outcome.suspects.scores is not None:
            found["scores"] = outcome.suspects.scores
    return found


def test_none_of_ours_is_left_out():
    assert set(SETTINGS) == set(ours())


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_not_declared_changes_nothing(name: str, worlds: tuple[World, World]):
    cls = ours()[name]
    one, other = worlds
    arch = one.victim.arch
    # Another model, clean set and training set, with other poisons and another target, wherever it declared no need.
    model = one.victim.model if "model" in cls.needs else build(arch, 99).eval()
    clean = one.clean if "clean" in cls.needs else other.clean
    suspect = one.suspect if "suspect" in cls.needs else other.suspect

    def outcome(model: torch.nn.Module, clean: Labelled, suspect: Labelled) -> Outcome:
        return defend(cls(cls.Config(**SETTINGS[name])), Victim(model, arch), clean, suspect, Context(seed=3))

    first = outcome(one.victim.model, one.clean, one.suspect)
    again = outcome(model, clean, suspect)
    assert tensors(first), "a defense that returns nothing would show nothing"
    assert tensors(first).keys() == tensors(again).keys()
    for part, value in tensors(first).items():
        assert torch.equal(value, tensors(again)[part]), part
    assert first.verdict == again.verdict
    timeless = {key: value for key, value in first.notes.items() if not key.endswith("seconds")}
    assert timeless == {key: again.notes[key] for key in timeless}


OPENED: list[str] = []
WATCHING = [False]


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHING[0] and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | bytes | Path):
        OPENED.append(str(Path(arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]).absolute()))


sys.addaudithook(_watch)  # a hook cannot be taken away again; it looks only while a defense runs


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Note what is opened while a defense runs; the folders for its checkpoints."""
    folders: list[Path] = []

    def watch(defense: Defense, victim: Victim, clean: Labelled, suspect: Labelled, context: Context) -> Outcome:
        assert context.folder is not None
        folders.append(context.folder.absolute())
        WATCHING[0] = True
        try:
            return defend(defense, victim, clean, suspect, context)
        finally:
            WATCHING[0] = False

    monkeypatch.setattr("bdcore.pipeline.defend", watch)
    OPENED.clear()
    yield folders
    OPENED.clear()


@pytest.mark.parametrize("name", SETTINGS)
def test_no_file_of_the_run_is_opened(name: str, watched: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "cache"))
    settings = [f"{name}.{key}={value}" for key, value in SETTINGS[name].items()]
    images, labels = load_digits(return_X_y=True)
    grey = (images.reshape(-1, 1, 8, 8) * 15).astype(np.uint8)
    np.savez(tmp_path / "d.npz", x_train=grey[:600], y_train=labels[:600], x_test=grey[600:900], y_test=labels[600:900])
    host = Host()
    config = resolve(
        host, plugins=["badnets", name], dataset=f"npz:{tmp_path / 'd.npz'}", model="wrn10_1", device="cpu",
        precision="fp32", out=tmp_path / "out",
        settings=["train.epochs=1", "attack.target=7", "run.clean_fraction=0.2", *settings],
    )  # fmt: skip
    run(config, host)
    (folder,) = watched
    assert any(path.startswith(str(folder)) for path in OPENED), "its checkpoints are seen"
    foreign = [path for path in OPENED if path.startswith(str(tmp_path)) and not path.startswith(str(folder))]
    assert foreign == []
