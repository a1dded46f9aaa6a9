"""What a pickle made by `torch.save` holds, found out without carrying out what it says.

A pickle is a program. Here its opcodes are followed on stand-ins: names stay names, a tensor is the form that it
claims, and nothing is imported, called or allocated. Only what a state dict is made of is let through; everything else
is refused with its name. So torch, which reads the file afterwards with `weights_only=True`, meets none that claims
more memory than it holds, and the reason for a refusal can be said in words.
"""

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar, cast

import torch

Kind = TypeVar("Kind")

# 16 MiB describe some 100 000 tensors; reading this much takes seconds.
LONGEST = 2**24

_SHOWN = 80

_ITEM_BYTES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("CharStorage", "ByteStorage", "BoolStorage"), 1),
    "ComplexDoubleStorage": 16,
}
_STORAGES = {f"{module}.{name}": size for module in ("torch", "torch.cuda") for name, size in _ITEM_BYTES.items()} | {
    "torch.storage.UntypedStorage": 1
}
# Modules whose functions are what an attack on those who read pickles is made of.
_DANGEROUS = frozenset(
    {"os", "posix", "nt", "io", "_io", "sys", "builtins", "subprocess", "runpy", "importlib", "pty"}
    | {"socket", "shutil", "ctypes", "code", "timeit", "pickle", "_pickle", "operator", "functools", "webbrowser"}
)


class Refused(Exception):
    """A file that is not read; the message is the reason, a clause."""


@dataclass(frozen=True)
class Name:
    """An object of a module that the pickle names."""

    path: str


@dataclass(frozen=True)
class Storage:
    """Memory that the pickle refers to: its key in the file, and how many bytes it claims."""

    key: str
    item_bytes: int
    bytes: int


@dataclass(frozen=True)
class Tensor:
    """A tensor that lies within its storage."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Scanned:
    """What a pickle would make: plain Python values, `Name` and `Tensor`; and the storages it refers to, by key."""

    value: Any
    storages: dict[str, Storage]


def scan(file: BinaryIO) -> Scanned:
    """Follow one pickle from where `file` stands; it stands behind the last opcode afterwards.

    Raises:
        Refused: it would import something that a state dict does not need, its tensors reach beyond their storages, or
            it is damaged.
    """
    machine = _Machine()
    try:
        return Scanned(machine.follow(file), machine.storages)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise Refused("its pickle is damaged") from error


def shown(text: str) -> str:
    """A text out of a file, fit for a message: short, on one line, without codes that a terminal would obey."""
    clipped = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return "".join(sign if sign.isprintable() else "?" for sign in clipped)


def check_imports(content: bytes) -> None:
    """Raise Refused for the first thing that a pickle, of any protocol, would import and a state dict does not need."""
    strings: list[str] = []
    memo: dict[int, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(content):
            match opcode.name:
                case "GLOBAL" | "INST":
                    _check_import(_path(cast(str, argument)))
                case "STACK_GLOBAL":  # of protocol 4: module and name stand on the stack
                    _check_import(".".join(strings[-2:]))
                case "MEMOIZE":
                    memo[len(memo)] = strings[-1] if strings else ""
                case "BINGET" | "LONG_BINGET":
                    strings.append(memo.get(cast(int, argument), ""))
                case _ if isinstance(argument, str):
                    strings.append(argument)
                case _:
                    pass
    except ValueError as error:
        raise Refused("its pickle is damaged") from error


def _path(argument: str) -> str:
    """MODULE.NAME of an import; protocol 2 writes the names that Python 2 had for it."""
    module, _, name = argument.partition(" ")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _check_import(path: str) -> None:
    if path not in _CALLS and path not in _STORAGES and not _dtype_bytes(path):
        raise Refused(_foreign(path))


def _foreign(path: str) -> str:
    """Why a file is refused whose pickle names something that a state dict does not hold."""
    path = shown(path)
    module, _, name = path.rpartition(".")
    package, a_class = module.partition(".")[0], name[:1].isupper()
    if package in _DANGEROUS or (package == "torch" and module != "torch._utils" and not a_class):
        return f"to read it would run {path}, which no weights need: take it for hostile"
    if module in ("torch._utils", "torch", "torch.storage"):
        return f"it needs {path}: of tensors, only plain dense ones with values are read"
    return (
        f"it holds an object of {path}, and to read that would run code of {package}. If a whole model was saved, or "
        "figures and arguments beside its weights: where the file is trusted, save model.state_dict() alone"
    )


class _Machine:
    """Stack, marks and memo of one pickle, and what each opcode does to them."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def follow(self, file: BinaryIO) -> Any:
        start = file.tell()
        for opcode, argument, position in pickletools.genops(file):
            if (position or 0) - start > LONGEST:
                raise Refused(f"its pickle is longer than {LONGEST} bytes, which no state dict needs")
            name = opcode.name
            if name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name]())
            elif name in _LITERALS:
                self._stack.append(argument)
            elif name in _STEPS:
                _STEPS[name](self, argument)
            elif name == "PROTO":
                if argument != 2:  # torch's own reader takes no other
                    raise Refused(
                        f"it is written in pickle protocol {argument}, and only protocol 2, torch.save's own, is read"
                    )
            elif name == "STOP":
                return self._stack.pop()
            else:
                raise Refused(f"its pickle has the instruction {name}, which torch.save does not write")
        raise Refused("its pickle has no end")

    def name(self, argument: str) -> None:
        path = _path(argument)
        _check_import(path)
        self._stack.append(Name(path))

    def mark(self, _: None) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def collect(self, _: None) -> None:
        items = tuple(self.since_mark())
        self._stack.append(items)

    def join(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) < count:
            raise IndexError("the stack is empty")
        self._stack[-count:] = [items]

    def append(self, _: None) -> None:
        item = self._stack.pop()
        _checked(self._stack[-1], list).append(item)

    def extend(self, _: None) -> None:
        items = self.since_mark()
        _checked(self._stack[-1], list).extend(items)

    def set_item(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        _checked(self._stack[-1], dict)[_plain(key)] = value

    def set_items(self, _: None) -> None:
        items = self.since_mark()
        target = _checked(self._stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_plain(key)] = value

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def call(self, _: None) -> None:
        arguments = _checked(self._stack.pop(), tuple)
        called = _checked(self._stack.pop(), Name).path
        if called not in _CALLS:
            raise Refused(f"it calls {called}")
        self._stack.append(_CALLS[called](*arguments))

    def build(self, _: None) -> None:
        state = _checked(self._stack.pop(), dict)
        _checked(self._stack[-1], _Ordered)
        if set(state) - {"_metadata"}:
            raise Refused("it sets attributes of a dict")

    def refer(self, _: None) -> None:
        identity = _checked(self._stack.pop(), tuple)
        if identity[0] == "module":
            path = identity[1].path if isinstance(identity[1], Name) else "unknown"
            raise Refused(_foreign(path))
        kind, storage, key, _device, count, *view = identity
        if kind != "storage" or not isinstance(key, str):
            raise Refused("it refers to something that is no tensor's memory")
        item_bytes = _STORAGES[_checked(storage, Name).path]  # KeyError: a name, but not of a storage
        found = Storage(key, item_bytes, _natural(count) * item_bytes)
        if self.storages.setdefault(key, found).bytes != found.bytes:
            raise Refused(f"it claims two sizes for its storage {shown(key)!r}")
        if view and view[0] is not None:
            _view_key, offset, size = view[0]
            if _natural(offset) + _natural(size) > count:
                raise Refused(f"a view of its storage {shown(key)!r} reaches beyond it")
            found = Storage(key, item_bytes, size * item_bytes)
        self._stack.append(found)


class _Ordered(dict[Any, Any]):
    """Stands for an OrderedDict, which alone may be given attributes."""


def _rebuild(storage: object, offset: int, size: object, stride: object, *rest: Any) -> Tensor:
    """A tensor within its storage; torch would enlarge the storage to whatever is claimed."""
    held = _checked(storage, Storage)
    dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], Name) else None  # of _rebuild_tensor_v3
    item_bytes = _dtype_bytes(dtype.path) if dtype else held.item_bytes
    if any(part for part in rest[1:] if isinstance(part, dict)):
        raise Refused("a tensor has hooks or attributes")
    sizes, strides = [[_natural(value) for value in _checked(given, tuple)] for given in (size, stride)]
    if len(sizes) > 64 or len(sizes) != len(strides):
        raise Refused(f"a tensor has {len(sizes)} dimensions and {len(strides)} strides")
    last = sum((extent - 1) * step for extent, step in zip(sizes, strides, strict=True))
    if all(sizes) and (_natural(offset) + last + 1) * item_bytes > held.bytes:
        raise Refused(f"a tensor of form {tuple(sizes)} reaches beyond its memory, storage {shown(held.key)!r}")
    return Tensor(tuple(sizes))


