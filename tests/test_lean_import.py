"""`import bdcore` and help import nothing heavy, and every public name is there when it is asked for."""

import json
import subprocess
import sys

import pytest

import bdcore

HEAVY = {"torch", "torchvision", "numpy", "sklearn", "pydantic", "rich", "safetensors"}

MODULES = "import json, sys\n{}\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"

CALL = "from bdcore.cli import main\ntry:\n    main({!r})\nexcept SystemExit as end:\n    assert end.code == 0"


def modules_after(statements: str) -> set[str]:
    program = [sys.executable, "-c", MODULES.format(statements)]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(done.stderr))


@pytest.mark.parametrize(
    "statements",
    ["import bdcore", "import bdcore.errors, bdcore.plugins", CALL.format(["--help"]), CALL.format(["--version"])],
)
def test_nothing_heavy_is_imported(statements):
    modules = modules_after(statements)
    assert "bdcore" in modules
    assert modules & HEAVY == set()


def test_help_imports_no_command_and_finds_no_plugins():
    modules = modules_after(CALL.format(["--help"]))
    assert {name for name in modules if name.startswith("bdcore.cli.")} == set()
    assert "bdcore.plugins" not in modules


@pytest.mark.parametrize("name", bdcore.__all__)
def test_public_names_load_on_use(name):
    assert callable(getattr(bdcore, name))
    assert name in dir(bdcore)


def test_other_names_do_not_exist():
    with pytest.raises(AttributeError, match="no attribute 'Defence'"):
        _ = bdcore.Defence
