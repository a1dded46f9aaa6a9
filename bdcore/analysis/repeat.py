"""How to repeat a run: its options as a configuration file, and the command that takes it."""

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any, cast

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def toml(config: Mapping[str, Any]) -> str:
    """A recorded configuration (JSON values; None is left out) as TOML, tables after what stands outside one."""
    outside = {key: value for key, value in config.items() if not isinstance(value, dict)}
    lines = _lines(outside)
    for name, table in config.items():
        if isinstance(table, dict):
            lines += ["", f"[{_key(name)}]", *_lines(cast("dict[str, Any]", table))]
    return "\n".join(lines).lstrip("\n") + "\n"


def command(name: str, config: Mapping[str, Any]) -> str:
    """The shell lines that do the same again with this version of bdcore.

    Args:
        name: "run", whose options all stand in a file, or "defend" or "scan", whose options are given one by one.
        config: as recorded.
    """
    if name == "run":
        return f"cat > repeat.toml <<'TOML'\n{toml(config)}TOML\nbdcore run --config repeat.toml"
    parts = [f"bdcore {name}"]
    for key, value in config.items():
        if key == "plugins":
            parts += [_option("plugin", str(plugin)) for plugin in cast("list[object]", value)]
        elif key == "size":
            parts.append(_option("size", "x".join(map(str, cast("list[object]", value)))))
        elif key == "run":
            parts += [_option(option, str(given)) for option, given in cast("dict[str, Any]", value).items()]
        elif isinstance(value, dict):
            given = cast("dict[str, Any]", value).items()
            parts += [_option("set", f"{key}.{option}={_value(one)}") for option, one in given if one is not None]
        elif key != "command":
            parts.append(_option(key, str(value)))
    if name == "defend":
        parts.append("--out purified.safetensors")
    return " \\\n  ".join(parts)


def _option(name: str, value: str) -> str:
    return f"--{name} {shlex.quote(value)}"


def _lines(table: Mapping[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_value(value)}" for key, value in table.items() if value is not None]


def _key(text: str) -> str:
    return text if _BARE.fullmatch(text) else _text(text)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list):
        return f"[{', '.join(_value(one) for one in cast('list[object]', value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(_lines(cast('dict[str, Any]', value)))}}}"
    return repr(value)


def _text(text: str) -> str:
    # JSON's strings are TOML's, but for DEL and for lone surrogates, which TOML has no form for.
    quoted = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
    return quoted.encode("utf-8", "replace").decode()
