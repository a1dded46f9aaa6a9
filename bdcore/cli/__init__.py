"""The command `bdcore`: which commands there are, and how each error ends.

A command lives in bdcore/cli/NAME.py as `command` and is imported only when it is called, so help answers at once.
"""

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from bdcore.errors import BdcoreError, unknown_name

COMMANDS = {
    "run": "Poison, train, defend and evaluate with the plugins named.",
    "scan": "Look for a backdoor in a model of your own.",
    "defend": "Purify a model of your own, or train a clean one on doubtful data.",
    "report": "Show runs on one HTML page, several compared.",
    "new": "Write a plugin's pip package to start from.",
    "plugins": "List all plugins, and why one cannot be used.",
    "options": "List every option, of a run, of training and of each plugin.",
    "doctor": "Show versions, devices, cache, plugins and operators.",
}
"""Each command with the line that `bdcore --help` shows."""

# Disk full, over quota, read-only file system, not permitted: the user's folders, no fault of the program.
_UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 1 the run failed, 2 wrong use, 130 interrupted; `scan` has 3 for a backdoor.

    Args:
        arguments: what follows `bdcore` on the command line; None takes sys.argv.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    status = _status(given)
    try:
        sys.stdout.flush()
    except OSError:  # `_status` flushed too and told; what is left must not fail again as the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _status(arguments: list[str]) -> int:
    try:
        status: object = commands.main(arguments, prog_name="bdcore", standalone_mode=False)
        sys.stdout.flush()  # here, where a full disk or a reader that has gone is still noticed
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        return 1  # as click ends where it notices first; nobody is left to tell
    except click.Abort as error:  # click's form of ^C, and of EOFError
        interrupted = isinstance(error.__cause__, KeyboardInterrupt)
        return _failed(error if interrupted else error.__cause__ or error, arguments)
    except (Exception, KeyboardInterrupt) as error:
        return _failed(error, arguments)
    return status if isinstance(status, int) else 0


def _failed(error: BaseException, arguments: list[str]) -> int:
    if "--traceback" in arguments:
        traceback.print_exception(error)
    message, status = _verdict(error)
    click.echo(message, err=True)
    return status


def _verdict(error: BaseException) -> tuple[str, int]:
    """What to print about an error, and the exit code."""
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "interrupted", 130
    if isinstance(error, BdcoreError):
        return f"error: {error}", error.exit_code
    if _out_of_memory(error):
        detail = f" ({_one_line(error)})" if str(error) else ""
        return f"error: out of memory{detail}: take a smaller model or data set, or another --device", 1
    if _impossible_path(error):
        return f"error: a path cannot be: {_one_line(error)[:300]}", 2
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        where = f" {str(error.filename)!r}" if error.filename else ""
        todo = "free space or permit it, or choose other folders with BDCORE_CACHE and --out"
        return f"error: cannot read or write{where}: {error.strerror}; {todo}", 1
    what = f"{type(error).__name__}: {_one_line(error)}"
    return f"error: unexpected {what} (run again with --traceback, please report it)", 1


def _out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # never imported here: what did not import it cannot have raised its error
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # so torch says it of the CPU's


def _impossible_path(error: BaseException) -> bool:
    """Whether a path that somebody gave is longer than the system takes, or holds a NUL character."""
    too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    return too_long or (isinstance(error, ValueError) and "embedded null" in str(error))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


class _Lazy(click.Group):
    """A group that imports a command only to call it, and suggests names near an unknown one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"bdcore.cli.{cmd_name}").command
        if all(option.name != "traceback" for option in command.params):
            command.params.append(_traceback_option())
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(unknown_name("command", args[0], COMMANDS))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _traceback_option() -> click.Option:
    """Accepted before and after the command; `_failed` reads it from the arguments."""
    return click.Option(["--traceback"], is_flag=True, expose_value=False, help="Show the whole traceback of an error.")


@click.group(cls=_Lazy, params=[_traceback_option()], context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bdcore", message="%(prog)s %(version)s")
def commands() -> None:
    """Run backdoor attacks and defenses on image classifiers, and account for both honestly.

    The first thing to try: bdcore run --plugin mcldef
    """
