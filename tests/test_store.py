"""The store: damage, crashes, races, full and read-only disks; with real files and processes."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdcore.errors import StoreError
from bdcore.store import Entry, Store, load_tensors, save_tensors, sha256_file

STAGE, KEY = "train", "0123456789abcdef"
MODEL = {"weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor(7)}


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> Store:
    return Store(tmp_path / "cache", warn=said.append)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def test_what_is_written_is_read(store: Store, said: list[str]):
    assert store.read(STAGE, KEY) is None
    assert not store.root.exists()
    payload = {"arch": {"shape": (3, 32, 32)}, 5: "five", "accuracy": 0.1}
    written = store.write(STAGE, KEY, payload, {"model": MODEL, "data": {}})
    read = store.read(STAGE, KEY)
    assert read == written
    assert read is not None
    assert read.payload == {"arch": {"shape": [3, 32, 32]}, "5": "five", "accuracy": 0.1}
    assert equal(read.tensors("model"), MODEL)
    assert read.tensors("data") == {}
    assert read.path("model") == store.root / "stages" / STAGE / KEY / "model.safetensors"
    assert read.sha256("model") == sha256_file(read.path("model"))
    assert files_below(store.root) == [
        f"stages/{STAGE}/{KEY}/{name}" for name in ("data.safetensors", "manifest.json", "model.safetensors")
    ]
    assert said == []


def test_the_first_of_two_writers_wins(store: Store):
    first = store.write(STAGE, KEY, {"by": "first"}, {"model": MODEL})
    assert store.write(STAGE, KEY, {"by": "second"}) == first
    assert store.write(STAGE, "other", {}).payload == {}
    assert list((store.root / "tmp").iterdir()) == []


@pytest.mark.parametrize(("stage", "key"), [("", "k"), ("..", "k"), ("s", "../k"), ("s", "a/b"), ("s", ".hidden")])
def test_names_cannot_leave_the_folder(store: Store, stage: str, key: str):
    with pytest.raises(ValueError, match="folder's name"):
        store.write(stage, key, {})
    with pytest.raises(ValueError, match="folder's name"), store.building(stage, key):
        pass


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "mine"))
    assert Store().root == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BDCORE_CACHE", "~/mine")
    assert Store().root == tmp_path / "mine"
    monkeypatch.delenv("BDCORE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Store().root.name == "bdcore"
    assert (tmp_path if sys.platform == "darwin" else tmp_path / "xdg") in Store().root.parents


def flip(path: Path, at: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("model.safetensors", lambda path: flip(path, 20)),
        ("model.safetensors", lambda path: flip(path, -1)),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes() + b"\0")),
        ("model.safetensors", Path.unlink),
        ("manifest.json", Path.unlink),
        ("manifest.json", lambda path: path.write_bytes(b"")),
        ("manifest.json", lambda path: path.write_bytes(path.read_bytes()[:50])),
        ("manifest.json", lambda path: path.write_text("[]")),
        ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe")),
        ("manifest.json", lambda path: edit(path, "0.875", "0.975")),
        ("manifest.json", lambda path: edit(path, "0.875", "1e999")),
        ("manifest.json", lambda path: edit(path, '"schema": 1', '"schema": 2')),
        ("manifest.json", lambda path: edit(path, KEY, "f" * 16)),
    ],
)
def test_damage_is_noticed_said_and_rebuilt(store: Store, said: list[str], name: str, harm):
    folder = store.write(STAGE, KEY, {"accuracy": 0.875}, {"model": MODEL}).folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    harm(folder / name)
    assert store.read(STAGE, KEY) is None
    assert len(said) == 1
    assert f"{STAGE}/{KEY[:12]} was altered or truncated" in said[0]
    assert str(folder / name) in said[0]
    assert "rebuilt" in said[0]
    assert not folder.exists()
    store.write(STAGE, KEY, {"accuracy": 0.875}, {"model": MODEL})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert store.read(STAGE, KEY) is not None
    assert len(said) == 1


@given(st.data())
def test_no_flipped_bit_of_a_manifest_changes_an_answer(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    said: list[str] = []
    store = Store(tmp_path_factory.mktemp("cache"), warn=said.append)
    entry = store.write(STAGE, KEY, {"accuracy": 0.875, "name": "Ä"})
    path = entry.folder / "manifest.json"
    flip(path, data.draw(st.integers(0, path.stat().st_size - 1)), 1 << data.draw(st.integers(0, 7)))
    found = store.read(STAGE, KEY)
    assert (found is None and len(said) == 1) or found == entry  # a space may become another space


def test_a_damaged_entry_does_not_win_against_a_writer(store: Store, said: list[str]):
    entry = store.write(STAGE, KEY, {"n": 1}, {"model": MODEL})
    flip(entry.path("model"), -1)
    again = store.write(STAGE, KEY, {"n": 1}, {"model": MODEL})
    assert equal(again.tensors("model"), MODEL)
    assert len(said) == 1


# Building


def test_the_work_folder_outlives_failure_alone(store: Store):
    def interrupted():
        with store.building(STAGE, KEY) as folder:
            save_tensors(folder / "epoch.safetensors", MODEL)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with store.building(STAGE, KEY) as folder:
        assert folder == store.root / "work" / f"{STAGE}-{KEY}"
        assert equal(load_tensors(folder / "epoch.safetensors")[0], MODEL)
    assert not folder.exists()
    assert list((store.root / "tmp").iterdir()) == []


def test_errors_of_the_block_stay_what_they_are(store: Store):
    with pytest.raises(FileNotFoundError), store.building(STAGE, KEY):
        (store.root / "absent").read_bytes()


def test_checkpoints_of_a_finished_result_are_removed(store: Store):
    folder = store.root / "work" / f"{STAGE}-{KEY}"

    def interrupted():
        with store.building(STAGE, KEY):
            (folder / "epoch").write_text("1")
            store.write(STAGE, KEY, {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert folder.exists()
    assert store.read(STAGE, KEY) is not None
    assert not folder.exists()


RACE = """
    import sys, time
    from pathlib import Path
    from bdcore.store import Store

    root, log, me = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    store = Store(root, warn=lambda message: print("WARNED", message))
    (log / f"ready{me}").touch()
    while len(list(log.glob("ready*"))) < 2:
        time.sleep(0.01)
    entry = store.read("train", "key")
    if entry is None:
        with store.building("train", "key") as folder:
            entry = store.read("train", "key")
            if entry is None:
                (log / f"computed{me}").touch()
                time.sleep(0.5)
                entry = store.write("train", "key", {"by": me})
    print("BY", entry.payload["by"])
