"""What a run shows on stderr while it goes on: bars on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from bdcore.hookspecs import hookimpl

if TYPE_CHECKING:
    from bdcore.context import Progress
    from bdcore.plugins import Host

# A log keeps every line: enough of them to see that it goes on, few enough to read.
_SECONDS_BETWEEN_LINES = 5.0
_SHARE_BETWEEN_LINES = 0.1
_LONGEST_SILENCE = 60.0


@contextmanager
def shown(host: "Host") -> Generator[None]:
    """Show the progress of what `host` runs on stderr, until the block ends, however it ends."""
    console = Console(stderr=True, highlight=False)
    if not (sys.stderr.isatty() and console.is_interactive):
        host.observe(ProgressLines())
        yield
        return
    bars = ProgressBars(console)
    host.observe(bars)
    with bars:
        yield


class ProgressBars:
    """An observer that draws one bar a training phase, with rate, remaining time and loss, and a line a stage."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[state]}", markup=False),
            console=console,
            transient=True,
        )
        self._working: TaskID | None = None
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def __enter__(self) -> "ProgressBars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @hookimpl
    def bdcore_run_started(self, config: Mapping[str, Any]) -> None:
        """Say what runs, and show that it is alive before its first epoch ends."""
        self._print(_describe_run(config))
        self._working = self._bars.add_task("working", total=None, state="")

    @hookimpl
    def bdcore_epoch_finished(self, stage: str, progress: "Progress") -> None:
        """Move the bar of this phase; the other phases of the stage are over and leave."""
        key, state = (stage, progress.phase), _describe_state(progress)
        self._remove(keep=key)
        if self._working is not None:
            self._bars.update(self._working, visible=False)
        if key in self._tasks:
            self._bars.update(self._tasks[key], completed=progress.epoch, state=state)
        else:
            self._tasks[key] = self._bars.add_task(
                _describe_phase(stage, progress), total=progress.epochs, completed=progress.epoch, state=state
            )

    @hookimpl
    def bdcore_stage_finished(self, stage: str, cached: bool, seconds: float) -> None:
        """Leave a line for the stage in place of its bars."""
        self._remove()
        if self._working is not None:
            self._bars.update(self._working, visible=True)
        self._print(_describe_stage(stage, cached, seconds))

    @hookimpl
    def bdcore_warning(self, message: str) -> None:
        """Show a warning above the bars."""
        self._print(f"warning: {message}", style="yellow")

    def _remove(self, keep: tuple[str, str] | None = None) -> None:
        for key in [key for key in self._tasks if key != keep]:
            self._bars.remove_task(self._tasks.pop(key))

    def _print(self, line: str, style: str | None = None) -> None:
        self._bars.console.print(line, style=style, markup=False, soft_wrap=True)


class ProgressLines:
    """An observer that writes plain lines, few of them: some 10 a phase or one a minute, and each phase's last."""

    def __init__(self) -> None:
        self._last_time = monotonic()
        self._last_share: dict[tuple[str, str], float] = {}

    @hookimpl
    def bdcore_run_started(self, config: Mapping[str, Any]) -> None:
        """Say what runs."""
        self._print(_describe_run(config))

    @hookimpl
    def bdcore_epoch_finished(self, stage: str, progress: "Progress") -> None:
        """Write a line where enough time and enough of the phase, or a minute, have passed, or the phase has ended."""
        key, share, silence = (stage, progress.phase), progress.epoch / progress.epochs, monotonic() - self._last_time
        far = share - self._last_share.get(key, 0.0) >= _SHARE_BETWEEN_LINES or silence >= _LONGEST_SILENCE
        ended = progress.epoch == progress.epochs or progress.seconds_left == 0
        if ended or (far and silence >= _SECONDS_BETWEEN_LINES):
            self._last_share[key] = share
            unit = "" if stage == "data" else "epoch "  # what is read is counted in images
            self._print(f"{_describe_phase(stage, progress)}: {unit}{_describe_state(progress)}")

    @hookimpl
    def bdcore_stage_finished(self, stage: str, cached: bool, seconds: float) -> None:
        """Write a line for the stage."""
        self._print(_describe_stage(stage, cached, seconds))

    @hookimpl
    def bdcore_warning(self, message: str) -> None:
        """Write a warning."""
        self._print(f"warning: {message}")

    def _print(self, line: str) -> None:
        self._last_time = monotonic()
        click.echo(line, err=True)


def _describe_run(config: Mapping[str, Any]) -> str:
    if "command" in config:  # a model or data of the user's own
        about = config.get("model") or config.get("suspect")
        return f"{config['command']} {about} with {' '.join(config['plugins'])}, seed {config['run']['seed']}"
    attack = "no attack" if config["no_attack"] else ""
    plugins = " ".join(filter(None, [attack, *config["plugins"]]))
    return f"{plugins} on {config['dataset']['name']}, {config['run']['model']}, seed {config['run']['seed']}"


def _describe_phase(stage: str, progress: "Progress") -> str:
    return stage if stage == progress.phase else f"{stage}: {progress.phase}"


def _describe_state(progress: "Progress") -> str:
    parts = [f"{progress.epoch}/{progress.epochs}"]
    if "loss" in progress.figures:
        parts.append(f"loss {progress.figures['loss']:.3g}")
    left = timedelta(seconds=round(progress.seconds_left))
    return ", ".join([*parts, f"{progress.images_per_second:,.0f} images/s", f"{left} left"])


def _describe_stage(stage: str, cached: bool, seconds: float) -> str:
    return f"{stage}: from the cache" if cached else f"{stage}: done in {seconds:.1f} s"
