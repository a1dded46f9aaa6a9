"""Fixtures shared by all tests: plugin distributions laid on disk as an installer would leave them, and the
implementations of the operators."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

from bdcore.ops.native import load


class Site:
    """A folder of installed distributions, like site-packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(
        self,
        distribution: str,
        plugins: Mapping[str, str],
        files: Mapping[str, str],
        *,
        version: str = "1.0",
        requires: Sequence[str] = (),
    ) -> None:
        """Lay a distribution down: modules by relative path, and entry points {plugin name: module}."""
        for path, content in files.items():
            file = self.folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.4", f"Name: {distribution}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        entries = [f"{name} = {value}" for name, value in plugins.items()]
        (info / "entry_points.txt").write_text("\n".join(["[bdcore]", *entries]) + "\n")
        (info / "INSTALLER").write_text("tests\n")
        names = [*files, *(f"{info.name}/{name}" for name in ("METADATA", "entry_points.txt", "INSTALLER", "RECORD"))]
        (info / "RECORD").write_text("".join(f"{name},,\n" for name in names))
        importlib.invalidate_caches()

    def forget(self, *more: Path) -> None:
        """Let this process import anew what lies here or in further folders, or no longer find it."""
        folders = tuple(f"{folder}{os.sep}" for folder in (self.folder, *more))
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(folders):
                del sys.modules[name]

    def bdcore(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run the installed command `bdcore` in a process of its own that sees these distributions."""
        script = Path(sys.executable).with_name("bdcore")
        env = {**os.environ, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run([script, *arguments], env=env, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="session")
def new_site(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Site]:
    """Make an empty site that only processes started with `Site.bdcore` see."""
    return lambda: Site(tmp_path_factory.mktemp("site"))


@pytest.fixture
def site(new_site: Callable[[], Site], monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An empty site that this process sees as well; its modules are forgotten at the end."""
    made = new_site()
    monkeypatch.syspath_prepend(made.folder)
    yield made
    made.forget()


def _lacking(*parts: str) -> str:
    """Which of the parts of the compiled operators are not there, and why."""
    return "; ".join(f"{part}: {load()[part].detail}" for part in parts if not load()[part].loaded)


_ON_GPU = _lacking("cuda", "host") if torch.cuda.is_available() else "no GPU"
native = pytest.mark.skipif(bool(_lacking("cpu", "host")), reason=f"no compiled operators: {_lacking('cpu', 'host')}")
cuda = pytest.mark.skipif(bool(_ON_GPU), reason=_ON_GPU)


@pytest.fixture(
    params=["reference", pytest.param("native", marks=native), pytest.param("cuda", marks=cuda)], scope="module"
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where an operator computes; every test that takes it runs with each implementation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDCORE_OPS", "reference" if request.param == "reference" else "native")
        yield "cuda" if request.param == "cuda" else "cpu"
