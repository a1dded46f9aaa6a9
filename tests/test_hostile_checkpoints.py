"""Files that want to run code, fill the memory, never end or lie: each is refused in one clear sentence, nothing runs.

The expectation of each is what was put into it. That the files are hostile, and not merely malformed, is seen by pickle
itself running the code of one, and by torch reading the well-formed twin of another.
"""

import builtins
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from bdcore.errors import UsageError
from bdcore.models import Checkpoint, read_checkpoint

HUGE = 2**40
LEGACY = {"_use_new_zipfile_serialization": False}


class Runs:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Nested:
    """Pickles as a call whose argument is made by a call, and whose state by a third."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (OrderedDict, ([["a", Runs(os.system, f"touch {self.marker}")]],), {"state": Runs(eval, "1")})


# The opcodes of a pickle as torch.save writes them, put together by hand so that they can lie.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    length = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def joined(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(number(value) for value in values) + b"t"


def storage(count: int, key: str = "0", legacy: bool = False) -> bytes:
    view = b"N" if legacy else b""
    return (
        b"(" + text("storage") + name("torch", "FloatStorage") + text(key) + text("cpu") + number(count) + view + b"tQ"
    )


def tensor(size: tuple[int, ...], stride: tuple[int, ...], held: bytes, offset: int = 0) -> bytes:
    hooks = name("collections", "OrderedDict") + b")R"
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return rebuild + b"(" + held + number(offset) + joined(size) + joined(stride) + b"\x89" + hooks + b"tR"


def program(value: bytes) -> bytes:
    """The pickle of {"weight": value}."""
    return b"\x80\x02}" + text("weight") + value + b"s."


def called(module: str, attribute: str, argument: bytes) -> bytes:
    return program(name(module, attribute) + argument + b"\x85R")


def packed(pickled: bytes, data: bytes = b"\0" * 4, **options: Any) -> bytes:
    """A file of torch.save around a pickle and one storage; `lie` is the size that the directory gives it."""
    lie, method = options.get("lie"), options.get("method", zipfile.ZIP_STORED)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", data, method)
        archive.writestr("archive/version", b"3\n")
        if lie:
            member = archive.getinfo("archive/data/0")
            member.file_size, member.compress_size = lie, lie if method == zipfile.ZIP_STORED else member.compress_size
    return buffer.getvalue()


def legacy(pickled: bytes, count: int, data: bytes) -> bytes:
    """torch.save's form before 1.6, with one storage."""
    buffer = io.BytesIO()
    torch.save({}, buffer, **LEGACY)
    buffer.seek(0)
    for _ in range(3):
        pickle.load(buffer)
    head = buffer.getvalue()[: buffer.tell()]
    return head + pickled + pickle.dumps(["0"], 2) + struct.pack("<q", count) + data


def tensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with a header of one's own."""
    described = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(described) if length is None else length) + described + data


def one(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a module whose source it does not find
        torch.save(value, buffer, **options)
    return buffer.getvalue()


def tarred(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for member, content in members.items():
            described = tarfile.TarInfo(member)
            described.size = len(content)
            archive.addfile(described, io.BytesIO(content))
    return buffer.getvalue()


def test_the_opcodes_put_together_here_are_those_of_torch(tmp_path: Path):
    """The honest twins of the lying files below are read, by torch and by bdcore."""
    data = struct.pack("<2f", 1.5, -2)
    for content in (
        packed(program(tensor((2,), (1,), storage(2))), data),
        legacy(program(tensor((2,), (1,), storage(2, legacy=True))), 2, data),
    ):
        path = tmp_path / "honest.pt"
        path.write_bytes(content)
        assert torch.load(path, weights_only=True)["weight"].tolist() == [1.5, -2]
        assert read_checkpoint(path).state["weight"].tolist() == [1.5, -2]


def test_the_code_in_these_files_would_run(tmp_path: Path):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Nested(marker)))
    assert marker.exists()


