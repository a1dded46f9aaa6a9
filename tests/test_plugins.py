"""The plugin host, against distributions that lie on disk as installed ones do."""

import ast
import hashlib
import inspect
import sys
from importlib.metadata import version
from pathlib import Path

import pluggy
import pytest

import bdcore
from bdcore import hookspecs
from bdcore.contract import Defense
from bdcore.errors import PluginError
from bdcore.plugins import KINDS, Host

HERE = version("bdcore")

GOOD = """
from pydantic import Field

from bdcore import Defense, Outcome, PluginConfig, hookimpl


class Good(Defense):
    name = "good"

    class Config(PluginConfig):
        strength: float = Field(1.0, ge=0, description="how strongly it defends")

    def __call__(self, given, context):
        return Outcome()


@hookimpl
def bdcore_defense():
    return Good
"""

OBSERVER = """
from bdcore import Observer, hookimpl


class Watch(Observer):
    name = "watch"

    @hookimpl
    def bdcore_warning(self, message):
        print(message)


@hookimpl
def bdcore_observer():
    return Watch
"""


def refused(name: str, kind: str | None = None) -> PluginError:
    """The error of loading `name`, in a host that is found unharmed by it."""
    host = Host()
    with pytest.raises(PluginError) as caught:
        host.load(name, kind)
    host.hook.bdcore_warning(message="the host still works")
    assert host.load("watch").kind == "observer"
    return caught.value


@pytest.fixture(autouse=True)
def beside(site):
    site.add("beside", {"watch": "observer_beside"}, {"observer_beside.py": OBSERVER})


def test_a_good_plugin_is_found_without_import_and_loaded_with_its_class_and_source_hash(site):
    site.add("good-dist", {"good": "good_plugin"}, {"good_plugin.py": GOOD}, version="2.1", requires=["bdcore>=0.1,<1"])
    host = Host()

    found = host.find()["good"]
    assert (found.value, found.distribution, found.version) == ("good_plugin", "good-dist", "2.1")
    assert set(found.requires.split(",")) == {">=0.1", "<1"}
    assert "good_plugin" not in sys.modules

    loaded = host.load("good")
    assert (loaded.name, loaded.kind, loaded.distribution, loaded.version) == ("good", "defense", "good-dist", "2.1")
    assert issubclass(loaded.cls, Defense)
    assert loaded.cls is sys.modules["good_plugin"].Good
    assert loaded.code == hashlib.sha256(GOOD.encode()).hexdigest()
    assert host.load("good", "defense") is loaded


def test_loading_one_plugin_imports_no_other(site):
    site.add("good-dist", {"good": "good_plugin"}, {"good_plugin.py": GOOD})
    site.add("bad-dist", {"bad": "bad_plugin"}, {"bad_plugin.py": "raise RuntimeError"})
    host = Host()
    host.load("good")
    assert "bad_plugin" not in sys.modules
    assert "observer_beside" not in sys.modules


def test_first_party_plugins_are_found_through_the_same_group():
    found = Host().find()
    assert {"digits", "npz", "cifar10", "badnets", "blended", "mcldef", "finetune"} <= set(found)
    assert found["mcldef"].distribution == "bdcore"


def test_an_unknown_name_gets_the_nearest_and_all(site):
    site.add("good-dist", {"good": "good_plugin"}, {"good_plugin.py": GOOD})
    message = str(refused("goood"))
    assert "unknown plugin 'goood'. Did you mean good?" in message
    assert "mcldef" in message


def test_an_exception_on_import_is_told_with_place_distribution_and_cause(site):
    files = {
        "broken/__init__.py": "",
        "broken/plugin.py": "import json\n\n\ndef settings():\n    return json.loads('{')\n\n\nsettings()\n",
    }
    site.add("broken-dist", {"broken": "broken.plugin"}, files, version="0.3")
    error = refused("broken")
    message = str(error)
    assert "(broken = broken.plugin) of broken-dist 0.3" in message
    assert "JSONDecodeError: Expecting property name" in message
    assert f"{site.folder / 'broken' / 'plugin.py'}:5 in settings" in message  # not the frame inside json
    assert "--traceback" in message
    assert type(error.__cause__).__name__ == "JSONDecodeError"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import sys\nsys.exit(3)", "SystemExit: 3 (at {file}:2 in <module>)"),
        ("def f(:\n", "{file}:1)"),
        ("import no_such_library_xyz", "Install 'no_such_library_xyz', which it needs"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines (at"),
        ("x = 1", "bad_plugin implements no hook"),
    ],
)
def test_other_ways_to_break_on_import(site, source, said):
    site.add("bad-dist", {"bad": "bad_plugin"}, {"bad_plugin.py": source})
    message = str(refused("bad"))
    assert said.format(file=site.folder / "bad_plugin.py") in message
    assert "bad-dist 1.0" in message


