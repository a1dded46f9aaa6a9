"""Observers that the user chose, kept from harming the run that they look on."""

from collections.abc import Callable
from functools import wraps

from bdcore.config import Chosen
from bdcore.plugins import Host, blamed, failure


def observe(host: Host, chosen: Chosen) -> None:
    """Make the observer and let it hear what `host` tells.

    Where it fails as the run starts, that ends the run, before any work; where it fails later, that is a warning, and
    it hears no more. Of a run whose start it was not told it hears nothing.

    Raises:
        BdcoreError: it cannot be made.
    """
    with blamed(chosen.plugin):
        observer = chosen.plugin.cls(chosen.config)
    host.observe(_Guard(host, chosen, observer))


class _Guard:
    """What the host calls in an observer's place: has its hooks as attributes."""

    def __init__(self, host: Host, chosen: Chosen, observer: object) -> None:
        self._host = host
        self._plugin = chosen.plugin
        self._started = not hasattr(observer, "bdcore_run_started")
        for name in dir(observer):
            if name.startswith("bdcore_"):
                setattr(self, name, self._guarded(name, getattr(observer, name)))

    def _guarded(self, hook: str, method: Callable[..., object]) -> Callable[..., None]:
        @wraps(method)  # the host reads a method's arguments, and that it is marked
        def call(*arguments: object) -> None:
            if hook == "bdcore_run_started":
                self._start(method, arguments)
            elif self._started:
                self._tell(method, arguments)

        return call

    def _start(self, method: Callable[..., object], arguments: tuple[object, ...]) -> None:
        with blamed(self._plugin):
            method(*arguments)
        self._started = True

    def _tell(self, method: Callable[..., object], arguments: tuple[object, ...]) -> None:
        try:
            method(*arguments)
        except (Exception, SystemExit) as error:
            self._host.dismiss(self)
            self._host.hook.bdcore_warning(message=f"{failure(self._plugin, error)}. It hears no more of this run.")
