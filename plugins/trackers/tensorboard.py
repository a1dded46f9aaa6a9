"""TensorBoard: a run's curves, final figures, hyperparameters, pictures and record as an event file.

`tensorboard --logdir runs` shows all runs beneath it. Curves have one point an epoch, its number as the step; final
figures have the step 0. A run that is repeated replaces its event file, whose curves come from the record where the
cache answered, so they are whole either way.
"""

# pyright: reportAttributeAccessIssue=false
# The classes of a protocol buffer exist only once it is imported.

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from bdcore import Observer, PluginConfig, Progress, UsageError, hookimpl

from . import kept


class TensorBoard(Observer):
    """Write an event file."""

    name = "tensorboard"

    class Config(PluginConfig):
        """Options of TensorBoard."""

        folder: Path | None = Field(
            None, description="where each run gets a folder of its name; else it is `tensorboard` in the run's folder"
        )

    config: Config

    @hookimpl
    def bdcore_run_started(self, config: Mapping[str, Any], run_id: str, folder: Path) -> None:
        """Begin the event file with the hyperparameters."""
        try:
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams
        except ImportError as error:
            raise UsageError(
                f"plugin 'tensorboard' needs a library that is missing ({error}): pip install 'bdcore[tensorboard]'."
            ) from error

        self._run_folder = folder
        events = self.config.folder / run_id if self.config.folder else folder / "tensorboard"
        try:
            for earlier in events.glob("events.out.tfevents.*"):
                earlier.unlink()
            self._writer = SummaryWriter(str(events))
        except OSError as error:
            raise UsageError(
                f"plugin 'tensorboard' cannot write to {events}: {error}. Choose another folder with "
                "--set tensorboard.folder=DIR."
            ) from error
        self._curves = kept.Curves()
        self._options = kept.options(config)
        _, start, _ = hparams(self._options, {})
        self._add(start)
        self._writer.flush()

    @hookimpl
    def bdcore_epoch_finished(self, stage: str, progress: Progress) -> None:
        """Add the epoch's figures to their curves."""
        for curve, value, epoch in self._curves.heard(stage, progress):
            self._writer.add_scalar(curve, value, epoch)

    @hookimpl
    def bdcore_stage_finished(self, stage: str) -> None:
        """Let a reader see what there is so far."""
        self._writer.flush()

    @hookimpl
    def bdcore_run_finished(self, record: Mapping[str, Any]) -> None:
        """Add what is left of curves, the final figures, pictures and the record; end with success."""
        from torch.utils.tensorboard.summary import hparams

        for curve, value, epoch in self._curves.unheard(record):
            self._writer.add_scalar(curve, value, epoch)
        figures = kept.figures(record)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, 0)
        for name, file in record["figures"].items():
            with Image.open(self._run_folder / file) as picture:
                self._writer.add_image(name, np.asarray(picture.convert("RGB")), 0, dataformats="HWC")
        without_curves = {name: value for name, value in record.items() if name != "curves"}
        self._writer.add_text("record", f"```json\n{json.dumps(without_curves, indent=2)}\n```", 0)
        # Which columns TensorBoard's table of runs has beside the hyperparameters.
        columns, _, _ = hparams(self._options, figures)
        self._add(columns)
        self._end("STATUS_SUCCESS")

    @hookimpl
    def bdcore_run_failed(self, error: BaseException) -> None:
        """Say why; end with failure."""
        self._writer.add_text("failure", f"    {type(error).__name__}: {error}", 0)
        self._end("STATUS_FAILURE")

    def _end(self, status: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.Value(status))
        content = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end))
        summary = Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=content)])
        self._add(summary)
        self._writer.close()

    def _add(self, summary: Any) -> None:
        assert self._writer.file_writer is not None, "it is until the writer is closed"
        self._writer.file_writer.add_summary(summary)


@hookimpl
def bdcore_observer() -> type[Observer]:
    """The class behind the name `tensorboard`."""
    return TensorBoard
