"""Lay out the two packages of the one distribution, and compile the native operators of csrc/ where it can be done.

Packages: `bdcore`, and the folder `plugins/` as `bdcore_plugins`.

Native operators: `_C_cpu.so` and `_C_cuda.so` use nothing of torch but its stable ABI, so they run under any torch from
2.11 on, whichever they were compiled against; `_host` is a pybind11 module. BDCORE_BUILD says what to build:

    auto (default)  what the compilers found here can build; what fails is left out, and the reason is kept
    cpu             the CPU library and the module; a failure is an error
    cuda            the CUDA library as well; a failure is an error
    off             nothing: the operators run as their PyTorch references

What was built, with what, and why something was not, is written to bdcore/ops/_build.json, which `bdcore doctor` shows.
Also honoured: CXX, CXXFLAGS, LDFLAGS, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, and BDCORE_TORCH_DIR, the folder of an
installed torch package. Torch is never imported here: its headers and libraries are found by path.
"""

import importlib.util
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
MODES = ("auto", "cpu", "cuda", "off")
REPORT = "_build.json"

# The oldest torch whose stable ABI the libraries use; without it they would ask for the newest one's symbols.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
PLAIN_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
CXX_FLAGS = [*PLAIN_FLAGS, TARGET]
# Enough for `omp simd` to vectorise; not -ffast-math, which would drop NaN and reorder sums at will.
KERNEL_FLAGS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
LEVELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", TARGET]
# --no-as-needed: without it the linker drops libtorch, through which a CUDA torch provides streams and device guards.
LINK_FLAGS = ["-shared", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
ARCHITECTURES = ["8.0", "9.0+PTX"]


class NotBuilt(Exception):
    """A part cannot be built; the message says why and what to do."""


@dataclass(frozen=True)
class Torch:
    """An installed torch: its folder and version."""

    folder: Path
    version: str


def find_torch() -> Torch | None:
    """A torch with the stable ABI's headers: BDCORE_TORCH_DIR, this build's path, then the target environment."""
    named = os.environ.get("BDCORE_TORCH_DIR")
    if named:
        folders = [Path(named)]
    else:
        spec = importlib.util.find_spec("torch")
        folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
        # pip hides the environment's packages from an isolated build, but not its paths.
        folders += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    for folder in folders:
        if (folder / "include/torch/csrc/stable/library.h").is_file():
            text = (folder / "version.py").read_text(encoding="utf-8")
            found = re.search(r"__version__ *= *['\"]([^'\"]+)", text)
            return Torch(folder, found[1] if found else "unknown")
    if named:
        raise SystemExit(f"BDCORE_TORCH_DIR={named} is no folder of an installed torch >= 2.11")
    return None


def find_compiler() -> str | None:
    """The C++ compiler: CXX, or the first of c++, g++, clang++ on the path."""
    wanted = os.environ.get("CXX")
    return shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def find_cuda() -> Path | None:
    """The CUDA toolkit with an nvcc: CUDA_HOME, /usr/local/cuda*, then the real path behind nvcc."""
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    homes += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    behind = shutil.which("nvcc")
    if behind:
        homes.append(Path(behind).resolve().parents[1])
    return next((home for home in homes if (home / "bin/nvcc").exists() and (home / "include").exists()), None)


def find_ninja() -> str:
    """The ninja program, of the Python package or on the path."""
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        import ninja

        program = Path(ninja.BIN_DIR) / "ninja"
        if program.exists():
            return str(program)
    program = shutil.which("ninja")
    if program is None:
        raise NotBuilt("ninja is not installed: pip install ninja")
    return program


def first_line(*command: str) -> str:
    """What a compiler says of itself."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


class BuildFile:
    """A build.ninja under construction: rules, objects and libraries."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.5"]
        for rule, depfile in (("cxx", "-MMD -MF $out.d"), ("nvcc", "-MD -MF $out.d")):
            self.lines += [
                f"rule {rule}",
                f"  command = $compiler $flags {depfile} -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = $out",
            ]
        self.lines += ["rule link", "  command = $compiler $in $flags -o $out", "  description = $out"]

    def add(self, rule: str, output: Path, inputs: list[Path], compiler: str, flags: list[str]) -> Path:
        """One step; returns its output."""
        needed = " ".join(self._path(path) for path in inputs)
        self.lines += [
            f"build {self._path(output)}: {rule} {needed}",
            f"  compiler = {self._escape(shlex.quote(compiler))}",
            f"  flags = {self._escape(shlex.join(flags))}",
        ]
        return output

    @staticmethod
    def _escape(text: str) -> str:
        return text.replace("$", "$$")

    @classmethod
    def _path(cls, path: Path) -> str:
        return cls._escape(str(path)).replace(" ", "$ ").replace(":", "$:")


