"""Finding, checking and loading plugins.

A plugin is an entry point of group "bdcore". Metadata alone says which there are; a plugin is imported only when it is
named, and only if its distribution's requirement on bdcore admits this version.
"""

import contextlib
import hashlib
import inspect
import re
import sys
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import Distribution, entry_points, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

import pluggy
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from bdcore import hookspecs
from bdcore.errors import BdcoreError, PluginError, unknown_name

if TYPE_CHECKING:
    from bdcore.contract import Plugin

GROUP = "bdcore"

KINDS = {
    "bdcore_dataset": "dataset",
    "bdcore_attack": "attack",
    "bdcore_defense": "defense",
    "bdcore_observer": "observer",
}
"""Provider hooks and the kind of plugin that implements each; every other hook is one that observers listen to."""

RESERVED = frozenset({"dataset", "attack", "train", "run", "victim", "poison", "features", "record"})
"""Names no plugin may have: they begin keys of `--set` or name files of a run's folder that are not a plugin's."""


@dataclass(frozen=True)
class Found:
    """What metadata says about a plugin; nothing was imported.

    Args:
        name: the entry point's name, which is the plugin's.
        value: the module, "package.module".
        distribution, version: who ships it.
        requires: the distribution's requirement on bdcore, for instance ">=0.1,<1"; None where it states none.
    """

    name: str
    value: str
    distribution: str
    version: str
    requires: str | None


@dataclass(frozen=True)
class Loaded:
    """A plugin that was imported, checked and registered.

    Args:
        name, distribution, version: as in its metadata.
        kind: "dataset", "attack", "defense" or "observer".
        code: SHA-256 of its source: the module's file, or every .py file beneath it where it is a package.
        cls: the class that its hook returned.
    """

    name: str
    kind: str
    distribution: str
    version: str
    code: str
    cls: "type[Plugin]"


