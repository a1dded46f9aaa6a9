"""Errors meant for the people who use bdcore: what was wrong, where, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class BdcoreError(Exception):
    """The run failed for a reason that its user can act on. The command line prints it and exits with `exit_code`."""

    exit_code = 1


class UsageError(BdcoreError):
    """Something asked for cannot be: an unknown name, a bad value, a file of the wrong form."""

    exit_code = 2


class PluginError(UsageError):
    """A plugin cannot be found, loaded or used."""


class DataError(UsageError):
    """A data set is missing or not of the form it must have."""


class StoreError(BdcoreError):
    """The cache or output folder cannot be read or written."""


class DefenseError(BdcoreError):
    """A defense cannot give an honest answer on what it was handed."""


class ThreatModelError(BdcoreError):
    """A defense altered what it was handed, or returned what it may not."""


def unknown_name(what: str, name: str, valid: Iterable[str]) -> str:
    """One line naming an unknown `name` of a `what`, the nearest valid names if any, and all of them."""
    names = sorted(valid)
    near = get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Valid: {', '.join(names) or '(none)'}."
