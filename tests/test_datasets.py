import hashlib
import io
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from bdcore import DataError, Dataset, PluginConfig
from bdcore_plugins.datasets import cifar10, digits, folder, npz
from bdcore_plugins.datasets.cifar10 import Cifar10
from bdcore_plugins.datasets.digits import Digits
from bdcore_plugins.datasets.folder import Folder
from bdcore_plugins.datasets.npz import Npz

# ------------------------------------------------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def handwriting() -> Dataset:
    return Digits(Digits.Config()).load(None)


def test_digits_split_is_fixed_and_stratified(handwriting: Dataset):
    assert handwriting.name == "digits"
    assert handwriting.classes == 10
    assert handwriting.train.images.shape == (1437, 3, 32, 32)
    assert handwriting.test.images.shape == (360, 3, 32, 32)
    counts = np.bincount(load_digits().target)
    share = np.bincount(handwriting.test.labels.numpy()) / counts
    assert np.abs(share - 360 / 1797).max() < 0.01
    torch.manual_seed(12345)
    np.random.seed(12345)  # noqa: NPY002 - that global seeds do not matter is the point
    again = Digits(Digits.Config()).load(None)
    assert again.fingerprint == handwriting.fingerprint


def test_digits_are_the_bilinear_enlargements_of_all_scans(handwriting: Dataset):
    scans = load_digits().images
    grid = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    rows, columns = np.meshgrid(grid, grid, indexing="ij")
    large = np.stack([map_coordinates(scan, [rows, columns], order=1) for scan in scans]) * 255 / 16
    images = torch.cat([handwriting.train.images, handwriting.test.images])
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])
    # In any order: each scan is there once, within a rounding.
    mine, expected = images[:, 0].reshape(1797, -1).double(), torch.from_numpy(large.reshape(1797, -1))
    distance = torch.cdist(mine, expected)
    nearest = distance.argmin(1)
    assert sorted(nearest.tolist()) == list(range(1797))
    assert float((mine - expected[nearest]).abs().max()) <= 0.5 + 1e-6
    labels = torch.cat([handwriting.train.labels, handwriting.test.labels])
    assert labels.tolist() == load_digits().target[nearest.numpy()].tolist()


def test_digits_takes_no_argument_and_is_never_mirrored():
    with pytest.raises(DataError, match="digits takes no argument, got '/data'"):
        Digits(Digits.Config()).load("/data")
    assert Digits.train_defaults["flip"] is False


# ---------------------------------------------------------------------------------------------------------------- npz


def arrays(**changes: object) -> dict[str, object]:
    generator = np.random.default_rng(0)
    return {
        "x_train": generator.integers(0, 256, (12, 3, 6, 5), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": generator.integers(0, 256, (6, 3, 6, 5), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
        **changes,
    }


def saved(tmp_path: Path, **changes: object) -> str:
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays(**changes))  # type: ignore[arg-type]
    return str(path)


def load(argument: str | None) -> Dataset:
    return Npz(Npz.Config()).load(argument)


def test_npz_reads_what_was_written(tmp_path: Path):
    data = load(saved(tmp_path))
    written = arrays()
    assert data.name == "npz:mine"
    assert data.classes == 3
    for part, labelled in (("train", data.train), ("test", data.test)):
        assert np.array_equal(labelled.images.numpy(), written[f"x_{part}"])
        assert labelled.labels.tolist() == list(written[f"y_{part}"])
        assert labelled.images.is_contiguous()


@pytest.mark.parametrize("limit", [4, 12, 99])
def test_npz_keeps_the_first_training_images(tmp_path: Path, limit: int):
    data = Npz(Npz.Config(limit=limit)).load(saved(tmp_path))
    written = arrays()
    assert np.array_equal(data.train.images.numpy(), written["x_train"][:limit])  # type: ignore[index]
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2][:limit]
    assert len(data.test) == 6
    with pytest.raises(DataError, match="of which y_train has no sample"):
        Npz(Npz.Config(limit=2)).load(saved(tmp_path))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", ">i4", "uint64"])
def test_npz_takes_any_integer_labels(tmp_path: Path, dtype: str):
    data = load(saved(tmp_path, y_train=(np.arange(12) % 3).astype(dtype), y_test=(np.arange(6) % 3).astype(dtype)))
    assert data.train.labels.dtype == torch.int64
    assert data.train.labels.tolist() == [0, 1, 2] * 4


