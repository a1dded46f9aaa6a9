"""What a check of the kit can find: that a plugin breaks a promise, or that the check does not apply to it."""


class ConformanceError(AssertionError):
    """A plugin does not do what its contract says."""


class NotApplicable(Exception):
    """There is nothing to check here, for instance no GPU, or the plugin refuses such data with a clear error."""


def broken(expected: str, happened: str, advice: str) -> ConformanceError:
    """The error of a check, in three lines: what was expected, what happened, what its author can do."""
    return ConformanceError(f"expected: {expected}\nhappened: {happened}\nto do: {advice}")
