#!/usr/bin/env bash
# Judge the runs of pretrain.sh at every loop count, each from one pass.
#   launch/evaluate.sh [--dry-run] [flags of looped_jax.evaluate …]
set -euo pipefail
cd "$(dirname "$0")/.."
say=(); if [[ "${1:-}" == --dry-run ]]; then say=(echo); shift; fi

for rule in ${RULES:-flt lt_ia lt_i lt}; do
  "${say[@]}" python -m looped_jax.evaluate --checkpoint "runs/pretrain/$rule" \
    --loops "${LOOPS:-1,3,6,9,12}" "$@"
done
