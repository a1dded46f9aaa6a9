"""Images from folders: which files, which classes, which pixels, against torchvision and closed forms."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from bdcore import DataError, Labelled, Samples, read_samples
from bdcore.samples.decoding import pixels
from bdcore.samples.reading import draw

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def photo(height: int, width: int) -> Image.Image:
    """Smooth colours, as JPEG keeps them."""
    coarse = RANDOM.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or photo(8, 9)).save(path, **options)
    return path


def read(root: Path, **options: object) -> Samples:
    return read_samples(f"folder:{root}", **options)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- files, classes, order


def test_pixels_labels_and_order_are_those_of_torchvision(root: Path):
    names = "b/z.jpg b/a.png b/deep-er/c.webp b/deep/er/d.bmp b/deep/q.ppm Apes/1.jpeg Apes/10.JPG Apes/2.tif c_c/x.png"
    for index, name in enumerate(names.split()):
        save(root / name, photo(30 + 7 * index, 71 - 6 * index))
    theirs = ImageFolder(root, Compose([Resize(24), CenterCrop(24), PILToTensor()]))
    ours = read(root, size=(24, 24))
    assert ours.name == "folder:photos"
    assert ours.classes == tuple(theirs.classes) == ("Apes", "b", "c_c")
    assert ours.labels is not None
    assert ours.labels.tolist() == theirs.targets
    assert torch.equal(ours.images, torch.stack([image for image, _ in theirs]))
    assert len(Labelled(ours.images, ours.labels)) == 9
    assert ours.paths == tuple(path for path, _ in theirs.samples)
    few = read(root, size=(24, 24), limit=3)
    assert torch.equal(few.images, ours.images[[ours.paths.index(path) for path in few.paths]])
    assert ours.skipped == 0


def test_what_is_no_image_is_passed_over_and_counted(root: Path):
    for name in ("a/1.png", "b/1.png", "b/.hidden.png", "b/.thumbs/1.png", ".git/1.png"):
        save(root / name)
    (root / "a" / "notes.txt").write_text("no image")
    (root / "README").write_text("no image")
    os.mkfifo(root / "a" / "pipe.png")  # opening it would wait for ever
    found = read(root)
    assert found.images.shape == (2, 3, 8, 9)
    assert found.skipped == 6


def test_links_are_followed_and_loops_are_not(root: Path, tmp_path: Path):
    for name in ("a/1.png", "b/1.png"):
        save(root / name)
    save(tmp_path / "elsewhere" / "more.png")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "again").symlink_to(root / "a")
    (root / "b" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "2.png").symlink_to(root / "a" / "1.png")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    found = read(root)
    assert found.classes == ("a", "b", "c")
    assert found.labels is not None
    assert torch.bincount(found.labels).tolist() == [1, 3, 1]
    (root / "b" / "lost.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"lost\.png \(No such file or directory\)"):
        read(root)


def test_a_flat_folder_is_unlabelled(root: Path):
    for name in ("2.png", "10.png", "1.png"):
        save(root / name, Image.new("L", (3, 2), int(name[:-4])))
    (root / "empty").mkdir()
    found = read(root)
    assert found.labels is None
    assert found.classes == ()
    assert found.images[:, 0, 0, 0].tolist() == [1, 10, 2]  # by name


def test_folders_named_by_numbers_mean_them(root: Path):
    for number in ("10", "2", "007"):
        save(root / number / "x.png", Image.new("L", (3, 3), int(number)))
    found = read(root)
    assert found.labels is not None
    assert found.labels.tolist() == found.images[:, 0, 0, 0].tolist()
    assert found.classes == ("0", "1", "2", "3", "4", "5", "6", "007", "8", "9", "10")
    save(root / "7" / "x.png")
    with pytest.raises(DataError, match="folders '007' and '7' mean one class"):
        read(root)


def test_a_single_numbered_class_and_an_empty_one_are_clear(root: Path):
    save(root / "3" / "x.png")
    (root / "5").mkdir()
    found = read(root)
    assert found.labels is not None
    assert found.labels.tolist() == [3]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"holds no images: an image's name ends in .*\.jpg"),
        (["a/notes.txt", "b/.x.png"], r"holds no images \(2 others"),
        (["a/1.png", "b/2.txt"], r"no images in b\. Classes are numbered in the order of their names"),
        (["cats/1.png"], r"a single class folder, 'cats'.*folder:.*photos/cats"),
        (["0/1.png", "1/1.png", "notes/1.png"], r"class numbers \(0, 1\) and others \(notes\)"),
        (["0/1.png", "20240131/1.png"], "'20240131' is too large a number for a class"),
        (["a/1.png", "b/1.png", "loose.png"], r"class folders \(a, b\), and beside them .*\(loose\.png\)"),
        (["train/a/1.png", "test/a/1.png"], "parts of a data set and no classes: name one of them, as folder:"),
    ],
)
def test_what_is_unclear_is_said(root: Path, files: list[str], message: str, cache: Path):
    for name in files:
        if name.endswith(".png"):
            save(root / name)
        else:
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text("no image")
    with pytest.raises(DataError, match=message) as caught:
        read(root)
    assert "\n" not in str(caught.value)
    assert not cache.exists()


def test_places_that_are_none(root: Path, tmp_path: Path):
    save(root / "a.png")
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"a\.png is a file, not a folder"):
        read(root / "a.png")
    with pytest.raises(DataError, match=r"names no folder: write folder:PATH"):
        read_samples("folder:")
    with pytest.raises(DataError, match=rf"is a path, .* write folder:{re.escape(str(root))}"):
        read_samples(str(root))
    with pytest.raises(DataError, match=r"is a path, .* write npz:"):
        read_samples(str(root / "a.png"))


@pytest.mark.parametrize("kind", ["folder:", "npz:", "MNIST:", ""])
@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-this-name/x", "x" * 5000, "\udcff", ".", "/dev/null"])
def test_paths_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, path: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError):
        read_samples(kind + path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_said(root: Path):
    save(root / "a" / "1.png")
    closed = save(root / "b" / "1.png")
    closed.chmod(0)
    with pytest.raises(DataError, match=r"b/1\.png \(Permission denied\)"):
        read(root)
    closed.parent.chmod(0)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        read(root)
    closed.parent.chmod(0o700)


# ---------------------------------------------------------------------------------------------------------------- form


@pytest.mark.parametrize(
    "options", [{"size": (0, 8)}, {"size": (8, -1)}, {"channels": 2}, {"channels": 0}, {"limit": 0}]
)
def test_forms_that_cannot_be(root: Path, options: dict):
    save(root / "a.png")
    with pytest.raises(DataError, match=r"at least 1|1 channel \(grey\) or 3"):
        read(root, **options)


def test_the_images_own_size_if_it_is_one(root: Path):
    save(root / "1.png", photo(8, 9))
    save(root / "2.png", photo(8, 9))
    assert read(root).images.shape == (2, 3, 8, 9)
    save(root / "3.png", photo(4, 30))
    with pytest.raises(DataError, match=r"2 sizes, from 8 x 9 to 4 x 30 .*--size 224.*dataset\.size=224"):
        read(root)
    assert read(root, size=(5, 7)).images.shape == (3, 3, 5, 7)
    assert read(root, size=(100, 120)).images.shape == (3, 3, 100, 120)


def test_grey_if_all_are_grey(root: Path):
    grey = Image.fromarray(RANDOM.integers(0, 256, (6, 5), dtype=np.uint8))
    save(root / "1.png", grey)
    save(root / "2.png", grey.convert("P"))  # with a palette of greys
    save(root / "3.png", grey.convert("LA"))
    save(root / "4.gif", grey)
    found = read(root)
    assert found.images.shape == (4, 1, 6, 5)
    assert all(np.array_equal(image[0], grey) for image in found.images)
    assert torch.equal(read(root, channels=3).images, found.images.repeat(1, 3, 1, 1))
    colours = photo(6, 5)
    save(root / "5.png", colours)
    assert read(root).images.shape == (5, 3, 6, 5)
    weighed = np.asarray(colours, np.float64) @ [0.299, 0.587, 0.114]  # ITU-R 601
    assert np.abs(read(root, channels=1).images[4, 0].numpy() - weighed).max() <= 0.51


def test_an_image_of_that_size_is_left_as_it_is(root: Path):
    noise = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    save(root / "1.png", Image.fromarray(noise))
    assert np.array_equal(read(root, size=(5, 7)).images[0].permute(1, 2, 0), noise)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), side=st.integers(1, 70))
def test_square_forms_are_torchvisions(height: int, width: int, side: int):
    image = photo(height, width)
    expected = Compose([Resize(side), CenterCrop(side), PILToTensor()])(image)
    assert np.array_equal(pixels(image.copy(), (3, side, side)), expected)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(40, 120), st.integers(40, 120)),
    wanted=st.tuples(st.integers(20, 60), st.integers(20, 60)),
)
def test_any_form_shows_the_centre_undistorted(size: tuple[int, int], wanted: tuple[int, int]):
    """Of two ramps, which linear interpolation keeps, each pixel tells the place that it came from."""
    (height, width), (tall, wide) = size, wanted
    rows, columns = np.mgrid[:height, :width]
    ramps = np.stack([2 * rows, 2 * columns, 0 * rows], axis=-1).astype(np.uint8)
    found = pixels(Image.fromarray(ramps), (3, tall, wide)).astype(np.float64) / 2
    scale = max(tall / height, wide / width)
    for axis, (across, out, there) in enumerate(((height, tall, found[0]), (width, wide, found[1]))):
        line = there.mean(axis=1 - axis)
        expected = (np.arange(out) + 0.5 - out / 2) / scale + across / 2 - 0.5
        inner = slice(4, -4)  # at the border there is nothing to interpolate with
        # The scaled size is a whole number, and so is the place of the cut: each is off by up to a pixel.
        assert np.abs(line - expected)[inner].max() <= 1.6 / scale + 0.5


# ---------------------------------------------------------------------------------------------------- kinds of pictures

TURNS: list[Callable[[np.ndarray], np.ndarray]] = [
    lambda x: x,
    lambda x: x[:, ::-1],
    lambda x: x[::-1, ::-1],
    lambda x: x[::-1],
    lambda x: x.transpose(1, 0, 2),
    lambda x: np.rot90(x, -1),
    lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    np.rot90,
]


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_images_are_turned_as_exif_says(root: Path, suffix: str):
    """Orientations 1 to 8: where the first row and column of what is stored belong."""
    upright = np.asarray(photo(6, 6)).copy()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if suffix == "webp" else {}
        save(root / f"{orientation}.{suffix}", Image.fromarray(upright), exif=exif, **options)
    found = read(root).images.permute(0, 2, 3, 1).numpy()
    for orientation, turn in enumerate(TURNS, 1):
        assert np.array_equal(found[orientation - 1], turn(upright)), orientation


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_turned_image_has_its_turned_size(root: Path, suffix: str):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / f"1.{suffix}", photo(6, 9), exif=exif)
    save(root / f"2.{suffix}", photo(9, 6))
    assert read(root).images.shape == (2, 3, 9, 6)


def test_sixteen_bits_are_scaled_to_eight(root: Path):
    values = RANDOM.integers(0, 65536, (50, 40), dtype=np.uint16)
    values[0, :3] = 0, 65535, 128
    for suffix in ("png", "tif", "pgm"):
        save(root / f"x.{suffix}", Image.fromarray(values))
    found = read(root)
    assert found.images.shape == (3, 1, 50, 40)
    assert (found.images[:, 0].numpy() == np.round(values / 257)).all()


def test_what_is_transparent_lies_over_white(root: Path):
    colours = RANDOM.integers(0, 256, (6, 5, 4), dtype=np.uint8)
    colours[0, 0, 3], colours[0, 1, 3] = 0, 255
    save(root / "1.png", Image.fromarray(colours))
    indexed = Image.new("P", (5, 6), 1)
    indexed.putpalette([0, 0, 0, 10, 20, 30])
    indexed.putpixel((2, 3), 0)
    save(root / "2.gif", indexed, transparency=0)
    found = read(root).images.permute(0, 2, 3, 1).numpy()
    alpha = colours[..., 3:] / 255
    assert np.abs(found[0] - (colours[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    assert found[0, 0, 0].tolist() == [255, 255, 255]
    assert found[1, 3, 2].tolist() == [255, 255, 255]
    assert found[1, 0, 0].tolist() == [10, 20, 30]


def test_other_colour_spaces_are_as_torchvision_reads_them(root: Path):
    image = photo(20, 16)
    save(root / "all" / "cmyk.jpg", image.convert("CMYK"))
    save(root / "all" / "ycbcr.tif", image.convert("YCbCr"))
    save(root / "all" / "palette.png", image.quantize(17))
    save(root / "all" / "bits.png", image.convert("1"))
    expected = torch.stack([pixel for pixel, _ in ImageFolder(root, PILToTensor())])
    assert torch.equal(read(root / "all").images, expected)


def test_of_an_animation_the_first_frame_counts(root: Path):
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "lime", "blue")]
    save(root / "1.gif", frames[0], save_all=True, append_images=frames[1:])
    assert read(root).images[0, :, 0, 0].tolist() == [255, 0, 0]


def test_images_that_cannot_be_read_are_told_together(root: Path, monkeypatch: pytest.MonkeyPatch, cache: Path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    save(root / "good.png")
    save(root / "large but fine.png", photo(80, 80))  # Pillow's limit is twice what it warns at
    whole = save(root / "short.jpg", photo(90, 90)).read_bytes()
    (root / "short.jpg").write_bytes(whole[:-200])
    (root / "text.png").write_text("no image")
    (root / "empty.gif").write_bytes(b"")
    (root / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    save(root / "bomb.png", photo(101, 100))
    save(root / "float.tif", Image.fromarray(RANDOM.random((8, 9), dtype=np.float32)))
    for options in ({"size": (8, 9)}, {"size": (8, 9), "channels": 3}):
        with pytest.raises(DataError, match=r"6 images of 8 in folder:photos cannot be read: .* Remove them") as caught:
            read(root, **options)
        said = str(caught.value)
        for name, reason in {
            "short.jpg": "truncated", "text.png": "no image, or damaged", "empty.gif": "no image",
            "script.jpg": "no image", "bomb.png": "exceeds limit of 10000 pixels", "float.tif": "floating-point",
        }.items():  # fmt: skip
            assert re.search(rf"/{re.escape(name)} \([^;]*{re.escape(reason)}", said), name
        assert "\n" not in said
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    for path in root.iterdir():
        if path.name not in ("good.png", "large but fine.png"):
            path.unlink()
    assert read(root, size=(8, 9)).images.shape == (2, 3, 8, 9)


def test_damaged_files_are_read_or_told_of(root: Path, tmp_path: Path):
    """Whatever a decoder makes of them."""
    suffixes = "jpg png gif webp bmp ppm tif jp2"
    whole = [save(tmp_path / f"whole.{suffix}", photo(40, 30)) for suffix in suffixes.split()]
    for index in range(240):
        content = bytearray(whole[index % len(whole)].read_bytes())
        for place in RANDOM.integers(0, min(len(content), 200 if index % 2 else 1 << 20), 4):
            content[place] = RANDOM.integers(256)
        if index % 3 == 0:
            del content[RANDOM.integers(len(content)) :]
        (root / f"{index:03d}{whole[index % len(whole)].suffix}").write_bytes(content)
    with pytest.raises(DataError, match=r"\d+ images of 240 in folder:photos cannot be read: ") as caught:
        read(root, size=(8, 8))
    assert "\n" not in str(caught.value)


def test_many_bad_images_are_counted_and_the_first_named(root: Path):
    for number in range(40):
        (root / f"{number:02d}.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"40 images of 40 .*/00\.jpg \(.*/09\.jpg \([^;]*; and 30 more\."):
        read(root)


# --------------------------------------------------------------------------------------------------------------- limit


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=60), limit=st.integers(1, 70), seed=st.integers(0, 9))
def test_a_draw_is_even_and_grows(labels: list[int], limit: int, seed: int):
    chosen = draw(torch.tensor(labels), len(labels), limit, seed).tolist()
    assert len(chosen) == min(limit, len(labels))
    assert chosen == sorted(set(chosen))
    held = {label: labels.count(label) for label in set(labels)}
    drawn = {label: [labels[place] for place in chosen].count(label) for label in held}
    most = max(drawn.values())
    assert all(count >= most - 1 or count == held[label] for label, count in drawn.items())
    assert set(chosen) <= set(draw(torch.tensor(labels), len(labels), limit + 3, seed).tolist())
    assert len(draw(None, len(labels), limit, seed)) == len(chosen)


def test_draws_differ_by_seed_and_favour_nobody():
    labels = torch.arange(1000) % 4
    first = [draw(labels, 1000, 6, seed) for seed in range(400)]
    share = np.bincount(np.concatenate(first) // 100, minlength=10) / 2400
    assert np.abs(share - 0.1).max() < 0.03  # five standard deviations
    extra = np.stack([np.bincount(labels.numpy()[chosen], minlength=4) for chosen in first]).mean(0)
    assert np.abs(extra - 1.5).max() < 0.13


def test_only_the_drawn_files_are_decoded(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for index in range(24):
        save(root / f"{index % 3}" / f"{index:02d}.png", Image.new("L", (4, 4), index))
    told: list[tuple[int, int]] = []
    found = read(root, limit=7, seed=1, progress=lambda *done: told.append(done))
    assert told[-1] == (7, 7)
    assert found.labels is not None
    assert sorted(torch.bincount(found.labels).tolist()) == [2, 2, 3]
    drawn = found.images[:, 0, 0, 0].tolist()
    assert found.labels.tolist() == [value % 3 for value in drawn]
    for path in root.rglob("*.png"):
        if int(path.stem) not in drawn:
            path.write_text("no image")
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "other"))
    assert torch.equal(read(root, limit=7, seed=1).images, found.images)
    with pytest.raises(DataError, match="cannot be read"):
        read(root, limit=24)