def test_npz_takes_channels_last_and_fortran_order(tmp_path: Path):
    plain = arrays()
    turned = {key: np.asarray(plain[key]).transpose(0, 2, 3, 1) for key in ("x_train", "x_test")}
    assert load(saved(tmp_path, **turned)).fingerprint == load(saved(tmp_path)).fingerprint
    fortran = {key: np.asfortranarray(plain[key]) for key in ("x_train", "x_test")}
    data = load(saved(tmp_path, **fortran))
    assert data.fingerprint == load(saved(tmp_path)).fingerprint
    assert data.train.images.is_contiguous()


def test_npz_reads_an_ambiguous_shape_as_channels_first(tmp_path: Path):
    x = np.random.default_rng(0).integers(0, 256, (12, 3, 6, 3), dtype=np.uint8)
    data = load(saved(tmp_path, x_train=x, x_test=x[:6]))
    assert np.array_equal(data.train.images.numpy(), x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((12, 3, 6, 5))}, r"x_train must be uint8.*float64; for values in \[0, 1\] store"),
        ({"x_test": np.zeros((6, 3, 6, 5), dtype=np.int64)}, "x_test must be uint8 with values 0 to 255, it is int64"),
        ({"x_train": np.zeros((12, 6, 5), dtype=np.uint8)}, r"x_train must be \[N, C, H, W\].*\[12, 6, 5\]"),
        ({"x_train": np.zeros((12, 4, 6, 5), dtype=np.uint8)}, "with 1 or 3 channels"),
        ({"x_train": np.zeros((0, 3, 6, 5), dtype=np.uint8), "y_train": np.zeros(0, int)}, "x_train is empty"),
        ({"x_test": np.zeros((6, 3, 6, 0), dtype=np.uint8)}, "x_test is empty"),
        ({"x_test": np.zeros((6, 3, 6, 6), dtype=np.uint8)}, r"x_train are \[3, 6, 5\], those of x_test \[3, 6, 6\]"),
        ({"y_train": np.zeros(12)}, "y_train must hold integers, it is float64"),
        ({"y_train": np.zeros(12, dtype=bool)}, "y_train must hold integers, it is bool"),
        ({"y_train": np.zeros((12, 1), dtype=int)}, r"y_train must be \[N\].*\[12, 1\]"),
        ({"y_test": np.zeros(5, dtype=int)}, "x_test has 6 images and y_test 5 labels"),
        ({"y_train": np.arange(12) % 3 - 1}, "y_train has label -1; classes are numbered from 0"),
        ({"y_test": np.full(6, 7)}, "y_test has label 7, of which y_train has no sample"),
        ({"y_train": np.zeros(12, int), "y_test": np.zeros(6, int)}, "a classifier needs two classes"),
        ({"y_train": np.arange(12) * 10, "y_test": np.arange(6) * 10}, "y_train has label 110 with 12 samples"),
        ({"y_train": np.array([{}] * 12, dtype=object)}, "y_train cannot be read.*pickled objects are refused"),
    ],
)
def test_npz_names_what_is_wrong(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(DataError, match=message):
        load(saved(tmp_path, **{"y_test": np.arange(6) % 2, **changes}))


def test_npz_names_missing_files_and_keys(tmp_path: Path):
    with pytest.raises(DataError, match="npz needs a file: write --dataset npz:FILE"):
        load(None)
    with pytest.raises(DataError, match=r"there is no file .*none\.npz"):
        load(str(tmp_path / "none.npz"))
    with pytest.raises(DataError, match="there is no file"):
        load(str(tmp_path))
    np.savez(tmp_path / "few.npz", x_train=np.zeros(3), extra=np.zeros(3))
    with pytest.raises(DataError, match="lacks y_train, x_test, y_test; it holds x_train, extra"):
        load(str(tmp_path / "few.npz"))


def test_npz_refuses_files_of_other_kinds(tmp_path: Path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(arrays()))
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("one.npy", "pickle.npz", "empty.npz"):
        with pytest.raises(DataError, match=re.escape(name) + " is not a .npz file, or is cut short"):
            load(str(tmp_path / name))
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as file:
        for key in ("x_train", "y_train", "x_test", "y_test"):
            file.writestr(key, "no array")
    with pytest.raises(DataError, match="x_train is not an array"):
        load(str(tmp_path / "text.npz"))


def test_npz_notices_truncation_and_damage(tmp_path: Path):
    path = Path(saved(tmp_path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(DataError, match="is cut short"):
        load(str(path))
    damaged = bytearray(whole)
    damaged[500] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"x_train is damaged \(Bad CRC-32"):
        load(str(path))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (12, 3, 6, 5)})
    with zipfile.ZipFile(path, "w") as file:
        for key in ("x_train", "y_train", "x_test", "y_test"):
            file.writestr(f"{key}.npy", header.getvalue() + bytes(100))
    with pytest.raises(DataError, match="x_train cannot be read"):
        load(str(path))


