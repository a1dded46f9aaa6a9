"""Images from .npz files and torchvision's data sets, against these data sets themselves."""

import gzip
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets as sets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from bdcore import DataError, read_samples

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def noise(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


# ----------------------------------------------------------------------------------------------------------------- npz


def saved(folder: Path, **arrays: np.ndarray) -> str:
    np.savez(folder / "mine.npz", **arrays)
    return f"npz:{folder / 'mine.npz'}"


def test_npz_takes_x_with_y_or_the_training_part(tmp_path: Path):
    x, y, other = noise(6, 3, 5, 4), np.arange(6, dtype=np.uint8) % 3, noise(2, 3, 5, 4)
    for arrays in ({"x": x, "y": y, "x_train": other}, {"x_train": x, "y_train": y, "x_test": other, "y_test": y[:2]}):
        found = read_samples(saved(tmp_path, **arrays))
        assert found.name == "npz:mine"
        assert found.classes == ()
        assert np.array_equal(found.images, x)
        assert found.images.is_contiguous()
        assert found.labels is not None
        assert found.labels.dtype == torch.int64
        assert found.labels.tolist() == y.tolist()
    assert read_samples(saved(tmp_path, x=x, x_train=other, y_train=y[:2])).labels is None
    assert np.array_equal(read_samples(saved(tmp_path, x=x.transpose(0, 2, 3, 1))).images, x)


def test_npz_is_brought_to_a_form_and_drawn_from(tmp_path: Path, cache: Path):
    x, y = noise(12, 3, 9, 12), np.arange(12) // 4
    text = saved(tmp_path, x=x, y=y)
    assert not cache.exists()
    small = read_samples(text, size=(6, 6), channels=1)
    assert small.images.shape == (12, 1, 6, 6)
    expected = Image.fromarray(x[5].transpose(1, 2, 0)).convert("L").resize((8, 6), Image.Resampling.BILINEAR)
    assert np.array_equal(small.images[5, 0], np.asarray(expected)[:, 1:7])
    drawn = read_samples(text, limit=6)
    assert drawn.labels is not None
    assert torch.bincount(drawn.labels).tolist() == [2, 2, 2]
    places = [next(i for i in range(12) if np.array_equal(x[i], image)) for image in drawn.images]
    assert drawn.labels.tolist() == y[places].tolist()
    grey = noise(3, 1, 5, 5)
    assert np.array_equal(read_samples(saved(tmp_path, x=grey), channels=3).images, grey.repeat(3, axis=1))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "lacks images, as x or x_train; it holds nothing"),
        ({"images": noise(2)}, "lacks images, as x or x_train; it holds images"),
        ({"x": noise(2, 3, 5, 5) / 255}, r"x must be uint8.*store \(x \* 255\)"),
        ({"x": noise(2, 5, 5)}, r"x must be \[N, C, H, W\]"),
        ({"x": noise(0, 3, 5, 5), "y": np.zeros(0, int)}, "x is empty"),
        ({"x": noise(2, 3, 5, 5), "y": np.zeros(3, int)}, "x has 2 images and y 3 labels"),
        ({"x": noise(2, 3, 5, 5), "y": np.array([0, -1])}, "y has label -1"),
        ({"x": noise(2, 3, 5, 5), "y": np.array([{}, {}])}, "pickled objects are refused"),
    ],
)
def test_npz_names_what_is_wrong(tmp_path: Path, arrays: dict[str, np.ndarray], message: str):
    with pytest.raises(DataError, match=message):
        read_samples(saved(tmp_path, **arrays))


def test_npz_files_that_are_none(tmp_path: Path):
    with pytest.raises(DataError, match="there is no file"):
        read_samples(f"npz:{tmp_path / 'none.npz'}")
    with pytest.raises(DataError, match="names no file: write npz:PATH"):
        read_samples("npz:")
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(DataError, match=r"is not a \.npz file"):
        read_samples(f"npz:{tmp_path / 'text.npz'}")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=5), kept=st.floats(0, 1))
def test_a_damaged_npz_is_read_or_refused(tmp_path: Path, changes: list[tuple[float, int]], kept: float):
    path = tmp_path / "damaged.npz"
    np.savez_compressed(path, x=noise(3, 3, 6, 5), y=np.arange(3))
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[int(place * (len(content) - 1))] = value
    path.write_bytes(content[: int(kept * len(content))] if kept < 0.2 else content)
    try:
        found = read_samples(f"npz:{path}")
    except DataError as error:
        assert str(path) in str(error)  # noqa: PT017 - it may be read as well
    else:
        assert found.images.shape == (3, 3, 6, 5)


# --------------------------------------------------------------------------------------------------------- torchvision