"""


def test_two_processes_compute_once(tmp_path: Path):
    log = tmp_path / "log"
    log.mkdir()
    racers = [python(RACE, tmp_path / "cache", log, me) for me in "AB"]
    outputs = [finished(racer) for racer in racers]
    computed = [path.name[-1] for path in log.glob("computed*")]
    assert len(computed) == 1
    assert all(f"BY {computed[0]}" in output for output in outputs)
    assert "".join(outputs).count("WARNED another run is computing train/key; waiting") == 1
    assert not (tmp_path / "cache/work/train-key").exists()


# Processes killed in the middle

KILLED = """
    import os, signal, sys, time
    from pathlib import Path
    import torch
    from bdcore.store import Store

    root = Path(sys.argv[1])
    tensors = {"model": {"weight": torch.arange(300_000)}, "data": {"images": torch.zeros(10_000)}}

    def dies_before(call):  # the call-th system call that touches the disk
        calls = 0
        def counted(real):
            def wrapped(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)
            return wrapped
        for name in ("open", "write", "fsync", "replace", "rename", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))

    def child(work):
        pid = os.fork()
        if pid == 0:
            work()
            os._exit(0)
        return pid

    deaths = 0
    for call in range(1, 100):
        def work():
            store = Store(root / f"at{call}")
            dies_before(call)
            with store.building("train", "key"):
                store.write("train", "key", {"n": 1}, tensors)
        status = os.waitpid(child(work), 0)[1]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        deaths = call
    print(deaths)

    for moment in range(8):
        def work():
            store = Store(root / f"after{moment}")
            for i in range(10_000):
                store.write("train", f"key{i}", {"n": i}, tensors)
        pid = child(work)
        time.sleep(0.02 + 0.013 * moment)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
