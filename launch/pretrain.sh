#!/usr/bin/env bash
# The paper's main comparison: FLT, LT_ia, LT_i and LT, one after the other, at L=6, K=12.
#   launch/pretrain.sh [--dry-run] [overrides …]
# Each continues where it was stopped; one that is complete is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
say=(); if [[ "${1:-}" == --dry-run ]]; then say=(echo); shift; fi

for rule in ${RULES:-flt lt_ia lt_i lt}; do
  "${say[@]}" python -m looped_jax.train --config "configs/$rule.py${PRESET:+:$PRESET}" \
    --config.train.run_dir="runs/pretrain/$rule" "$@"
done
