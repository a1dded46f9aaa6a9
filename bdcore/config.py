"""What one run does, resolved from class defaults, a TOML file and the command line, with every option checked.

A configuration file has this form; every key is optional, and the table of a defense or observer is named after it:

    plugins = ["badnets", "mcldef"]   # as --plugin, in order
    no_attack = false
    [run]                             # RunSettings
    seed = 0
    [dataset]                         # which one, and its own options
    name = "npz"
    argument = "cifar10.npz"
    [attack]                          # options of the attack
    [train]                           # Recipe: how the victim is trained
    [mcldef]                          # options of that defense

`RunConfig.record()` has the same form, so what a run recorded can be run again; it leaves out who looked on.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast

from pydantic import BaseModel, Field, ValidationError, model_validator

from bdcore.contract import Attack, DatasetPlugin, PluginConfig
from bdcore.errors import PluginError, UsageError, unknown_name
from bdcore.models import check_name
from bdcore.training import Recipe

if TYPE_CHECKING:
    from bdcore.plugins import Host, Loaded

_DEFAULT_DATASET = "digits"
_DEFAULT_ATTACK = "badnets"
_NUMBERS: tuple[object, ...] = (int, float)

Options = TypeVar("Options", bound=BaseModel)


class Settings(PluginConfig):
    """Where and how to compute, and from which seed."""

    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed from which everything random follows")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of training; auto: bf16 where the device computes it natively, else fp32"
    )


class RunSettings(Settings):
    """Options of the run itself, the keys `run.*`."""

    model: str = Field("wrn16_1", description="architecture of the victim")
    victim: Literal["trained", "fine_tuned"] = Field(
        "trained",
        description="trained on the poisoned set; or a clean classifier, fine-tuned on batches of which on average the "
        "share that the attack poisons of the set is poisoned, anew each time",
    )
    fine_tuning_lr: float = Field(1e-3, gt=0, le=10, description="learning rate of the victim that is fine-tuned")
    fine_tuning_epochs: int = Field(10, ge=1, le=10_000, description="passes over the data of that fine-tuning")
    clean_fraction: float = Field(0.05, gt=0, le=1, description="share of the training set that the defender has clean")
    compile: bool = Field(False, description="train with torch.compile")

    @model_validator(mode="after")
    def _used(self) -> Self:
        # A record names every option, so that only a value of one's own shows that its author expects an effect.
        fields = type(self).model_fields
        changed = [
            name for name in ("fine_tuning_lr", "fine_tuning_epochs") if getattr(self, name) != fields[name].default
        ]
        if changed and self.victim != "fine_tuned":
            raise ValueError(f"{' and '.join(changed)} change nothing without run.victim=fine_tuned")
        return self


@dataclass(frozen=True)
class Chosen:
    """A plugin chosen for the run, with its options."""

    plugin: "Loaded"
    config: PluginConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything that one run needs to know; `attack` is None where the training set stays clean.

    `observers` and `out` change no number and are no part of the record.
    """

    run: RunSettings
    dataset: Chosen
    dataset_argument: str | None
    attack: Chosen | None
    train: Recipe
    defenses: tuple[Chosen, ...]
    observers: tuple[Chosen, ...] = ()
    out: Path | None = None

    def record(self) -> dict[str, Any]:
        """All that changes a number, as JSON values in the form of a configuration file; what is None is left out."""
        attacks = [self.attack] if self.attack else []
        dataset = {"name": self.dataset.plugin.name, "argument": self.dataset_argument} | _dump(self.dataset.config)
        return {
            "plugins": [chosen.plugin.name for chosen in (*attacks, *self.defenses)],
            "no_attack": self.attack is None,
            "run": _dump(self.run),
            "dataset": {key: value for key, value in dataset.items() if value is not None},
            **({"attack": _dump(self.attack.config)} if self.attack else {}),
            "train": _dump(self.train),
            **{chosen.plugin.name: _dump(chosen.config) for chosen in self.defenses},
        }


