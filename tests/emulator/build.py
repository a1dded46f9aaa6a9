"""Compile CUDA sources of csrc/cuda for the CPU, with the emulator in this folder, into a library of operators.

python tests/emulator/build.py [--sanitize] [--cache FOLDER] [SOURCE.cu ...]

prints the library's path. Without sources, all of csrc/cuda. Objects and libraries are kept in the cache by what they
are made of, so that only what changed is compiled again. torch is found by its path and not imported.
"""

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-unknown-pragmas",
    "-DBDCORE_EMULATED",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]
# Their handlers are in emulator.h.
CHECKS = ["-fsanitize=alignment,null,bounds-strict", "-fno-sanitize-recover=alignment,null,bounds-strict"]
LINK_FLAGS = ["-shared", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=vptr"]


def build(compiler: str, sources: list[Path], cache: Path, *, sanitize: bool) -> Path:
    """The library, compiled where the cache has not got it.

    Raises:
        subprocess.CalledProcessError: a source does not compile; the compiler has said why on stderr.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("torch is not installed")
    torch = Path(spec.submodule_search_locations[0])
    flags = [*FLAGS, *CHECKS, *poison_locals(compiler), *(SANITIZERS if sanitize else [])]
    headers = sorted([*HERE.glob("*.h"), *(ROOT / "csrc").glob("common/*"), *(ROOT / "csrc").glob("cuda/*.h")])
    common = [compiler, *flags, str(torch), (torch / "version.py").read_text(), *(path.read_text() for path in headers)]
    cache.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        output = cache / f"{source.stem}-{digest(source.read_text(), *common)}.o"
        command = [compiler, "-x", "c++", *flags, f"-I{HERE}", f"-I{torch / 'include'}", "-c", str(source)]
        return make(output, command)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, sources))
    library = cache / f"emulated-{digest(*(path.name for path in objects))}.so"
    command = [compiler, *map(str, objects), *(SANITIZERS if sanitize else []), *LINK_FLAGS, f"-L{torch / 'lib'}"]
    return make(library, command)


def poison_locals(compiler: str) -> list[str]:
    """The option that fills local variables with garbage, where the compiler has it."""
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=True).stdout
    return ["-ftrivial-auto-var-init=pattern"] if int(version.split(".")[0]) >= 12 else []


def make(output: Path, command: list[str]) -> Path:
    """Run a command that writes `output`, unless it is there."""
    if not output.exists():
        unfinished = output.with_suffix(f".{os.getpid()}{output.suffix}")
        subprocess.run([*command, "-o", str(unfinished)], check=True)
        unfinished.replace(output)
    return output


def digest(*texts: str) -> str:
    """A short name for some content."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def find_compiler() -> str:
    """GCC's C++ compiler: the emulator uses its extensions."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise SystemExit("g++ is not installed")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    if re.search("clang", version):
        raise SystemExit("g++ is clang here; the emulator needs GCC")
    return compiler


def main() -> None:
    """Build what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, metavar="SOURCE.cu")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "emulated")
    parser.add_argument("--sanitize", action="store_true", help="with address and undefined-behaviour sanitizers")
    arguments = parser.parse_args()
    sources = arguments.sources or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    try:
        print(build(find_compiler(), sources, arguments.cache, sanitize=arguments.sanitize))
    except subprocess.CalledProcessError as failure:
        sys.exit(f"{' '.join(failure.cmd)}\nended with {failure.returncode}")


if __name__ == "__main__":
    main()