def test_interruption_is_not_held_against_a_plugin(site):
    site.add("slow-dist", {"slow": "slow_plugin"}, {"slow_plugin.py": "raise KeyboardInterrupt"})
    with pytest.raises(KeyboardInterrupt):
        Host().load("slow")


@pytest.mark.parametrize("misspelt", ["bdcore_defence", "on_defense"])
def test_a_misspelt_hook_is_refused_with_the_nearest_name(site, misspelt):
    source = GOOD.replace("def bdcore_defense", f"def {misspelt}")
    site.add("typo-dist", {"good": "typo_plugin"}, {"typo_plugin.py": source})
    message = str(refused("good"))
    assert f"unknown hook '{misspelt}'" in message
    assert "bdcore_defense" in message


def test_a_hook_with_an_argument_that_does_not_exist_is_refused(site):
    source = OBSERVER.replace("(self, message)", "(self, message, colour)").replace('"watch"', '"odd"')
    site.add("odd-dist", {"odd": "odd_plugin"}, {"odd_plugin.py": source})
    error = refused("odd")
    assert "colour" in str(error)
    assert isinstance(error.__cause__, pluggy.PluginValidationError)


@pytest.mark.parametrize(
    "requires",
    [
        [f"bdcore>{HERE}"],
        ["BDCore >= 99"],
        ["numpy", "bdcore>=0.0.1", "bdcore<0.0.2"],
        ['bdcore==99; python_version >= "3"'],
        ["bdcore[test] (>=99)"],
    ],
)
def test_a_plugin_made_for_another_bdcore_is_refused_before_its_import(site, requires):
    trace = site.folder / "imported"
    source = f"open({str(trace)!r}, 'w').close()\n" + GOOD
    site.add("newer-dist", {"good": "newer_plugin"}, {"newer_plugin.py": source}, version="5.0", requires=requires)
    message = str(refused("good"))
    assert "newer-dist 5.0" in message
    assert f"this is {HERE}" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    "requires",
    [
        [f"bdcore=={HERE}"],
        ["bdcore"],
        ["bdcore-extras>=99"],
        ['bdcore>=99; extra == "next"'],
        ['bdcore>=99; python_version < "3"'],
        ["someone-else >> 1"],
    ],
)
def test_requirements_that_this_bdcore_meets(site, requires):
    site.add("fine-dist", {"good": "good_plugin"}, {"good_plugin.py": GOOD}, requires=requires)
    assert Host().load("good").kind == "defense"


def test_a_prerelease_of_bdcore_counts_as_its_version(site, monkeypatch):
    monkeypatch.setattr("bdcore.plugins.version", lambda name: "0.2.0.dev1")
    site.add("fine-dist", {"good": "good_plugin"}, {"good_plugin.py": GOOD}, requires=["bdcore>=0.1"])
    assert Host().load("good").kind == "defense"


def test_a_requirement_that_cannot_be_read_is_refused(site):
    site.add("fine-dist", {"good": "good_plugin"}, {"good_plugin.py": GOOD}, requires=["bdcore >> 1"])
    assert "'bdcore >> 1'" in str(refused("good"))
    assert "good_plugin" not in sys.modules


def test_two_plugins_of_one_name_matter_only_to_who_names_them(site):
    site.add("first-dist", {"good": "first_plugin"}, {"first_plugin.py": GOOD})
    site.add("second-dist", {"good": "second_plugin"}, {"second_plugin.py": GOOD}, version="7.0")
    message = str(refused("good"))
    assert "first-dist 1.0 (first_plugin)" in message
    assert "second-dist 7.0 (second_plugin)" in message
    rows = [row for row in Host().listing() if row["name"] == "good"]
    assert {row["distribution"] for row in rows} == {"first-dist", "second-dist"}
    assert all("more than once" in row["status"] for row in rows)


