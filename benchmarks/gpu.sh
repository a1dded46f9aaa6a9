#!/usr/bin/env bash
# Build, check and measure bdcore on a machine with one Hopper GPU, from a bare checkout and without a network:
#
#   benchmarks/gpu.sh [FOLDER OF WHEELS]        or WHEELS=FOLDER benchmarks/gpu.sh
#
# Needs Python >= 3.11 ($PYTHON, else python3) with torch >= 2.11 for CUDA, and nvcc of the same CUDA version. Packages
# that bdcore needs and Python lacks are taken from the folder of wheels. Nothing is installed: bdcore is built into a
# temporary folder. Takes at most BUDGET seconds (default 570); a step that fails or takes too long is recorded, and the
# others still run. Ends with benchmarks/results/gpu.json and gpu.md, and the operators' table; with OUT set, copies of
# these and the logs go there. Exit code: 0, 1 where a step failed, 2 where this cannot run here.
set -uo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
wheels="${1:-${WHEELS:-}}"
budget="${BUDGET:-570}"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
export TORCH_CUDA_ARCH_LIST=9.0
unset BDCORE_OPS

refuse() {
    echo "benchmarks/gpu.sh: $*" >&2
    exit 2
}

"$python" - <<'PYTHON' || refuse "this needs one Hopper GPU that PyTorch can use"
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Python >= 3.11 is needed, {sys.executable} is {sys.version.split()[0]}")
try:
    import torch
except ImportError as error:
    sys.exit(f"{sys.executable} has no torch: {error}")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} finds no CUDA device")
capability = torch.cuda.get_device_capability()
if capability != (9, 0):
    sys.exit(f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, Hopper has 9.0")
PYTHON

export PATH="${CUDA_HOME:-/usr/local/cuda}/bin:$PATH"
command -v nvcc >/dev/null || refuse "nvcc is not there: set CUDA_HOME to the folder of the CUDA toolkit"

temporary="$(mktemp -d)"
trap 'rm -rf "$temporary"' EXIT
work="$temporary/work" site="$temporary/site"
mkdir "$work" "$site"
# -P with this path: the bdcore that is built below, with its compiled operators, not the folder of that name here.
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}"

missing() {
    "$python" -P - <<'PYTHON'
from importlib.util import find_spec
needed = "torchvision numpy scipy sklearn PIL pluggy click rich pydantic safetensors platformdirs filelock packaging"
needed += " ninja pytest pytest_benchmark pytest_timeout hypothesis"
lacking = [name for name in needed.split() if find_spec(name) is None]
if find_spec("setuptools") is None or int(__import__("setuptools").__version__.split(".")[0]) < 77:
    lacking.append("setuptools>=77")
print(*lacking)
PYTHON
}

lacking="$(missing)"
if [ -n "$lacking" ] && [ -n "$wheels" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$wheels"/*.whl ||
        refuse "the wheels in $wheels cannot be installed"
    lacking="$(missing)"
fi
[ -z "$lacking" ] || refuse "missing packages: $lacking. Give a folder of wheels: benchmarks/gpu.sh FOLDER"

# step NAME SECONDS COMMAND...: runs it with that limit, or what is left of the budget; keeps its output and its end.
failed=0
step() {
    local name="$1" limit="$2" began=$SECONDS code
    shift 2
    local left=$((budget - 20 - SECONDS))
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        echo "== $name: no time left" && code=skipped
    else
        echo "== $name (at most $limit s)"
        # INT, at which pytest still writes what it has.
        timeout --signal=INT --kill-after=10 "$limit" "$@" >"$work/$name.log" 2>&1
        code=$?
        tail -n 15 "$work/$name.log"
    fi
    [ "$code" = 0 ] || failed=1
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - began))" "$limit" >>"$work/steps.tsv"
    echo "== $name: $([ "$code" = 0 ] && echo ok || echo "FAILED ($code)"), $((SECONDS - began)) s"
    [ "$code" = 0 ]
}

tests=(tests/test_ops_*.py tests/test_cuda_{device,capture}.py tests/test_operators_in_runs.py tests/test_native_library.py)
workers=()
"$python" -P -c 'import xdist' 2>/dev/null && workers=(-n 4)
install=("$python" -m pip install --no-index --no-deps --no-build-isolation --target "$site" --upgrade .)
# What cannot be compiled is left out the second time, so that the rest still shows something.
step build 150 env BDCORE_BUILD=cuda "${install[@]}" || step "build what can be" 90 env BDCORE_BUILD=auto "${install[@]}"
step doctor 60 "$python" -P -c 'from bdcore.cli import main; main(["doctor"])'
step training 60 "$python" -P -m benchmarks.gpu_training --epochs 2 --output "$work/training.json"
# no:benchmark, which warns of workers, and warnings are errors.
step tests 120 "$python" -P -m pytest -q -k cuda "${workers[@]}" -p no:cacheprovider -p no:benchmark \
    --junitxml="$work/tests.xml" "${tests[@]}"
for tool in memcheck racecheck; do
    step "$tool" 30 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$python" -P -m benchmarks.gpu_cases
done
# The first two first: with what time is left torch.compile, which compiles every case anew, may not come to the end.
measured=(benchmarks/test_{model_contrastive_loss,blend_trigger}.py benchmarks)
step benchmarks "$budget" "$python" -P -m pytest "${measured[@]}" --benchmark-only -q -p no:cacheprovider \
    --continue-on-collection-errors --device cuda --seconds 0.1 --benchmark-json="$work/operators.json"

"$python" -P -m benchmarks.gpu_report "$work" || failed=1
if [ -n "${OUT:-}" ]; then
    cp benchmarks/results/gpu.{json,md} "$OUT"
    [ ! -f "$work/operators.json" ] || cp benchmarks/results/operators.{json,md} "$OUT"
    for log in "$work"/*.log; do
        echo "==== $(basename "$log" .log)"
        tail -c 200000 "$log"
    done >"$OUT/gpu.log"
fi
exit "$failed"
