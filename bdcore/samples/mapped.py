"""Decoded images on disk, mapped into memory.

A set of images is a folder CACHE/samples/KEY with the file `pixels`, uint8 [N, C, H, W] and nothing else, and a
manifest.json; it appears by one rename, so it is there whole or not at all. KEY is a hash of the files and of the form
that was asked for.
"""

import json
import mmap
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import closing
from math import prod
from pathlib import Path
from time import monotonic
from typing import Any, cast

import PIL
import torch
from torch import Tensor

from bdcore.errors import StoreError
from bdcore.samples.decoding import Form, decoded, quiet, shape_of
from bdcore.samples.pictures import Pictures
from bdcore.store import Damaged, Store, digest, explained, sha256_file, write_json, write_parts

_SCHEMA = 1
_PROGRESS_SECONDS = 0.05
# Else the kernel refuses to map a file larger than its memory, as if all of it might be written to.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def stored(pictures: Pictures, form: Form, name: str, progress: Callable[[int, int], None] | None = None) -> Tensor:
    """The images in that form, uint8 [N, C, H, W], from the cache, into which they are decoded where they are not.

    The tensor is a private map of the file: reading takes pages of it, writing to the tensor never alters it, and the
    map stays good if the file is deleted. A file that was truncated or altered is noticed, said as a warning, and made
    again; its checksum is computed only where its time of modification is not the one it was written at. Two processes
    that want the same images decode them once: the second waits.

    Args:
        pictures: the images.
        form: what to bring them to.
        name: of all of them, for errors.
        progress: told (images done, of how many), at most 20 times a second, and at the end.

    Raises:
        DataError: where an image cannot be read, or the form cannot be found.
        StoreError: where the cache cannot be read or written.
    """
    store = Store()
    asked = {"schema": _SCHEMA, "pillow": PIL.__version__, "size": form.size, "channels": form.channels}
    key = digest({**asked, "pictures": pictures.key()})
    folder = store.root / "samples" / key
    images = _intact(folder)
    if images is None:
        with store.building("samples", key) as work:
            images = _intact(folder)  # another process may have made it meanwhile
            if images is None:
                _build(pictures, form, name, folder, work, progress)
                images = _read(folder)
    return images


def _intact(folder: Path) -> Tensor | None:
    with explained(folder, "read"):
        if not folder.exists():
            return None
    try:
        return _read(folder)
    except Damaged as damage:
        warnings.warn(f"decoded images were altered or truncated ({damage}); they are decoded again", stacklevel=4)
        return None


def _read(folder: Path) -> Tensor:
    """The map of a set of images. Raises Damaged where it is not what was written."""
    manifest, pixels = folder / "manifest.json", folder / "pixels"
    with explained(folder, "read"):
        try:
            loaded = json.loads(manifest.read_bytes())
            facts = cast("dict[str, Any]", loaded) if isinstance(loaded, dict) else {}
            whole = facts.pop("digest", None) == digest(facts)
            found = pixels.stat()
        except (FileNotFoundError, ValueError) as error:
            raise Damaged(f"{folder}: {error}") from error
        if not whole or found.st_size != prod(facts["shape"]):
            raise Damaged(f"{pixels if whole else manifest}")
        if found.st_mtime_ns != facts["modified"] and sha256_file(pixels) != facts["sha256"]:
            raise Damaged(f"{pixels}")
        with open(pixels, "rb") as file:
            flags, access = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            mapped = mmap.mmap(file.fileno(), found.st_size, flags=flags, prot=access)
    return torch.frombuffer(mapped, dtype=torch.uint8).reshape(facts["shape"])


def _build(
    pictures: Pictures,
    form: Form,
    name: str,
    folder: Path,
    work: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Decode into `work`, then move to `folder`; what stood there is damaged."""
    made = work / "made"
    try:
        with explained(work, "write"):
            for old in work.iterdir():  # of a process that was killed
                shutil.rmtree(old)
            made.mkdir()
        with quiet():
            shape = (len(pictures), *shape_of(pictures, form, name))
            _check_space(work, prod(shape))
            with closing(_blocks(pictures, shape, name, progress)) as blocks:
                sha256 = write_parts(made / "pixels", blocks)
        with explained(folder, "write"):
            facts = {"shape": shape, "sha256": sha256, "modified": (made / "pixels").stat().st_mtime_ns}
            write_json(made / "manifest.json", {**facts, "digest": digest(facts)})
            folder.parent.mkdir(parents=True, exist_ok=True)
            if folder.exists():
                os.rename(folder, work / "damaged")
            os.rename(made, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)  # nothing of it is of use to the next attempt
        raise


def _blocks(
    pictures: Pictures, shape: tuple[int, ...], name: str, progress: Callable[[int, int], None] | None
) -> Generator[memoryview]:
    """The bytes of the decoded images, with progress told as it is due."""
    last = monotonic()

    def told(done: int) -> None:
        nonlocal last
        if progress and (done == len(pictures) or monotonic() - last >= _PROGRESS_SECONDS):
            last = monotonic()
            progress(done, len(pictures))

    _, channels, height, width = shape
    with closing(decoded(pictures, (channels, height, width), name, told)) as blocks:
        for block in blocks:
            yield block.data.cast("B")


def _check_space(work: Path, needed: int) -> None:
    """Say before hours of decoding what can be known then. Raises StoreError."""
    with explained(work, "write"):
        free = shutil.disk_usage(work).free
    if free < needed:
        raise StoreError(
            f"cannot write {work}: the decoded images take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. "
            "Give a smaller size or fewer images, or choose another folder with BDCORE_CACHE."
        )