CODE: dict[str, tuple[Callable[[Path], object], str]] = {
    "os.system": (lambda marker: Runs(os.system, f"touch {marker}"), "would run posix.system"),
    "eval": (lambda marker: Runs(eval, f"open({str(marker)!r}, 'w')"), r"would run builtins\.eval"),
    "exec": (lambda marker: Runs(exec, f"open({str(marker)!r}, 'w')"), r"would run builtins\.exec"),
    "open": (
        lambda marker: Runs(builtins.open, str(marker), "w"),
        r"would run (io|_io)\.open",
    ),
    "nested": (Nested, r"would run posix\.system"),
    "subprocess": (lambda marker: Runs(subprocess.getoutput, f"touch {marker}"), r"would run subprocess\.getoutput"),
    "torch's own": (lambda marker: Runs(torch.load, str(marker)), r"would run torch\.serialization\.load"),
    "bytes in bytes": (
        lambda marker: Runs(torch.storage._load_from_bytes, pickle.dumps(Nested(marker))),
        r"would run torch\.storage\._load_from_bytes",
    ),
    "a model": (
        lambda marker: nn.Linear(2, 2),
        r"object of (torch\.nn\.modules\.linear\.Linear|copyreg\._reconstructor).*save model\.state_dict",
    ),
}


@pytest.mark.parametrize("form", ["zip", "legacy", *(f"pickle protocol {number}" for number in range(6))])
@pytest.mark.parametrize("code", CODE)
def test_code_is_refused_by_its_name_and_does_not_run(code: str, form: str, tmp_path: Path):
    make, says = CODE[code]
    marker = tmp_path / "marker"
    held = {"state_dict": {"weight": torch.zeros(2), "hidden": make(marker)}}
    if form.startswith("pickle"):
        content = pickle.dumps(make(marker), int(form[-1]))
    else:
        content = saved(held, **(LEGACY if form == "legacy" else {}))
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=says) as refusal:
        read_checkpoint(path)
    assert not marker.exists()
    assert str(refusal.value).startswith(f"{path} is not read: ")
    assert "\n" not in str(refusal.value)


MAGIC = saved({}, **LEGACY)[:15]  # the magic number of old files, a pickle of its own
SECRET = called("builtins", "bytearray", number(HUGE))
LAUGHS = b"\x80\x02})" + b"".join(b"q\0h\0\x86" for _ in range(90)) + b"K\1s."
ZEROS = b"\0" * 2**26

