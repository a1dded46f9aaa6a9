"""Networks of people's own code, named MODULE:FUNCTION and found from the working folder."""

import ast
import contextlib
import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bdcore.errors import UsageError, unknown_name


def find_function(name: str) -> Callable[..., object]:
    """The FUNCTION of MODULE:FUNCTION; MODULE is imported, from the working folder before anywhere else.

    Raises:
        UsageError: MODULE cannot be imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise UsageError(
            f"model {name!r} is no MODULE:FUNCTION: write mynet:make for the function make of mynet.py, or "
            "folder.mynet:make"
        )
    with _working_folder():
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:
            raise UsageError(f"model {name!r}: {_why_not_imported(error, module_name)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        here = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"model {name!r}: {unknown_name(f'function of {module.__file__}', function_name, here)}")
    return function


def call(name: str, channels: int, classes: int, size: tuple[int, int], options: Mapping[str, object]) -> nn.Module:
    """What MODULE:FUNCTION returns, called with those of the data's figures that its signature names, and `options`.

    Args:
        channels, classes, size: handed over as `in_channels` or `in_chans`, `num_classes`, `image_size` or `img_size`
            (one number where the images are square, else (height, width)); options of these names come first.

    Raises:
        UsageError: as `find_function`; it takes no such option, raises, or returns something else than a module.
    """
    function = find_function(name)
    taken = _parameters(function)
    figures: dict[str, object] = {"num_classes": classes}
    figures |= dict.fromkeys(("in_channels", "in_chans"), channels)
    figures |= dict.fromkeys(("image_size", "img_size"), size[0] if size[0] == size[1] else size)
    given = {key: value for key, value in figures.items() if key in taken} | dict(options)
    if not any(kind is inspect.Parameter.VAR_KEYWORD for kind in taken.values()):
        for key in options:
            if key not in taken:
                raise UsageError(f"model {name!r}: {unknown_name('option', key, taken)}")
    try:
        with _working_folder():
            made = function(**given)
    except (Exception, SystemExit) as error:
        raise UsageError(f"model {name!r} cannot be made with {_shown(given)}: {_told(error)}") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"model {name!r} returned {type(made).__name__} and must return a torch.nn.Module.")
    return made


def takes_channels(name: str) -> bool:
    """Whether MODULE:FUNCTION is told how many channels the images have."""
    return bool({"in_channels", "in_chans"} & set(_parameters(find_function(name))))


def code_hash(name: str) -> str:
    """SHA-256 of the source of MODULE:FUNCTION: of its module or whole package, and of what it imports from beside it.

    What stands elsewhere, installed packages for instance, is not part of it, but for the package MODULE itself.
    """
    find_function(name)
    top = name.partition(":")[0].partition(".")[0]
    folders, file = list(getattr(sys.modules[top], "__path__", [])), getattr(sys.modules[top], "__file__", None)
    if not folders and not file:
        return ""  # built into Python
    root = Path(folders[0] if folders else str(file)).parent
    beside = root.resolve() == Path.cwd().resolve()
    pending, files = [top], set[Path]()
    while pending:
        sources = _sources(root, pending.pop()) - files
        files |= sources
        if beside:
            pending += [imported for source in sources for imported in _imported(source)]
    digest = hashlib.sha256()
    for source in sorted(files):
        content = source.read_bytes()
        digest.update(f"{source.relative_to(root).as_posix()}|{len(content)}|".encode() + content)
    return digest.hexdigest()


@contextlib.contextmanager
def _working_folder() -> Generator[None]:
    """Within the block, modules are looked for in the working folder first; what they print goes to stderr."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        with contextlib.suppress(ValueError):  # the module took it away itself
            sys.path.remove(folder)


def _why_not_imported(error: BaseException, module_name: str) -> str:
    absent = isinstance(error, ModuleNotFoundError) and module_name.startswith(error.name or "?")
    if absent:
        return (
            f"there is no module {module_name!r} in the working folder {Path.cwd()}, nor is one installed. MODULE is "
            f"written without .py and with dots between folders; start bdcore where {module_name.partition('.')[0]} is."
        )
    return f"module {module_name!r} cannot be imported: {_told(error)}"


def _parameters(function: Callable[..., object]) -> dict[str, Any]:
    try:
        return {key: parameter.kind for key, parameter in inspect.signature(function).parameters.items()}
    except (ValueError, TypeError):  # a built-in without a signature
        return {}


def _told(error: BaseException) -> str:
    """An error in one line, with the last place that it came by."""
    message = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (at {frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" (at {error.filename}:{error.lineno})"
    return f"{type(error).__name__}: {message}{place}."


def _shown(given: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in given.items()) or "no arguments"


def _sources(root: Path, name: str) -> set[Path]:
    """The Python files of a module or package that stands in `root`."""
    package = root / name
    alone = root / f"{name}.py"
    return set(package.rglob("*.py")) if package.is_dir() else {alone} if alone.is_file() else set()


def _imported(source: Path) -> list[str]:
    """The first parts of the modules that a file imports."""
    names: list[str] = []
    try:
        tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError):
        return []  # a file of the package that is no module: nothing can import it either
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module.partition(".")[0])
    return names
