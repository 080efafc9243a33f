#!/usr/bin/env bash
# What works on a GPU, how far precisions drift and how fast it is: one table, and benchmarks/results/gpu_<card>.json.
#
#   bash benchmarks/gpu.sh                      every part, at most 8 minutes on one GPU
#   bash benchmarks/gpu.sh correct train        some parts again; the others keep their figures
#   bash benchmarks/gpu.sh speed --only var_d16 some rows of a part; so do the other rows
#   bash benchmarks/gpu.sh --device cpu --tiny  a dry run on tiny networks, under two minutes
#
# Uses .venv if there is one, else the python on the PATH; the project must be installed there, and pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
PYTHONPATH=benchmarks:.${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m gpu "$@"