LIES: dict[str, tuple[bytes, str]] = {
    "a compressed member": (packed(program(tensor((2**24,), (1,), storage(2**24))), ZEROS, method=8), "is compressed"),
    "a compressed member that lies": (packed(program(b"N"), b"\0" * 4, method=8, lie=HUGE), "is compressed"),
    "a member larger than the file": (packed(program(tensor((1,), (1,), storage(1))), lie=HUGE), "more bytes than"),
    "a member of another compression": (
        packed(program(b"N"), ZEROS, method=zipfile.ZIP_BZIP2),
        "is compressed",
    ),
    "a tensor larger than its storage": (
        packed(program(tensor((HUGE,), (1,), storage(1)))),
        "reaches beyond its memory",
    ),
    "a tensor with giant strides": (packed(program(tensor((2,), (HUGE,), storage(1)))), "reaches beyond its memory"),
    "a tensor far behind its storage": (
        packed(program(tensor((1,), (1,), storage(1), HUGE))),
        "reaches beyond its memory",
    ),
    "a negative place": (packed(program(tensor((1,), (1,), storage(1), -1))), "no natural number"),
    "a negative size": (packed(program(tensor((-4,), (1,), storage(1)))), "no natural number"),
    "a size of 2000 bits": (packed(program(tensor((2**2000,), (1,), storage(1)))), "no natural number"),
    "ten thousand dimensions": (
        packed(program(tensor((2**60,) * 10_000, (0,) * 10_000, storage(1)))),
        "10000 dimensions",
    ),
    "a storage larger than its member": (
        packed(program(tensor((1,), (1,), storage(HUGE)))),
        "claims 4398046511104 bytes",
    ),
    "a storage that is not there": (
        packed(program(tensor((1,), (1,), storage(1, "7")))),
        "'7' claims 4 bytes, and is not",
    ),
    "an old file's giant storage": (
        legacy(program(tensor((1,), (1,), storage(HUGE, legacy=True))), HUGE, b"\0" * 4),
        "claims more bytes than the file",
    ),
    "an old file's false count": (
        legacy(program(tensor((1,), (1,), storage(1, legacy=True))), HUGE, b"\0" * 4),
        "truncated or damaged at storage",
    ),
    "bytearray of a terabyte": (packed(SECRET), r"would run builtins\.bytearray"),
    "a storage of a terabyte": (packed(called("torch", "FloatStorage", number(HUGE))), r"calls torch\.FloatStorage"),
    "a tensor of a terabyte": (packed(called("torch", "FloatTensor", number(HUGE))), r"needs torch\.FloatTensor"),
    "a memo of four billion places": (packed(program(b"Nr\xff\xff\xff\xff")), "holds no state dict"),
    "a key that takes for ever to hash": (packed(LAUGHS), "a tuple for a key"),
    "a set that takes for ever to hash": (
        packed(program(name("builtins", "set") + b"])" + LAUGHS[4:-4] + b"a\x85R")),
        "a tuple for a key",
    ),
    "a text of four gigabytes": (packed(b"\x80\x02X\xff\xff\xff\xffabc"), "damaged"),
    "another codec": (packed(program(name("_codecs", "encode") + text("a") + text("zip") + b"\x86R")), "codec"),
    "an empty stack": (packed(b"\x80\x02s."), "damaged"),
    "no pickle at all": (packed(b""), "damaged"),
    "attributes of a dict": (
        packed(b"\x80\x02" + name("collections", "OrderedDict") + b")R}" + text("items") + b"Nsb."),
        "attributes of a dict",
    ),
    "two archives in one": (packed(program(b"N")) + packed(program(b"N")), "two ways"),
    "two members of one name": (
        packed(program(b"N")).replace(b"archive/version", b"archive/data/0\0"),
        "one name",
    ),
    "another zip": (packed(program(b"N")).replace(b"data.pkl", b"data.txt"), r"no data\.pkl"),
    "a tar archive": (tarred(sys_info=b"", pickle=SECRET, storages=b"", tensors=b""), "tar archive"),
    "a tar archive that begins like an old file": (
        tarred(**{MAGIC.decode("utf-8", "surrogateescape"): b"", "pickle": SECRET}),
        "damaged",
    ),
    "safetensors with an absurd header": (tensors({}, length=2**63), "no whole safetensors"),
    "safetensors with a header beyond its end": (tensors({"a": one([1], 0, 4)}, b"\0" * 4, 9 * 10**7), "no whole"),
    "safetensors with offsets beyond its end": (tensors({"a": one([HUGE], 0, 4 * HUGE)}, b"\0" * 4), "no whole"),
    "safetensors with a false size": (tensors({"a": one([HUGE], 0, 4)}, b"\0" * 4), "no whole"),
    "safetensors that overlap": (tensors({"a": one([2], 0, 8), "b": one([2], 4, 12)}, b"\0" * 12), "no whole"),
    "safetensors that run backwards": (tensors({"a": one([1], 4, 0)}, b"\0" * 4), "no whole"),
    "safetensors of endless depth": (tensors(b"{" + b'"a":[' + b"[" * 10**6), "no whole"),
    "safetensors without tensors": (tensors({"__metadata__": {"a": "b"}}), "no tensors"),
    "safetensors of no dtype": (tensors({"a": {**one([1], 0, 4), "dtype": "F31"}}, b"\0" * 4), "no whole"),
    "nothing": (b"", "is empty"),
    "one byte": (b"P", "no safetensors file and none of torch.save"),
    "text": (b"weights = 1\n", "no safetensors file and none of torch.save"),
    "a text with a full stop": (b"These are the weights.", "none of torch.save"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a page": (b"\n<!DOCTYPE html><html>", "web page"),
    "noise": (bytes(range(255, 0, -1)) * 9, "no safetensors file and none of torch.save"),
}


def test_a_message_holds_no_codes_and_no_long_names_of_the_file(tmp_path: Path):
    path = tmp_path / "model.pt"
    for content in (
        packed(called("os\x1b[2J" + "a" * 10**5, "system\r", number(1))),
        saved({"\x1b[31m" + "b" * 10**5: {}, "\n": 1}),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError) as refusal:
            read_checkpoint(path)
        assert str(refusal.value).isprintable()
        assert len(str(refusal.value)) < 1000


PROGRAM = """
import json, resource, sys, time
from pathlib import Path
from bdcore.errors import UsageError
from bdcore.models import read_checkpoint
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**27,) * 2)
for path in sys.argv[1:]:
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_checkpoint(Path(path))
        outcome = "read"
    except UsageError as error:
        outcome = str(error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([Path(path).name, outcome, time.perf_counter() - start, grown]), flush=True)
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float, int]]:
    """For each lie: what is said, the seconds it took and the kibibytes it grew by, in a process that may grow by
    128 MiB."""
    folder = tmp_path_factory.mktemp("lies")
    for number, (content, _) in enumerate(LIES.values()):
        (folder / str(number)).write_bytes(content)
    with open(folder / "sparse", "wb") as file:
        file.write(packed(program(b"N"))[:30])
        file.truncate(2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    names = dict(zip(map(str, range(len(LIES))), LIES, strict=True)) | {"sparse": "sparse"}
    command = [sys.executable, "-c", PROGRAM, *(str(folder / number) for number in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {names[number]: (outcome, seconds, grown) for number, outcome, seconds, grown in lines}


@pytest.mark.parametrize("lie", [*LIES, "sparse"])
def test_a_lie_is_refused_at_once_and_within_little_memory(lie: str, refusals: dict[str, tuple[str, float, int]]):
    outcome, seconds, grown = refusals[lie]
    says = LIES[lie][1] if lie in LIES else "this machine's memory"
    assert "is not read: " in outcome
    assert re.search(says, outcome), outcome
    assert seconds < 5
    assert grown < 2**16


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.mkdir(), "it is a folder"),
        (os.mkfifo, "no regular file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
        (lambda path: path.symlink_to(path.parent / "absent"), "No such file"),
        (lambda path: None, "No such file"),
    ],
)
def test_what_is_no_file_is_refused_without_waiting(make: Callable[[Path], None], says: str, tmp_path: Path):
    path = tmp_path / "model.pt"
    make(path)
    with pytest.raises(UsageError, match=says):
        read_checkpoint(path)


STATE = {"conv.weight": torch.arange(24.0).view(2, 3, 2, 2), "bn.num_batches_tracked": torch.tensor(7)}
VALID = {
    "zip": saved({"state_dict": STATE, "epoch": 3}),
    "legacy": saved({"state_dict": STATE, "epoch": 3}, **LEGACY),
    "safetensors": safetensors.torch.save(STATE),
}


@pytest.mark.parametrize("form", VALID)
def test_a_truncated_file_is_refused_wherever_it_ends(form: str, tmp_path: Path):
    content = VALID[form]
    path = tmp_path / "model"
    for length in {1, 7, 8, 9, 15, 64, *range(0, len(content), max(1, len(content) // 40)), len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(UsageError, match="is not read: "):
            read_checkpoint(path)


@pytest.mark.parametrize("form", VALID)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_as_weights_or_refused(form: str, data: st.DataObject, tmp_path: Path):
    content = bytearray(VALID[form])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "model"
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)) | st.just(len(content)))])
    outcome = read_or_refused(path)
    if isinstance(outcome, Checkpoint):
        assert all(type(value) is torch.Tensor and value.device.type == "cpu" for value in outcome.state.values())
        assert sum(value.numel() for value in outcome.state.values()) <= 25
    else:
        assert outcome.startswith(f"{path} is not read: ")


def read_or_refused(path: Path) -> Checkpoint | str:
    try:
        return read_checkpoint(path)
    except UsageError as error:
        return str(error)