def test_one_distribution_twice_on_the_path_counts_once(site, new_site, monkeypatch):
    site.add("good-dist", {"good": "good_plugin"}, {"good_plugin.py": GOOD}, version="1.0")
    earlier = new_site()
    earlier.add("Good_Dist", {"good": "good_plugin"}, {"good_plugin.py": GOOD}, version="2.0")
    monkeypatch.syspath_prepend(earlier.folder)
    assert Host().load("good").version == "2.0"
    del sys.modules["good_plugin"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("return Good", "return Outcome", "no subclass of bdcore.Defense"),
        ("return Good", "return None", "returned None"),
        ("return Good", "return Good(PluginConfig())", "no subclass of bdcore.Defense"),
        ("return Good", "return 1 / 0", "ZeroDivisionError: division by zero (at"),
        ("def bdcore_defense", "def bdcore_attack", "no subclass of bdcore.Attack"),
        ('name = "good"', 'name = "better"', "has the name 'better', its entry point 'good'"),
        ('name = "good"', "", "has the name None"),
        ("__call__", "defend", "Define __call__"),
        (', description="how strongly it defends"', "", "does not describe strength"),
        ("class Config(PluginConfig)", "class Config", "Let it inherit bdcore.PluginConfig"),
        ('name = "good"', 'name = "good"\n    needs = frozenset({"test"})', "unknown need 'test'"),
        ("@hookimpl", "@hookimpl\ndef bdcore_attack():\n    pass\n\n@hookimpl", "bdcore_attack and bdcore_defense"),
    ],
)
def test_a_breach_of_the_contract_is_named(site, old, new, said):
    assert old in GOOD
    site.add("good-dist", {"good": "good_plugin"}, {"good_plugin.py": GOOD.replace(old, new)})
    assert said in str(refused("good"))


@pytest.mark.parametrize(
    "name", ["train", "run", "dataset", "attack", "poison", "features", "a.b", "a:b", "1st", "two words"]
)
def test_names_that_would_clash_with_options_are_refused(site, name):
    site.add("good-dist", {name: "good_plugin"}, {"good_plugin.py": GOOD})
    assert "cannot be the name of a plugin" in str(refused(name))


def test_a_plugin_of_another_kind_is_refused(site):
    site.add("good-dist", {"good": "good_plugin"}, {"good_plugin.py": GOOD})
    message = str(refused("good", "attack"))
    assert "is of kind defense" in message
    assert "attack is needed" in message


def test_two_entry_points_to_one_module_leave_the_first_in_place(site):
    site.add("good-dist", {"good": "good_plugin", "alias": "good_plugin"}, {"good_plugin.py": GOOD})
    host = Host()
    loaded = host.load("good")
    with pytest.raises(PluginError, match="alias"):
        host.load("alias")
    assert host.load("good") is loaded
    assert len(host.hook.bdcore_defense()) == 1


def test_a_refused_plugin_can_be_repaired_and_loaded_by_the_same_host(site):
    site.add("good-dist", {"good": "good_plugin"}, {"good_plugin.py": "import absent_half"})
    host = Host()
    with pytest.raises(PluginError):
        host.load("good")
    (site.folder / "good_plugin.py").write_text(GOOD)
    assert host.load("good").kind == "defense"


def test_plugins_of_one_kind_each_give_their_own_class(site):
    for name in ("one", "two", "three"):
        source = GOOD.replace('"good"', f'"{name}"')
        site.add(f"{name}-dist", {name: f"{name}_plugin"}, {f"{name}_plugin.py": source})
    host = Host()
    assert [host.load(name).cls.name for name in ("one", "two", "three")] == ["one", "two", "three"]


def test_the_hash_of_a_package_covers_every_source_beneath_it_and_nothing_else(site):
    files = {"pack/__init__.py": GOOD, "pack/losses.py": "a = 1\n", "pack/deep/more.py": "", "pack/data.txt": "1"}
    site.add("pack-dist", {"good": "pack"}, files)

    def code() -> str:
        return Host().load("good").code

    first = code()
    (site.folder / "pack" / "data.txt").write_text("2")
    (site.folder / "elsewhere.py").write_text("")
    assert code() == first
    (site.folder / "pack" / "deep" / "more.py").write_text("b = 1\n")
    second = code()
    (site.folder / "pack" / "losses.py").rename(site.folder / "pack" / "loss.py")
    third = code()
    assert len({first, second, third}) == 3


def test_what_a_plugin_prints_on_import_does_not_reach_stdout(site, capsys):
    source = GOOD.replace("    return Good", "    print('hook called')\n    return Good")
    site.add("loud-dist", {"good": "loud_plugin"}, {"loud_plugin.py": "print('hello')\n" + source})
    Host().load("good")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "hello\nhook called\n"


HOOKS = [name for name in vars(hookspecs) if name.startswith("bdcore_")]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_described(hook):
    assert inspect.getdoc(getattr(hookspecs, hook))


def test_every_hook_is_used():
    """A provider hook is one that the host loads; every other is called from somewhere in bdcore."""
    package = Path(bdcore.__file__).parent
    used = {
        node.attr
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert set(KINDS) <= set(HOOKS)
    assert set(HOOKS) - set(KINDS) - used == set()
