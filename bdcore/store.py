"""Results on disk: tensors as safetensors, everything else as JSON, each file atomic and under a checksum.

A finished stage is a folder ROOT/stages/STAGE/KEY with its tensors and a manifest.json, written last; it appears by one
rename, so it is there whole or not at all. Checkpoints of an unfinished stage live in ROOT/work, folders under
construction in ROOT/tmp.
"""

import errno
import hashlib
import json
import os
import shutil
import socket
import uuid
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import platformdirs
import safetensors
from filelock import FileLock, Timeout

from bdcore.errors import StoreError

if TYPE_CHECKING:  # torch is imported where tensors are at hand: what only reads and writes files starts without it
    from torch import Tensor

_SCHEMA = 1


class Damaged(StoreError):
    """A file is not what was written: truncated, altered or missing."""


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file atomically; equal tensors and metadata give equal bytes.

    Tensors may be on any device, non-contiguous, or views of one memory: each is stored whole and contiguous.

    Returns:
        The file's SHA-256.

    Raises:
        StoreError: the file cannot be written; what stood at `path` before is untouched.
    """
    import safetensors.torch

    content = safetensors.torch.save(_separate(tensors))
    # The library writes metadata in random order, so this header is put together here: sorted, and padded to 8 bytes.
    end = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(sorted((metadata or {}).items())), **json.loads(content[8:end])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return write_bytes(path, len(text).to_bytes(8, "little"), text, memoryview(content)[end:])


def load_tensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """The tensors (on the CPU) and metadata of a safetensors file.

    Raises:
        Damaged: it is not a whole safetensors file.
        StoreError: it cannot be read.
    """
    try:
        with explained(path, "read"), safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise Damaged(f"{path} is damaged, or no safetensors file: {error}. Remove it and write it anew.") from error


def write_json(path: Path, value: Any) -> str:
    """Write JSON atomically: UTF-8, indented, keys in their order.

    Returns:
        The file's SHA-256.

    Raises:
        StoreError: the file cannot be written.
        ValueError: `value` holds NaN or an infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A path of undecodable bytes holds lone surrogates; escaped this way they are JSON.
    return write_bytes(path, text.encode(errors="backslashreplace"))


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, as hex digits. Raises StoreError where it cannot be read."""
    with explained(path, "read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of `value` as canonical JSON: independent of the order of keys, tuples like lists, 1 unlike 1.0.

    Raises:
        ValueError, TypeError: `value` holds NaN, an infinity or something that is not JSON.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A finished stage result.

    Args:
        folder: where its files are.
        payload: what the stage wrote, as JSON gives it back (tuples are lists).
        files: for each file of tensors, its SHA-256 and size in bytes.
    """

    folder: Path
    payload: dict[str, Any]
    files: dict[str, tuple[str, int]]

    def tensors(self, name: str) -> dict[str, "Tensor"]:
        """The tensors that were written under `name`, on the CPU. Raises Damaged or StoreError."""
        return load_tensors(self.path(name))[0]

    def path(self, name: str) -> Path:
        """The file of the tensors `name`."""
        return self.folder / f"{name}.safetensors"

    def sha256(self, name: str) -> str:
        """SHA-256 of that file."""
        return self.files[name][0]


