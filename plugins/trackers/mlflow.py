"""MLflow: a run's options as parameters, curves and final figures as metrics, pictures and record as artifacts.

Where nothing is said, MLflow decides where that goes: its variable MLFLOW_TRACKING_URI, else `mlflow.db` in the working
folder. Curves have one point an epoch, its number as the step; final figures have the step 0. Every repetition is a run
of its own, as MLflow has it; where the cache answered, its curves come from the record.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from bdcore import Observer, PluginConfig, Progress, UsageError, hookimpl

from . import kept

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SECONDS_BETWEEN_REQUESTS = 5.0  # short epochs must not wait for a server each
_METRICS_A_REQUEST = 1000  # these three are MLflow's limits
_OPTIONS_A_REQUEST = 100
_LONGEST_OPTION = 6000


class MLflow(Observer):
    """Keep a run in MLflow."""

    name = "mlflow"

    class Config(PluginConfig):
        """Options of MLflow."""

        uri: str | None = Field(
            None, min_length=1, description="tracking store or server, for instance sqlite:///mlflow.db or http://host"
        )
        experiment: str = Field("bdcore", min_length=1, description="MLflow's experiment that the run belongs to")

    config: Config

    @hookimpl
    def bdcore_run_started(self, config: Mapping[str, Any], run_id: str, folder: Path) -> None:
        """Begin a run of MLflow with the options."""
        self._run_folder = folder
        self._curves = kept.Curves()
        self._waiting: list[kept.Point] = []
        self._sent_at = time.monotonic()
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Param
            from mlflow.exceptions import MlflowException

            try:
                self._client = MlflowClient(self.config.uri)
                experiment = _experiment(self._client, self.config.experiment)
                run = self._client.create_run(experiment, run_name=run_id, tags={"bdcore.run": run_id})
                self._run: str = run.info.run_id
                options = [Param(name, str(value)[:_LONGEST_OPTION]) for name, value in kept.options(config).items()]
                for first in range(0, len(options), _OPTIONS_A_REQUEST):
                    self._client.log_batch(self._run, params=options[first : first + _OPTIONS_A_REQUEST])
            except MlflowException as error:
                message = " ".join(str(error).split()).removesuffix(".")
                raise UsageError(
                    f"plugin 'mlflow' cannot begin a run of experiment {self.config.experiment!r}: {message}. Another "
                    "place is chosen with --set mlflow.uri=URI, another experiment with --set mlflow.experiment=NAME."
                ) from error
        except ImportError as error:
            raise UsageError(
                f"plugin 'mlflow' needs a library that is missing ({error}): pip install 'bdcore[mlflow]'."
            ) from error

    @hookimpl
    def bdcore_epoch_finished(self, stage: str, progress: Progress) -> None:
        """Add the epoch's figures to their curves."""
        self._waiting += self._curves.heard(stage, progress)
        if time.monotonic() - self._sent_at >= _SECONDS_BETWEEN_REQUESTS:
            self._send()

    @hookimpl
    def bdcore_stage_finished(self, stage: str) -> None:
        """Let a reader see what there is so far."""
        self._send()

    @hookimpl
    def bdcore_run_finished(self, record: Mapping[str, Any]) -> None:
        """Add what is left of curves, the final figures, pictures and the record; end as finished."""
        self._waiting += self._curves.unheard(record)
        self._waiting += ((name, value, 0) for name, value in kept.figures(record).items())
        self._send()
        for file in ("record.json", *record["figures"].values()):
            self._client.log_artifact(self._run, str(self._run_folder / file))
        self._client.set_terminated(self._run, "FINISHED")

    @hookimpl
    def bdcore_run_failed(self, error: BaseException) -> None:
        """Say why; end as failed, or as killed where the user interrupted it."""
        self._send()
        self._client.set_tag(self._run, "bdcore.error", f"{type(error).__name__}: {error}")
        self._client.set_terminated(self._run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def _send(self) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(name, value, now, epoch) for name, value, epoch in self._waiting]
        for first in range(0, len(points), _METRICS_A_REQUEST):
            self._client.log_batch(self._run, metrics=points[first : first + _METRICS_A_REQUEST])
        self._waiting.clear()
        self._sent_at = time.monotonic()


def _experiment(client: "MlflowClient", name: str) -> str:
    """The number of the experiment called `name`, which is made where there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name)
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process may have made it at the same time
            if found is None:
                raise
    return found.experiment_id


@hookimpl
def bdcore_observer() -> type[Observer]:
    """The class behind the name `mlflow`."""
    return MLflow