def resolve(
    host: "Host",
    *,
    plugins: Sequence[str] = (),
    dataset: str | None = None,
    model: str | None = None,
    seed: int | None = None,
    no_attack: bool = False,
    settings: Sequence[str] = (),
    file: Path | None = None,
    device: str | None = None,
    precision: str | None = None,
    out: Path | None = None,
) -> RunConfig:
    """Load the plugins that a run names and check every option; later ones win: defaults of the classes, those of the
    data set for training, the file, the command line.

    Args:
        host: loads the plugins.
        plugins: names of any kind: at most one data set and one attack, defenses in order, observers. They replace
            the file's.
        dataset: NAME or NAME:ARGUMENT.
        model, seed, device, precision: `run.*`; None where the command line is silent.
        no_attack: leave the training set clean.
        settings: KEY=VALUE texts; KEY is SECTION.OPTION, VALUE is TOML or else a plain string.
        file: a configuration file.
        out: folder of the run; not part of its record.

    Raises:
        UsageError: for what cannot be, saying where it was written and what is valid.
    """
    written = _read_file(file) if file else _File((), False, None, None, [])
    named = [host.load(name) for name in _once(plugins or written.plugins)]
    loaded, argument = _choose_dataset(host, named, dataset, written, by_flag=bool(plugins))
    attack = _choose_attack(host, named, no_attack or written.no_attack)
    defenses = [plugin for plugin in named if plugin.kind == "defense"]
    observers = [plugin for plugin in named if plugin.kind == "observer"]

    sections = {"run": "run", "train": "train", "dataset": "dataset", loaded.name: "dataset"}
    if attack:
        sections |= {"attack": "attack", attack.name: "attack"}
    sections |= {plugin.name: plugin.name for plugin in (*defenses, *observers)}

    flags = {"seed": seed, "device": device, "precision": precision, "model": model}
    levels = [
        _train_defaults(loaded),
        written.options,
        [_Given("run", key, value, f"--{key} {value}") for key, value in flags.items() if value is not None]
        + [_parse_setting(text) for text in settings],
    ]
    given: dict[str, dict[str, _Given]] = {section: {} for section in sections.values()}
    for level in levels:
        for section, options in _by_section(level, sections, host).items():
            given[section] |= options

    def configured(plugin: "Loaded", section: str) -> Chosen:
        return Chosen(plugin, _validate(plugin.cls.Config, section, given[section]))

    run = _validate(RunSettings, "run", given["run"])
    check_name(run.model)
    if run.victim == "fine_tuned":
        _check_fine_tuned(attack)
    return RunConfig(
        run=run,
        dataset=configured(loaded, "dataset"),
        dataset_argument=argument,
        attack=configured(attack, "attack") if attack else None,
        train=_validate(Recipe, "train", given["train"]),
        defenses=tuple(configured(one, one.name) for one in defenses),
        observers=tuple(configured(one, one.name) for one in observers),
        out=out,
    )


@dataclass(frozen=True)
class Choice:
    """Defenses and observers with their options, for a model or data of the user's own."""

    settings: Settings
    defenses: tuple[Chosen, ...]
    observers: tuple[Chosen, ...]


def choose(host: "Host", plugins: Sequence[str], settings: Sequence[str], flags: Mapping[str, object | None]) -> Choice:
    """Load defenses and observers and check their options, where there is no run with an attack and a data set.

    Args:
        plugins: names.
        settings: KEY=VALUE texts; KEY is NAME.OPTION or run.OPTION.
        flags: options of `Settings` by name; None where the command line is silent.

    Raises:
        UsageError: as `resolve`, and for a plugin of another kind.
    """
    named = [host.load(name) for name in _once(plugins)]
    for plugin in named:
        if plugin.kind not in ("defense", "observer"):
            raise UsageError(
                f"plugin {plugin.name!r} is of kind {plugin.kind}: a model or data of your own is put before defenses "
                "alone. `bdcore run` has attacks and data sets."
            )
    sections = {"run": "run"} | {plugin.name: plugin.name for plugin in named}
    level = [_Given("run", key, value, f"--{key} {value}") for key, value in flags.items() if value is not None]
    given = {section: dict[str, _Given]() for section in sections}
    given |= _by_section([*level, *map(_parse_setting, settings)], sections, host)
    chosen = {
        kind: tuple(
            Chosen(one, _validate(one.cls.Config, one.name, given[one.name])) for one in named if one.kind == kind
        )
        for kind in ("defense", "observer")
    }
    return Choice(_validate(Settings, "run", given["run"]), chosen["defense"], chosen["observer"])


