"""The cache of decoded images: what is found again, damage, crashes, races and full disks, with real files and
processes."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bdcore import DataError, Labelled, Samples, read_samples
from bdcore.artifacts import fingerprint
from bdcore.errors import StoreError
from bdcore.store import digest, write_json

COUNT = 100
Starter = Callable[[Path], "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images that each are of one level of grey: their own number."""
    for number in range(COUNT):
        folder = tmp_path / "photos" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(folder / f"{number:03d}.png")
    return tmp_path / "photos"


class Reader:
    """Reads a folder, and counts how many images were decoded for it."""

    def __init__(self, root: Path) -> None:
        self.root, self.decoded = root, 0

    def __call__(self, **options: object) -> Samples:
        self.decoded = 0
        return read_samples(f"folder:{self.root}", progress=self._told, **options)  # type: ignore[arg-type]

    def _told(self, done: int, total: int) -> None:
        assert done <= total
        self.decoded = done


@pytest.fixture
def read(root: Path) -> Reader:
    return Reader(root)


def levels(samples: Samples) -> list[int]:
    return samples.images[:, 0, 3, 3].tolist()


EXPECTED = [*range(0, COUNT, 2), *range(1, COUNT, 2)]


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_images_are_decoded_once_for_each_form(read: Reader, cache: Path):
    assert levels(read()) == EXPECTED
    assert read.decoded == COUNT
    for options in ({"channels": 3}, {"size": (4, 4)}, {"limit": 10}, {"limit": 10, "seed": 1}):
        read(**options)
        assert read.decoded > 0
        read(**options)
        assert read.decoded == 0
    read()
    assert read.decoded == 0
    assert files_below(cache) == sorted(["manifest.json", "pixels"] * 5)


@pytest.mark.parametrize("change", ["content", "time", "more", "fewer", "name"])
def test_changed_files_are_decoded_anew(read: Reader, root: Path, change: str):
    read()
    first = root / "0" / "000.png"
    match change:
        case "content":
            Image.new("L", (8, 8), 77).save(first)
        case "time":
            os.utime(first, ns=(0, first.stat().st_mtime_ns + 1))
        case "more":
            shutil.copy(first, root / "1" / "x.png")
        case "fewer":
            first.unlink()
        case _:
            first.rename(root / "0" / "999.png")
    found = read()
    assert read.decoded == len(found.images) == COUNT + {"more": 1, "fewer": -1}.get(change, 0)
    assert (levels(found)[0] == 77) == (change == "content")


def test_the_tensor_is_a_map_that_never_writes(read: Reader, cache: Path):
    found = read()
    (pixels,) = cache.rglob("pixels")
    before = pixels.read_bytes()
    assert str(pixels) in Path("/proc/self/maps").read_text()
    assert found.images.is_contiguous()
    found.images.fill_(255)
    assert pixels.read_bytes() == before
    again = read()
    assert levels(again) == EXPECTED
    pixels.unlink()  # what is mapped stays
    assert levels(again) == EXPECTED
    assert again.labels is not None
    data = Labelled(again.images, again.labels)
    plain = Labelled(again.images.clone(), again.labels.clone())
    assert data.fingerprint == plain.fingerprint == fingerprint({"images": plain.images, "labels": plain.labels})
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(again.images, again.labels), 30, num_workers=1)
    assert torch.equal(torch.cat([images for images, _ in loader]), plain.images)


def test_a_map_may_be_larger_than_memory(read: Reader, cache: Path):
    read()
    (pixels,) = cache.rglob("pixels")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shape = [4 * memory >> 20, 1, 1024, 1024]
    with pixels.open("r+b") as file:
        file.truncate(shape[0] << 20)  # without taking room on the disk
    facts = {"shape": shape, "sha256": "", "modified": pixels.stat().st_mtime_ns}
    write_json(pixels.with_name("manifest.json"), {**facts, "digest": digest(facts)})
    found = read()
    assert list(found.images.shape) == shape
    assert found.images[-1].max() == 0


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(700)
        file.write(b"\xff")


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("pixels", flip),
        ("pixels", lambda path: os.truncate(path, 5)),
        ("pixels", lambda path: os.truncate(path, 8 * 8 * COUNT + 1)),
        ("pixels", Path.unlink),
        ("manifest.json", Path.unlink),
        ("manifest.json", lambda path: path.write_text("{}")),
        ("manifest.json", lambda path: path.write_text("[1")),
        ("manifest.json", lambda path: path.write_text(path.read_text().replace("100", "010"))),
    ],
)
def test_damage_is_noticed_said_and_made_good(read: Reader, cache: Path, name: str, harm):
    read()
    (path,) = cache.rglob(name)
    harm(path)
    with pytest.warns(UserWarning, match=r"decoded images were altered or truncated \(.*\); they are decoded again"):
        assert levels(read()) == EXPECTED
    assert read.decoded == COUNT
    assert levels(read()) == EXPECTED
    assert read.decoded == 0
    assert files_below(cache) == ["manifest.json", "pixels"]


