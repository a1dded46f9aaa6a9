"""`bdcore options`: every option as `--set` takes it, with its default, what is valid, and what it does."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pydantic import BaseModel

    from bdcore.plugins import Host

_OF_A_RUN = {"run": "run", "train": "training"}
"""Sections that are no plugin's, and their kind."""
_OF_ONE = ("attack", "dataset")
"""Kinds of which a run has one, so that options are named after the kind."""
_COLUMNS = ("option", "default", "values", "description")
_SECTIONS = ("section", "kind", "keys", "status")


@click.command(
    "options",
    epilog="""\b
Examples:
  bdcore options
  bdcore options run train
  bdcore options mcldef badnets --json""",
)
@click.argument("sections", nargs=-1, metavar="[SECTION]...")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list on stdout.")
def command(sections: tuple[str, ...], as_json: bool) -> None:
    """List the options of each SECTION: run, train, or the name of a plugin. Without one, list the sections.

    An option is written as `--set KEY=VALUE` takes it. A plugin that cannot be used is listed with the reason.
    """
    from bdcore.cli.table import show_table
    from bdcore.plugins import Host

    host = Host()
    if sections:
        _check(sections, host)
        described = [section(host, name) for name in dict.fromkeys(sections)]
    else:
        described = overview(host)
    if as_json:
        click.echo(json.dumps(described, indent=2))
    elif sections:
        for number, one in enumerate(described):
            click.echo("\n" * (number > 0) + _heading(one))
            if one["options"]:
                show_table(_COLUMNS, ([_text(option[key]) for key in _COLUMNS] for option in one["options"]))
        if any(option["default"] is None for one in described for option in one["options"]):
            click.echo("\n-: not set")
    else:
        show_table(_SECTIONS, ([one[key] for key in _SECTIONS] for one in described))
        click.echo("\n`bdcore options SECTION` lists the options of one.")


def overview(host: "Host") -> list[dict[str, Any]]:
    """Each section with its kind, what its keys look like, and its status: "ok", or why the plugin cannot be used."""
    rows: list[dict[str, Any]] = [
        {"section": name, "kind": kind, "keys": f"{name}.*", "status": "ok"} for name, kind in _OF_A_RUN.items()
    ]
    for row in host.listing():
        keys = f"{_prefix(str(row['name']), row['kind'])}.*" if row["kind"] else None
        rows.append({"section": row["name"], "kind": row["kind"], "keys": keys, "status": row["status"]})
    return rows


def section(host: "Host", name: str) -> dict[str, Any]:
    """A section with its kind, who ships it, and its options.

    Raises:
        PluginError: the plugin cannot be used.
    """
    if name in _OF_A_RUN:
        from bdcore.config import RunSettings
        from bdcore.training import Recipe

        model = {"run": RunSettings, "train": Recipe}[name]
        return {"section": name, "kind": _OF_A_RUN[name], "options": _options(model, name)}
    plugin = host.load(name)
    found: dict[str, Any] = {
        "section": name,
        "kind": plugin.kind,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "options": _options(plugin.cls.Config, _prefix(name, plugin.kind)),
    }
    if plugin.kind == "dataset":
        defaults: Mapping[str, object] = getattr(plugin.cls, "train_defaults", {})
        found["train_defaults"] = {f"train.{key}": value for key, value in defaults.items()}
    return found


def _check(sections: Iterable[str], host: "Host") -> None:
    """Raise, before any plugin is imported, where there is no such section."""
    from bdcore.errors import UsageError, unknown_name

    known = [*_OF_A_RUN, *host.find()]
    for name in sections:
        if name in _OF_ONE:
            raise UsageError(
                f"{name}.* are the options of the {name} that a run has: name that one, for instance "
                f"{'badnets' if name == 'attack' else 'digits'}. `bdcore options` lists all."
            )
        if name not in known:
            raise UsageError(f"{unknown_name('section', name, known)} `bdcore options` lists them with their kinds.")


def _prefix(name: str, kind: str | None) -> str:
    return kind if kind in _OF_ONE else name


def _options(model: "type[BaseModel]", prefix: str) -> list[dict[str, Any]]:
    """Each option: as --set names it, its default as JSON (None: not set), what is valid, its description."""
    defaults, schemas, definitions = _defaults(model), *_schemas(model)
    return [
        {
            "option": f"{prefix}.{name}",
            "default": defaults.get(name),
            "values": values(schemas[name], definitions) if name in schemas else str(field.annotation),
            "description": field.description or "",
        }
        for name, field in model.model_fields.items()
    ]


def _defaults(model: "type[BaseModel]") -> dict[str, Any]:
    """By name, as JSON values; empty where a plugin breaks the contract: an option must be given, or is no JSON."""
    from pydantic import ValidationError
    from pydantic_core import PydanticSerializationError

    try:
        return model().model_dump(mode="json")
    except (ValidationError, PydanticSerializationError):
        return {}


def _schemas(model: "type[BaseModel]") -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON schema of each option, and what these refer to; empty where a type has none."""
    from pydantic.errors import PydanticUserError

    try:
        schema = model.model_json_schema(by_alias=False)
    except PydanticUserError:
        return {}, {}
    return schema.get("properties", {}), schema.get("$defs", {})


def values(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What a JSON schema admits, in words: the type with its bounds, or the choices. `definitions` are by name what it
    may refer to."""
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        others = {known: one for known, one in definitions.items() if known != name}  # one may refer to itself
        return values(definitions.get(name, {}), others)
    if "anyOf" in schema:
        return " or ".join(values(one, definitions) for one in schema["anyOf"] if one.get("type") != "null")
    if "const" in schema or "enum" in schema:
        return ", ".join(map(_text, schema["enum"] if "enum" in schema else [schema["const"]]))
    return _typed(schema, definitions)


def _typed(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return _bounded("whole number" if kind == "integer" else "number", schema)
    if kind == "string":
        named = "path" if "path" in schema.get("format", "") else "text"
        return f"{named} matching {schema['pattern']}" if "pattern" in schema else named
    if kind == "array":
        items: Sequence[Mapping[str, Any]] = schema.get("prefixItems", ())
        every = "" if items else f"{values(schema.get('items', {}), definitions)}, ..."
        return f"[{every or ', '.join(values(one, definitions) for one in items)}]"
    return {"boolean": "true, false", "object": "table"}.get(str(kind), "any")


def _bounded(kind: str, schema: Mapping[str, Any]) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f"{kind} {_text(schema['minimum'])} to {_text(schema['maximum'])}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return f"{kind} {', '.join(f'{sign} {_text(schema[key])}' for key, sign in signs.items() if key in schema)}".strip()


def _heading(one: Mapping[str, Any]) -> str:
    if "distribution" not in one:
        return str(one["section"])
    kind = one["kind"].replace("dataset", "data set")
    said = f"{one['section']}: {kind} of {one['distribution']} {one['version']}"
    said += "" if one["options"] else ", without options"
    defaults = " ".join(f"{key}={_text(value)}" for key, value in one.get("train_defaults", {}).items())
    return f"{said}; by default with {defaults}" if defaults else said


def _text(value: Any) -> str:
    """A value as --set takes it; what is not set as a dash."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)