class Host:
    """The plugins of one run. `hook` tells those that observe it what happens."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("bdcore")
        self._manager.add_hookspecs(hookspecs)
        self._loaded: dict[str, Loaded] = {}
        self.hook = self._manager.hook

    def find(self) -> dict[str, Found]:
        """All plugins by name, from metadata alone. Of several that share a name the first; `load` refuses that one."""
        return {name: offers[0] for name, offers in self._offers.items()}

    def load(self, name: str, kind: str | None = None) -> Loaded:
        """Import, check and register the plugin called `name`; a second call returns the same.

        Args:
            name: an entry point's name.
            kind: the kind that it must be; None takes any.

        Raises:
            PluginError: no plugin of that name, two of it, made for another bdcore, fails on import, breaks the
                contract, or is of another kind. A refused plugin leaves the host as it was.
        """
        if name not in self._offers:
            raise PluginError(f"{unknown_name('plugin', name, self._offers)} `bdcore plugins` lists them.")
        if name not in self._loaded:
            found = self._only(name)
            check_name(found)
            _check_version(found)
            self._loaded[name] = self._import(found)
        loaded = self._loaded[name]
        if kind not in (None, loaded.kind):
            raise PluginError(
                f"plugin {name!r} ({loaded.distribution} {loaded.version}) is of kind {loaded.kind}, "
                f"where one of kind {kind} is needed; `bdcore plugins` lists each with its kind."
            )
        return loaded

    def observe(self, observer: object) -> None:
        """Register an object whose hook methods are called as the run goes on.

        Raises:
            pluggy.PluginValidationError: it marks a method that is no hook, or takes arguments that the hook has not.
        """
        self._manager.register(observer)
        self._manager.check_pending()

    def dismiss(self, observer: object) -> None:
        """Call no more hook of an object that was handed to `observe`."""
        self._manager.unregister(observer)

    def listing(self) -> list[dict[str, str | None]]:
        """One row a plugin: name, kind, distribution, version, status, which is "ok" or the reason in one line.

        Imports every plugin, each guarded; a broken one gives its row a reason and a kind of None.
        """
        rows: list[dict[str, str | None]] = []
        for name in sorted(self._offers):
            try:
                kind, status = self.load(name).kind, "ok"
            except _Refused as error:
                kind, status = None, error.reason
            rows += [
                {
                    "name": name,
                    "kind": kind,
                    "distribution": offer.distribution,
                    "version": offer.version,
                    "status": status,
                }
                for offer in self._offers[name]
            ]
        return rows

    @cached_property
    def _offers(self) -> dict[str, list[Found]]:
        """Entry points by name. importlib counts a distribution that stands on the path twice once, the first one."""
        offers: dict[str, list[Found]] = {}
        for entry in entry_points(group=GROUP):
            dist = entry.dist
            assert dist is not None, "entry_points() sets it"
            found = Found(entry.name, entry.value, dist.name, dist.version, _requirement(dist))
            offers.setdefault(entry.name, []).append(found)
        return offers

    def _only(self, name: str) -> Found:
        first, *others = self._offers[name]
        if others:
            offers = " and ".join(f"{o.distribution} {o.version} ({o.value})" for o in (first, *others))
            raise _Refused(first, f"the name is offered more than once, by {offers}", "Uninstall all but one of them.")
        return first

    def _import(self, found: Found) -> Loaded:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to results, which may be JSON
                module = import_module(found.value)
                self._manager.register(module, name=found.name)
                kind, provided = self._provided(found, module)
                return Loaded(found.name, kind, found.distribution, found.version, _source_hash(module), provided)
        except (Exception, SystemExit) as error:
            if self._manager.get_plugin(found.name) is not None:
                self._manager.unregister(name=found.name)
            if isinstance(error, _Refused):
                raise
            raise _Refused(found, explain(error, found.value), _advice(error, found)) from error

    def _provided(self, found: Found, module: ModuleType) -> "tuple[str, type[Plugin]]":
        """The kind of a registered plugin and its class, checked against the contract."""
        callers = _hooks(found, self._manager, module)
        if not callers:
            raise _Refused(found, f"{found.value} implements no hook", "Mark one with `@bdcore.hookimpl`.")
        observing = [caller.name for caller in callers if caller.name not in KINDS]
        if observing:
            reason = f"{found.value} implements {' and '.join(observing)} as a function of the module"
            advice = "Make it a method of a class that inherits bdcore.Observer, and return that from bdcore_observer."
            raise _Refused(found, reason, advice)
        if len(callers) > 1:
            names = " and ".join(sorted(caller.name for caller in callers))
            raise _Refused(found, f"{found.value} implements {names}", "Give each its own module and entry point.")

        hook = callers[0].name
        others = [impl.plugin for impl in callers[0].get_hookimpls() if impl.plugin is not module]
        answers: list[Any] = self._manager.subset_hook_caller(hook, others)()
        kind = KINDS[hook]
        return kind, check_class(found, kind, hook, answers[0] if answers else None)


def explain(error: BaseException, module: str) -> str:
    """`error` in one line, with the last place (file:line in function) inside the package that `module` belongs to."""
    message = " ".join(str(error).split())
    what = f"{type(error).__name__}: {message}" if message else type(error).__name__
    places = list(_places(error, module))
    return f"{what} (at {places[-1]})" if places else what


@contextlib.contextmanager
def blamed(plugin: Loaded) -> Generator[None]:
    """Turn what goes wrong inside a plugin into one error that says whose it is and where.

    Raises:
        BdcoreError: with the plugin's name; one that the plugin raises itself stays as it is.
    """
    try:
        yield
    except BdcoreError:
        raise
    except (Exception, SystemExit) as error:  # a plugin that exits has not finished
        raise BdcoreError(f"{failure(plugin, error)}. Report it to its authors; --traceback shows all.") from error


def failure(plugin: Loaded, error: BaseException) -> str:
    """Which plugin failed, how and where, without a full stop."""
    where = explain(error, plugin.cls.__module__)
    return f"{plugin.kind} {plugin.name!r} of {plugin.distribution} {plugin.version} failed: {where}"


class _Refused(PluginError):
    """A plugin that cannot be used; `reason` is one line."""

    def __init__(self, found: Found, reason: str, advice: str) -> None:
        self.reason = reason
        super().__init__(
            f"plugin {found.name!r} ({found.name} = {found.value}) of {found.distribution} {found.version} "
            f"cannot be used: {reason.removesuffix('.')}. {advice}"
        )


def check_name(found: Found) -> None:
    """Raise PluginError where the plugin has a name that none may have."""
    if found.name in RESERVED or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", found.name):
        reason = f"{found.name!r} cannot be the name of a plugin"
        rule = f"Names are letters, digits, - and _, begin with a letter, and are not {', '.join(sorted(RESERVED))}."
        raise _Refused(found, reason, rule)


def _check_version(found: Found) -> None:
    if found.requires is None:
        return
    here = version("bdcore")
    try:
        admitted = SpecifierSet(found.requires).contains(here, prereleases=True)
    except InvalidSpecifier as error:
        reason = f"its requirement on bdcore cannot be read: {found.requires!r}"
        raise _Refused(found, reason, f"Report it to the authors of {found.distribution}.") from error
    if not admitted:
        reason = f"it needs bdcore {found.requires}, this is {here}"
        raise _Refused(found, reason, f"Install a bdcore that it admits, or a {found.distribution} made for {here}.")


def _requirement(dist: Distribution) -> str | None:
    """What `dist` requires of bdcore here, for instance ">=0.1,<1"; the whole line where it cannot be parsed."""
    specifiers: list[str] = []
    for line in dist.requires or []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            if re.match(r"\s*bdcore\b(?![-_.]\w)", line, re.IGNORECASE):
                return line  # `_check_version` refuses it, if the plugin is ever named
            continue  # what it needs of others is their installer's concern
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if canonicalize_name(requirement.name) == "bdcore" and applies:
            specifiers.append(str(requirement.specifier))
    return ",".join(filter(None, specifiers)) or None


def check_class(found: Found, kind: str, hook: str, answer: object) -> "type[Plugin]":
    """The class that a provider hook returned, if it is as the contract says."""
    from bdcore import contract
    from bdcore.artifacts import Need

    base = {
        "dataset": contract.DatasetPlugin,
        "attack": contract.Attack,
        "defense": contract.Defense,
        "observer": contract.Observer,
    }[kind]
    if not (isinstance(answer, type) and issubclass(answer, base)):
        reason = f"{hook} returned {answer!r}, which is no subclass of bdcore.{base.__name__}"
        raise _Refused(found, reason, f"Return a class that inherits bdcore.{base.__name__}.")

    where = f"class {answer.__name__}"
    if inspect.isabstract(answer):
        missing = ", ".join(sorted(vars(answer)["__abstractmethods__"]))
        raise _Refused(found, f"{where} is incomplete", f"Define {missing}.")
    name: object = getattr(answer, "name", None)
    if name != found.name:
        reason = f"{where} has the name {name!r}, its entry point {found.name!r}"
        raise _Refused(found, reason, f"Set `name = {found.name!r}` in the class, or rename the entry point.")

    config: object = getattr(answer, "Config", None)
    if not (isinstance(config, type) and issubclass(config, contract.PluginConfig)):
        raise _Refused(found, f"Config of {where} is {config!r}", "Let it inherit bdcore.PluginConfig.")
    blank = [key for key, field in config.model_fields.items() if not (field.description or "").strip()]
    if blank:
        reason = f"Config of {where} does not describe {', '.join(blank)}"
        raise _Refused(found, reason, 'Give each field `Field(..., description="...")`.')

    if issubclass(answer, contract.Defense):
        unknown = sorted(set(answer.needs) - set(get_args(Need)))
        if unknown:
            raise _Refused(found, unknown_name("need", unknown[0], get_args(Need)), f"Correct `needs` of {where}.")
    if issubclass(answer, contract.Observer):
        _check_observer(found, answer)
    return answer


def _check_observer(found: Found, cls: type) -> None:
    """Refuse a class that would hear nothing, not what it seems to ask for, or more than observers are told."""
    manager = pluggy.PluginManager("bdcore")
    manager.add_hookspecs(hookspecs)
    manager.register(cls)
    callers = _hooks(found, manager, cls)
    where = f"class {cls.__name__}"
    unmarked = sorted({name for name in dir(cls) if name.startswith("bdcore_")} - {caller.name for caller in callers})
    if unmarked:
        raise _Refused(found, f"{where} does not mark {' and '.join(unmarked)}", "Put `@bdcore.hookimpl` before it.")
    heard = [caller for caller in callers if caller.name not in KINDS]
    if not heard or len(heard) < len(callers):
        hooks = ", ".join(name for name in vars(hookspecs) if name.startswith("bdcore_") and name not in KINDS)
        raise _Refused(found, f"the methods of {where} are not observing hooks alone", f"Those are {hooks}.")
    if any(impl.wrapper or impl.hookwrapper for caller in heard for impl in caller.get_hookimpls()):
        raise _Refused(found, f"{where} wraps a hook", "An observer looks on; mark it with `@bdcore.hookimpl` alone.")


def _hooks(found: Found, manager: pluggy.PluginManager, registered: object) -> list[pluggy.HookCaller]:
    """The hooks that a registered module or class implements, each one of ours with arguments that it has."""
    callers = manager.get_hookcallers(registered) or []
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        unknown = [caller.name for caller in callers if not caller.has_spec()]
        hooks = [name for name in vars(hookspecs) if name.startswith("bdcore_")]
        reason = " ".join(unknown_name("hook", name, hooks) for name in unknown)
        raise _Refused(found, reason, f"Rename it in {found.value}, or upgrade bdcore if it is new.") from error
    return callers


def _source_hash(module: ModuleType) -> str:
    """SHA-256 of a module's file, or of the relative paths and contents of all .py files of a package."""
    roots = [Path(folder) for folder in getattr(module, "__path__", [])]
    digest = hashlib.sha256()
    if not roots:
        digest.update(Path(module.__file__ or "").read_bytes())
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(root).as_posix()}|{len(content)}|".encode())
            digest.update(content)
    return digest.hexdigest()


def _places(error: BaseException, module: str) -> Iterator[str]:
    package = module.partition(".")[0]
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] == package:
            yield f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
    if isinstance(error, SyntaxError) and error.filename:  # a file that cannot be parsed has no frame
        yield f"{error.filename}:{error.lineno}"


def _advice(error: BaseException, found: Found) -> str:
    package = found.value.partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != package:
        return f"Install {error.name.partition('.')[0]!r}, which it needs; --traceback shows all."
    return f"Report it to the authors of {found.distribution}, or uninstall that; --traceback shows all."
