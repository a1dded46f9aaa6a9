"""How the command line ends: exit codes, one line an error, tracebacks only on request."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

from bdcore import cli
from bdcore.errors import BdcoreError, UsageError

BDCORE = Path(sys.executable).with_name("bdcore")


@pytest.fixture
def ending(monkeypatch, capsys):
    """Run a command that raises, in this process; returns the exit code, stdout and stderr."""

    def run(error: BaseException | None, *arguments: str) -> tuple[object, str, str]:
        @click.command("fail")
        def command() -> None:
            if error is not None:
                raise error

        module = ModuleType("bdcore.cli.fail")
        module.command = command
        monkeypatch.setitem(sys.modules, "bdcore.cli.fail", module)
        monkeypatch.setitem(cli.COMMANDS, "fail", "Fail.")
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments or ["fail"])
        return caught.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (BdcoreError("the loss is no number"), 1, "error: the loss is no number\n"),
        (UsageError("no such thing"), 2, "error: no such thing\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (MemoryError(), 1, "error: out of memory: take a smaller model or data set, or another --device\n"),
    ],
)
def test_each_error_has_its_code_and_one_line(ending, error, code, said):
    assert ending(error) == (code, "", said)


@pytest.mark.parametrize("error", [ValueError("two\nlines"), EOFError("two lines"), RuntimeError("two  lines")])
def test_an_unexpected_error_is_one_line_that_asks_for_a_report(ending, error):
    code, out, err = ending(error)
    assert (code, out) == (1, "")
    said = f"error: unexpected {type(error).__name__}: two lines (run again with --traceback, please report it)\n"
    assert err.lstrip("\n") == said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_named(ending, number):
    code, _, err = ending(OSError(number, os.strerror(number), "/some/folder"))
    assert code == 1
    assert err.startswith(f"error: cannot read or write '/some/folder': {os.strerror(number)}; ")
    assert "BDCORE_CACHE" in err


def test_torch_out_of_memory_is_told_as_such(ending):
    torch = pytest.importorskip("torch")
    code, _, err = ending(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"))
    assert code == 1
    assert err.startswith("error: out of memory (CUDA out of memory. Tried to allocate 9 GiB)")


@pytest.mark.parametrize("arguments", [["--traceback", "fail"], ["fail", "--traceback"]])
@pytest.mark.parametrize("error", [UsageError("no such thing"), ValueError("odd")])
def test_traceback_is_shown_on_request_before_and_after_the_command(ending, arguments, error):
    error.__cause__ = ZeroDivisionError("the first cause")
    _, out, err = ending(error, *arguments)
    assert out == ""
    assert "Traceback (most recent call last)" in err
    assert "ZeroDivisionError: the first cause" in err
    assert "error: " in err.splitlines()[-1]


def test_wrong_use_ends_with_2_and_the_nearest_command():
    unknown = subprocess.run([BDCORE, "docter"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2
    assert "unknown command 'docter'. Did you mean doctor?" in unknown.stderr
    option = subprocess.run([BDCORE, "plugins", "--jsn"], capture_output=True, text=True, check=False)
    assert option.returncode == 2
    assert "--jsn" in option.stderr
    assert "Traceback" not in unknown.stderr + option.stderr


def test_help_lists_every_command_and_each_can_be_imported(ending):
    code, out, _ = ending(None, "--help")
    assert code == 0
    for name in cli.COMMANDS:
        assert f"  {name} " in out
        context = click.Context(cli.commands)
        assert cli.commands.get_command(context, name).name == name
        assert ending(None, name, "--help")[1].count("--traceback") == 1


def test_version_is_the_installed_one(ending):
    from importlib.metadata import version

    assert ending(None, "--version") == (0, f"bdcore {version('bdcore')}\n", "")


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen([BDCORE, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


def test_a_full_disk_under_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([BDCORE, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot read or write: No space left on device")
    assert done.stderr.count("\n") == 1
