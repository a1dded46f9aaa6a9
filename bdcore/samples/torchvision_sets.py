"""torchvision's data sets for image classification, by class name."""

import inspect
import os
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bdcore.errors import DataError
from bdcore.samples.pictures import Arrays, Files, Found, Items, Pictures, stamp

_DEFAULT_ROOT = "./data"
_DOCUMENTED = "https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.{}.html"

# What is in torchvision beside: detection, segmentation, captions, video, flow, stereo, pairs, attributes, and classes
# that need more than a folder.
_OTHER_TASKS = frozenset(
    """
    CREStereo CarlaStereo CelebA Cityscapes CocoCaptions CocoDetection DatasetFolder ETH3DStereo FakeData
    FallingThingsStereo Flickr30k Flickr8k FlyingChairs FlyingThings3D HD1K HMDB51 InStereo2k Kinetics Kitti
    Kitti2012Stereo Kitti2015Stereo KittiFlow LFWPairs LSUN LSUNClass Middlebury2014Stereo MovingMNIST PhotoTour
    SBDataset SBU SceneFlowStereo Sintel SintelStereo UCF101 VOCDetection VOCSegmentation VisionDataset WIDERFace
    """.split()  # noqa: SIM905
)


def find(text: str) -> Found:
    """The data set `NAME[/PART][:ROOT]`. Raises DataError where there is none, or its files are not there."""
    head, _, folder = text.partition(":")
    name, *parts = head.split("/")
    root = Path(os.path.expanduser(folder or _DEFAULT_ROOT))
    kind = _kind(name, text)
    options = _options(name, kind, parts)
    dataset = _opened(name, kind, root, options)
    image, label = _first(name, root, dataset)
    if not isinstance(image, Image.Image) or not _is_class(label):
        raise DataError(
            f"torchvision's {name} is no data set for image classification: an item is {type(image).__name__} with "
            f"{type(label).__name__}, not an image with a class number"
        )
    image.close()
    labels = _labels(dataset, label)
    return Found("/".join([name, *parts]), _pictures(name, dataset, root, options), labels, _names(dataset, labels))


def is_name(text: str) -> bool:
    """Whether `text` names a torchvision data set, of whatever kind."""
    import torchvision.datasets

    return text.partition(":")[0].partition("/")[0] in torchvision.datasets.__all__


def _kind(name: str, text: str) -> Any:
    import torchvision.datasets

    if name in _OTHER_TASKS:
        raise DataError(f"torchvision's {name} is no data set for image classification, which is what is needed here")
    kinds = {
        known: getattr(torchvision.datasets, known)
        for known in torchvision.datasets.__all__
        if inspect.isclass(getattr(torchvision.datasets, known)) and known not in _OTHER_TASKS
    }
    if name in kinds:
        return kinds[name]
    by_lower = {known.lower(): known for known in kinds}
    near = [by_lower[lower] for lower in get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise DataError(
        f"unknown images {text!r}: write folder:DIR, npz:FILE or the name of a torchvision data set, as CIFAR10/test "
        f"or GTSRB:ROOT.{hint} Valid names: {', '.join(sorted(kinds))}."
    )


def _options(name: str, kind: Any, parts: Sequence[str]) -> dict[str, Any]:
    """What the constructor is called with besides the root, from the parts that the user wrote."""
    parameters = _parameters(kind)
    options, left = dict[str, Any](), list(parts)
    if "split" in parameters:
        if left:
            options["split"] = left.pop(0)
        elif parameters["split"].default is inspect.Parameter.empty:
            raise DataError(f"{name} has several parts: write {name}/SPLIT, as {_DOCUMENTED.format(name)} names them")
    if "train" in parameters:
        part = left.pop(0) if left else "train"
        if part not in ("train", "test"):
            raise DataError(f"{name} has no part {part!r}: write {name}/train or {name}/test")
        options["train"] = part == "train"
    if left:
        raise DataError(f"{name} has no part {left[0]!r}: write {'/'.join([name, *parts[: -len(left)]])}")
    if "download" in parameters:
        options["download"] = False
    return options


def _parameters(kind: Any) -> dict[str, inspect.Parameter]:
    """Of the constructor, and of those it hands what it does not know itself."""
    found = dict[str, inspect.Parameter]()
    for above in kind.__mro__:
        own = inspect.signature(above.__init__).parameters if "__init__" in vars(above) else {}
        found = {**own, **found}
        if own and not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in own.values()):
            break
    return found


def _opened(name: str, kind: Any, root: Path, options: dict[str, Any]) -> Any:
    if "split" not in options and not os.path.isdir(root):  # which some of these classes would make
        raise DataError(_absent(name, root, options, "there is no such folder"))
    try:
        with warnings.catch_warnings():
            # Python 2 wrote CIFAR's files; NumPy 2.4.0 to 2.4.4 warn of an outdated argument in such pickles.
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
            dataset = kind(str(root), **options)
        if len(dataset) == 0:
            raise DataError(f"{name} in {root} holds no images")
        return dataset
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{name} cannot be read: {error}. Install what is missing.") from error
    except ValueError as error:
        raise DataError(f"{name} cannot be read from {root}: {error}") from error
    except Exception as error:  # each class says in its own way that files are missing or damaged
        reason = str(error).partition(" You can use download")[0].strip() or type(error).__name__
        raise DataError(_absent(name, root, options, reason)) from error


