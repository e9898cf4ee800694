#!/usr/bin/env bash
# One machine, all its GPUs (or TPU cores), one process: JAX sees every device by itself.
#   launch/single.sh [--dry-run] [overrides …]      as --config.mesh.fsdp=8 --config.model.loops=6
set -euo pipefail
cd "$(dirname "$0")/.."
say=(); if [[ "${1:-}" == --dry-run ]]; then say=(echo); shift; fi

# Copies of the weights on every device; for models that do not fit, --config.mesh.fsdp=8.
"${say[@]}" python -m looped_jax.train --config "${CONFIG:-configs/flt.py}" --config.mesh.data=-1 "$@"
