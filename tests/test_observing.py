"""Observers: what the host asks of one, what one hears, and that its failure is no failure of the run."""

import re
import sys
from pathlib import Path

import pluggy
import pytest

from bdcore import hookimpl
from bdcore.config import Chosen
from bdcore.errors import BdcoreError, PluginError, UsageError
from bdcore.observing import observe
from bdcore.plugins import Host

OBSERVER = """
from pydantic import Field

from bdcore import Observer, PluginConfig, hookimpl

seen = []


class Watch(Observer):
    name = "watch"

    class Config(PluginConfig):
        prefix: str = Field("", description="what every line begins with")

    @hookimpl
    def bdcore_warning(self, message):
        seen.append(self.config.prefix + message)


@hookimpl
def bdcore_observer():
    return Watch
"""


WATCH = "class Watch(Observer)"
METHOD = "    @hookimpl\n    def bdcore_warning(self, message)"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (WATCH, "class Watch(Defense)", "no subclass of bdcore.Observer"),
        ('name = "watch"', 'name = "look"', "has the name 'look', its entry point 'watch'"),
        (', description="what every line begins with"', "", "does not describe prefix"),
        (METHOD, METHOD.replace("@hookimpl\n    ", ""), "class Watch does not mark bdcore_warning"),
        (METHOD, METHOD.replace("bdcore_warning", "bdcore_wraning"), "Did you mean bdcore_warning"),
        (METHOD, METHOD.replace("bdcore_warning", "bdcore_defense").replace(", message", ""), "observing hooks alone"),
        (METHOD, "    def heard(self, message)", "observing hooks alone"),
        (METHOD, METHOD.replace("@hookimpl", "@hookimpl(wrapper=True)") + ":\n        yield\n\n    def f(s)", "wraps"),
        ("@hookimpl\ndef", "@hookimpl\ndef bdcore_run_failed(): pass\n\n@hookimpl\ndef", "function of the module"),
    ],
)
def test_an_observer_that_breaks_the_contract_is_named(site, old, new, said):
    source = OBSERVER.replace("import Observer", "import Defense, Observer")
    assert old in source
    site.add("odd-dist", {"watch": "odd_plugin"}, {"odd_plugin.py": source.replace(old, new, 1)})
    with pytest.raises(PluginError, match=re.escape(said)):
        Host().load("watch")


def test_a_module_that_only_observes_is_told_what_to_write(site):
    source = "from bdcore import hookimpl\n\n@hookimpl\ndef bdcore_warning(message):\n    raise RuntimeError\n"
    site.add("bare-dist", {"bare": "bare_plugin"}, {"bare_plugin.py": source})
    with pytest.raises(PluginError) as caught:
        Host().load("bare")
    message = str(caught.value)
    assert "implements bdcore_warning as a function of the module" in message
    assert "a class that inherits bdcore.Observer" in message


def test_an_observer_object_with_a_misspelt_hook_is_a_mistake_in_the_program():
    class Progress:
        @hookimpl
        def bdcore_wraning(self, message):
            pass

    with pytest.raises(pluggy.PluginValidationError, match="bdcore_wraning"):
        Host().observe(Progress())


def test_objects_that_observe_hear_what_happens_until_they_are_dismissed():
    host, heard = Host(), []

    class Progress:
        @hookimpl
        def bdcore_warning(self, message):
            heard.append(message)

    progress = Progress()
    host.observe(progress)
    host.hook.bdcore_warning(message="low on memory")
    host.dismiss(progress)
    host.hook.bdcore_warning(message="unheard")
    assert heard == ["low on memory"]


def chosen(host: Host, name: str, **options: object) -> Chosen:
    plugin = host.load(name)
    return Chosen(plugin, plugin.cls.Config.model_validate(options))


@pytest.fixture
def watch(site):
    """Lay down the observer above."""
    site.add("watch-dist", {"watch": "watch_plugin"}, {"watch_plugin.py": OBSERVER})