# ------------------------------------------------------------------------------------------------------------- folder


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both parts with three classes; each image is all of one colour, of its class."""
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "cache"))
    for part, count in (("train", 4), ("test", 2)):
        for label, colour in {"cat": "red", "dog": "lime", "emu": "blue"}.items():
            for number in range(count):
                put(tmp_path / f"photos/{part}/{label}/{number}.png", colour)
    return tmp_path / "photos"


def put(path: Path, colour: str, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def load_folder(argument: str | Path | None, **options: object) -> Dataset:
    return Folder(Folder.Config(**options)).load(None if argument is None else str(argument))  # type: ignore[arg-type]


def test_folder_reads_both_parts(photos: Path):
    data = load_folder(photos)
    assert data.name == "folder:photos"
    assert data.classes == 3
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for part in (data.train, data.test):
        assert part.images.shape[1:] == (3, 5, 6)
        assert part.images.float().amax((2, 3)).argmax(1).tolist() == part.labels.tolist()
    assert load_folder(photos).fingerprint == data.fingerprint


def test_folder_scales_to_a_size(photos: Path):
    put(photos / "test/emu/large.jpg", "blue", size=(70, 40))
    with pytest.raises(DataError, match=r"of 2 sizes.*--set dataset\.size=224"):
        load_folder(photos)
    data = load_folder(photos, size=8)
    assert data.train.images.shape == (12, 3, 8, 8)
    assert data.test.images.shape == (7, 3, 8, 8)


def test_folder_is_grey_if_both_parts_are(photos: Path):
    for path in photos.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert load_folder(photos).train.images.shape == (12, 1, 5, 6)
    put(photos / "test/cat/9.png", "red")
    data = load_folder(photos)
    assert data.train.images.shape == (12, 3, 5, 6)
    assert data.test.images.shape == (7, 3, 5, 6)


def test_folder_classes_by_number(photos: Path):
    for path in sorted(photos.glob("*/*")):
        path.rename(path.with_name({"cat": "0", "dog": "2", "emu": "3"}[path.name]))
    data = load_folder(photos)
    assert data.classes == 4
    assert data.test.labels.tolist() == [0, 0, 2, 2, 3, 3]
    put(photos / "test/1/x.png", "red")
    with pytest.raises(DataError, match="test has images of class 1, of which train has none"):
        load_folder(photos)


def test_folder_names_what_is_wrong(photos: Path, tmp_path: Path):
    with pytest.raises(DataError, match="folder needs a folder: write --dataset folder:DIR"):
        load_folder(None)
    with pytest.raises(
        DataError, match=r"there is no folder .*nowhere: name the one that holds train/CLASS and test/CLASS"
    ):
        load_folder(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"bare has no folder train or test: images belong in train/CLASS"):
        load_folder(tmp_path / "bare")
    put(photos / "test/yak/1.png", "red")
    with pytest.raises(DataError, match="differ in their classes: only one of them has yak"):
        load_folder(photos)
    put(photos / "train/yak/1.png", "red")
    assert load_folder(photos).classes == 4
    for path in (photos / "test").rglob("*.png"):
        put(path, "red", size=(9, 9))
    with pytest.raises(DataError, match=r"images of train are \[3, 5, 6\], those of test \[3, 9, 9\]: .*dataset\.size"):
        load_folder(photos)
    put(tmp_path / "flat/train/1.png", "red")
    put(tmp_path / "flat/test/1.png", "red")
    with pytest.raises(DataError, match="flat/train has images but no class folders: put them in train/CLASS"):
        load_folder(tmp_path / "flat")
    put(tmp_path / "one/train/0/1.png", "red")
    put(tmp_path / "one/test/0/1.png", "red")
    with pytest.raises(DataError, match="there is no class but 0; a classifier needs two"):
        load_folder(tmp_path / "one")


# ------------------------------------------------------------------------------------------------------------ cifar10


class _OldDtype:
    """Pickles as Python 2's NumPy did, with the numbers 0 and 1 where truth values belong now."""

    def __reduce__(self):
        return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)


