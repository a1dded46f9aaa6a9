"""The checks of a data set. Each takes a `Loading` and raises what it finds; what it returns is a remark."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from bdcore.artifacts import Dataset, fingerprint
from bdcore.contract import DatasetPlugin
from bdcore.errors import DataError
from bdcore.testing.conduct import (
    Budget,
    Conduct,
    check_budget,
    check_no_global_random,
    check_no_prints,
    honest_refusals,
    observed,
    reason,
    stir_global_random,
)
from bdcore.testing.findings import NotApplicable, broken
from bdcore.testing.installed import check_config_round_trip, check_contract, config_of
from bdcore.training import Recipe

_NONSENSE = "no such thing/at all"

_DARKEST = 16
"""Images whose brightest value is less were most likely fractions of 1 that became whole numbers."""


@dataclass
class Loading:
    """A data set under test: the class, the settings and the argument that its author gives."""

    cls: type[DatasetPlugin]
    settings: Mapping[str, Any]
    argument: str | None
    overlap: float
    budget: Budget

    def load(self, argument: str | None) -> Dataset:
        """What a new instance loads."""
        return self.cls(config_of(self.cls, self.settings)).load(argument)

    @cached_property
    def first(self) -> tuple[Dataset | None, Conduct]:
        """One loading, watched."""
        loaded: list[Dataset] = []
        seen = observed(lambda: loaded.append(self.load(self.argument)))
        return (loaded[0] if loaded else None), seen

    def worked(self) -> Dataset:
        """As `first`, where it ended well; else there is nothing to look at."""
        dataset, _ = self.first
        if not isinstance(dataset, Dataset):
            raise NotApplicable("it loads no Dataset: see the check `form`")
        return dataset


def check_form(tested: Loading) -> str:
    """Both parts hold uint8 images of one shape, over the whole range of brightness."""
    dataset, seen = tested.first
    if seen.error is not None:
        raise broken(
            f"a Dataset from the argument {tested.argument!r}",
            reason(seen.error, tested.cls),
            "mend it, or give the check an argument=... that can be loaded.",
        ) from seen.error
    if not isinstance(dataset, Dataset):
        raise broken("bdcore.Dataset", f"{type(dataset).__name__} was returned", "return Dataset(name, train, ...).")
    shapes = {name: list(part.images.shape[1:]) for name, part in (("train", dataset.train), ("test", dataset.test))}
    if shapes["train"] != shapes["test"] or shapes["train"][0] not in (1, 3):
        raise broken(
            "images of one shape in both parts, [C, H, W] with 1 or 3 channels",
            f"those of train are {shapes['train']}, those of test {shapes['test']}",
            "resize them alike; images of the form [H, W, C] need .permute(0, 3, 1, 2).contiguous().",
        )
    if not len(dataset.train) or not len(dataset.test):
        raise broken("images in both parts", "one is empty", "raise DataError where there is nothing to load.")
    brightest = int(dataset.train.images.max())
    if brightest < _DARKEST:
        raise broken(
            "values from 0 to 255",
            f"the brightest one is {brightest}",
            "multiply fractions of 1 by 255 and round before .to(torch.uint8).",
        )
    return f"{len(dataset.train)} + {len(dataset.test)} images of {shapes['train']} in {dataset.classes} classes"


def check_classes(tested: Loading) -> None:
    """Labels run from 0 to classes - 1, each is in the training set, and none is in the test set alone."""
    dataset = tested.worked()
    known, met = set(dataset.train.labels.tolist()), set(dataset.test.labels.tolist())
    if known != set(range(dataset.classes)) or dataset.classes < 2:
        raise broken(
            f"training labels from 0 to classes - 1 = {dataset.classes - 1}, each at least once, two at least",
            f"missing are {sorted(set(range(dataset.classes)) - known)[:5]}, too many are "
            f"{sorted(known - set(range(dataset.classes)))[:5]}",
            "number the classes that are there 0, 1, 2, ... and count them for classes=.",
        )
    if not met <= known:
        raise broken(
            "every class of the test set is in the training set",
            f"{sorted(met - known)[:5]} are in the test set alone",
            "leave these test images out, or split anew with equal shares of each class.",
        )


def check_no_overlap(tested: Loading) -> str:
    """No test image is among the training images, or not more than the author allows; returns the share."""
    dataset = tested.worked()
    known = {image.tobytes() for image in dataset.train.images.contiguous().numpy()}
    twice = sum(image.tobytes() in known for image in dataset.test.images.contiguous().numpy())
    share = twice / len(dataset.test)
    if share > tested.overlap:
        raise broken(
            f"at most {tested.overlap:.2%} of the test images are training images too",
            f"{twice} of {len(dataset.test)} are, to the byte ({share:.2%}): whoever learns them by heart is right",
            "drop duplicates before splitting; if they belong to a published split, say how many with overlap=...",
        )
    return f"{share:.2%} of the test images are training images too"


def check_deterministic(tested: Loading) -> None:
    """Loaded twice, it is the same to the byte, whatever the random state of the process."""
    dataset = tested.worked()
    stir_global_random()
    with honest_refusals(tested.cls):
        again = tested.load(tested.argument)
    if _prints(dataset) != _prints(again):
        raise broken(
            "loaded twice it is the same, to the byte",
            "it is another one",
            "draw and split with a generator of a fixed seed, torch.Generator().manual_seed(0), and sort file names.",
        )


def check_argument_errors(tested: Loading) -> None:
    """An argument that it cannot use, or one that is missing, is a DataError."""
    tested.worked()
    arguments = [_NONSENSE] if tested.argument is None else [_NONSENSE, None]
    for argument in arguments:
        asked = f"load({argument!r})"
        try:
            tested.load(argument)
        except DataError:
            continue
        except Exception as error:
            raise broken(
                f"{asked} raises DataError with one sentence for the user",
                reason(error, tested.cls),
                "look at the argument first: `raise DataError(f'... {argument!r} ...: write --dataset NAME:...')`.",
            ) from error
        if argument is not None:  # without one there may be a default
            raise broken(
                f"{asked} raises DataError: nobody means that",
                "it loads something",
                "refuse an argument that is not used: `if argument is not None: raise DataError(...)`.",
            )


def check_train_defaults(tested: Loading) -> None:
    """train_defaults are options of training."""
    try:
        Recipe.model_validate(dict(tested.cls.train_defaults))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise broken(
            "train_defaults holds options of train.*",
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            f"valid are {', '.join(Recipe.model_fields)}.",
        ) from error


CHECKS: dict[str, Callable[[Loading], str | None]] = {
    "contract": lambda tested: check_contract(tested.cls, "dataset", tested.settings),
    "form": check_form,
    "classes": check_classes,
    "no_overlap": check_no_overlap,
    "deterministic": check_deterministic,
    "argument_errors": check_argument_errors,
    "train_defaults": check_train_defaults,
    "config_round_trip": lambda tested: check_config_round_trip(
        tested.cls, "dataset", config_of(tested.cls, tested.settings)
    ),
    "no_prints": lambda tested: check_no_prints(tested.first[1]),
    "no_global_random": lambda tested: check_no_global_random(tested.first[1]),
    "budget": lambda tested: check_budget(tested.first[1], tested.budget),
}
"""By name, in the order in which they are best read."""


def _prints(dataset: Dataset) -> list[str]:
    parts = [dataset.train, dataset.test]
    return [fingerprint({"images": part.images, "labels": part.labels}) for part in parts]