class Store:
    """Stage results by stage and key; the key is a hash of everything that the result depends on.

    The way to use it, which computes once however many processes ask, and resumes after a crash:

        entry = store.read(stage, key)
        if entry is None:
            with store.building(stage, key) as folder:
                entry = store.read(stage, key)  # another run may have finished it meanwhile
                if entry is None:
                    entry = store.write(stage, key, *compute(checkpoints=folder))

    Args:
        root: the cache folder, made when first needed; by default $BDCORE_CACHE, else the platform's cache folder.
        warn: told what the user should know: a damaged entry, a wait for another run.

    Raises:
        StoreError: from all methods, where the folder cannot be read or written.
    """

    def __init__(self, root: Path | None = None, warn: Callable[[str], None] = warnings.warn) -> None:
        chosen = root or Path(os.environ.get("BDCORE_CACHE") or platformdirs.user_cache_path("bdcore"))
        self.root = chosen.expanduser().absolute()
        self._warn = warn

    def read(self, stage: str, key: str) -> Entry | None:
        """The result of `stage` under `key`, every file checked; None where there is none.

        A damaged one (a file missing, truncated or altered) is told to `warn`, deleted, and None returned.
        """
        folder = self._folder(stage, key)
        try:
            entry = self._verified(folder, stage, key)
        except Damaged as damage:
            self._warn(f"cached result {stage}/{key[:12]} was altered or truncated ({damage}); it is rebuilt")
            self._discard(folder)
            return None
        if entry is not None:
            # Checkpoints outlive the result they led to where the process died between its writing and their removal.
            self._discard(self._work(stage, key))
        return entry

    def write(
        self,
        stage: str,
        key: str,
        payload: Mapping[str, Any],
        tensors: Mapping[str, Mapping[str, "Tensor"]] | None = None,
    ) -> Entry:
        """Keep a result; it appears at once and whole. Where another process was first, its result is returned.

        Args:
            stage, key: its address.
            payload: JSON values.
            tensors: for each name a mapping of tensors, written to NAME.safetensors.
        """
        folder = self._folder(stage, key)
        plain = json.loads(json.dumps(dict(payload), allow_nan=False))  # as every later read gives it back
        self._sweep()
        temporary = self._temporary()
        files: dict[str, tuple[str, int]] = {}
        try:
            with explained(self.root, "write"):
                temporary.mkdir(parents=True)
                folder.parent.mkdir(parents=True, exist_ok=True)
                for name, group in (tensors or {}).items():
                    path = temporary / f"{name}.safetensors"
                    files[name] = (save_tensors(path, group), path.stat().st_size)
            listed = {name: {"sha256": sha256, "bytes": size} for name, (sha256, size) in files.items()}
            manifest = {"schema": _SCHEMA, "stage": stage, "key": key, "payload": plain, "files": listed}
            write_json(temporary / "manifest.json", {**manifest, "sha256": digest(manifest)})
            while not self._moved(temporary, folder):
                first = self.read(stage, key)
                if first is not None:
                    return first
            return Entry(folder, plain, files)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # gone after success; what stays now, a later write sweeps

    @contextmanager
    def building(self, stage: str, key: str) -> Generator[Path]:
        """Hold the key's lock and yield a folder for checkpoints.

        Another process that wants the same key waits (and says so once); call `read` again inside the block. The folder
        is removed when the block ends; it stays, for the next attempt to resume from, when the block raises or the
        process dies.
        """
        folder = self._work(stage, key)
        with explained(self.root, "write"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder.with_name(f"{folder.name}.lock"))
            try:
                lock.acquire(blocking=False)
            except Timeout:
                self._warn(f"another run is computing {stage}/{key[:12]}; waiting for it")
                lock.acquire()
        try:
            with explained(self.root, "write"):
                folder.mkdir(exist_ok=True)
            yield folder
            self._discard(folder)
        finally:
            lock.release()

    def _folder(self, stage: str, key: str) -> Path:
        for part in (stage, key):
            if not part or part.startswith(".") or "/" in part or "\0" in part:
                raise ValueError(f"a stage or key must be fit for a folder's name, got {part!r}")
        return self.root / "stages" / stage / key

    def _work(self, stage: str, key: str) -> Path:
        folder = self._folder(stage, key)
        return self.root / "work" / f"{folder.parent.name}-{folder.name}"

    def _verified(self, folder: Path, stage: str, key: str) -> Entry | None:
        """The entry in `folder`; None where there is no such folder; Damaged where a file is not what was written."""
        with explained(self.root, "read"):
            if not folder.exists():
                return None
            try:
                loaded = json.loads((folder / "manifest.json").read_bytes())
                manifest = cast("dict[str, Any]", loaded) if isinstance(loaded, dict) else {}
                whole = manifest.pop("sha256", None) == digest(manifest)
            except (FileNotFoundError, ValueError) as error:
                raise Damaged(f"file {folder / 'manifest.json'}: {error}") from error
            expected = {"schema": _SCHEMA, "stage": stage, "key": key}
            if not whole or any(manifest.get(name) != value for name, value in expected.items()):
                raise Damaged(f"file {folder / 'manifest.json'}")
            files = {name: (known["sha256"], known["bytes"]) for name, known in manifest["files"].items()}
            entry = Entry(folder, manifest["payload"], files)
            for name, (sha256, size) in files.items():
                path = entry.path(name)
                if not path.is_file() or path.stat().st_size != size or sha256_file(path) != sha256:
                    raise Damaged(f"file {path}")
            return entry

    def _moved(self, temporary: Path, folder: Path) -> bool:
        """Rename `temporary` to `folder`; False where that is there already."""
        with explained(self.root, "write"):
            try:
                os.rename(temporary, folder)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return False
                raise
            return True

    def _discard(self, folder: Path) -> None:
        """Delete a folder, if it is there, so that nobody ever sees a part of it: renamed away first."""
        with explained(self.root, "write"):
            if folder.exists():
                away = self._temporary()
                away.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # another process did the same
                    os.rename(folder, away)
                    shutil.rmtree(away)

    def _temporary(self) -> Path:
        return self.root / "tmp" / f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"

    def _sweep(self) -> None:
        """Remove what processes of this host left under construction when they died."""
        with explained(self.root, "write"):
            for folder in self.root.glob(f"tmp/{socket.gethostname()}:*:*"):
                if not _alive(int(folder.name.split(":")[1])):
                    shutil.rmtree(folder, ignore_errors=True)  # another process may be sweeping too


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def _separate(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Contiguous CPU tensors that share no memory with each other."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        stored = tensor.detach().cpu().contiguous()
        if stored.untyped_storage().data_ptr() in seen:
            stored = stored.clone()
        seen.add(stored.untyped_storage().data_ptr())
        separate[name] = stored
    return separate


def write_bytes(path: Path, *parts: bytes | memoryview) -> str:
    """Write `parts` to `path` by way of a temporary file beside it; the SHA-256 of the whole."""
    return write_parts(path, parts)


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """As `write_bytes`, each part taken when the one before is written: the whole may be larger than memory."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    hashed = hashlib.sha256()
    with explained(path, "write"):
        try:
            with open(temporary, "wb") as file:
                for part in parts:
                    file.write(part)
                    hashed.update(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                temporary.unlink(missing_ok=True)
            raise
    return hashed.hexdigest()


@contextmanager
def explained(where: Path, doing: str) -> Generator[None]:
    """Turn an OSError into one StoreError: where, what happened, what to do."""
    elsewhere = "choose another folder (BDCORE_CACHE sets the cache's, --out the results')"
    try:
        yield
    except OSError as error:
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT:
                advice = f"the disk is full: free space, or {elsewhere}"
            case errno.EFBIG:
                advice = f"a limit on file sizes is set (ulimit -f): lift it, or {elsewhere}"
            case errno.EROFS:
                advice = f"the folder is read-only: {elsewhere}"
            case errno.EACCES | errno.EPERM:
                advice = f"permission denied: {elsewhere}"
            case errno.ENOTDIR | errno.EEXIST:
                advice = f"a file stands where a folder is needed: remove it, or {elsewhere}"
            case _ if isinstance(error, FileNotFoundError):
                advice = "there is no such file or folder"
            case _:
                advice = f"check it, or {elsewhere}"
        raise StoreError(f"cannot {doing} {where}: {advice}. ({error})") from error
