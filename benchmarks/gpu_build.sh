#!/usr/bin/env bash
# Builds fastmrc with its CUDA kernels and installs it into the present Python environment. Nothing
# is fetched: what is missing is told, or installed from the wheels in the folder FASTMRC_WHEELS.
#
#   benchmarks/gpu_build.sh [--sanitize] [ARCHITECTURES]
#
# ARCHITECTURES are CMake's ("90" or "80-real;90"); by default those of the GPUs here, and where
# there is none the project's. PYTHON names the interpreter (python3). With --sanitize the kernels
# are then run under compute-sanitizer, if it is there: the tests marked gpu of tests/test_gpu.py
# and the operations of benchmarks.gpu, under memcheck and racecheck, each of the four runs for at
# most FASTMRC_SANITIZE_SECONDS (240).
set -euo pipefail
cd "$(dirname "$0")/.."

sanitize=false
architectures=
for argument in "$@"; do
  case $argument in
    --sanitize) sanitize=true ;;
    -*) echo "gpu_build: unknown option $argument" >&2; exit 2 ;;
    *) architectures=$argument ;;
  esac
done
python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 HF_HUB_OFFLINE=1

step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

has_module() { # has_module NAME: without importing it
  "$python" - "$1" <<'PYTHON'
import importlib.util
import sys

sys.exit(importlib.util.find_spec(sys.argv[1]) is None)
PYTHON
}

find_nvcc() {
  local candidate
  for candidate in "${CUDACXX:-}" "$(command -v nvcc || true)" \
    "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc"; do
    if [ -n "$candidate" ] && [ -x "$candidate" ]; then
      echo "$candidate"
      return
    fi
  done
}

# Of all GPUs here, as CMake names them: "90" or "80;90".
find_architectures() {
  local found=
  if command -v nvidia-smi >/dev/null; then
    found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d ' .' |
      grep -E '^[0-9]+$' | sort -u | paste -sd ';' -) || found=
  fi
  if [ -z "$found" ]; then
    found=$("$python" - <<'PYTHON' 2>/dev/null || true
import torch

count = torch.cuda.device_count() if torch.cuda.is_available() else 0
found = {"{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(count)}
print(";".join(sorted(found)))
PYTHON
    )
  fi
  echo "$found"
}

step "what is here"
missing=()
if ! command -v "$python" >/dev/null; then
  echo "gpu_build: there is no $python; set PYTHON" >&2
  exit 1
fi
"$python" --version
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || missing+=("python >= 3.11")
"$python" -m pip --version >/dev/null 2>&1 || missing+=("pip")

# Modules and the distributions that hold them: to build, then to run.
modules=(scikit_build_core:scikit-build-core pybind11:pybind11 packaging:packaging
  pathspec:pathspec numpy:numpy torch:torch transformers:transformers tokenizers:tokenizers
  safetensors:safetensors tqdm:tqdm)
command -v cmake >/dev/null || modules+=(cmake:cmake)
command -v ninja >/dev/null || modules+=(ninja:ninja)
for entry in "${modules[@]}"; do
  module=${entry%%:*} distribution=${entry#*:}
  has_module "$module" && continue
  if [ -z "${FASTMRC_WHEELS:-}" ] || [ "$module" = torch ]; then # whose build fits the GPU's driver
    missing+=("$distribution")
  elif said=$("$python" -m pip install --quiet --no-index --no-deps \
    --find-links "$FASTMRC_WHEELS" "$distribution" 2>&1); then
    echo "installed offline: $distribution"
  else
    missing+=("$distribution (pip: $(grep -i -m 1 error <<<"$said" || echo "failed"))")
  fi
done
nvcc=$(find_nvcc)
[ -n "$nvcc" ] || missing+=("nvcc (set CUDACXX)")
compiler=${CXX:-c++}
command -v "$compiler" >/dev/null || missing+=("a C++17 compiler (set CXX)")
if [ "${#missing[@]}" -gt 0 ]; then
  echo "gpu_build: missing:" >&2
  printf '  %s\n' "${missing[@]}" >&2
  exit 1
fi
"$python" - <<'PYTHON'
from importlib.metadata import PackageNotFoundError, version

for name in ("torch", "transformers", "scikit-build-core", "pybind11", "cmake", "ninja", "numpy"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "(no Python distribution)")
PYTHON
"$nvcc" --version | tail -n 2
"$compiler" --version | head -n 1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null ||
  echo "no GPU is seen"

step "build"
[ -n "$architectures" ] || architectures=$(find_architectures)
echo "architectures: ${architectures:-those of CMakeLists.txt}"
settings=(-C cmake.define.FASTMRC_CUDA=ON
  -C "cmake.define.CMAKE_CUDA_COMPILER=$nvcc"
  -C "cmake.define.pybind11_DIR=$("$python" -m pybind11 --cmakedir)"
  -C "build-dir=build/gpu-${architectures//;/-}-{wheel_tag}")
[ -z "$architectures" ] || settings+=(-C "cmake.define.CMAKE_CUDA_ARCHITECTURES=$architectures")
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! "$python" -m pip install --verbose --no-index --no-build-isolation --no-deps \
  --force-reinstall "${settings[@]}" . >"$log" 2>&1; then
  cat "$log"
  echo "gpu_build: the build failed" >&2
  exit 1
fi
tail -n 1 "$log"

step "what was built"
# From elsewhere, so that what was installed is found.
repository=$PWD
cd /
"$python" - <<'PYTHON'
import json
import sys

import fastmrc
from fastmrc.cuda import runtime

print(fastmrc.__file__)
print(json.dumps(fastmrc.build_info()))
if runtime.kernels() is None:
    sys.exit("gpu_build: the package was installed without its CUDA kernels")
print("GPUs that the kernels see:", runtime.device_count())
PYTHON
cd "$repository"

$sanitize || exit 0
step "compute-sanitizer"
sanitizer=$(command -v compute-sanitizer || true)
[ -n "$sanitizer" ] || sanitizer=$(dirname "$nvcc")/compute-sanitizer
if [ ! -x "$sanitizer" ]; then
  echo "there is no compute-sanitizer: nothing was run"
  exit 0
fi
status=0
run() { # run TOOL COMMAND...
  local tool=$1 code=0
  shift
  step "$tool: $*"
  timeout "${FASTMRC_SANITIZE_SECONDS:-240}" "$sanitizer" --tool "$tool" --target-processes all \
    --error-exitcode 99 "$@" || code=$?
  echo "$tool: exit code $code"
  [ "$code" -eq 0 ] || status=1
}
for tool in memcheck racecheck; do
  # Every tensor its own allocation: what is written beyond one is seen.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  run "$tool" "$python" -m benchmarks.gpu --quick --parts operations --output "$log.json"
  if has_module pytest && has_module hypothesis; then
    # Without its memory torch's allocator cannot record graphs.
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
    run "$tool" "$python" -m pytest -q -m gpu tests/test_gpu.py
  fi
done
rm -f "$log.json"
exit "$status"
