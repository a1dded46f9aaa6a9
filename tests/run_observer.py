"""What several tests hear of a run."""

from bdcore import hookimpl


class Observer:
    """What a run told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, bool]] = []
        self.warnings: list[str] = []
        self.epochs: list[str] = []
        self.ends: list[str] = []

    @hookimpl
    def bdcore_stage_finished(self, stage: str, cached: bool) -> None:
        self.stages.append((stage, cached))

    @hookimpl
    def bdcore_epoch_finished(self, stage: str) -> None:
        self.epochs.append(stage)

    @hookimpl
    def bdcore_warning(self, message: str) -> None:
        self.warnings.append(message)

    @hookimpl
    def bdcore_run_started(self) -> None:
        self.ends.append("started")

    @hookimpl
    def bdcore_run_finished(self) -> None:
        self.ends.append("finished")

    @hookimpl
    def bdcore_run_failed(self) -> None:
        self.ends.append("failed")

    @property
    def computed(self) -> list[str]:
        return [stage for stage, cached in self.stages if not cached]
