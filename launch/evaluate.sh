#!/usr/bin/env bash
# Judge runs at every loop count, each from one pass, then one page that compares them.
#   launch/evaluate.sh [--dry-run] [flags of looped_jax.evaluate …]
#   RUNS="runs/a runs/b" OUT=runs/page LOOPS=1,4 launch/evaluate.sh      by default pretrain.sh's
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
say=(); if [[ "${1:-}" == --dry-run ]]; then say=(echo); shift; fi

out=${OUT:-runs/pretrain}
if [[ -z "${RUNS:-}" ]]; then
  for rule in ${RULES:-flt lt_ia lt_i lt}; do RUNS+=" $out/$rule"; done
fi
read -ra runs <<<"$RUNS"
for run in "${runs[@]}"; do
  "${say[@]}" python -m looped_jax.evaluate --checkpoint "$run" --loops "${LOOPS:-1,3,6,9,12}" "$@"
done
"${say[@]}" python -m looped_jax.compare "${runs[@]}" --out "$out/comparison"