class Build(build):
    """A build that always comes to BuildNative, which also says why there is nothing to compile."""

    sub_commands = [(name, None if name == "build_ext" else needed) for name, needed in build.sub_commands]  # noqa: RUF012


class BuildNative(build_ext):
    """Compile csrc/ with ninja, and leave a report of it beside the operators."""

    def run(self) -> None:
        """Build what BDCORE_BUILD asks for into the package, whole or not at all."""
        self.work = Path(self.build_temp).resolve() / "native"
        self.work.mkdir(parents=True, exist_ok=True)
        target = self.target()
        target.mkdir(parents=True, exist_ok=True)
        for old in stale(target):  # setuptools reuses ./build, and would ship what an earlier build left there
            old.unlink()
        report = {"mode": MODE, "torch": None, "parts": {}}
        failures = []
        for part, make in (("cpu", self.build_cpu), ("host", self.build_host), ("cuda", self.build_cuda)):
            if MODE == "off" or (MODE == "cpu" and part == "cuda"):
                report["parts"][part] = {"built": False, "reason": f"BDCORE_BUILD={MODE}"}
                continue
            try:
                torch = find_torch()
                if torch is None:
                    raise NotBuilt(
                        "no torch >= 2.11 was found while building: install torch first and use "
                        "--no-build-isolation, or set BDCORE_TORCH_DIR to the folder of an installed one"
                    )
                report["torch"] = torch.version
                library, facts = make(torch)
                shutil.copy2(library, target / library.name)
                report["parts"][part] = {"built": True, **facts}
            except NotBuilt as failure:
                report["parts"][part] = {"built": False, "reason": str(failure)}
                failures.append(f"{part}: {failure}")
        (target / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if failures and MODE != "auto":
            raise SystemExit(f"BDCORE_BUILD={MODE}, but not everything could be built.\n" + "\n".join(failures))
        for failure in failures:
            self.warn(f"bdcore: operators without native code: {failure}")

    def target(self) -> Path:
        """The folder of the operators' package in what is being built."""
        return (ROOT if self.inplace else Path(self.build_lib)) / "bdcore" / "ops"

    def get_outputs(self) -> list[str]:
        """The files that this command made."""
        folder = Path(self.build_lib) / "bdcore" / "ops"
        return [str(path) for path in stale(folder)]

    def get_output_mapping(self) -> dict[str, str]:
        """For editable installs: where each output would lie in a wheel, and where it lies in the sources."""
        inside = ROOT / "bdcore" / "ops"
        return {str(Path(self.build_lib) / "bdcore" / "ops" / path.name): str(path) for path in stale(inside)}

    def build_cpu(self, torch: Torch) -> tuple[Path, dict[str, object]]:
        """The CPU library: each operator's interface once, each kernel file once for every instruction set."""
        compiler = self.compiler_path()
        file = BuildFile()
        include = [f"-I{torch.folder / 'include'}"]
        more = shlex.split(os.environ.get("CXXFLAGS", ""))
        levels = LEVELS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
        objects = []
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            if not source.stem.endswith("_kernel"):
                output = self.work / "cpu" / f"{source.stem}.o"
                objects.append(file.add("cxx", output, [source], compiler, [*CXX_FLAGS, *include, *more]))
                continue
            for level, instructions in levels.items():
                flags = [*CXX_FLAGS, *KERNEL_FLAGS, *instructions, f"-DBDCORE_ISA={level}", *more]
                output = self.work / "cpu" / f"{source.stem}.{level}.o"
                objects.append(file.add("cxx", output, [source], compiler, flags))
        library = self.work / "_C_cpu.so"
        file.add("link", library, objects, compiler, self.link_flags(torch))
        self.ninja(file, "cpu", library)
        return library, {"compiler": first_line(compiler, "--version"), "levels": list(levels)}

    def build_host(self, torch: Torch) -> tuple[Path, dict[str, object]]:
        """The pybind11 module; torch brings pybind11's headers."""
        compiler = self.compiler_path()
        file = BuildFile()
        include = [f"-I{torch.folder / 'include'}", f"-I{sysconfig.get_path('include')}"]
        more = shlex.split(os.environ.get("CXXFLAGS", ""))
        flags = [*PLAIN_FLAGS, *include, *more]  # pybind11 as torch 2.11 brings it refuses TARGET
        objects = [
            file.add("cxx", self.work / "host" / f"{source.stem}.o", [source], compiler, flags)
            for source in sorted((CSRC / "host").glob("*.cpp"))
        ]
        module = self.work / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"
        file.add("link", module, objects, compiler, ["-shared", *shlex.split(os.environ.get("LDFLAGS", ""))])
        self.ninja(file, "host", module)
        return module, {"python": platform.python_version()}

    def build_cuda(self, torch: Torch) -> tuple[Path, dict[str, object]]:
        """The CUDA library. It compiles against any torch's headers; it runs under one with the same CUDA version."""
        home = find_cuda()
        if home is None:
            raise NotBuilt("no CUDA toolkit was found: set CUDA_HOME to the folder that holds bin/nvcc")
        compiler = self.compiler_path()
        nvcc = str(home / "bin/nvcc")
        wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
        architectures = re.split(r"[ ;,]+", wanted.strip()) if wanted else ARCHITECTURES
        flags = [*NVCC_FLAGS, "-ccbin", compiler, f"-I{torch.folder / 'include'}", *map(code_for, architectures)]
        file = BuildFile()
        objects = [
            file.add("nvcc", self.work / "cuda" / f"{source.stem}.o", [source], nvcc, flags)
            for source in sorted((CSRC / "cuda").glob("*.cu"))
        ]
        library = self.work / "_C_cuda.so"
        places = [f"-L{home / name}" for name in ("lib64", "lib", "targets/x86_64-linux/lib") if (home / name).is_dir()]
        file.add("link", library, objects, compiler, [*self.link_flags(torch), *places, "-lcudart"])
        self.ninja(file, "cuda", library)
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release (\d+\.\d+)", said)
        return library, {"cuda": release[1] if release else "unknown", "architectures": architectures}

    def compiler_path(self) -> str:
        """The C++ compiler."""
        found = find_compiler()
        if found is None:
            raise NotBuilt("no C++ compiler was found: install g++ or clang++, or set CXX")
        return found

    def link_flags(self, torch: Torch) -> list[str]:
        """How a library of operators is linked."""
        return [*LINK_FLAGS, f"-L{torch.folder / 'lib'}", *shlex.split(os.environ.get("LDFLAGS", ""))]

    def ninja(self, file: BuildFile, name: str, output: Path) -> None:
        """Run a build file; its messages become the reason where it fails."""
        path = self.work / f"{name}.ninja"
        path.write_text("\n".join([*file.lines, ""]), encoding="utf-8")
        command = [find_ninja(), "-C", str(self.work), "-f", path.name, "-j", str(jobs())]
        self.announce(f"building {output.name}", level=logging.INFO)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            output.unlink(missing_ok=True)
            raise NotBuilt(f"{output.name} does not compile:\n{done.stdout[-4000:]}")


def code_for(architecture: str) -> str:
    """nvcc's option for an entry of TORCH_CUDA_ARCH_LIST such as 9.0, 9.0a or 9.0+PTX."""
    found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", architecture)
    if found is None:
        raise NotBuilt(f"TORCH_CUDA_ARCH_LIST: {architecture!r} is no architecture such as 9.0 or 9.0+PTX")
    number = found[1] + found[2] + found[3]
    code = f"[sm_{number},compute_{number}]" if found[4] else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def jobs() -> int:
    """How many compilers run at once: as many as there are cores, and 2 GB of memory for each."""
    wanted = os.environ.get("MAX_JOBS")
    if wanted:
        if not wanted.isdecimal() or int(wanted) < 1:
            raise SystemExit(f"MAX_JOBS={wanted} is no number of compilers to run at once")
        return int(wanted)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), free // (2 << 30)))


def stale(folder: Path) -> list[Path]:
    """What builds put into the operators' package."""
    return [path for pattern in ("_C_*.so", "_host*.so", REPORT) for path in sorted(folder.glob(pattern))]


MODE = os.environ.get("BDCORE_BUILD", "auto")
if MODE not in MODES:
    raise SystemExit(f"BDCORE_BUILD={MODE}: choose one of {', '.join(MODES)}")

native = MODE != "off" and (MODE != "auto" or find_compiler() is not None)
plugins = ["bdcore_plugins", *(f"bdcore_plugins.{name}" for name in find_packages("plugins"))]

setup(
    packages=[*find_packages(include=["bdcore", "bdcore.*"]), *plugins],
    package_dir={"bdcore_plugins": "plugins"},
    # It only makes this a wheel of one platform: BuildNative knows the sources.
    ext_modules=[Extension("bdcore.ops._host", [])] if native else [],
    cmdclass={"build": Build, "build_ext": BuildNative},
    # Into an empty environment pip builds the wheel before torch is there, and native code would silently be missing.
    # Asked for only then: where torch is installed, a second one would be fetched for nothing.
    setup_requires=["torch>=2.11"] if native and find_torch() is None else [],
)