def _parameter(tensor: object, _requires_grad: object, _hooks: object) -> Tensor:
    return _checked(tensor, Tensor)


def _ordered(pairs: object = ()) -> _Ordered:
    found = _checked(list(cast("list[Any]", pairs)), list)
    return _Ordered((_plain(key), value) for key, value in found)


def _counter(counts: object = None) -> dict[Any, Any]:
    return _checked(counts, dict) if counts is not None else {}


def _set(items: object = ()) -> list[Any]:
    return [_plain(item) for item in _checked(items, list)]


def _encoded(text: object, encoding: object) -> bytes:
    if encoding != "latin1":  # a codec is a module of its own
        raise Refused("it asks for a codec other than latin1")
    return _checked(text, str).encode("latin1")


def _inert(*_: object) -> None:
    return None


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _inert,
    "torch.device": _inert,
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counter,
    "builtins.set": _set,
    "_codecs.encode": _encoded,
}

_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}
_LITERALS = frozenset(("BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"))
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "GLOBAL": _Machine.name,
    "MARK": _Machine.mark,
    "TUPLE": _Machine.collect,
    "TUPLE1": lambda machine, _: machine.join(1),
    "TUPLE2": lambda machine, _: machine.join(2),
    "TUPLE3": lambda machine, _: machine.join(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.refer,
}


def _dtype_bytes(path: str) -> int:
    """The size of one value of a dtype of torch, 0 where `path` names none."""
    module, _, name = path.rpartition(".")
    found = vars(torch).get(name) if module == "torch" else None
    return found.itemsize if isinstance(found, torch.dtype) else 0


def _checked(value: object, kind: type[Kind]) -> Kind:
    if not isinstance(value, kind):
        raise Refused(f"its pickle is damaged (a {type(value).__name__} where a {kind.__name__} must be)")
    return value


def _natural(value: object) -> int:
    """A size or place: bounded, for arithmetic on numbers of a million digits never ends."""
    if type(value) is not int or not 0 <= value < 2**62:
        raise Refused("a tensor's size or place is no natural number")
    return value


def _plain(key: object) -> Any:
    """A key of a dict: to hash a tuple of tuples may take for ever."""
    if not isinstance(key, str | int | float | bytes | None):
        raise Refused(f"a dict or set in it has a {type(key).__name__} for a key")
    return key
