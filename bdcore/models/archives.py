"""Files of `torch.save`, checked before torch reads them: nothing in them runs, nothing claims more than is there."""

import os
import pickletools
import struct
import warnings
import zipfile
from io import BytesIO
from typing import Any, BinaryIO

import torch

from bdcore.models.pickles import LONGEST, Refused, Storage, check_imports, scan, shown

# What a file of torch.save begins with before torch 1.6: its magic number as a pickle of its own.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP = b"PK\x03\x04"


def read_archive(file: BinaryIO) -> Any:
    """What a file of `torch.save` holds, its tensors on the CPU.

    Args:
        file: open for reading, at its beginning.

    Raises:
        Refused: it is none, would run code, claims more than it holds, or is damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what readers warn of in a damaged file is of no use to anybody
        _check(file)
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file makes torch raise almost anything
            raise Refused(f"torch cannot read it, so it is damaged ({_first_line(error)})") from error


def _check(file: BinaryIO) -> None:
    head = file.read(len(_LEGACY))
    file.seek(0)
    if head.startswith(_ZIP):
        _check_zip(file)
    elif head == _LEGACY:
        _check_legacy(file)
    else:
        _explain(file)


def _check_zip(file: BinaryIO) -> None:
    try:
        size = os.fstat(file.fileno()).st_size
        with zipfile.ZipFile(file) as archive:
            if archive.comment or archive.start_dir != _directory(file, size):
                raise Refused("its directory can be read in two ways, which torch.save never leaves open")
            entries = _entries(archive, size)
            folder = _folder(entries)
            described = entries[f"{folder}data.pkl"]
            if described.file_size > LONGEST:
                raise Refused(f"its data.pkl has {described.file_size} bytes, which no state dict needs")
            content = archive.read(described)
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        EOFError,
        OSError,
        ValueError,
        RuntimeError,
        struct.error,
    ) as error:
        raise Refused(f"it is truncated or damaged ({_first_line(error)})") from error
    check_imports(content)
    for key, storage in scan(BytesIO(content)).storages.items():
        entry = entries.get(f"{folder}data/{key}")
        if entry is None or entry.file_size != storage.bytes:
            held = "is not there" if entry is None else f"has {entry.file_size} bytes"
            raise Refused(f"its storage {shown(key)!r} claims {storage.bytes} bytes, and {held}")


def _directory(file: BinaryIO, size: int) -> int:
    """Where the directory of the members begins by the archive's own last records.

    zipfile searches, torch believes these records: where both find the same, what is checked is what is read.
    """
    file.seek(max(0, size - 98))
    large, locator, end = file.read(56), file.read(20), file.read(22)
    if locator.startswith(b"PK\6\7"):
        if int.from_bytes(locator[8:16], "little") != size - 98:
            return -1
        return int.from_bytes(large[48:56], "little")
    return int.from_bytes(end[16:20], "little")


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The members by name. `torch.save` stores them as they are, so none can be larger than the file."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) < len(archive.infolist()):
        raise Refused("two of its members have one name")
    for entry in entries.values():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise Refused(
                f"its member {shown(entry.filename)!r} is compressed or encrypted ({entry.file_size} bytes in "
                f"{entry.compress_size}), which torch.save never does: it could fill any memory. If it was packed "
                "anew, pack it plainly (zip -0)"
            )
    if sum(entry.file_size for entry in entries.values()) > size:
        raise Refused("its members together claim more bytes than the file has")
    return entries


def _folder(entries: dict[str, zipfile.ZipInfo]) -> str:
    """The one folder that all members stand in, with its slash."""
    folder = next(iter(entries), "").partition("/")[0] + "/"
    if f"{folder}constants.pkl" in entries or any(name.startswith(f"{folder}code/") for name in entries):
        raise Refused(
            "it is a TorchScript archive, which holds a program. In the program that made it, save "
            "model.state_dict() instead"
        )
    if f"{folder}data.pkl" not in entries:
        raise Refused("it is a zip archive, but not one of torch.save: it has no data.pkl")
    return folder


def _check_legacy(file: BinaryIO) -> None:
    """Five pickles one after another (magic number, version, system, content, keys of storages), then the storages,
    each the number of its values and these."""
    size = os.fstat(file.fileno()).st_size
    pickles = BytesIO(file.read(LONGEST))  # in memory: a file would make room for whatever length a pickle claims
    parts = [scan(pickles) for _ in range(5)]
    if parts[1].value != 1001:
        raise Refused("its form is of an unknown version")
    storages, keys = parts[3].storages, parts[4].value
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise Refused("its list of storages is not that of its tensors")
    file.seek(pickles.tell())
    for key in keys:
        _check_storage(file, storages[key], size)


def _check_storage(file: BinaryIO, storage: Storage, size: int) -> None:
    count = file.read(8)
    if len(count) < 8 or int.from_bytes(count, "little") * storage.item_bytes != storage.bytes:
        raise Refused(f"it is truncated or damaged at storage {shown(storage.key)!r}")
    if file.tell() + storage.bytes > size:
        raise Refused(f"it is truncated, or its storage {shown(storage.key)!r} claims more bytes than the file has")
    file.seek(storage.bytes, os.SEEK_CUR)


def _explain(file: BinaryIO) -> None:
    """Raise Refused: say what a file of another form seems to be."""
    content = file.read(LONGEST)
    if content[257:262] == b"ustar":
        raise Refused("it is a tar archive, torch.save's form before 2017, which can run code when it is read")
    if content.startswith(b"version https://git-lfs"):
        raise Refused("it is a Git LFS pointer, not the file itself: fetch that with `git lfs pull`")
    if content[:64].lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise Refused("it is a web page, perhaps of the site that has the file: download the file itself")
    if _is_pickle(content):
        check_imports(content)
        raise Refused("it is a plain pickle, which torch.save did not write: save the state dict with torch.save")
    raise Refused(
        "it is no safetensors file and none of torch.save: name the file with the model's weights, or save its state "
        "dict with torch.save"
    )


def _is_pickle(content: bytes) -> bool:
    try:
        return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(content))
    except ValueError:
        return content.startswith(b"\x80")  # damaged, but it begins as one


def _first_line(error: BaseException) -> str:
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0])
