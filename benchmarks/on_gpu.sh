#!/usr/bin/env bash
# Everything that is owed on a GPU, from a fresh clone: sets up .venv and goes through the steps of
# benchmarks/on_gpu.py, each at most nine minutes on one GPU. What ran is not run again.
#
#   benchmarks/on_gpu.sh                  all steps; CUDA=13 for a driver from 580 on
#   benchmarks/on_gpu.sh parity race      those whose names begin so
#   benchmarks/on_gpu.sh --dry            toy sizes on a CPU, nothing is kept
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" = --dry ]; then
  make --quiet .venv/installed-torch
else
  # PyTorch's own wheels for CUDA: the race and the parity with it are on the GPU, too.
  make --quiet ".venv/installed-cuda${CUDA:-12}"
  .venv/bin/pip install --quiet "torch>=2.6" safetensors
fi
exec .venv/bin/python -m benchmarks.on_gpu "$@"
