"""`bdcore plugins`, in real processes, beside distributions that break in every way."""

import json
import os
import pty
import subprocess
import sys

import pytest

GOOD = """
from bdcore import Defense, Outcome, hookimpl


class Good(Defense):
    name = "good"

    def __call__(self, given, context):
        return Outcome()


@hookimpl
def bdcore_defense():
    return Good
"""

NEWER = "open({!r}, 'w').close()\n"


@pytest.fixture(scope="module")
def crowd(new_site):
    """A good plugin among broken ones."""
    site = new_site()
    site.add("good-dist", {"good": "good_plugin"}, {"good_plugin.py": GOOD}, version="1.2.3")
    site.add("raises-dist", {"raises": "raises_plugin"}, {"raises_plugin.py": "raise RuntimeError('[red]no[/red]')"})
    site.add("exits-dist", {"exits": "exits_plugin"}, {"exits_plugin.py": "import sys\nsys.exit('bye')"})
    loud = "print('{}')\n" + GOOD.replace('"good"', '"loud"')
    site.add("loud-dist", {"loud": "loud_plugin"}, {"loud_plugin.py": loud})
    typo = GOOD.replace("def bdcore_defense", "def bdcore_defence")
    site.add("typo-dist", {"typo": "typo_plugin"}, {"typo_plugin.py": typo})
    trace = NEWER.format(str(site.folder / "imported"))
    site.add("newer-dist", {"newer": "newer_plugin"}, {"newer_plugin.py": trace}, requires=["bdcore>=99"])
    site.add("twin-one", {"twin": "twin_one"}, {"twin_one.py": GOOD})
    site.add("twin-two", {"twin": "twin_two"}, {"twin_two.py": GOOD})
    return site


def test_json_lists_all_with_their_reasons_and_nothing_else_on_stdout(crowd):
    done = crowd.bdcore("plugins", "--json")
    assert done.returncode == 0
    rows = {(row["name"], row["distribution"]): row for row in json.loads(done.stdout)}
    assert rows["good", "good-dist"] == {
        "name": "good",
        "kind": "defense",
        "distribution": "good-dist",
        "version": "1.2.3",
        "status": "ok",
    }
    assert rows["loud", "loud-dist"]["status"] == "ok"
    assert "{}" in done.stderr
    reasons = {
        ("raises", "raises-dist"): "RuntimeError: [red]no[/red]",
        ("exits", "exits-dist"): "SystemExit: bye",
        ("typo", "typo-dist"): "Did you mean bdcore_defense",
        ("newer", "newer-dist"): "it needs bdcore >=99",
        ("twin", "twin-one"): "twin-two 1.0 (twin_two)",
        ("twin", "twin-two"): "twin-one 1.0 (twin_one)",
    }
    for key, reason in reasons.items():
        assert reason in rows[key]["status"]
        assert "\n" not in rows[key]["status"]
        assert rows[key]["kind"] is None
    assert not (crowd.folder / "imported").exists()
    first_party = {name for name, distribution in rows if distribution == "bdcore"}
    assert {"digits", "npz", "cifar10", "badnets", "blended", "mcldef", "finetune"} <= first_party


def test_the_piped_table_has_one_uncut_line_a_plugin_without_control_codes(crowd):
    done = crowd.bdcore("plugins", COLUMNS="40")
    assert done.returncode == 0
    header, *lines = done.stdout.rstrip("\n").split("\n")
    assert header.split() == ["name", "kind", "distribution", "version", "status"]
    by_name = {line.split()[0]: line for line in lines}
    assert by_name["good"].split() == ["good", "defense", "good-dist", "1.2.3", "ok"]
    assert f"RuntimeError: [red]no[/red] (at {crowd.folder / 'raises_plugin.py'}:1 in <module>)" in by_name["raises"]
    assert "\x1b" not in done.stdout


def test_on_a_terminal_long_reasons_are_folded_not_cut():
    row = {"name": "bad", "kind": None, "distribution": "bad-dist", "version": "1.0", "status": "[x]" * 100}
    program = [sys.executable, "-c", f"from bdcore.cli.plugins import show; show([{row}])"]
    leader, follower = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    with subprocess.Popen(program, stdout=follower, stderr=subprocess.PIPE, env=env) as process:
        os.close(follower)
        shown = b""
        while chunk := _read(leader):
            shown += chunk
        assert process.wait() == 0
        assert process.stderr.read() == b""
    os.close(leader)
    assert shown.count(b"x") == 100
    assert shown.count(b"\n") > 300 // 80
    assert b"bad-dist" in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so that the other end is closed
        return b""


def test_interrupting_an_import_ends_with_130(new_site):
    site = new_site()
    # Whatever started the tests may have let SIGINT be ignored, which children inherit.
    source = "import os, signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    source += "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    site.add("slow-dist", {"a": "slow_plugin"}, {"slow_plugin.py": source})
    done = site.bdcore("plugins", "--json")
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr.strip() == "interrupted"