@dataclass(frozen=True)
class _Given:
    """One option as somebody wrote it; `source` is shown where it is wrong."""

    section: str
    key: str
    value: object
    source: str


@dataclass(frozen=True)
class _File:
    """What a configuration file says."""

    plugins: tuple[str, ...]
    no_attack: bool
    dataset: str | None
    argument: str | None
    options: list[_Given]


def _read_file(path: Path) -> _File:
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no file: --config names one of text in the form of TOML.")
        content = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is no valid TOML: {error}.") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the configuration file {path}: {error}.") from error

    plugins, no_attack = content.pop("plugins", []), content.pop("no_attack", False)
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in cast(list[object], plugins)):
        raise UsageError(f'{path}: plugins must be a list of names, as ["badnets", "mcldef"], got {plugins!r}.')
    if not isinstance(no_attack, bool):
        raise UsageError(f"{path}: no_attack must be true or false, got {no_attack!r}.")
    for key, value in content.items():
        if not isinstance(value, dict):
            raise UsageError(
                f"{path}: {key} must be a table, as [{key}]; only plugins and no_attack stand outside one."
            )

    tables = cast(dict[str, dict[str, object]], content)
    which = tables.get("dataset", {})
    name, argument = which.pop("name", None), which.pop("argument", None)
    for key, value in (("name", name), ("argument", argument)):
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{path}: dataset.{key} must be a string, got {value!r}.")
    options = [
        _Given(section, key, value, f"{path}: {section}.{key} = {value!r}")
        for section, table in tables.items()
        for key, value in table.items()
    ]
    return _File(
        tuple(cast(list[str], plugins)), no_attack, cast(str | None, name), cast(str | None, argument), options
    )


def _once(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"plugin {name!r} is named {names.count(name)} times; a run uses a plugin once.")
    return names


def _choose_dataset(
    host: "Host", named: Iterable["Loaded"], flag: str | None, written: _File, *, by_flag: bool
) -> tuple["Loaded", str | None]:
    """The data set that `--dataset`, a plugin's name or the file (in this order) asks for, and its argument."""
    claims = [(plugin.name, f"plugin {plugin.name!r}") for plugin in named if plugin.kind == "dataset"]
    if flag is not None:
        claims.append((flag.partition(":")[0], f"--dataset {flag}"))
    if written.dataset and (not claims or not (by_flag or flag)):
        claims.append((written.dataset, f"dataset.name = {written.dataset!r} of the file"))
    if len({name for name, _ in claims}) > 1:
        raise UsageError(f"a run has one data set, here are {' and '.join(source for _, source in claims)}.")
    name = claims[0][0] if claims else _DEFAULT_DATASET
    argument = flag.partition(":")[2] if flag else ""
    # The file's argument belongs to the file's data set.
    kept = written.argument if name == (written.dataset or _DEFAULT_DATASET) else None
    if name not in host.find():
        raise PluginError(f"{unknown_name('data set', name, _of_kind(host, 'dataset'))} `bdcore plugins` lists them.")
    return host.load(name, kind="dataset"), argument or kept


def _choose_attack(host: "Host", named: Sequence["Loaded"], no_attack: bool) -> "Loaded | None":
    attacks = [plugin for plugin in named if plugin.kind == "attack"]
    if len(attacks) > 1:
        raise UsageError(f"a run has one attack, here are {' and '.join(repr(plugin.name) for plugin in attacks)}.")
    if attacks and no_attack:
        raise UsageError(f"attack {attacks[0].name!r} is named in a run without attack; leave out one of the two.")
    if attacks or no_attack:
        return attacks[0] if attacks else None
    if not any(plugin.kind == "defense" for plugin in named):
        raise UsageError(
            f"nothing to run: name a defense ({', '.join(_of_kind(host, 'defense'))}) or an attack "
            f"({', '.join(_of_kind(host, 'attack'))}) with --plugin."
        )
    return host.load(_DEFAULT_ATTACK, kind="attack")