def test_a_copied_cache_is_checked_and_kept(read: Reader, cache: Path):
    read()
    (pixels,) = cache.rglob("pixels")
    pixels.touch()
    assert levels(read()) == EXPECTED
    assert read.decoded == 0


def test_progress_is_told_seldom_and_at_the_end(root: Path):
    told: list[tuple[float, int, int]] = []
    began = time.monotonic()
    read_samples(
        f"folder:{root}", size=(700, 700), progress=lambda *done: told.append((time.monotonic() - began, *done))
    )
    assert told[-1][1:] == (COUNT, COUNT)
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
    assert len(told) <= 20 * told[-1][0] + 2


# ------------------------------------------------------------------------------------------- crashes, races, full disks

BLOCKED = """
    import sys, time
    from pathlib import Path
    import bdcore.samples.mapped
    from bdcore import read_samples

    def told(done, total):
        print("decoded", done, flush=True)
        while not Path(sys.argv[2]).exists():
            time.sleep(0.01)

    bdcore.samples.mapped._PROGRESS_SECONDS = 0  # so that the first block is told of
    found = read_samples("folder:" + sys.argv[1], progress=told)
    print("sum", int(found.images.sum()), flush=True)
"""


@pytest.fixture
def start(root: Path) -> Iterator[Starter]:
    """Start a process that reads the folder and, once a block is decoded, waits for a file."""
    started: list[subprocess.Popen[str]] = []

    def begin(go: Path) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", textwrap.dedent(BLOCKED), str(root), str(go)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_a_killed_process_leaves_nothing_half(read: Reader, start: Starter, cache: Path, tmp_path: Path):
    process = start(tmp_path / "never")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("decoded 32")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (cache / "samples").exists()
    assert len(files_below(cache)) == 1  # the file under construction
    assert levels(read()) == EXPECTED
    assert read.decoded == COUNT
    assert files_below(cache) == ["manifest.json", "pixels"]


def test_two_processes_decode_once(
    read: Reader, start: Starter, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = start(tmp_path / "go")
    assert other.stdout is not None
    assert other.stdout.readline().startswith("decoded 32")
    said: list[str] = []

    def warned(message: Warning | str, *_: object) -> None:
        said.append(str(message))
        (tmp_path / "go").touch()

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", warned)
        assert levels(read()) == EXPECTED
    assert len(said) == 1
    assert "another run is computing samples/" in said[0]
    assert read.decoded == 0
    out, err = other.communicate(timeout=60)
    assert (other.returncode, out.splitlines()[-1]) == (0, f"sum {64 * sum(range(COUNT))}"), err
    assert files_below(cache) == ["manifest.json", "pixels"]


def test_an_interrupt_leaves_nothing(root: Path, cache: Path):
    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_samples(f"folder:{root}", progress=interrupted)
    assert files_below(cache) == []


@pytest.fixture
def tiny_disk(tmp_path: Path):
    """A real file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs can be mounted by root alone")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_error(read: Reader, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BDCORE_CACHE", str(tiny_disk / "cache"))
    with pytest.raises(StoreError, match=r"the decoded images take 0\.0 GB, and 0\.0 GB are free\. .*BDCORE_CACHE"):
        read(size=(100, 100))
    assert read.decoded == 0
    # Where the file system promises more than it has, as under a quota.
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match="the disk is full: free space, or choose another folder"):
        read(size=(100, 100))
    assert files_below(tiny_disk) == []
    assert levels(read()) == EXPECTED


def test_a_file_where_the_cache_belongs(read: Reader, cache: Path):
    cache.write_text("no folder")
    with pytest.raises(StoreError, match="a file stands where a folder is needed"):
        read()


def test_paths_of_undecodable_bytes(tmp_path: Path):
    folder = os.fsencode(tmp_path / "odd") + b"\xff"
    os.mkdir(folder)
    Image.new("L", (2, 2), 9).save(tmp_path / "x.png")
    shutil.copy(tmp_path / "x.png", os.path.join(folder, b"\xfe.png"))
    found = read_samples("folder:" + os.fsdecode(folder))
    assert np.array_equal(found.images, np.full((1, 1, 2, 2), 9))
    with open(os.path.join(folder, b"\xfe.png"), "wb") as file:
        file.write(b"no image")
    with pytest.raises(DataError, match="cannot be read"):
        read_samples("folder:" + os.fsdecode(folder))
