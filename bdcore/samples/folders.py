"""Image files in a folder, with a folder a class or none."""

import os
from pathlib import Path

import torch

from bdcore.errors import DataError
from bdcore.samples.pictures import Files, Found

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .gif .webp .bmp .ppm .pgm .pbm .pnm .tif .tiff .jp2 .avif".split()  # noqa: SIM905
)
_PARTS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})
_LARGEST_CLASS = 99_999


def find(root: Path) -> Found:
    """The images below `root`, in the order of torchvision's ImageFolder: class, then folder, then file name.

    Raises:
        DataError: where there is none, or it is not clear what class they are of.
    """
    if os.path.isfile(root):
        raise DataError(f"{root} is a file, not a folder: name the folder that holds the images")
    name = f"folder:{os.path.basename(os.path.abspath(root))}"
    files, folders, skipped = _listed(root)
    classes = list[tuple[str, list[str]]]()
    for folder in folders:
        below, passed = _below(folder, {_identity(str(root))})
        classes.append((os.path.basename(folder), below))
        skipped += passed
    labelled = any(below for _, below in classes)
    if not labelled and not files:
        beside = f" ({skipped} others: hidden, or no images by their names)" if skipped else ""
        raise DataError(f"{root} holds no images{beside}: an image's name ends in {', '.join(sorted(SUFFIXES))}")
    if not labelled:
        return Found(name, Files(sorted(files)), None, (), skipped)
    if files:
        raise DataError(
            f"{root} holds class folders ({_some([known for known, _ in classes])}), and beside them images of no "
            f"class ({_some([os.path.basename(path) for path in sorted(files)])}): move these to their class or away"
        )
    numbers, names = _numbered(root, classes)
    labels = [number for number, (_, below) in zip(numbers, classes, strict=True) for _ in below]
    paths = [path for _, below in classes for path in below]
    return Found(name, Files(paths), torch.tensor(labels, dtype=torch.int64), names, skipped)


def _numbered(root: Path, classes: list[tuple[str, list[str]]]) -> tuple[list[int], tuple[str, ...]]:
    """The class number of each folder, and the names of all classes by number."""
    names = [name for name, _ in classes]
    if {name.lower() for name in names} <= _PARTS:
        raise DataError(
            f"{root} holds {_some(names)}, which are parts of a data set and no classes: name one of them, as "
            f"folder:{root / names[0]}"
        )
    digits = [name for name in names if name.isascii() and name.isdigit()]
    if digits and len(digits) < len(names):
        others = [name for name in names if name not in digits]
        raise DataError(
            f"{root} holds folders that are class numbers ({_some(digits)}) and others ({_some(others)}): number all "
            "of them or none, and move away what is no class"
        )
    if digits:
        return _by_number(root, names)
    empty = [name for name, below in classes if not below]
    if empty:
        raise DataError(
            f"{root}: no images in {_some(empty)}. Classes are numbered in the order of their names, so an empty one "
            "cannot be left out unsaid: remove it, or name all class folders by the model's class numbers (0, 1, ...)"
        )
    if len(classes) == 1:
        raise DataError(
            f"{root} has a single class folder, {names[0]!r}, which says nothing of the class's number: name the "
            f"folder by its number, or for unlabelled images write folder:{root / names[0]}"
        )
    return list(range(len(names))), tuple(names)


def _by_number(root: Path, names: list[str]) -> tuple[list[int], tuple[str, ...]]:
    numbers = [int(name) for name in names]
    if max(numbers) > _LARGEST_CLASS:
        raise DataError(f"{root}: folder {names[numbers.index(max(numbers))]!r} is too large a number for a class")
    known = dict(zip(numbers, names, strict=True))
    if len(known) < len(numbers):
        twice = next(name for number, name in zip(numbers, names, strict=True) if known[number] != name)
        raise DataError(f"{root}: folders {twice!r} and {known[int(twice)]!r} mean one class: put them together")
    return numbers, tuple(known.get(number, str(number)) for number in range(max(numbers) + 1))


def _below(folder: str, seen: set[tuple[int, int]]) -> tuple[list[str], int]:
    """The images at any depth below `folder` and the number of others; each real folder is entered once."""
    images, skipped, ahead = list[str](), 0, [folder]
    while ahead:
        current = ahead.pop()
        identity = _identity(current)
        if identity in seen:
            continue
        seen.add(identity)
        files, folders, others = _listed(Path(current))
        images += files
        ahead += folders
        skipped += others
    return sorted(images, key=os.path.split), skipped


def _listed(folder: Path) -> tuple[list[str], list[str], int]:
    """Image files and sub-folders of one folder, by name, and the number of others."""
    files, folders, skipped = list[str](), list[str](), 0
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            if entry.name.startswith("."):
                skipped += 1
            elif entry.is_dir():
                folders.append(entry.path)
            # A link to nowhere is listed: that an image is missing must be said.
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and (entry.is_file() or _broken(entry)):
                files.append(entry.path)
            else:
                skipped += 1
    except (FileNotFoundError, ValueError) as error:  # a path may hold what no path can
        raise DataError(f"there is no folder {folder}: name the one that holds the images") from error
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read: {error.strerror}") from error
    return files, folders, skipped


def _broken(entry: "os.DirEntry[str]") -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _identity(folder: str) -> tuple[int, int]:
    try:
        found = os.stat(folder)
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read: {error.strerror}") from error
    return found.st_dev, found.st_ino


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
