#!/usr/bin/env bash
# Short runs of every loop rule at several loop counts, then one page that compares them.
#   launch/check.sh [--dry-run] [overrides of looped_jax.train …]
#   RULES="flt lt" LOOPS="1 4 12" STEPS=200 OUT=runs/check PRESET=tiny launch/check.sh
# With one loop all rules are the same, so it is run once. A run that is complete is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
say=(); if [[ "${1:-}" == --dry-run ]]; then say=(echo); shift; fi
out=${OUT:-runs/check}
runs=()

for loops in ${LOOPS:-1 4 12}; do
  for rule in ${RULES:-flt flt_res lt_ia lt_i lt}; do
    if [[ $loops == 1 && ${#runs[@]} -gt 0 ]]; then continue; fi
    run="$out/${rule}_K$loops"
    runs+=("$run")
    "${say[@]}" python -m looped_jax.train --config "configs/$rule.py:${PRESET:-tiny}" \
      --config.model.loops="$loops" --config.train.steps="${STEPS:-200}" \
      --config.train.diagnostics_every=10 --config.train.run_dir="$run" "$@" ||
      echo "$run ended early: the page shows it up to there" >&2 # a loss that broke is a result
  done
done
"${say[@]}" python -m looped_jax.compare "${runs[@]}" --out "$out/comparison"