def _absent(name: str, root: Path, options: dict[str, Any], reason: str) -> str:
    given = "".join(f", {key}={value!r}" for key, value in options.items() if key != "download")
    fetch = f'python -c "from torchvision.datasets import {name}; {name}({str(root)!r}{given}, download=True)"'
    how = f"fetch them once with: {fetch}" if "download" in options else f"see {_DOCUMENTED.format(name)}"
    return (
        f"the files of {name} are not in {root}, or damaged ({reason}). Nothing is downloaded here: {how}; or name "
        f"their folder with {name}:ROOT"
    )


def _first(name: str, root: Path, dataset: Any) -> tuple[Any, Any]:
    try:
        item = dataset[0]
    except Exception as error:  # whatever the damage is
        raise DataError(f"the first image of {name} in {root} cannot be read: {error}") from error
    return item if isinstance(item, tuple) and len(item) == 2 else (item, None)


def _is_class(label: Any) -> bool:
    # A part without labels gives None or -1.
    return label is None or (isinstance(label, (int, np.integer)) and not isinstance(label, bool)) or _is_scalar(label)


def _is_scalar(label: Any) -> bool:
    return isinstance(label, Tensor) and label.ndim == 0 and not label.is_floating_point()


def _labels(dataset: Any, first: Any) -> Tensor | None:
    """Class numbers, from a list that the data set keeps, else item by item; None where it has none."""
    if first is None or int(first) < 0:
        return None
    for name in ("targets", "labels", "_labels", "y"):
        kept = getattr(dataset, name, None)
        if kept is not None and len(kept) == len(dataset):
            numbers = np.asarray(kept)
            if numbers.ndim == 1 and numbers.dtype.kind in "iu" and numbers[0] == int(first):
                return torch.from_numpy(numbers.astype(np.int64))
    pairs = _pairs(dataset)
    numbers = [label for _, label in pairs] if pairs else [_label(dataset, index) for index in range(len(dataset))]
    return torch.tensor(numbers, dtype=torch.int64)


def _label(dataset: Any, index: int) -> int:
    image, label = dataset[index]
    image.close()
    return int(label)


def _names(dataset: Any, labels: Tensor | None) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None)
    if labels is None or not isinstance(names, (list, tuple)) or len(names) <= int(labels.max()):
        return ()
    # ImageNet gives several words for a class.
    return tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in names)


def _pictures(name: str, dataset: Any, root: Path, options: dict[str, Any]) -> Pictures:
    """Arrays or files where the data set keeps them, which is faster than item by item."""
    arrays = _arrays(dataset)
    if arrays is not None:
        return Arrays(arrays)
    paths = _paths(dataset)
    if paths:
        return Files(paths)
    origin = [name, sorted(options.items()), [stamp(path) for path in _files_below(root)]]
    return Items(lambda index: dataset[index][0], np.arange(len(dataset)), origin)


def _arrays(dataset: Any) -> NDArray[np.uint8] | None:
    """The attribute `data` as [N, C, H, W], read so that its ends are as the items there are; None where it is not."""
    data = getattr(dataset, "data", None)
    data = data.numpy() if isinstance(data, Tensor) else data
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or len(data) != len(dataset):
        return None
    readings = [data[:, None]] if data.ndim == 3 else [data, data.transpose(0, 3, 1, 2)] if data.ndim == 4 else []
    ends = {place: _planar(dataset[place][0]) for place in (0, len(dataset) - 1)}
    for read in readings:
        if all(np.array_equal(read[place], item) for place, item in ends.items()):
            return np.require(read, requirements=["C", "W"])
    return None


def _planar(image: Image.Image) -> NDArray[np.uint8]:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _paths(dataset: Any) -> list[str]:
    """Paths of the image files, one an item; empty where the data set keeps none."""
    pairs = _pairs(dataset)
    if pairs:
        return [path for path, _ in pairs]
    for name in ("_image_files", "_images", "data"):
        kept = getattr(dataset, name, None)
        if isinstance(kept, list) and len(kept) == len(dataset) and all(isinstance(p, (str, Path)) for p in kept):
            return [str(path) for path in kept]
    return []


def _pairs(dataset: Any) -> list[tuple[str, int]]:
    """(path, class number) of each item, as data sets of the form of ImageFolder keep them; empty elsewhere."""
    for name in ("samples", "_samples", "imgs"):
        kept = getattr(dataset, name, None)
        if isinstance(kept, list) and len(kept) == len(dataset) and isinstance(kept[0][0], (str, Path)):
            return [(str(path), int(label)) for path, label in kept]
    return []


def _files_below(root: Path) -> list[str]:
    return sorted(os.path.join(folder, file) for folder, _, files in os.walk(root) for file in files)