def _of_kind(host: "Host", kind: str) -> list[str]:
    """Names of the installed plugins of a kind that can be used; imports all."""
    return [str(row["name"]) for row in host.listing() if row["kind"] == kind]


def _check_fine_tuned(attack: "Loaded | None") -> None:
    if attack is None:
        raise UsageError("run.victim=fine_tuned: a run without attack has nothing to fine-tune a classifier with.")
    if cast(type[Attack], attack.cls).controls_training:
        raise UsageError(f"run.victim=fine_tuned: attack {attack.name!r} trains the victim itself; leave it out.")


def _train_defaults(dataset: "Loaded") -> list[_Given]:
    defaults = cast(type[DatasetPlugin], dataset.cls).train_defaults
    source = f"train_defaults of data set {dataset.name!r}"
    return [_Given("train", key, value, f"{source}: {key} = {value!r}") for key, value in defaults.items()]


def _parse_setting(text: str) -> _Given:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and section and dot and key):
        raise UsageError(f"--set {text}: must have the form SECTION.OPTION=VALUE, for instance train.epochs=10.")
    if section == "dataset" and key in ("name", "argument"):
        raise UsageError(f"--set {text}: the data set is chosen with --dataset NAME:ARGUMENT.")
    return _Given(section, key, _parse_value(value.strip()), f"--set {text}")


def _parse_value(text: str) -> object:
    """A TOML value where `text` is one (quoted strings, numbers, booleans, arrays, tables), else `text` itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # no TOML, a number of more digits than Python takes, or nested too deeply
        return text
    value = cast(object, parsed["value"])
    single = len(parsed) == 1 and isinstance(value, str | bool | int | float | list | dict)
    return cast(object, value) if single else text


def _by_section(options: Iterable[_Given], sections: Mapping[str, str], host: "Host") -> dict[str, dict[str, _Given]]:
    """Options of one level by the sections that they mean; each may be given once."""
    result: dict[str, dict[str, _Given]] = {}
    for option in options:
        if option.section not in sections:
            absent = option.section in host.find()
            hint = f" Plugin {option.section!r} is not part of this run: name it with --plugin." if absent else ""
            raise UsageError(f"{option.source}: {unknown_name('section', option.section, sections)}{hint}")
        section = result.setdefault(sections[option.section], {})
        if option.key in section:
            raise UsageError(f"the same option is given twice: {section[option.key].source} and {option.source}.")
        section[option.key] = option
    return result


def _validate(model: type[Options], section: str, given: Mapping[str, _Given]) -> Options:
    for key, option in given.items():
        if key not in model.model_fields:
            raise UsageError(f"{option.source}: {unknown_name(f'option of {section}', key, model.model_fields)}")
        # pydantic takes infinity and true for numbers; whoever writes them means something else.
        if isinstance(option.value, float) and not isfinite(option.value):
            raise UsageError(f"{option.source}: must be finite{_described(model, key)}.")
        if isinstance(option.value, bool) and model.model_fields[key].annotation in _NUMBERS:
            raise UsageError(f"{option.source}: must be a number, not true or false{_described(model, key)}.")
    try:
        return model.model_validate({key: option.value for key, option in given.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        says = re.sub(r"^\w+ should", "must", first["msg"].removeprefix("Value error, "))
        place = [str(part) for part in first["loc"]]
        if not place or place[0] not in given:  # the options are each right but not together
            everything = ", ".join(option.source for option in given.values()) or "the defaults"
            raise UsageError(f"options of {section} ({everything}): {says}.") from error
        inside = f"{'.'.join(place[1:])} " if place[1:] else ""
        raise UsageError(f"{given[place[0]].source}: {inside}{says}{_described(model, place[0])}.") from error


def _described(model: type[BaseModel], key: str) -> str:
    description = model.model_fields[key].description
    return f" ({key}: {description})" if description else ""


def _dump(config: BaseModel) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_none=True)
