"""What is looked at: somebody's model in the form that every model has here, and their images."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from bdcore.artifacts import Architecture, Labelled, Victim
from bdcore.context import Context, Progress
from bdcore.errors import DataError, UsageError
from bdcore.inspection.normalisation import likeliest, normalise, parse
from bdcore.inspection.request import Request
from bdcore.models import Checkpoint, Classifier, build, load_into, manifest_of, read_checkpoint
from bdcore.samples import Samples, read_samples
from bdcore.stages.data import architecture
from bdcore.stages.evaluate import answers, share

_TRIED = 256
"""Images by which a normalisation is chosen."""
_COUNTING = 1009
"""A number of classes that no dimension of a network has by chance."""
_DOUBTFUL = 0.5
"""Accuracy on the clean images below which something about the model was probably told wrong."""


@dataclass(frozen=True)
class Subject:
    """A model and images, ready to be handed to a defense.

    Args:
        victim: the model; where none was given, an untrained one of the architecture.
        checkpoint: as it was read; None where none was given.
        clean: the defender's images, in the order in which they were read; None where none were given.
        suspect: the training set that may be poisoned; None where none was given.
        classes: names of the classes by number; empty where nobody named them.
        labelled: whether `clean` came with labels; otherwise they are the model's own answers.
        whole: whether the checkpoint is of a whole `Classifier`, as bdcore writes it, with its normalisation.
        normalisation: how the model normalises, in words.
        predicted: int64 [N], the model's answers on `clean`; None where there is no model or no clean image.
        suspect_files: of each image of `suspect` its file; empty where images are not files of their own.
    """

    victim: Victim
    checkpoint: Checkpoint | None
    clean: Labelled | None
    suspect: Labelled | None
    classes: tuple[str, ...]
    labelled: bool
    whole: bool
    normalisation: str
    predicted: Tensor | None
    suspect_files: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float | None:
        """Share of the clean images that the model gets right; None where nothing says what is right."""
        if self.predicted is None or self.clean is None or not self.labelled:
            return None
        return share(self.predicted == self.clean.labels)

    def class_name(self, number: int | None) -> str | None:
        """The name of a class, where it has one besides its number."""
        name = self.classes[number] if number is not None and number < len(self.classes) else None
        return None if name == str(number) else name


def read_subject(request: Request, context: Context) -> Subject:
    """Read model and images, and find out what nobody told: number of classes, normalisation, labels.

    Raises:
        DataError, UsageError: something cannot be read, or the parts do not fit each other.
    """
    # Where a network is named, that is what is meant; and a file is not trusted to name code that is then run.
    manifest = manifest_of(request.model) if request.model and request.arch is None else None
    clean = _images("clean images", request.clean, request, manifest, request.images, context)
    suspect = _images("suspect images", request.suspect, request, manifest, None, context)
    if clean is not None and suspect is not None and clean.images.shape[1:] != suspect.images.shape[1:]:
        raise DataError(
            f"clean images are {list(clean.images.shape[1:])}, those of the training set "
            f"{list(suspect.images.shape[1:])} (channels, height, width): bring both to one size with --size."
        )
    if suspect is not None and suspect.labels is None:
        raise DataError(f"{request.suspect}: a training set needs labels: one folder for each class, or y beside x.")
    samples = clean or suspect
    assert samples is not None, "a defense needs images of some kind"
    shape = samples.images.shape[1], samples.images.shape[2], samples.images.shape[3]

    checkpoint = read_checkpoint(request.model) if request.model else None
    model, arch = _model(request, manifest, checkpoint, shape, samples)
    model = model.to(context.device).eval()
    _try(model, samples.images[:2].to(context.device), arch)

    said = "stored with the model" if checkpoint else "by the training set's own mean and spread"
    whole = checkpoint is not None and _brought_normalisation(model)
    if whole:
        arch = replace(arch, mean=_values(model.mean, arch), std=_values(model.std, arch))
    elif checkpoint is not None:
        arch, said = _normalised(request, model, arch, clean, context)
    names = samples.classes if len(samples.classes) == arch.classes else ()
    own = suspect and _labelled("suspect", suspect, suspect.labels, arch.classes)
    files = suspect.paths if suspect is not None else ()
    if clean is None:
        return Subject(Victim(model, arch), checkpoint, None, own or None, names, False, whole, said, None, files)
    predicted = answers(model, clean.images, context)
    data = _labelled("clean", clean, predicted if clean.labels is None else clean.labels, arch.classes)
    subject = Subject(
        Victim(model, arch), checkpoint, data, own or None, names, clean.labels is not None, whole, said,
        predicted if checkpoint else None, files,
    )  # fmt: skip
    if subject.accuracy is not None and subject.accuracy < max(_DOUBTFUL, 2 / arch.classes):
        context.warn(
            f"the model gets {subject.accuracy:.1%} of the clean images right. Unless it is that bad, something was "
            "told wrong: --arch, --size, --normalize, or the numbers of the classes (folders are numbered in the order "
            "of their names, or by the number that each is named)"
        )
    return subject


def _images(
    phase: str, text: str | None, request: Request, manifest: Architecture | None, limit: int | None, context: Context
) -> Samples | None:
    if text is None:
        return None
    size = request.size or (manifest.shape[1:] if manifest else None)
    channels = manifest.shape[0] if manifest else None
    seed = context.generator("images").initial_seed() % 2**31
    return read_samples(text, size=size, channels=channels, limit=limit, seed=seed, progress=_shown(phase, context))


def _shown(phase: str, context: Context) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        rate = done / max(context.meter.seconds, 1e-9)
        context.report(Progress(phase, done, total, {}, rate, (total - done) / max(rate, 1e-9)))

    return progress


def _model(
    request: Request,
    manifest: Architecture | None,
    checkpoint: Checkpoint | None,
    shape: tuple[int, int, int],
    samples: Samples,
) -> tuple[Classifier, Architecture]:
    """The model with its parameters, not normalising yet where it is foreign, and its architecture."""
    plain = (0.0,) * shape[0], (1.0,) * shape[0]
    if manifest is not None:
        arch = manifest
    elif request.arch is None:
        raise UsageError(
            f"{request.model}: a state dict does not say which network it belongs to; name it with --arch, for "
            "instance --arch resnet18, --arch timm:vit_tiny_patch16_224 or, for your own code, --arch MODULE:FUNCTION."
        )
    elif checkpoint is None:
        assert samples.labels is not None
        arch = architecture(request.arch, Labelled(samples.images, samples.labels), _classes(samples))
    else:
        arch = Architecture(request.arch, _classes(samples), shape, *plain)
        arch = replace(arch, classes=_classes_of(arch, checkpoint))
    model = build(arch, request.settings.seed)
    if checkpoint is not None:
        load_into(model, checkpoint)
    return model, arch


def _classes(samples: Samples) -> int:
    """How many classes the images tell of: an untrained network has so many."""
    if samples.classes:
        return max(2, len(samples.classes))
    return max(2, int(samples.labels.max()) + 1) if samples.labels is not None else 2


def _classes_of(arch: Architecture, checkpoint: Checkpoint) -> int:
    """How many classes the network in `checkpoint` has: the rows of what depends on their number in `arch`."""
    probe = build(replace(arch, classes=_COUNTING), 0).net.state_dict()
    for name, value in probe.items():
        if value.ndim and value.shape[0] == _COUNTING:
            held = [kept for key, kept in checkpoint.state.items() if f".{key}".endswith(f".{name}") and kept.ndim]
            if len(held) == 1:
                return len(held[0])
    return arch.classes  # code of one's own may know by itself; what does not fit, `load_into` explains


def _try(model: Classifier, images: Tensor, arch: Architecture) -> None:
    """Raise where the network cannot take such images or gives no logits."""
    try:
        with torch.no_grad():
            logits = model(images)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UsageError(
            f"{arch.name} cannot take images of {list(images.shape[1:])} (channels, height, width): "
            f"{' '.join(str(error).split())}. Another --size?"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (len(images), arch.classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(
            f"{arch.name} must give logits [{len(images)}, {arch.classes}] for two images, it gives {got}."
        )


def _brought_normalisation(model: Classifier) -> bool:
    """Whether the checkpoint was that of a whole `Classifier`, and brought its normalisation."""
    return bool((model.mean != 0).any() or (model.std != 1).any())


def _values(buffer: Tensor, arch: Architecture) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in buffer.flatten()[: arch.shape[0]].tolist())


def _normalised(
    request: Request, model: Classifier, arch: Architecture, clean: Samples | None, context: Context
) -> tuple[Architecture, str]:
    if request.normalize is not None:
        mean, std = parse(request.normalize, arch.shape[0])
        return normalise(model, arch, mean, std), f"{request.normalize}, as told"
    if clean is None or clean.labels is None:
        context.warn(
            "the images have no labels, so how the model normalises cannot be found out: taken to be not at all. If it "
            "was trained with a normalisation, name it with --normalize"
        )
        return arch, "none"
    data = _labelled("clean", clean, clean.labels, arch.classes)
    few = torch.linspace(0, len(data) - 1, min(_TRIED, len(data))).round().long()
    arch, name = likeliest(model, arch, data.select(few), context)
    return arch, f"{name}, which suits the clean images best"


def _labelled(what: str, samples: Samples, labels: Tensor | None, classes: int) -> Labelled:
    assert labels is not None
    if len(labels) and int(labels.max()) >= classes:
        named = samples.classes[int(labels.max())] if samples.classes else str(int(labels.max()))
        raise DataError(
            f"{samples.name}: the {what} images have class {int(labels.max())} ({named}), the model's classes are 0 to "
            f"{classes - 1}. Name the folders by the numbers that the model gives them."
        )
    assert prod(samples.images.shape), "read_samples refuses empty sets"
    return Labelled(samples.images, labels)