def write_idx(path: Path, array: np.ndarray) -> None:
    """MNIST's own form: two zeros, the type of bytes, the number of dimensions, these, and the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.tobytes())


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def mnist(root: Path, patch: pytest.MonkeyPatch) -> None:
    for part, count in (("train", 20), ("t10k", 7)):
        write_idx(root / f"MNIST/raw/{part}-images-idx3-ubyte", noise(count, 28, 28))
        write_idx(root / f"MNIST/raw/{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)


def emnist(root: Path, patch: pytest.MonkeyPatch) -> None:
    for part, count in (("train", 20), ("test", 7)):
        write_idx(root / f"EMNIST/raw/emnist-letters-{part}-images-idx3-ubyte", noise(count, 28, 28))
        write_idx(
            root / f"EMNIST/raw/emnist-letters-{part}-labels-idx1-ubyte", 1 + np.arange(count, dtype=np.uint8) % 9
        )


def cifar10(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / sets.CIFAR10.base_folder
    folder.mkdir()

    def write(name: str, content: object) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return md5((folder / name).read_bytes())

    digest = write("one", {"data": noise(12, 3072), "labels": [index % 10 for index in range(12)]})
    patch.setattr(sets.CIFAR10, "train_list", [["one", digest]])
    patch.setattr(sets.CIFAR10, "test_list", [["one", digest]])
    meta = write("batches.meta", {"label_names": list("abcdefghij")})
    patch.setattr(sets.CIFAR10, "meta", {**sets.CIFAR10.meta, "md5": meta})


def svhn(root: Path, patch: pytest.MonkeyPatch) -> None:
    savemat(root / "train.mat", {"X": noise(32, 32, 3, 11), "y": 1 + np.arange(11)[:, None] % 10})
    digest = md5((root / "train.mat").read_bytes())
    patch.setattr(sets.SVHN, "split_list", {"train": ["", "train.mat", digest], "test": ["", "test.mat", "0"]})


def stl10(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / sets.STL10.base_folder
    folder.mkdir()
    names = np.frombuffer(b"a\nb\nc\nd\ne\nf\ng\nh\ni\nj", np.uint8)
    files = {
        "train_X.bin": noise(5, 3, 96, 96),
        "train_y.bin": 1 + np.arange(5, dtype=np.uint8),
        "unlabeled_X.bin": noise(3, 3, 96, 96),
        "class_names.txt": names,
    }
    for name, array in files.items():
        (folder / name).write_bytes(array.tobytes())
    digests = {name: md5(array.tobytes()) for name, array in files.items()}
    patch.setattr(sets.STL10, "train_list", [[name, digests[name]] for name in list(files)[:3]])
    patch.setattr(sets.STL10, "test_list", [])


def write_images(root: Path, *names: str, size: tuple[int, int] = (9, 7)) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(*size, 3)).save(root / name)


def gtsrb(root: Path, patch: pytest.MonkeyPatch) -> None:
    names = [f"{label:05d}/{place:05d}_00000.ppm" for label in (0, 3, 42) for place in range(4)]
    write_images(root / "gtsrb/GTSRB/Training", *names)


def flowers(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "flowers-102"
    write_images(folder / "jpg", *(f"image_{number:05d}.jpg" for number in range(1, 8)))
    savemat(folder / "imagelabels.mat", {"labels": 1 + np.arange(7)[None]})
    savemat(folder / "setid.mat", {"trnid": np.array([[2, 5, 7]]), "valid": np.array([[1]]), "tstid": np.array([[3]])})
    files = {name: (f"{name}.mat", md5((folder / f"{name}.mat").read_bytes())) for name in ("imagelabels", "setid")}
    patch.setattr(
        sets.Flowers102, "_file_dict", {"image": ("", ""), "label": files["imagelabels"], "setid": files["setid"]}
    )


def food(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "food-101"
    write_images(folder / "images", "soup/1.jpg", "soup/2.jpg", "cake/7.jpg")
    (folder / "meta").mkdir()
    (folder / "meta/train.json").write_text('{"soup": ["soup/1", "soup/2"], "cake": ["cake/7"]}')


def caltech(root: Path, patch: pytest.MonkeyPatch) -> None:
    names = [f"{name}/image_{number:04d}.jpg" for name in ("ant", "crab", "yak") for number in (1, 2, 3)]
    write_images(root / "caltech101/101_ObjectCategories", *names)
    (root / "caltech101/101_ObjectCategories/BACKGROUND_Google").mkdir()


def imagefolder(root: Path, patch: pytest.MonkeyPatch) -> None:
    write_images(root, "b/1.png", "a/1.jpg", "a/2.png")


@pytest.mark.parametrize(
    ("write", "text", "options"),
    [
        (mnist, "MNIST", {"train": True}),
        (mnist, "MNIST/test", {"train": False}),
        (emnist, "EMNIST/letters", {"split": "letters"}),
        (emnist, "EMNIST/letters/test", {"split": "letters", "train": False}),
        (cifar10, "CIFAR10", {}),
        (svhn, "SVHN/train", {"split": "train"}),
        (stl10, "STL10", {}),
        (stl10, "STL10/unlabeled", {"split": "unlabeled"}),
        (gtsrb, "GTSRB", {"split": "train"}),
        (flowers, "Flowers102", {}),
        (food, "Food101", {}),
        (caltech, "Caltech101", {}),
        (imagefolder, "ImageFolder", {}),
    ],
)
def test_torchvision_sets_are_read_as_torchvision_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write, text: str, options: dict, cache: Path
):
    root = tmp_path / "data"
    root.mkdir()
    write(root, monkeypatch)
    theirs = getattr(sets, text.partition("/")[0])(str(root), **options)
    monkeypatch.chdir(tmp_path)  # ./data is where they are by default
    found = read_samples(text)
    assert found.name == text
    planar, labels = [], []
    for image, label in theirs:
        with image:
            planar.append(np.atleast_3d(np.asarray(image)).transpose(2, 0, 1))
        labels.append(int(label))
    expected = np.stack(planar)
    assert np.array_equal(found.images, expected)
    assert found.images.is_contiguous()
    assert (found.labels.tolist() if found.labels is not None else [-1] * len(theirs)) == labels
    assert list(found.classes) in ([], list(getattr(theirs, "classes", [])))
    small = read_samples(f"{text}:{root}", size=(5, 5), channels=3)
    assert torch.equal(small.images, read_samples(text, size=(5, 5), channels=3).images)
    assert small.images.shape == (len(theirs), 3, 5, 5)
    drawn = read_samples(text, limit=3)
    assert drawn.images.shape[0] == 3
    if drawn.labels is not None:
        assert len(drawn.labels.unique()) == min(3, len(set(labels)))


def test_a_changed_file_of_a_set_is_decoded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for write, text, file in (
        (gtsrb, "GTSRB", "gtsrb/GTSRB/Training/00003/00001_00000.ppm"),
        (caltech, "Caltech101", "caltech101/101_ObjectCategories/crab/image_0002.jpg"),
    ):
        write(tmp_path, monkeypatch)
        read_samples(f"{text}:{tmp_path}")
        Image.new("RGB", (7, 9), (200, 0, 0)).save(tmp_path / file)
        assert read_samples(f"{text}:{tmp_path}").images[:, 0].min(-1).values.min(-1).values.max() >= 199


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cifar10", r"unknown images 'cifar10': write folder:DIR.* Did you mean CIFAR10.*\? Valid names: .*USPS\."),
        ("GTRSB/test", "Did you mean GTSRB"),
        ("", "unknown images ''"),
        ("wrap_dataset_for_transforms_v2", "unknown images"),
        ("VOCDetection", "torchvision's VOCDetection is no data set for image classification"),
        ("CelebA", "no data set for image classification"),
        ("MNIST/valid", "MNIST has no part 'valid': write MNIST/train or MNIST/test"),
        ("MNIST/test/more", "MNIST has no part 'more': write MNIST/test"),
        ("GTSRB/valid", "GTSRB cannot be read from data: .*valid.*'train', 'test'"),
        ("EMNIST", "EMNIST has several parts: write EMNIST/SPLIT"),
        ("EuroSAT/test", "EuroSAT has no part 'test': write EuroSAT"),
        ("CIFAR10", r"not in data, or damaged .*python -c \"from torchvision\.datasets import CIFAR10; "
                    r"CIFAR10\('data', train=True, download=True\)\"; or name their folder with CIFAR10:ROOT"),
        ("GTSRB/test:none", r"not in none, or damaged .*GTSRB\('none', split='test', download=True\)"),
        ("SEMEION", "not in data, or damaged"),
        ("ImageNet", r"not in data, or damaged .*see https://docs\.pytorch\.org/.*ImageNet"),
        ("Caltech101", "not in data, or damaged .*there is no such folder"),
        ("ImageFolder:none", "not in none, or damaged"),
    ],
)  # fmt: skip
def test_sets_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        read_samples(text)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_every_set_of_torchvision_is_known():
    """A new one appears in the names of the error, unless it is for another task."""
    from bdcore.samples import torchvision_sets as ours

    assert set(sets.__all__) >= ours._OTHER_TASKS
    for name in set(sets.__all__) - ours._OTHER_TASKS - {"wrap_dataset_for_transforms_v2"}:
        parameters = ours._parameters(getattr(sets, name))
        needed = [
            key for key, each in parameters.items() if each.default is each.empty and each.kind < each.VAR_POSITIONAL
        ]
        assert set(needed) <= {"self", "root", "split"}, name


def test_damage_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mnist(tmp_path, monkeypatch)
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_bytes(gzip.compress(b"no images"))
    with pytest.raises(DataError, match=r"MNIST .*from|files of MNIST are not in"):
        read_samples(f"MNIST:{tmp_path}")
    gtsrb(tmp_path, monkeypatch)
    (tmp_path / "gtsrb/GTSRB/Training/00003/00001_00000.ppm").write_text("no image")
    with pytest.raises(DataError, match=r"1 image of 12 in GTSRB cannot be read: .*00001_00000\.ppm \(no image"):
        read_samples(f"GTSRB:{tmp_path}")
