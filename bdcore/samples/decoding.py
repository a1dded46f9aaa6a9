"""From Pillow's images to uint8 pixels of one form, in parallel."""

import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from bdcore.errors import DataError

if TYPE_CHECKING:
    from bdcore.samples.pictures import Pictures

_Result = TypeVar("_Result")

_GREY_MODES = ("1", "L", "LA", "La", "I", "F")
_NAMED = 10
_BATCH_IMAGES, _BATCH_BYTES = 32, 8 << 20
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Form:
    """What images are to be brought to: (height, width) and channels; None where the images are to decide."""

    size: tuple[int, int] | None
    channels: int | None

    @classmethod
    def checked(cls, size: tuple[int, int] | None, channels: int | None) -> Self:
        """A form that can be. Raises DataError."""
        if size is not None and min(size) < 1:
            raise DataError(f"a size of {_across(size)} pixels is none: give a height and a width of at least 1")
        if channels not in (None, 1, 3):
            raise DataError(f"images have 1 channel (grey) or 3 (RGB), not {channels}")
        return cls(size, channels)


def shape_of(pictures: "Pictures", form: Form, name: str) -> tuple[int, int, int]:
    """(C, H, W) of the form, what it leaves open found from the headers of all images.

    Raises:
        DataError: where the size is open and the images' sizes differ, or where no image can be read.
    """
    if form.size is not None and form.channels is not None:
        return form.channels, *form.size

    def headers(batch: range) -> list[tuple[tuple[int, int], bool] | None]:
        return [_header(pictures, index) for index in batch]

    found = [header for batch in in_order(headers, len(pictures), 256) for header in batch if header is not None]
    if not found:
        raise unreadable(pictures, name, ((index, _reason(pictures, index)) for index in range(len(pictures))))
    sizes = {size for size, _ in found}
    if form.size is None and len(sizes) > 1:
        smallest, largest = min(sizes, key=prod), max(sizes, key=prod)
        raise DataError(
            f"the images of {name} are of {len(sizes)} sizes, from {_across(smallest)} to {_across(largest)} (height x "
            "width): say which size to bring them to, with --size 224, or in a run with --set dataset.size=224"
        )
    return form.channels or (1 if all(grey for _, grey in found) else 3), *(form.size or sizes.pop())


def decoded(
    pictures: "Pictures", shape: tuple[int, int, int], name: str, told: Callable[[int], None]
) -> Generator[NDArray[np.uint8]]:
    """The pixels of all images in their order, as blocks uint8 [B, C, H, W].

    Args:
        pictures: the images.
        shape: (C, H, W).
        name: of all of them, for errors.
        told: called with the number of images done, after each block.

    Raises:
        DataError: at the end, if an image could not be read; it names the first few.
    """
    failures = list[tuple[int, str]]()
    done = 0

    def block(batch: range) -> tuple[NDArray[np.uint8], list[tuple[int, str]]]:
        out, failed = np.empty((len(batch), *shape), np.uint8), list[tuple[int, str]]()
        for place, index in enumerate(batch):
            try:
                with pictures.open(index) as image:
                    out[place] = pixels(image, shape)
            except Exception as error:  # a damaged file can make a decoder raise anything; all of it is reported
                failed.append((index, _said(error)))
        return out, failed

    at_once = max(1, min(_BATCH_IMAGES, _BATCH_BYTES // prod(shape)))
    for images, failed in in_order(block, len(pictures), at_once):
        failures += failed
        if not failures:
            yield images
        done += len(images)
        told(done)
    if failures:
        raise unreadable(pictures, name, failures)


def pixels(image: Image.Image, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The image as uint8 [C, H, W], by the rules that `read_samples` states. Raises what Pillow raises."""
    channels, height, width = shape
    grey = channels == 1 or is_grey(image)  # so as its header says; grey is faster to scale
    image.load()
    ImageOps.exif_transpose(image, in_place=True)  # after loading: a PNG's orientation may stand behind its pixels
    image = _eight_bits(image)
    if image.has_transparency_data:
        above = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
    image = image.convert("L" if grey else "RGB")
    if (image.height, image.width) != (height, width):
        image = _centre(image, height, width)
    flat = np.asarray(image)
    return np.broadcast_to(flat, shape) if grey else flat.transpose(2, 0, 1)


def is_grey(image: Image.Image) -> bool:
    """Whether the image is grey by its form: its mode, or a palette of greys; equal channels of RGB do not count."""
    if image.mode in ("P", "PA") and image.palette is not None:
        palette = image.getpalette("RGB") or []
        return palette[0::3] == palette[1::3] == palette[2::3]
    return image.mode in _GREY_MODES or image.mode.startswith("I;16")


def in_order(function: Callable[[range], _Result], count: int, at_once: int) -> Generator[_Result]:
    """`function` of consecutive ranges of `count` places, `at_once` each, computed in threads.

    Threads, as decoders let go of the interpreter: they are faster here than processes, which must hand pixels over.
    Few results wait at a time, so memory does not grow with `count`.
    """
    workers = min(16, _usable_cores())
    waiting = deque[Future[_Result]]()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="bdcore-decode")
    try:
        for start in range(0, count, at_once):
            waiting.append(pool.submit(function, range(start, min(start + at_once, count))))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def quiet() -> Generator[None]:
    """Without Pillow's warnings, of damaged metadata and of large images: pixels count, and it refuses what is far too
    large with an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        yield


def unreadable(pictures: "Pictures", name: str, failures: Iterable[tuple[int, str]]) -> DataError:
    """One error for all images that cannot be read: [(place, reason)]."""
    listed = list(failures)
    first = "; ".join(f"{pictures.name(index)} ({reason})" for index, reason in listed[:_NAMED])
    more = f"; and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    which = "1 image" if len(listed) == 1 else f"{len(listed)} images"
    return DataError(
        f"{which} of {len(pictures)} in {name} cannot be read: {first}{more}. Remove them or replace them."
    )


def _header(pictures: "Pictures", index: int) -> tuple[tuple[int, int], bool] | None:
    """((height, width) once turned, whether it is grey); None where it cannot be read, which decoding reports."""
    try:
        with pictures.open(index) as image:
            width, height = image.size
            if _turned(image):
                width, height = height, width
            return (height, width), is_grey(image)
    except Exception:  # decoding meets and reports it
        return None


def _turned(image: Image.Image) -> bool:
    # Pillow gives a TIFF's size as turned already; to look behind a PNG's pixels would be to decode it.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return False
    return image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)


def _reason(pictures: "Pictures", index: int) -> str:
    try:
        with pictures.open(index) as image:
            image.load()
    except Exception as error:  # whatever it is, it is the answer
        return _said(error)
    return "its header cannot be read"


def _said(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image, or damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8: Pillow's own conversion would cut off all above 255."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: convert it to 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels need more than 16 bits: convert it to 8 or 16 bits")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _centre(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scaled until it just covers height x width, the centre cut out; rounded as torchvision rounds."""
    if height * image.width >= width * image.height:
        covering = max(width, height * image.width // image.height), height
    else:
        covering = width, width * image.height // image.width
    image = image.resize(covering, Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _across(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _usable_cores() -> int:
    # A job may be bound to fewer cores than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
