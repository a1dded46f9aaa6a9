"""What stages hand on, one way only: Dataset -> Poisoned -> Victim -> DefenseInput/Outcome -> Scores.

Images are uint8 [N, C, H, W] tensors, labels int64 [N]. Every artifact is frozen; those that hold tensors have a
`fingerprint`, the SHA-256 of their content, by which later stages are cached.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from bdcore.errors import DataError

Need = Literal["model", "clean", "suspect", "arch"]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of `tensors`, independent of their order, device and strides."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


@dataclass(frozen=True)
class Labelled:
    """Images with their labels.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].

    Raises:
        DataError: where dtypes or shapes are others.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(f"images must be uint8 [N, C, H, W], got {self.images.dtype} {tuple(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"labels must be int64 [{len(self.images)}], got {self.labels.dtype} {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of images and labels."""
        return fingerprint({"images": self.images, "labels": self.labels})

    def select(self, index: Tensor) -> "Labelled":
        """A copy of the samples at `index` (int64 [M] or bool [N]) that shares no memory with this one."""
        return Labelled(self.images[index].clone(), self.labels[index].clone())

    def to(self, device: torch.device) -> "Labelled":
        """The same samples on `device`."""
        return Labelled(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A data set in its two official parts; `classes` is the number of classes."""

    name: str
    train: Labelled
    test: Labelled
    classes: int

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over both parts."""
        return hashlib.sha256(f"{self.train.fingerprint}{self.test.fingerprint}{self.classes}".encode()).hexdigest()


@dataclass(frozen=True)
class Triggered:
    """Test images that carry the trigger; samples that the attack does not count (its target class) are left out.

    Args:
        images: uint8 [M, C, H, W].
        labels: int64 [M], the true classes.
        targets: int64 [M], the classes that the attacker wants.
        source: int64 [M], places in the test set of the images that they were made of, where there is one each.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor
    source: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All that is there, by name."""
        found = {name: getattr(self, name) for name in ("images", "labels", "targets", "source")}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Poisoned:
    """The attacker's work: the training set as its victim sees it, and the secrets that only evaluation may use.

    Args:
        train: the training set, some of it poisoned.
        poisoned: bool [N], which samples are; all False where there is no attack.
        triggered: the triggered test set, None where there is no attack.
        target: the target class; None where there is no attack or no single target (all-to-all).
    """

    train: Labelled
    poisoned: Tensor
    triggered: Triggered | None
    target: int | None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the training set that results; what else is here follows from the same seed."""
        return self.train.fingerprint


@dataclass(frozen=True)
class Architecture:
    """What is needed to build an untrained classifier: a name of `bdcore.models` and the form of its data.

    `mean` and `std` (one value a channel, for images in [0, 1]) are the normalisation inside the model.
    """

    name: str
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Victim:
    """A trained classifier, in eval mode, and how to build another like it."""

    model: nn.Module
    arch: Architecture

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of parameters and buffers."""
        return fingerprint(self.model.state_dict())


@dataclass(frozen=True)
class DefenseInput:
    """What a defense is given: what it declared in `needs`, and nothing else (the rest is None).

    It never holds test images, poison flags, the target class or the true trigger. It is read-only: the host checks
    afterwards that the model and tensors are as they were.

    Args:
        classes: the number of classes.
        model: the suspicious classifier; takes uint8 or [0, 1] float images [B, C, H, W], returns logits.
        clean: the defender's own small clean set.
        suspect: the training set, perhaps poisoned.
        arch: how to build an untrained classifier.
    """

    classes: int
    model: nn.Module | None = None
    clean: Labelled | None = None
    suspect: Labelled | None = None
    arch: Architecture | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether the model is backdoored, towards which class, and the evidence a class (larger: more suspicious)."""

    backdoored: bool
    target: int | None = None
    evidence: tuple[float, ...] = ()


@dataclass(frozen=True)
class Trigger:
    """A recovered trigger, in one of three forms.

    Args:
        target: the class that it leads to.
        delta: float [C, H, W], added to images in [0, 1]: x' = clamp(x + delta, 0, 1).
        mask, pattern: float [1, H, W] and [C, H, W] in [0, 1], blended in: x' = (1 - mask) x + mask pattern.
        patches: float [K, C, h, w] in [0, 1], samples of a distribution of patches, each of which is put over the image
            at any place.
    """

    target: int
    delta: Tensor | None = None
    mask: Tensor | None = None
    pattern: Tensor | None = None
    patches: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All that is there, by name."""
        found = {name: getattr(self, name) for name in ("delta", "mask", "pattern", "patches")}
        return {name: value for name, value in found.items() if value is not None}

    def to(self, device: torch.device) -> "Trigger":
        """The same trigger on `device`."""
        return Trigger(self.target, **{name: value.to(device) for name, value in self.tensors().items()})


@dataclass(frozen=True)
class Suspects:
    """Training samples that a defense holds to be poisoned.

    Args:
        index: int64 [K], their places in the suspect set, each once.
        scores: floating point [N], how suspicious every sample of the set is (larger: more); None where only some were
            picked out.
    """

    index: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """What a defense returns; evaluation scores whatever is there.

    Args:
        model: the purified classifier; None leaves the model as it was.
        verdict: whether there is a backdoor.
        triggers: recovered triggers.
        notes: short facts worth recording, for instance a chosen threshold.
        suspects: training samples that look poisoned.
    """

    model: nn.Module | None = None
    verdict: Verdict | None = None
    triggers: tuple[Trigger, ...] = ()
    notes: Mapping[str, float | int | str] = field(default_factory=dict[str, float | int | str])
    suspects: Suspects | None = None


@dataclass(frozen=True)
class Scores:
    """Figures of one classifier, as fractions of 1.

    Args:
        clean_accuracy: accuracy on all test images (BA).
        asr: triggered images of non-target classes sent to the target; None where there is no attack.
        ra: the same images given their true class; None where there is no attack.
        target_class_accuracy: accuracy on the target class's test images; None without a single target.
        nontarget_accuracy: accuracy on the other classes' test images; None without a single target.
    """

    clean_accuracy: float
    asr: float | None
    ra: float | None
    target_class_accuracy: float | None
    nontarget_accuracy: float | None


@dataclass(frozen=True)
class Isolation:
    """How well suspects match the poisoned samples, as fractions of 1; None where a figure has no meaning.

    Args:
        isolated: number of suspects.
        precision: share of the suspects that are poisoned.
        recall: share of the poisoned samples that are suspects.
        fpr: share of the clean samples that are suspects.
        f1: harmonic mean of precision and recall.
        auroc: chance that a poisoned sample scores above a clean one, ties counting half.
    """

    isolated: int
    precision: float | None
    recall: float | None
    fpr: float | None
    f1: float | None
    auroc: float | None


@dataclass(frozen=True)
class Recovered:
    """What a recovered trigger is worth on the model that it was recovered from.

    Args:
        target: the class that it leads to.
        asr: share of the test images of other classes that it sends there.
        size: how much of an image it changes, in pixels: the sum of the mask, of the largest change in a channel, or
            the area of the patch.
    """

    target: int
    asr: float | None
    size: float
