#!/usr/bin/env bash
# Tests what pyproject.toml promises: builds an environment and runs the unit tests and the two-rank matrix in it.
#
#     tests/versions.sh oldest|newest|latest [FOLDER] [PYTEST ARGUMENTS FOR THE MATRIX]
#
# oldest   the lowest version of everything that pyproject.toml allows: tests/versions/oldest.txt
# newest   the highest that was tested: tests/versions/newest.txt
# latest   whatever pip takes today
#
# FOLDER is where the environment is built, or found again: build/versions/STACK unless given. PYTHON names the interpreter.
# PIP_INDEX_URL and the like are pip's own, e.g. to have torch without CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."

stack=${1:-}
case $stack in oldest | newest | latest) ;; *) sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac
folder=${2:-build/versions/$stack}
shift $(($# < 2 ? $# : 2))
constraints=()
[ "$stack" = latest ] || constraints=(-c "tests/versions/$stack.txt")

[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
folder=$(cd "$folder" && pwd)
export PATH="$folder/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_EXTENSIONS_DIR="$folder/torch_extensions"
python -m pip install --quiet "${constraints[@]}" --editable ".[hdf5,lightning,recipes]" \
    hypothesis megatron-core pytest pytest-xdist triton
python -m pip install --quiet "${constraints[@]}" --no-deps timm

status=0
unit=$(python -m pytest -q -p no:cacheprovider tests/unit | tee -a /dev/stderr | tail -n 1) || status=1
matrix=$(python -m pytest -q -p no:cacheprovider tests/distributed --ranks 2 "$@" |
    tee -a /dev/stderr | tail -n 1) || status=1

versions=$(python -c 'import sys
from importlib.metadata import version
names = "torch", "deepspeed", "transformers", "accelerate", "numpy"
print(f"{sys.version_info[0]}.{sys.version_info[1]}", *(f"{name} {version(name)}" for name in names), sep=", ")')
echo "$stack, $(date +%F), Python $versions | unit: $unit | two ranks: $matrix"
exit $status
