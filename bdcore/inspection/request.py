"""What `bdcore scan` and `bdcore defend` were asked, checked before any work."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from bdcore.artifacts import Need
from bdcore.config import Chosen, Settings, choose
from bdcore.contract import Defense
from bdcore.errors import UsageError
from bdcore.inspection.normalisation import read
from bdcore.models import check_name

if TYPE_CHECKING:
    from bdcore.plugins import Host


@dataclass(frozen=True)
class Request:
    """One inspection.

    Args:
        command: what is wanted: a verdict, or a purified model.
        model: a checkpoint; None where no defense needs a model.
        arch: the name of its architecture; None where a manifest beside it says.
        clean, suspect: where images are, as `bdcore.samples.read_samples` takes it; None where nothing needs them.
        size: height and width that images are brought to; None keeps theirs.
        normalize: as `normalisation.parse` takes it; None tries the common ones.
        images: how many clean images are taken, at most.
        settings: seed, device and precision.
        defenses: in order, each on the model as it was.
        observers: plugins that are told of progress.
        out: where the result goes: a file for `defend`, a folder for `scan`, None for one named after the scan.
    """

    command: Literal["scan", "defend"]
    model: Path | None
    arch: str | None
    clean: str | None
    suspect: str | None
    size: tuple[int, int] | None
    normalize: str | None
    images: int
    settings: Settings
    defenses: tuple[Chosen, ...]
    observers: tuple[Chosen, ...]
    out: Path | None

    @property
    def needs(self) -> frozenset[str]:
        """What the defenses need together."""
        return frozenset().union(*(cast(type[Defense], chosen.plugin.cls).needs for chosen in self.defenses))

    def record(self) -> dict[str, Any]:
        """All that changes a number, as JSON values; what is None is left out."""
        run = self.settings.model_dump(mode="json", include={"seed", "device", "precision"})
        asked = {
            "model": str(self.model) if self.model else None,
            "arch": self.arch,
            "clean": self.clean,
            "suspect": self.suspect,
            "size": list(self.size) if self.size else None,
            "normalize": self.normalize,
            "images": self.images,
        }
        return {
            "command": self.command,
            "plugins": [chosen.plugin.name for chosen in self.defenses],
            **{name: value for name, value in asked.items() if value is not None},
            "run": run,
            **{
                chosen.plugin.name: chosen.config.model_dump(mode="json", exclude_none=True) for chosen in self.defenses
            },
        }


def ask(
    host: "Host",
    command: Literal["scan", "defend"],
    *,
    plugins: Sequence[str],
    model: Path | None = None,
    arch: str | None = None,
    clean: str | None = None,
    suspect: str | None = None,
    size: str | None = None,
    normalize: str | None = None,
    images: int = 2500,
    seed: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    settings: Sequence[str] = (),
    out: Path | None = None,
) -> Request:
    """Load the plugins and check that everything that they need was given.

    Args:
        size: N or HEIGHTxWIDTH.
        settings: KEY=VALUE texts, KEY being NAME.OPTION of a plugin; the rest as in `Request`.

    Raises:
        UsageError: for what cannot be, saying what to give.
    """
    chosen = choose(host, plugins, settings, {"seed": seed, "device": device, "precision": precision})
    if not chosen.defenses:
        raise UsageError(f"bdcore {command} needs a defense: name one with --plugin, for instance --plugin mcldef.")
    if command == "scan" and len(chosen.defenses) > 1:
        names = " and ".join(repr(one.plugin.name) for one in chosen.defenses)
        raise UsageError(f"a scan has one plugin that judges, here are {names}.")
    if command == "defend" and out is not None and not out.name:
        raise UsageError(f"--out {out}: must name a file.")
    if command == "defend" and out is None:
        out = Path(f"{model.stem}-purified{model.suffix}" if model else "trained.safetensors")
    request = Request(
        command, model, arch, clean, suspect, _size(size), normalize, images,
        chosen.settings, chosen.defenses, chosen.observers, out,
    )  # fmt: skip
    for defense in request.defenses:
        needs = cast(type[Defense], defense.plugin.cls).needs
        if command == "scan":
            _check_judging(defense.plugin.name, needs)
        for need, given, option in (
            ("model", model, "--model FILE"),
            ("clean", clean, "--clean DATA"),
            ("suspect", suspect, "--suspect DATA"),
        ):
            if need in needs and given is None:
                raise UsageError(f"plugin {defense.plugin.name!r} needs {_WHAT[need]}: give {option}.")
    if normalize is not None:
        read(normalize)
    if model is not None and not model.exists():
        raise UsageError(f"there is no file {model}: --model names the checkpoint to look at.")
    if arch is not None:
        check_name(arch)
    elif model is None:
        raise UsageError(f"bdcore {command} needs --arch where there is no --model: which network shall be trained?")
    return request


def _check_judging(name: str, needs: frozenset[Need]) -> None:
    """Raise where a plugin cannot judge a model by clean images, saying what to do with it instead."""
    if "model" in needs and "suspect" not in needs:
        return
    reason = "needs the training set as well, which a scan does not take"
    if "model" not in needs:
        reason = "judges no model: it trains one on data"
    options = {"model": "--model FILE", "arch": "--arch NAME", "clean": "--clean DATA", "suspect": "--suspect DATA"}
    given = " ".join(option for need, option in options.items() if need in needs)
    raise UsageError(f"plugin {name!r} {reason}. Instead: bdcore defend --plugin {name} {given}")


_WHAT = {"model": "a model", "clean": "clean images", "suspect": "the training set that may be poisoned"}


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, x, width = text.partition("x")
    try:
        sides = int(height), int(width if x else height)
    except ValueError:
        sides = 0, 0
    if not all(1 <= side <= 4096 for side in sides):
        raise UsageError(f"--size {text}: must be N or HEIGHTxWIDTH, in pixels from 1 to 4096, for instance 224.")
    return sides