"""


def test_a_process_killed_at_any_moment_leaves_all_or_nothing(tmp_path: Path, said: list[str]):
    deaths = int(finished(python(KILLED, tmp_path)))
    assert deaths >= 8
    sample = {"weight": torch.arange(300_000)}
    full: list[Entry] = []
    for root in tmp_path.iterdir():
        store = Store(root, warn=said.append)
        keys = ["key", *(path.name for path in root.glob("stages/train/*"))]
        full += [entry for entry in (store.read("train", key) for key in keys) if entry is not None]
        with store.building("train", "key"):  # the dead process holds no lock
            store.write("train", "key", {"n": 1}, {"model": sample})
        assert list((root / "tmp").iterdir()) == []
        assert not (root / "work/train-key").exists()
    assert full
    assert all(equal(entry.tensors("model"), sample) for entry in full)
    assert said == []


def test_only_what_the_dead_left_is_swept(store: Store, said: list[str]):
    store.write(STAGE, KEY, {})
    dead = python("pass")
    finished(dead)
    alive = [f"{os.uname().nodename}:{os.getpid()}:a", f"elsewhere:{dead.pid}:b", f"{os.uname().nodename}:1:c"]
    for name in [*alive, f"{os.uname().nodename}:{dead.pid}:d"]:
        (store.root / "tmp" / name).mkdir()
    store.write(STAGE, "other", {})
    assert sorted(path.name for path in (store.root / "tmp").iterdir()) == sorted(alive)


# Disks that do not take it


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "the disk is full: free space"),
        (errno.EDQUOT, "the disk is full: free space"),
        (errno.EROFS, "the folder is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "check it"),
    ],
)
@pytest.mark.parametrize("call", ["open", "fsync", "replace", "rename", "mkdir"])
def test_one_clear_error_and_nothing_half_written(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int, advice: str, call: str
):
    store.write(STAGE, KEY, {}, {"model": MODEL})
    before = files_below(store.root)

    def fails(*arguments: object, **options: object):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open" if call == "open" else f"os.{call}", fails)
        with pytest.raises(StoreError) as caught:
            store.write(STAGE, "other", {}, {"model": MODEL})
    message = str(caught.value)
    assert str(store.root) in message
    assert advice in message
    assert "BDCORE_CACHE" in message
    assert "\n" not in message
    assert files_below(store.root) == before
    assert list((store.root / "tmp").iterdir()) == []
    assert store.read(STAGE, "other") is None
    assert store.read(STAGE, KEY) is not None


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


def test_a_disk_that_is_really_full(tiny_disk: Path, said: list[str]):
    store = Store(tiny_disk / "cache", warn=said.append)
    store.write(STAGE, KEY, {}, {"model": MODEL})
    with pytest.raises(StoreError, match="the disk is full: free space"):
        store.write(STAGE, "big", {}, {"small": MODEL, "big": {"images": torch.zeros(1 << 20)}})
    assert store.read(STAGE, "big") is None
    assert list((store.root / "tmp").iterdir()) == []
    entry = store.read(STAGE, KEY)
    assert entry is not None
    assert equal(entry.tensors("model"), MODEL)
    store.write(STAGE, "small", {}, {"model": MODEL})  # its space is free again
    assert said == []


def test_a_disk_that_is_really_read_only(tiny_disk: Path):
    store = Store(tiny_disk / "cache")
    store.write(STAGE, KEY, {}, {"model": MODEL})
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    assert store.read(STAGE, KEY) is not None
    with pytest.raises(StoreError, match="the folder is read-only: choose another folder"):
        store.write(STAGE, "other", {})
    with pytest.raises(StoreError, match="the folder is read-only"), store.building(STAGE, "other"):
        raise AssertionError("the block must not begin")


LIMITED = """
    import resource, signal, sys
    from pathlib import Path
    import torch
    from bdcore.errors import StoreError
    from bdcore.store import Store

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    store = Store(Path(sys.argv[1]))
    try:
        store.write("train", "key", {}, {"model": {"weight": torch.zeros(100_000)}})
    except StoreError as error:
        print(error)
    print(store.read("train", "key"))
"""


def test_a_limit_on_file_sizes(tmp_path: Path):
    out = finished(python(LIMITED, tmp_path / "cache"))
    assert "a limit on file sizes is set (ulimit -f)" in out
    assert out.endswith("None\n")
    assert files_below(tmp_path) == []


def test_a_root_that_is_a_file(tmp_path: Path):
    root = tmp_path / "cache"
    root.write_text("I was here first")
    store = Store(root)
    assert store.read(STAGE, KEY) is None
    for attempt in (lambda: store.write(STAGE, KEY, {}), lambda: store.building(STAGE, KEY).__enter__()):
        with pytest.raises(StoreError, match="a file stands where a folder is needed") as caught:
            attempt()
        assert str(root) in str(caught.value)
    assert root.read_text() == "I was here first"
