import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from bdcore import Trigger
from bdcore.analysis.pictures import contact_sheet, grid, patch_sheet, trigger_picture

MARGIN, GAP = 8, 4


def pixels(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def tile(picture: Image.Image, row: int, column: int, rows: int, columns: int, side: tuple[int, int]) -> np.ndarray:
    """One tile's pixels, [height, width, 3]: tiles lie flush with the right and lower margin."""
    width, height = side
    bottom = picture.height - MARGIN - (rows - 1 - row) * (height + GAP)
    right = picture.width - MARGIN - (columns - 1 - column) * (width + GAP)
    return pixels(picture)[bottom - height : bottom, right - width : right]


def enlarged(image: Tensor, times: int) -> np.ndarray:
    """uint8 [C, H, W] as every pixel `times` x `times`, [H, W, 3]."""
    colour = image.numpy().astype(int)
    colour = np.repeat(colour, 3, 0) if len(colour) == 1 else colour
    return np.kron(colour, np.ones((1, times, times), dtype=int)).transpose(1, 2, 0)


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 5),
    channels=st.sampled_from([1, 3]),
    height=st.integers(8, 32),
    seed=st.integers(0, 1000),
)
def test_a_contact_sheet_shows_every_pixel(count: int, channels: int, height: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    clean, triggered = torch.randint(0, 256, (2, count, channels, height, 32), generator=generator).byte()
    sheet = contact_sheet(clean, triggered)
    for column in range(count):
        tiles = [tile(sheet, row, column, 3, count, (96, 3 * height)) for row in range(3)]
        assert np.array_equal(tiles[0], enlarged(clean[column], 3))
        assert np.array_equal(tiles[1], enlarged(triggered[column], 3))
        difference = 128 + 10 * (tiles[1] - tiles[0])
        assert np.array_equal(tiles[2], np.clip(difference, 0, 255))


def test_a_difference_is_centred_at_grey_and_cut_off():
    clean = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    triggered = clean.clone()
    triggered[0, :, 31, 31] = torch.tensor([103, 98, 200], dtype=torch.uint8)
    triggered[0, :, 0, 31] = 0
    shown = tile(contact_sheet(clean, triggered), 2, 0, 3, 1, (96, 96))
    assert shown[95, 95].tolist() == shown[93, 93].tolist() == [158, 108, 255]
    assert shown[92, 95].tolist() == shown[95, 92].tolist() == [128, 128, 128]
    assert shown[0, 95].tolist() == [0, 0, 0]


def test_captions_stand_left_of_their_rows():
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    sheet = contact_sheet(images, images)
    gutter = pixels(sheet)[:, : sheet.width - MARGIN - 2 * 96 - GAP]
    inked = (gutter.sum(2) < 3 * 128).any(1)
    # Dark somewhere in the middle of each row, nowhere between rows or at the border of the sheet.
    for row in range(3):
        top = MARGIN + row * (96 + GAP)
        assert inked[top + 38 : top + 58].any()
        assert not inked[top - GAP : top + 30].any()
    assert bool((gutter[:, :MARGIN] == 255).all())


def test_large_images_keep_their_size():
    clean = torch.zeros(1, 3, 224, 200, dtype=torch.uint8)
    triggered = clean + 255
    sheet = contact_sheet(clean, triggered)
    assert sheet.height == 2 * MARGIN + 3 * 224 + 2 * GAP
    assert bool((tile(sheet, 1, 0, 3, 1, (200, 224)) == 255).all())


def test_other_channel_counts_are_drawn_as_their_mean():
    clean = torch.zeros(1, 2, 32, 32, dtype=torch.uint8)
    clean[:, 1] = 200
    sheet = contact_sheet(clean, clean)
    assert bool((tile(sheet, 0, 0, 3, 1, (96, 96)) == 100).all())


def test_patches_stand_eight_in_a_row():
    patches = torch.rand(11, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    sheet = patch_sheet(patches)
    assert sheet.size == (2 * MARGIN + 8 * 48 + 7 * GAP, 2 * MARGIN + 2 * 48 + GAP)
    for number, patch in enumerate(patches):
        shown = tile(sheet, number // 8, number % 8, 2, 8, (48, 48))
        exact = np.kron(patch.double().numpy(), np.ones((1, 16, 16))).transpose(1, 2, 0) * 255
        assert float(np.abs(shown - exact).max()) <= 0.5 + 1e-4
    assert bool((tile(sheet, 1, 3, 2, 8, (48, 48)) == 255).all())  # white where the last row has no more


def test_a_delta_is_drawn_around_grey_and_on_grey():
    delta = torch.zeros(3, 32, 32)
    delta[0, 0, 0], delta[1, 0, 0], delta[2, 31, 31] = 0.2, -0.1, -0.2
    picture = trigger_picture(Trigger(target=0, delta=delta))
    alone, carried = (tile(picture, 0, column, 1, 2, (96, 96)) for column in (0, 1))
    assert alone[0, 0].tolist() == pytest.approx([255, 64, 128], abs=1)
    assert alone[95, 95].tolist() == pytest.approx([128, 128, 0], abs=1)
    assert carried[2, 2].tolist() == pytest.approx([0.7 * 255, 0.4 * 255, 127.5], abs=1)
    assert carried[95, 95].tolist() == pytest.approx([127.5, 127.5, 0.3 * 255], abs=1)
    assert carried[50, 50].tolist() == pytest.approx([127.5] * 3, abs=1)


def test_what_leaves_the_range_on_grey_is_cut_off():
    picture = trigger_picture(Trigger(target=0, delta=torch.full((1, 32, 32), -0.8)))
    assert bool((tile(picture, 0, 1, 1, 2, (96, 96)) == 0).all())


def test_a_delta_of_nothing_is_grey():
    picture = trigger_picture(Trigger(target=0, delta=torch.zeros(3, 32, 32)))
    assert bool((tile(picture, 0, 0, 1, 2, (96, 96)) == 128).all())


def test_mask_and_pattern_are_drawn_side_by_side_and_on_grey():
    mask, pattern = torch.zeros(1, 32, 32), torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
    mask[:, :, 16:], mask[:, 0, 0] = 1, 0.5
    picture = trigger_picture(Trigger(target=3, mask=mask, pattern=pattern))
    drawn = [tile(picture, 0, column, 1, 3, (96, 96)) for column in range(3)]
    assert drawn[0][10, 40].tolist() == [0, 0, 0]
    assert drawn[0][10, 60].tolist() == [255, 255, 255]
    assert drawn[1][0, 0].tolist() == pytest.approx((pattern[:, 0, 0] * 255).tolist(), abs=0.6)
    assert drawn[2][0, 0].tolist() == pytest.approx((127.5 * 0.5 + pattern[:, 0, 0] * 127.5).tolist(), abs=0.6)
    assert np.array_equal(drawn[2][:, 48:], drawn[1][:, 48:])
    assert bool((drawn[2][6:, :48] == 128).all())


def test_a_trigger_distribution_is_drawn_as_its_patches():
    patches = torch.rand(3, 1, 3, 3)
    picture = trigger_picture(Trigger(target=0, patches=patches))
    assert np.array_equal(pixels(picture), pixels(patch_sheet(patches)))


def test_tiles_stand_in_the_middle_under_wide_captions():
    red, blue = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    assert grid([[red, blue]]).size == (2 * MARGIN + 2 * 20 + GAP, 2 * MARGIN + 20)
    values = pixels(grid([[red]], columns=("a caption far wider than\nits tile",)))
    reds, ink = ((values == (255, 0, 0)).all(2).nonzero(), (values.max(2) < 128).nonzero())
    assert len(reds[0]) == 400
    assert ink[0].max() < reds[0].min()  # above the tile
    assert ink[1].max() - ink[1].min() > 100
    assert (ink[1].min() + ink[1].max()) / 2 == pytest.approx((reds[1].min() + reds[1].max()) / 2, abs=3)
    values = pixels(grid([[red, blue]], columns=("a caption far wider than\nits tile", "short")))
    reds, blues = ((values == colour).all(2).nonzero() for colour in ((255, 0, 0), (0, 0, 255)))
    assert blues[1].min() - reds[1].max() > 100


@pytest.mark.parametrize(
    ("clean", "triggered", "message"),
    [
        (torch.zeros(2, 3, 8, 8).byte(), torch.zeros(1, 3, 8, 8).byte(), "of one shape"),
        (torch.zeros(0, 3, 8, 8).byte(), torch.zeros(0, 3, 8, 8).byte(), "N at least 1"),
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), "takes uint8 images"),
    ],
)
def test_what_is_no_pair_of_image_sets_is_refused(clean: Tensor, triggered: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        contact_sheet(clean, triggered)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="patches must be"):
        patch_sheet(torch.zeros(0, 3, 3, 3))
    with pytest.raises(ValueError, match="a trigger needs"):
        trigger_picture(Trigger(target=0, mask=torch.zeros(1, 8, 8)))
