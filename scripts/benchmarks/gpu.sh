#!/usr/bin/env bash
# Throughput, memory and correctness on one GPU, in under eight minutes on a Hopper: gpu.py, then the tests that need
# one. Flags are gpu.py's, as --json FILE. PYTHON=python3.12 chooses another interpreter than .venv's.
set -u
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
"$python" scripts/benchmarks/gpu.py "$@"
code=$?
[ "$code" -eq 2 ] && exit 2 # there is no GPU, or a flag is wrong
OMP_NUM_THREADS=1 "$python" -m pytest -m gpu -n 4 tests || code=1
exit "$code"
