"""Pictures for people: what an attack does to images, and what trigger a defense recovered.

Pixels are enlarged a whole number of times and never smoothed, so that what is seen is what is there. One channel is
drawn grey, three in colour, of any other number the mean. Tiles lie flush with the right and lower margin.
"""

from collections.abc import Sequence
from math import ceil

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bdcore.artifacts import Trigger

MARGIN, GAP = 8, 4
"""Pixels around a picture and between its tiles."""

AMPLIFIED = 10
"""What `contact_sheet` multiplies differences by."""

_TILE = 96  # at least half as wide where an image is smaller
_PATCH = 48
_FONT = ImageFont.load_default(14)
_LINE = 17
_WHITE, _INK = (255, 255, 255), (32, 32, 32)


def contact_sheet(clean: Tensor, triggered: Tensor) -> Image.Image:
    """Images above their triggered forms above the difference times ten, where mid grey is no difference.

    Args:
        clean: uint8 [N, C, H, W], one column each.
        triggered: the same images with the trigger, uint8 [N, C, H, W].

    Raises:
        ValueError: where there is no image, or shapes or dtypes are others.
    """
    rows = comparison(clean, triggered)
    return grid(rows, ("clean", "triggered", f"difference x {AMPLIFIED}"))


def comparison(clean: Tensor, triggered: Tensor) -> tuple[list[Image.Image], list[Image.Image], list[Image.Image]]:
    """The three rows of `contact_sheet` as tiles: clean, triggered, 128 + 10 (triggered - clean)."""
    if clean.ndim != 4 or not len(clean) or clean.shape != triggered.shape:
        raise ValueError(
            "a contact sheet takes two tensors [N, C, H, W] of one shape, N at least 1, got "
            f"{list(clean.shape)} and {list(triggered.shape)}"
        )
    if clean.dtype != torch.uint8 or triggered.dtype != torch.uint8:
        raise ValueError(f"a contact sheet takes uint8 images, got {clean.dtype} and {triggered.dtype}")
    difference = 128 + AMPLIFIED * (triggered.short() - clean.short())
    return _tiles(clean), _tiles(triggered), _tiles(difference.clamp(0, 255).byte())


def patch_sheet(patches: Tensor) -> Image.Image:
    """Samples of a recovered trigger distribution, eight in a row.

    Args:
        patches: float [K, C, h, w] in [0, 1], as in `Trigger.patches`.

    Raises:
        ValueError: where there is no patch, or the shape is another.
    """
    if patches.ndim != 4 or not len(patches):
        raise ValueError(f"patches must be [K, C, h, w] with K at least 1, got {list(patches.shape)}")
    tiles = _tiles(_bytes(patches), _PATCH)
    return grid([tiles[start : start + 8] for start in range(0, len(tiles), 8)])


def trigger_picture(trigger: Trigger) -> Image.Image:
    """All that a defense says of a trigger, part by part, and beside it a mid-grey image that carries the trigger.

    `delta` is drawn around mid grey, enlarged so that its largest value, which the caption states, is black or white.
    Patches are drawn by themselves, as `patch_sheet` does.

    Raises:
        ValueError: where the trigger has no delta, no mask with a pattern, and no patches.
    """
    if trigger.patches is not None:
        return patch_sheet(trigger.patches)
    parts: dict[str, Tensor] = {}
    if trigger.delta is not None:
        largest = float(trigger.delta.abs().max())
        parts[f"delta ± {largest:.2g}"] = 0.5 + trigger.delta / (2 * max(largest, 1e-12))
        carrier = 0.5 + trigger.delta
    elif trigger.mask is not None and trigger.pattern is not None:
        parts |= {"mask": trigger.mask, "pattern": trigger.pattern}
        carrier = (1 - trigger.mask) * 0.5 + trigger.mask * trigger.pattern
    else:
        raise ValueError("a trigger needs patches, a delta, or a mask and a pattern, to be drawn")
    parts["on grey"] = carrier
    return grid([[_tiles(_bytes(part.unsqueeze(0)))[0] for part in parts.values()]], columns=tuple(parts))


def grid(tiles: Sequence[Sequence[Image.Image]], rows: Sequence[str] = (), columns: Sequence[str] = ()) -> Image.Image:
    """Tiles of one size on white, in rows, of which the last may be shorter.

    Args:
        tiles: row by row.
        rows: captions to the left of the rows; none, or one each.
        columns: captions above the columns; none, or one each. A line break in one makes two lines.
    """
    width, height = tiles[0][0].size
    # A caption wider than its tile would run into the next one.
    pitch = GAP + max(width, *(ceil(_FONT.getlength(line)) for caption in columns for line in caption.split("\n")), 0)
    left = MARGIN + (2 * GAP + max(ceil(_FONT.getlength(caption)) for caption in rows) if rows else 0)
    top = MARGIN + (GAP + _LINE * max(caption.count("\n") + 1 for caption in columns) if columns else 0)
    size = (left + pitch * len(tiles[0]) - GAP + MARGIN, top + (height + GAP) * len(tiles) - GAP + MARGIN)
    sheet = Image.new("RGB", size, _WHITE)
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(tiles):
        for place, tile in enumerate(row):
            sheet.paste(tile, (left + pitch * place + (pitch - GAP - width) // 2, top + (height + GAP) * number))
    for number, caption in enumerate(rows):
        middle = top + (height + GAP) * number + height // 2
        draw.text((left - 2 * GAP, middle), caption, _INK, _FONT, anchor="rm")
    for place, caption in enumerate(columns):
        middle = left + pitch * place + (pitch - GAP) / 2
        for number, line in enumerate(reversed(caption.split("\n"))):
            draw.text((middle, top - GAP - _LINE * number), line, _INK, _FONT, anchor="ms")
    return sheet


def _tiles(images: Tensor, side: int = _TILE) -> list[Image.Image]:
    """Each of uint8 [N, C, H, W], enlarged as often as fits into `side` pixels, at least once."""
    channels, height, width = images.shape[1:]
    images = images.cpu()
    if channels not in (1, 3):
        images = images.float().mean(1, keepdim=True).round().byte()
    times = max(1, side // max(height, width))
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    size = (width * times, height * times)
    return [Image.fromarray(image).resize(size, Image.Resampling.NEAREST) for image in pixels]


def _bytes(values: Tensor) -> Tensor:
    """Values in [0, 1] as uint8; what lies outside is cut off."""
    return (values.detach().float() * 255).round().clamp(0, 255).byte()
