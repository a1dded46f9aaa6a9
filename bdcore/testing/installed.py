"""A host that knows a class as an installed plugin, and runs with it."""

import json
import sys
import tempfile
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from bdcore.config import resolve
from bdcore.contract import AttackConfig, Plugin, PluginConfig
from bdcore.errors import PluginError, UsageError
from bdcore.plugins import KINDS, Found, Host, Loaded, check_class, check_name
from bdcore.testing.findings import broken

_NUMBERS: tuple[object, ...] = (int, float, int | None, float | None)


class HostWith(Host):
    """Finds `cls` under its name besides what is installed; one installed under that name is left aside."""

    def __init__(self, cls: type[Plugin], kind: str) -> None:
        super().__init__()
        code = uuid.uuid4().hex  # never the same, so that no cache answers for it
        self._loaded[cls.name] = Loaded(cls.name, kind, "checked", "0", code, cls)
        self._offers[cls.name] = [_found(cls)]


def check_contract(cls: type[Plugin], kind: str, settings: Mapping[str, Any]) -> None:
    """The class is declared as the host wants it, and its options have defaults, descriptions and bounds."""
    (hook,) = [hook for hook, one in KINDS.items() if one == kind]
    try:
        check_name(_found(cls))
        check_class(_found(cls), kind, hook, cls)
    except PluginError as error:
        raise broken("a class that the host accepts", str(error), "see the end of the line above.") from error
    if kind == "attack" and not issubclass(cls.Config, AttackConfig):
        raise broken(
            "an attack's options are `target`, `poison_rate` and its own",
            f"{cls.__name__}.Config does not inherit bdcore.AttackConfig",
            "write `class Config(AttackConfig):`.",
        )
    advice = "give every field a default and, with Field(..., ge=, gt=, le= or lt=), a bound."
    try:
        cls.Config()
    except ValidationError as error:
        raise broken("Config() works: every option has a default", _first(error), advice) from error
    bare = [
        key for key, field in cls.Config.model_fields.items() if field.annotation in _NUMBERS and not field.metadata
    ]
    if bare:
        raise broken("every number among the options is bounded", f"{', '.join(bare)} may be anything", advice)
    if not (cls.Config.model_config.get("frozen") and cls.Config.model_config.get("extra") == "forbid"):
        raise broken(
            "options are frozen, and an unknown one is an error",
            f"model_config of {cls.__name__}.Config is {dict(cls.Config.model_config)}",
            "inherit bdcore.PluginConfig (an attack bdcore.AttackConfig) and leave model_config as it is.",
        )
    config_of(cls, settings)


def config_of(cls: type[Plugin], settings: Mapping[str, Any]) -> PluginConfig:
    """The options that the author gives for checks.

    Raises:
        ConformanceError: they are not valid.
    """
    try:
        return cls.Config.model_validate(dict(settings))
    except ValidationError as error:
        raise broken(
            f"{cls.__name__}.Config takes the settings that the check was given",
            _first(error),
            f"correct settings={dict(settings)}, or the bounds of the field.",
        ) from error


def check_config_round_trip(cls: type[Plugin], kind: str, config: PluginConfig) -> None:
    """Options come back the same from JSON, and from a file that a run's record was written to."""
    advice = "use plain fields (numbers, strings, bool, Path, tuples); a validator must accept what it returned itself."
    expected = "options that were recorded make the same options again"
    try:
        again = cls.Config.model_validate_json(config.model_dump_json())
    except (ValidationError, ValueError) as error:
        raise broken(expected, f"{cls.__name__}.Config cannot read its own JSON: {error}", advice) from error
    if again != config:
        raise broken(expected, f"{config!r} became {again!r} by way of JSON", advice)

    host = HostWith(cls, kind)
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "record.toml"
            file.write_text(_toml_file(_sections(cls, kind, config)), "utf-8")
            first = resolve(host, file=file)
            file.write_text(_toml_file(first.record()), "utf-8")
            second = resolve(host, file=file)
    except UsageError as error:
        raise broken(expected, f"a configuration file with them is refused: {error}", advice) from error
    if first.record() != second.record():
        raise broken(expected, f"{first.record()} became {second.record()} by way of a file", advice)


@contextmanager
def watched_files(seen: list[Path]) -> Generator[None]:
    """Add to `seen` what is opened or listed inside, by Python of this process."""
    _watch()
    _WATCHERS.append(seen)
    try:
        yield
    finally:
        _WATCHERS.remove(seen)


_WATCHERS: list[list[Path]] = []
_HOOKED: list[bool] = []


def _watch() -> None:
    """Install the hook, once: one that is installed stays until the process ends, and costs something."""
    if _HOOKED:
        return

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _WATCHERS and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | bytes | Path):
            name = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
            for seen in _WATCHERS:
                seen.append(Path(name).absolute())

    sys.addaudithook(hook)
    _HOOKED.append(True)


def _found(cls: type[Plugin]) -> Found:
    name = getattr(cls, "name", cls.__name__)
    return Found(str(name), cls.__module__, "checked", "0", None)


def _sections(cls: type[Plugin], kind: str, config: PluginConfig) -> dict[str, Any]:
    """A configuration file in which this plugin has these options."""
    options = config.model_dump(mode="json", exclude_none=True)
    if kind == "dataset":
        return {"plugins": ["finetune"], "dataset": {"name": cls.name, **options}}
    return {"plugins": [cls.name], ("attack" if kind == "attack" else cls.name): options}


def _toml_file(content: Mapping[str, Any]) -> str:
    lines = [f"{key} = {_toml(value)}" for key, value in content.items() if not isinstance(value, dict)]
    for section, options in content.items():
        if isinstance(options, dict):
            lines.append(f"[{section}]")
            lines += [f"{key} = {_toml(value)}" for key, value in cast(dict[str, Any], options).items()]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    """A JSON value as TOML: alike, but for tables."""
    if isinstance(value, dict):
        items = cast(dict[str, object], value).items()
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(one)}" for key, one in items if one is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(one) for one in cast(list[object], value)) + "]"
    return json.dumps(value)


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the options together'}: {first['msg']} (got {first['input']!r})"