class _OldArray:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self):
        rebuild, arguments, _ = self.array.__reduce__()
        return rebuild, arguments, (1, self.array.shape, _OldDtype(), False, self.array.tobytes())


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray, list[int]]:
    """Six small batches in CIFAR-10's form, with their checksums in place of the published ones."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (24, 3072), dtype=np.uint8)
    labels = [int(label) for label in generator.integers(0, 10, 24)]

    def write(name: str, content: object) -> str:
        data = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(data)
        return hashlib.md5(data, usedforsecurity=False).hexdigest()

    def batch(index: int) -> dict[str, object]:
        part = slice(4 * index, 4 * index + 4)
        return {"data": _OldArray(pixels[part]), "labels": labels[part]}

    names = [f"data_batch_{number}" for number in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", [[name, write(name, batch(i))] for i, name in enumerate(names)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", write("test_batch", batch(5))]])
    meta = {**CIFAR10.meta, "md5": write("batches.meta", {"label_names": [str(i) for i in range(10)]})}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return tmp_path, pixels, labels


def test_cifar10_reads_the_batches_in_order(photographs: tuple[Path, np.ndarray, list[int]]):
    root, pixels, labels = photographs
    data = Cifar10(Cifar10.Config()).load(str(root))
    assert data.name == "cifar10"
    assert data.classes == 10
    assert np.array_equal(data.train.images.numpy(), pixels[:20].reshape(20, 3, 32, 32))
    assert np.array_equal(data.test.images.numpy(), pixels[20:].reshape(4, 3, 32, 32))
    assert data.train.labels.tolist() + data.test.labels.tolist() == labels
    assert data.train.images.is_contiguous()


def test_cifar10_keeps_the_first_training_images(photographs: tuple[Path, np.ndarray, list[int]]):
    root, pixels, labels = photographs
    data = Cifar10(Cifar10.Config(limit=7)).load(str(root))
    assert np.array_equal(data.train.images.numpy(), pixels[:7].reshape(7, 3, 32, 32))
    assert data.train.labels.tolist() == labels[:7]
    assert len(data.test) == 4


def test_cifar10_default_folder_is_in_the_cache(
    photographs: tuple[Path, np.ndarray, list[int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    root, _, _ = photographs
    cache = tmp_path / "cache"
    (cache / "data").mkdir(parents=True)
    (root / CIFAR10.base_folder).rename(cache / "data" / CIFAR10.base_folder)
    monkeypatch.setenv("BDCORE_CACHE", str(cache))
    assert len(Cifar10(Cifar10.Config()).load(None).train) == 20


def test_cifar10_does_not_download_unasked(tmp_path: Path):
    with pytest.raises(DataError, match=r"is not there in .*--dataset cifar10:ROOT.*--set dataset.download=true"):
        Cifar10(Cifar10.Config()).load(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_cifar10_notices_damage(photographs: tuple[Path, np.ndarray, list[int]]):
    root, _, _ = photographs
    with (root / CIFAR10.base_folder / "data_batch_3").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="CIFAR-10 is damaged in"):
        Cifar10(Cifar10.Config()).load(str(root))


def test_cifar10_says_when_a_download_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "nowhere.tar.gz").as_uri())
    with pytest.raises(DataError, match=r"CIFAR-10 could not be downloaded to .*nowhere"):
        Cifar10(Cifar10.Config(download=True)).load(str(tmp_path / "root"))


def test_hooks_return_the_data_sets():
    found = [module.bdcore_dataset() for module in (digits, npz, folder, cifar10)]
    assert found == [Digits, Npz, Folder, Cifar10]
    assert [kind.name for kind in found] == ["digits", "npz", "folder", "cifar10"]
    assert all(issubclass(kind.Config, PluginConfig) for kind in found)
