"""`bdcore new`: packages that build, install, run and pass their own tests in an environment of their own."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from bdcore.cli import main
from bdcore.cli.new import KINDS, write
from bdcore.errors import UsageError

MADE = {"defense": "mine", "attack": "red-sticker", "dataset": "drawn_shapes"}
QUICK = ["--model", "wrn10_1", "--device", "cpu", "--set", "train.epochs=1", "--json"]
RUNS = {
    "defense": ["--plugin", "mine", "--set", "mine.epochs=1"],
    "attack": ["--plugin", "red-sticker"],
    "dataset": ["--plugin", "finetune", "--dataset", "drawn_shapes", "--set", "dataset.samples=240"],
}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


class Elsewhere:
    """A fresh environment with all three packages, built and installed by pip; what is needed stands in this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=False)
        self.python = folder / "venv" / "bin" / "python"
        site = Path(
            run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
        )
        here = sysconfig.get_path("purelib")
        (site / "dependencies.pth").write_text(f"import site; site.addsitedir({here!r})\n")
        sources = [str(write(kind, name, folder)) for kind, name in MADE.items()]
        run(
            sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels",
            *sources, cwd=folder,
        )  # fmt: skip
        wheels = sorted(str(path) for path in (folder / "wheels").iterdir())
        # Without an index pip would fail here if the bounds did not admit this bdcore.
        run(sys.executable, "-m", "pip", "--python", self.python, "install", "--no-index", *wheels, cwd=folder)

    def bdcore(self, *arguments: str) -> str:
        call = "from bdcore.cli import main; main()"
        return run(self.python, "-c", call, *arguments, cwd=self.folder, BDCORE_CACHE=str(self.folder / "cache"))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    return Elsewhere(tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.parametrize("kind", MADE)
def test_it_runs(kind: str, elsewhere: Elsewhere):
    record = json.loads(elsewhere.bdcore("run", *RUNS[kind], *QUICK, "--out", f"out-{kind}"))
    name = MADE[kind]
    used = {plugin["name"]: plugin for plugin in record["plugins"]}
    assert used[name]["distribution"] == f"bdcore-{name.replace('_', '-')}"
    assert record["victim"]["clean_accuracy"] > 0.1


def test_their_own_tests_pass(elsewhere: Elsewhere):
    """All checks of the kit among them, in one process."""
    tests = [str(elsewhere.folder / f"bdcore-{name.replace('_', '-')}" / "tests") for name in MADE.values()]
    said = run(elsewhere.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=elsewhere.folder)
    assert "failed" not in said
    assert int(said.split(" passed")[0].split()[-1]) > 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_is_small_and_complete(kind: str, tmp_path: Path):
    folder = write(kind, "my-own_one", tmp_path)
    assert folder == tmp_path / "bdcore-my-own-one"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    found = files(folder)
    assert set(found) == {
        "pyproject.toml", "README.md", "LICENSE", ".gitignore", ".github/workflows/test.yml",
        "bdcore_my_own_one.py", "tests/test_my_own_one.py",
    }  # fmt: skip
    assert len(found["bdcore_my_own_one.py"].splitlines()) <= 60
    assert "$" not in "".join(found.values())
    for path, text in found.items():
        assert max(map(len, text.splitlines())) <= 120 or path == "README.md"
        if path.endswith(".py"):
            compile(text, path, "exec")
    assert "class MyOwnOne(" in found["bdcore_my_own_one.py"]


def test_it_asks_for_this_bdcore_up_to_the_next_major_version(tmp_path: Path):
    text = (write("attack", "mine", tmp_path) / "pyproject.toml").read_text()
    (asked,) = [line for line in text.splitlines() if line.startswith("dependencies")]
    bounds = SpecifierSet(asked.partition("bdcore")[2].partition('"')[0])
    here = version("bdcore")
    assert bounds.contains(here, prereleases=True)
    assert not bounds.contains(f"{int(here.split('.')[0]) + 1}.0.0")
    assert not bounds.contains("0.0.1")


@pytest.mark.parametrize(
    ("name", "cls"), [("tensor", "TensorAttack"), ("none", "NoneAttack"), ("Context", "ContextAttack")]
)
def test_the_class_has_a_name_that_the_module_does_not_use(name: str, cls: str, tmp_path: Path):
    text = (write("attack", name, tmp_path) / f"bdcore_{name.lower()}.py").read_text()
    assert f"class {cls}(Attack):" in text
    assert f'name = "{name}"' in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("record", "cannot be the name of a plugin"),
        ("1st", "begin with a letter"),
        ("a-", "cannot be the name"),
        ("a--b", "cannot be the name"),
        ("../a", "cannot be the name"),
        ("\u00e4", "cannot be the name"),
        ("x" * 31, "at most 30"),
        ("mcldef", r"there is a plugin 'mcldef' already, of bdcore \d"),
        ("Feature-Collision", "there is a plugin 'feature_collision' already"),
        ("plugins", "module bdcore_plugins .* is installed already"),
    ],
)
def test_wrong_names_are_refused_and_leave_nothing(name: str, said: str, tmp_path: Path):
    with pytest.raises(UsageError, match=said):
        write("defense", name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_distribution_of_that_name_is_not_shadowed(site, tmp_path: Path):
    site.add("bdcore-mine", {"other": "bdcore_other"}, {"bdcore_other.py": ""}, version="3.1")
    with pytest.raises(UsageError, match=r"distribution bdcore-mine 3\.1 is installed already"):
        write("defense", "mine", tmp_path)


def test_nothing_is_overwritten(tmp_path: Path):
    kept = tmp_path / "bdcore-mine" / "kept"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(UsageError, match="exists and is left as it is"):
        write("defense", "mine", tmp_path)
    assert files(tmp_path) == {"bdcore-mine/kept": "mine"}
    with pytest.raises(UsageError, match="there is no folder"):
        write("defense", "other", tmp_path / "absent")


def test_it_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = Path.write_text

    def full(self: Path, *arguments: object, **options: object) -> int:
        if self.name == ".gitignore":
            raise OSError(28, "No space left on device")
        return whole(self, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UsageError, match="cannot be written: No space left on device"):
        write("dataset", "mine", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_shows_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub dir").mkdir()
    with pytest.raises(SystemExit) as end:
        main(["new", "dataset", "shapes", "--into", "sub dir"])
    assert end.value.code == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  pip install -e 'sub dir/bdcore-shapes[test]'",
        "  pytest 'sub dir/bdcore-shapes'",
        "  bdcore run --plugin finetune --dataset shapes",
    ]
    with pytest.raises(SystemExit) as end:
        main(["new", "defence", "mine"])
    assert end.value.code == 2
    assert "'defence' is not one of 'defense'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_code_is_clean_by_ruff_and_pyright(tmp_path: Path):
    pytest.importorskip("ruff")
    pytest.importorskip("pyright")
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"typeCheckingMode": "standard", "extraPaths": [str(Path(__file__).parents[1])]})
    )
    for kind in KINDS:
        for name in (f"my-{kind}", f"one-of-thirty-letters-{kind}".ljust(30, "x")):
            write(kind, name, tmp_path)
    binaries = Path(sys.executable).parent
    run(binaries / "ruff", "check", "--select", "E,F,I,UP,B,PL,RUF", ".", cwd=tmp_path)
    run(binaries / "ruff", "format", "--check", ".", cwd=tmp_path)
    run(binaries / "pyright", "--pythonpath", sys.executable, ".", cwd=tmp_path)