def test_a_chosen_observer_hears_what_happens_with_its_options(watch):
    host = Host()
    host.load("watch")
    host.hook.bdcore_warning(message="loaded is not chosen")
    observe(host, chosen(host, "watch", prefix="> "))
    host.hook.bdcore_warning(message="low on memory")
    assert sys.modules["watch_plugin"].seen == ["> low on memory"]


FRAIL = """
from bdcore import Observer, UsageError, hookimpl

heard = []


class Frail(Observer):
    name = "frail"

    @hookimpl
    def bdcore_run_started(self, run_id, folder):
        heard.append((run_id, folder))
        START

    @hookimpl
    def bdcore_epoch_finished(self, stage):
        heard.append(stage)
        LATER

    @hookimpl
    def bdcore_warning(self, message):
        heard.append(message)

    @hookimpl
    def bdcore_run_failed(self, error):
        heard.append(error)


@hookimpl
def bdcore_observer():
    return Frail
"""


@pytest.fixture
def frail(site):
    """Lay down an observer that does something as a run starts and as an epoch ends, and choose it."""

    def build(start: str = "pass", later: str = "pass") -> tuple[Host, list]:
        source = FRAIL.replace("START", start).replace("LATER", later)
        site.add("frail-dist", {"frail": "frail_plugin"}, {"frail_plugin.py": source})
        host = Host()
        observe(host, chosen(host, "frail"))
        return host, sys.modules["frail_plugin"].heard

    return build


def start(host: Host) -> None:
    host.hook.bdcore_run_started(config={}, run_id="a-run", folder=Path("runs/a-run"))


def test_an_observer_that_fails_as_the_run_starts_ends_it_by_name_and_is_told_no_more(frail, site):
    host, heard = frail(start="1 / 0")
    place = f"{site.folder / 'frail_plugin.py'}:13 in bdcore_run_started"
    said = f"observer 'frail' of frail-dist 1.0 failed: ZeroDivisionError: division by zero (at {place})"
    with pytest.raises(BdcoreError, match=re.escape(said)):
        start(host)
    host.hook.bdcore_run_failed(error=KeyError())
    assert heard == [("a-run", Path("runs/a-run"))]


def test_what_an_observer_says_to_the_user_itself_is_left_as_it_is(frail):
    host, _ = frail(start="raise UsageError('no such place: ask for another')")
    with pytest.raises(UsageError, match=r"^no such place: ask for another$"):
        start(host)


@pytest.mark.parametrize("later", ["1 / 0", "raise SystemExit(3)", "raise UsageError('disk full.')"])
def test_an_observer_that_fails_later_is_warned_of_once_and_dropped(frail, watch, later):
    host, heard = frail(later=later)
    observe(host, chosen(host, "watch"))
    start(host)
    for _ in range(3):
        host.hook.bdcore_epoch_finished(stage="train", progress=None)
    host.hook.bdcore_run_failed(error=KeyError())
    assert heard == [("a-run", Path("runs/a-run")), "train"]
    (said,) = sys.modules["watch_plugin"].seen
    assert said.startswith("observer 'frail' of frail-dist 1.0 failed: ")
    assert said.endswith("in bdcore_epoch_finished). It hears no more of this run.")


def test_an_observer_that_fails_at_a_warning_does_not_hear_of_its_own_failure(frail, watch):
    host, heard = frail(later="pass")
    sys.modules["frail_plugin"].heard = None
    observe(host, chosen(host, "watch"))
    host.hook.bdcore_warning(message="before the start, which frail does not hear")
    sys.modules["frail_plugin"].heard = heard
    start(host)
    sys.modules["frail_plugin"].heard = None
    host.hook.bdcore_warning(message="low on memory")
    _, *said = sys.modules["watch_plugin"].seen
    assert sorted(said)[0] == "low on memory"
    assert "AttributeError" in sorted(said)[1]
    assert len(said) == 2


def test_interrupting_an_observer_interrupts_the_run(frail):
    host, _ = frail(later="raise KeyboardInterrupt")
    start(host)
    with pytest.raises(KeyboardInterrupt):
        host.hook.bdcore_epoch_finished(stage="train", progress=None)
