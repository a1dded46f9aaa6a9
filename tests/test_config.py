"""What a run is asked for, resolved: which plugin plays which part, which value wins, how a mistake is answered."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from bdcore import config
from bdcore.contract import Attack, AttackConfig, DatasetPlugin, Defense, Observer, PluginConfig
from bdcore.errors import PluginError, UsageError
from bdcore.plugins import Loaded


class Photos(DatasetPlugin):
    name = "photos"
    train_defaults: ClassVar = {"crop": 4, "epochs": 7}

    class Config(PluginConfig):
        size: int = Field(32, ge=8, le=64, description="side in pixels")

    def load(self, argument):
        raise NotImplementedError


class Digits(Photos):
    name = "digits"
    train_defaults: ClassVar = {}


class Badnets(Attack):
    name = "badnets"

    class Config(AttackConfig):
        mode: str = Field("one", description="one or all")

    def stamp(self, images, context):
        raise NotImplementedError

    def relabel(self, labels, classes):
        raise NotImplementedError


class Blended(Badnets):
    name = "blended"


class Prune(Defense):
    name = "prune"

    class Config(PluginConfig):
        share: float = Field(0.5, ge=0, le=1, description="share of channels that go")
        steps: int = Field(3, ge=1, description="steps")
        layers: tuple[int, ...] = Field((), description="which layers")
        target: int | None = Field(None, description="a class")
        loud: bool = Field(False, description="say more")

        @model_validator(mode="after")
        def _possible(self):
            if self.share == 1 and self.steps == 1:
                raise ValueError("all channels cannot go in one step")
            return self

    def __call__(self, given, context):
        raise NotImplementedError


class Tune(Prune):
    name = "tune"

    class Config(PluginConfig):
        lr: float = Field(0.01, gt=0, description="learning rate")


class Watch(Observer):
    name = "watch"

    class Config(PluginConfig):
        every: int = Field(1, ge=1, description="epochs from one look to the next")


KINDS: dict[str, tuple[str, type]] = {
    "photos": ("dataset", Photos),
    "digits": ("dataset", Digits),
    "badnets": ("attack", Badnets),
    "blended": ("attack", Blended),
    "prune": ("defense", Prune),
    "tune": ("defense", Tune),
    "watch": ("observer", Watch),
}


@dataclass
class Offer:
    """A host whose plugins are the classes above."""

    def find(self):
        return dict.fromkeys(KINDS)

    def listing(self):
        return [{"name": name, "kind": kind, "status": "ok"} for name, (kind, _) in KINDS.items()]

    def load(self, name, kind=None):
        if name not in KINDS or kind not in (None, KINDS[name][0]):
            raise PluginError(f"no {kind or 'plugin'} {name}")
        return Loaded(name, KINDS[name][0], "offer", "1", "0" * 64, KINDS[name][1])


def resolve(*plugins: str, **asked: Any) -> config.RunConfig:
    return config.resolve(Offer(), plugins=plugins, **asked)  # type: ignore[arg-type]


def refused(*plugins: str, **asked: Any) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(*plugins, **asked)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def toml(table: dict[str, Any]) -> str:
    """JSON's strings, numbers, booleans and lists are TOML's."""
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items() if key not in tables]
    for name, options in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in options.items())]
    return "\n".join(lines)


def test_a_defense_alone_gets_digits_and_badnets():
    run = resolve("prune")
    assert (run.dataset.plugin.name, run.attack.plugin.name) == ("digits", "badnets")
    assert [one.plugin.name for one in run.defenses] == ["prune"]
    assert (run.run.seed, run.run.model, run.run.device, run.run.precision) == (0, "wrn16_1", "auto", "auto")
    assert run.defenses[0].config == Prune.Config()


def test_parts_are_told_apart_by_kind_and_defenses_keep_their_order():
    run = resolve("tune", "watch", "blended", "photos", "prune")
    assert (run.dataset.plugin.name, run.attack.plugin.name) == ("photos", "blended")
    assert [one.plugin.name for one in run.defenses] == ["tune", "prune"]
    assert [one.plugin.name for one in run.observers] == ["watch"]
    assert "watch" not in json.dumps(run.record()), "an observer changes no number"
    unwatched = resolve("tune", "blended", "photos", "prune")
    assert unwatched.observers == ()
    assert unwatched.record() == run.record()


def test_an_observer_has_options_as_others_have(tmp_path: Path):
    assert resolve("prune", "watch").observers[0].config.every == 1
    assert resolve("prune", "watch", settings=["watch.every=5"]).observers[0].config.every == 5
    file = tmp_path / "run.toml"
    file.write_text("plugins = ['prune', 'watch']\n[watch]\nevery = 3")
    run = resolve(file=file)
    assert (run.observers[0].plugin.name, run.observers[0].config.every) == ("watch", 3)
    assert "watch" not in json.dumps(run.record())
    assert resolve(file=file, settings=["watch.every=4"]).observers[0].config.every == 4
    assert "every" in refused("prune", "watch", settings=["watch.ever=5"])
    assert "watch.every=0" in refused("prune", "watch", settings=["watch.every=0"])
    assert "name it with --plugin" in refused("prune", settings=["watch.every=5"])
    assert "2 times" in refused("prune", "watch", "watch")


def test_without_attack():
    assert resolve("prune", no_attack=True).attack is None
    assert resolve(no_attack=True).defenses == ()
    assert "badnets" in refused("badnets", "prune", no_attack=True)


def test_what_cannot_be_together():
    both = refused("badnets", "blended", "prune")
    assert "badnets" in both
    assert "blended" in both
    assert "prune" in refused("prune", "tune", "prune")
    assert "photos" in refused("digits", "photos", "prune")
    conflict = refused("digits", "prune", dataset="photos:here")
    assert "digits" in conflict
    assert "photos:here" in conflict
    assert resolve("photos", "prune", dataset="photos:here").dataset_argument == "here"


@pytest.mark.parametrize("plugins", [(), ("digits",), ("watch",)])
def test_nothing_to_run_lists_what_there_is(plugins):
    said = refused(*plugins)
    assert "--plugin" in said
    assert "a defense (prune, tune) or an attack (badnets, blended)" in said
    assert "digits" not in said


def test_dataset_argument_stays_as_given():
    run = resolve("prune", dataset="photos:../a:b/c d.npz")
    assert (run.dataset.plugin.name, run.dataset_argument) == ("photos", "../a:b/c d.npz")
    assert resolve("prune", dataset="photos").dataset_argument is None
    assert "attack" not in resolve("prune", dataset="photos", no_attack=True).record()
    assert "badnets" in refused("prune", dataset="badnets")
    assert "unknown data set 'photo'. Did you mean photos? Valid: digits, photos." in refused("prune", dataset="photo")


def test_later_wins(tmp_path: Path):
    file = tmp_path / "run.toml"
    assert resolve("prune", dataset="photos").train.epochs == 7
    assert resolve("prune", dataset="photos").train.crop == 4
    assert resolve("prune").train.crop == 0
    file.write_text(
        "plugins = ['tune']\n[train]\nepochs = 8\n[run]\nseed = 3\nclean_fraction = 0.1\n[attack]\ntarget = 2"
    )
    run = resolve(file=file, dataset="photos")
    assert (run.train.epochs, run.train.crop, run.run.seed, run.defenses[0].plugin.name) == (8, 4, 3, "tune")
    run = resolve("prune", file=file, dataset="photos", seed=4, settings=["train.epochs=9", "badnets.target=5"])
    assert (run.train.epochs, run.run.seed, run.run.clean_fraction) == (9, 4, 0.1)
    assert [one.plugin.name for one in run.defenses] == ["prune"], "--plugin replaces the file's"
    assert run.attack.config.target == 5


def test_the_files_argument_belongs_to_its_data_set(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text("plugins = ['prune']\n[dataset]\nname = 'photos'\nargument = 'a.npz'")
    assert resolve(file=file).dataset_argument == "a.npz"
    assert resolve(file=file, dataset="photos").dataset_argument == "a.npz"
    assert resolve(file=file, dataset="photos:b.npz").dataset_argument == "b.npz"
    assert resolve("prune", "photos", file=file).dataset_argument == "a.npz"
    for run in (resolve(file=file, dataset="digits"), resolve("prune", "digits", file=file)):
        assert (run.dataset.plugin.name, run.dataset_argument) == ("digits", None)
    file.write_text("plugins = ['prune', 'digits']\n[dataset]\nname = 'photos'")
    assert "digits" in refused(file=file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("prune.share=0.25", 0.25),
        ("prune.share=.25", 0.25),
        ("prune.share=1", 1.0),
        ("prune.steps=1_000", 1000),
        ("prune.layers=[1, 2]", (1, 2)),
        ("prune.loud=true", True),
        (" prune.loud = true ", True),
        ("attack.mode=all", "all"),
        ('attack.mode="all"', "all"),
        ("attack.mode=a=b", "a=b"),
        ("attack.mode=", ""),
        ("attack.mode=2024-01-01", "2024-01-01"),
        ("attack.mode=all # of them", "all # of them"),
        ("badnets.target=3", 3),
        ("digits.size=16", 16),
        ("dataset.size=16", 16),
        ("run.clean_fraction=1", 1.0),
        ("train.milestones=[3]", (3,)),
    ],
)
def test_set(text: str, value: object):
    run = resolve("prune", settings=[text])
    section, key = text.partition("=")[0].strip().split(".")
    owner = {
        "prune": run.defenses[0].config,
        "attack": run.attack.config,
        "badnets": run.attack.config,
        "digits": run.dataset.config,
        "dataset": run.dataset.config,
        "run": run.run,
        "train": run.train,
    }[section]
    found = getattr(owner, key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"settings": ["train.epochs=-1"]},
            ["--set train.epochs=-1: must be greater than or equal to 1", "passes over"],
        ),
        ({"settings": ["train.epoch=3"]}, ["--set train.epoch=3", "Did you mean epochs", "batch_size, betas"]),
        (
            {"settings": ["trian.lr=3"]},
            ["'trian'", "Did you mean train?", "attack, badnets, dataset, digits, prune, run"],
        ),
        ({"settings": ["tune.lr=3"]}, ["--set tune.lr=3", "tune", "--plugin", "attack, badnets, dataset"]),
        ({"settings": ["attack.tagret=3"]}, ["unknown option of attack 'tagret'. Did you mean target?"]),
        ({"settings": ["prune.share=much"]}, ["--set prune.share=much: must be a valid number", "share of channels"]),
        ({"settings": ["prune.share=true"]}, ["must be a number"]),
        ({"settings": ["prune.steps=true"]}, ["must be a number"]),
        ({"settings": ["train.lr=inf"]}, ["--set train.lr=inf: must be finite"]),
        ({"settings": ["train.lr=nan"]}, ["must be finite"]),
        ({"settings": ["prune.layers=[1, 'x']"]}, ["--set prune.layers", "1 must be a valid integer"]),
        (
            {"settings": ["prune.share=1", "prune.steps=1"]},
            ["options of prune", "prune.steps=1", "all channels cannot go"],
        ),
        ({"settings": ["train.optimizer=adm"]}, ["'sgd' or 'adam'"]),
        ({"settings": ["train.lr=1", "train.lr=2"]}, ["given twice", "train.lr=1", "train.lr=2"]),
        ({"settings": ["attack.target=1", "badnets.target=2"]}, ["given twice", "attack.target=1", "badnets.target=2"]),
        ({"settings": ["run.seed=1"], "seed": 2}, ["given twice", "--seed 2", "--set run.seed=1"]),
        ({"settings": ["epochs=3"]}, ["--set epochs=3", "SECTION.OPTION=VALUE"]),
        ({"settings": ["train.epochs"]}, ["--set train.epochs", "SECTION.OPTION=VALUE"]),
        ({"settings": ["dataset.name=photos"]}, ["--dataset"]),
        ({"seed": -1}, ["--seed -1: must be greater than or equal to 0"]),
        ({"seed": 2**31}, ["--seed 2147483648: must be less than or equal to 2147483647"]),
        ({"device": "gpu"}, ["--device gpu: must match", "auto, cpu, cuda or cuda:N"]),
        ({"device": "cuda:"}, ["--device cuda:"]),
        ({"precision": "fp16"}, ["--precision fp16: must be 'auto', 'fp32' or 'bf16'"]),
        ({"model": "wrn16"}, ["wrn16_1"]),
        ({"no_attack": True, "settings": ["attack.target=1"]}, ["unknown section 'attack'"]),
        ({"file": Path("nowhere.toml")}, ["nowhere.toml", "No such file"]),
    ],
)
def test_a_mistake_is_named_with_what_is_valid(asked: dict[str, Any], said: list[str]):
    message = refused("prune", **asked)
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("plugins = [", "end of document"),
        ("\n[run]\nseed = = 3", "line 3"),
        ("plugins = 'prune'", "list of names"),
        ("plugins = [1]", "list of names"),
        ("no_attack = 1", "true or false"),
        ("seed = 1", "seed must be a table"),
        ("[run]\nsed = 1", "Did you mean seed?"),
        ("[run]\nseed = 'x'", "run.seed = 'x': must be a valid integer"),
        ("[tune]\nlr = 1", "'tune'"),
        ("[attack]\ntarget = 1\n[badnets]\ntarget = 2", "given twice"),
        ("[dataset]\nname = 3", "dataset.name must be a string"),
        ("[dataset]\nname = 'badnets'", "badnets"),
    ],
)
def test_a_mistake_in_a_file_names_file_and_place(tmp_path: Path, content: str, said: str):
    file = tmp_path / "mine.toml"
    file.write_text(content)
    message = refused("prune", file=file)
    assert said in message
    if "badnets" not in said:
        assert "mine.toml" in message


def test_a_file_that_is_no_text(tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_bytes(b"\xff\xfe")
    assert "mine.toml" in refused(file=file)
    assert str(tmp_path) in refused(file=tmp_path)


def test_train_defaults_of_a_data_set_are_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Digits, "train_defaults", {"epoch": 3})
    assert "train_defaults of data set 'digits'" in refused("prune")


@given(
    st.lists(st.sampled_from(["prune", "tune"]), unique=True),
    st.sampled_from(["badnets", "blended", None]),
    st.sampled_from([None, "photos", "photos:x y.npz"]),
    st.integers(0, 2**31 - 1),
    st.integers(1, 500),
    st.floats(0, 1, exclude_min=True),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=8),
)
def test_a_record_is_a_file_that_gives_the_same_run(
    tmp_path_factory: pytest.TempPathFactory, defenses, attack, dataset, seed, epochs, fraction, mode
):
    settings = [f"train.epochs={epochs}", f"run.clean_fraction={fraction}"]
    if attack:
        settings += [f"attack.mode={json.dumps(mode, ensure_ascii=False)}"]
    plugins = [*([attack] if attack else []), *defenses]
    first = resolve(*plugins, dataset=dataset, seed=seed, no_attack=attack is None, settings=settings)
    record = first.record()
    assert json.loads(json.dumps(record)) == record

    file = tmp_path_factory.mktemp("record") / "run.toml"
    file.write_text(toml(record), "utf-8")
    again = resolve(file=file)
    assert again.record() == record
    assert again == first
    assert (again.run.seed, again.train.epochs, again.run.clean_fraction) == (seed, epochs, fraction)
    assert again.attack is None or again.attack.config.mode == mode


def test_out_is_no_part_of_the_record(tmp_path: Path):
    assert resolve("prune", out=tmp_path).out == tmp_path
    assert resolve("prune", out=tmp_path).record() == resolve("prune").record()
