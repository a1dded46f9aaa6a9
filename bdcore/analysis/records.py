"""What a record.json must hold to be reported, checked; whatever else stands in one is left alone.

Figures are fractions of 1, None where nothing can be measured. Records of schema 1 have no command, curves, poison or
features.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

SCHEMAS = (1, 2)
"""Schemas that can be read."""


def _list(value: object) -> object:
    # A list of JSON is taken for a tuple, so that a record is frozen; a text is none.
    return tuple(value) if isinstance(value, list) else value


Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Names = Annotated[tuple[str, ...], BeforeValidator(_list)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, strict=True, protected_namespaces=())


class Cost(_Part):
    """What a stage took."""

    seconds: Annotated[float, Field(ge=0)] | None = None
    peak_memory_bytes: Count | None = None
    images: Count | None = None


class Found(_Part):
    """A verdict; `evidence` a class, larger: more suspicious. `correct` only where the truth is known."""

    backdoored: bool
    target: Count | None
    evidence: Annotated[tuple[float | None, ...], BeforeValidator(_list)] = ()
    correct: bool | None = None
    target_rank: Count | None = None
    class_name: str | None = None
    confidence: Fraction | None = None


class Isolated(_Part):
    """How many samples were set aside, and how well they match the poisoned ones."""

    isolated: Count
    precision: Fraction | None = None
    recall: Fraction | None = None
    fpr: Fraction | None = None
    f1: Fraction | None = None
    auroc: Fraction | None = None


class Inverted(_Part):
    """A recovered trigger: its class, its success on the model that it was recovered from and, where a defense was
    given somebody's own model, on the purified one; its size in pixels."""

    target: Count
    asr: Fraction | None
    asr_after: Fraction | None = None
    size: float


class Victim(Cost):
    """The classifier as the attack left it."""

    clean_accuracy: Fraction
    asr: Fraction | None
    ra: Fraction | None
    target_class_accuracy: Fraction | None
    nontarget_accuracy: Fraction | None


class Defended(Cost):
    """A defense's scores and finds; `agreement` is what `bdcore defend` measures in place of attack success."""

    name: str
    clean_accuracy: Fraction | None
    asr: Fraction | None = None
    ra: Fraction | None = None
    target_class_accuracy: Fraction | None = None
    nontarget_accuracy: Fraction | None = None
    der: Fraction | None = None
    agreement: Fraction | None = None
    verdict: Found | None
    isolation: Isolated | None
    triggers: Annotated[tuple[Inverted, ...], BeforeValidator(_list)]
    notes: dict[str, Any] = {}


class Used(_Part):
    """A plugin of the run; `oracle`: what it was told that a defender does not know; `needs`: what it was given."""

    name: str
    kind: str
    distribution: str
    version: str
    oracle: Names
    needs: Names | None = None


class Epoch(_Part):
    """One epoch of a phase of training, with its mean figures."""

    phase: str
    epoch: Count
    epochs: Count
    figures: dict[str, float | None]


class Artifact(_Part):
    """A file of the run folder."""

    path: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class DataSet(_Part):
    """The data of a run."""

    name: str
    train: Count
    test: Count
    classes: Count


class Poison(_Part):
    """How much was poisoned; `triggered` counts the test images that attack success was measured on."""

    count: Count
    rate: Fraction
    class_rate: Fraction | None
    triggered: Count | None = None


class Given(_Part):
    """The model that `bdcore defend` or `bdcore scan` was handed; one that is trained from nothing has no file."""

    path: str | None
    sha256: str | None
    form: str | None
    arch: dict[str, Any]
    clean_accuracy: Fraction | None = None


class Images(_Part):
    """Images that were handed over."""

    source: str
    images: Count
    classes: Any = None
    labelled: bool | None = None


class Identity(_Part):
    """Which run."""

    id: str


class Record(Cost):
    """A record of `bdcore run`, `bdcore defend` or `bdcore scan`; its own cost is that of a scan."""

    command: Literal["run", "defend", "scan"] = "run"
    run: Identity
    config: dict[str, Any]
    seed: int | None = None
    plugins: Annotated[tuple[Used, ...], BeforeValidator(_list)] = ()
    versions: dict[str, str]
    device: dict[str, str | int | float | None]
    curves: dict[str, Annotated[tuple[Epoch, ...], BeforeValidator(_list)]] = {}
    warnings: dict[str, Annotated[tuple[str, ...], BeforeValidator(_list)]] = {}
    artifacts: dict[str, Artifact]
    figures: dict[str, str]
    dataset: DataSet | None = None
    poison: Poison | None = None
    attack: Cost | None = None
    victim: Victim | None = None
    defenses: Annotated[tuple[Defended, ...], BeforeValidator(_list)] = ()
    model: Given | None = None
    clean: Images | None = None
    suspect: Images | None = None
    verdict: Found | None = None
    calibration: dict[str, Any] | None = None
    triggers: Annotated[tuple[Inverted, ...], BeforeValidator(_list)] = ()

    @model_validator(mode="after")
    def _complete(self) -> "Record":
        needed = {"run": ("dataset", "victim"), "scan": ("model", "verdict")}
        for name in needed.get(self.command, ()):
            if getattr(self, name) is None:
                raise ValueError(f"a record of `bdcore {self.command}` has {name}")
        if self.command == "run" and any(done.clean_accuracy is None for done in self.defenses):
            raise ValueError("a record of `bdcore run` has each defense's clean_accuracy")
        if self.victim and self.victim.asr is not None and any(done.asr is None for done in self.defenses):
            raise ValueError("a record of `bdcore run` has each defense's asr where its victim has one")
        return self
