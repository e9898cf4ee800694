#!/usr/bin/env bash
# Rules × seeds as an array of SLURM jobs, each a launch/slurm.sh, and one more that evaluates and
# compares all of them once they are complete:
#   RULES="flt lt" SEEDS="0 1 2" OUT=runs/array PRESET=tiny launch/slurm_array.sh [--dry-run] \
#     [options of sbatch, as --nodes=2 --time=2:00:00 …] [-- overrides of looped_jax.train …]
# Given again, it continues what is not complete. EVALUATE="--modes bpb" are flags of evaluate, for
# nodes without the network that CORE is downloaded from; LOOPS="1,4" its loop counts.
set -euo pipefail
cd "$(dirname "$0")/.."
say=(); if [[ "${1:-}" == --dry-run ]]; then say=(echo); shift; fi
export RULES=${RULES:-flt lt_ia lt_i lt} SEEDS=${SEEDS:-0 1 2} OUT=${OUT:-runs/array}

options=(); while (($#)) && [[ $1 != -- ]]; do options+=("$1"); shift; done
if (($#)); then shift; fi
read -ra rules <<<"$RULES"; read -ra seeds <<<"$SEEDS"; read -ra evaluate <<<"${EVALUATE:-}"
runs=()
for rule in "${rules[@]}"; do
  for seed in "${seeds[@]}"; do runs+=("$OUT/${rule}_seed$seed"); done
done

array=$("${say[@]}" sbatch --parsable --array="0-$((${#runs[@]} - 1))" "${options[@]}" \
  launch/slurm.sh "$@")
if ((${#say[@]})); then echo "$array"; array=ARRAY; else echo "array ${array%%;*}: ${runs[*]}"; fi
export RUNS="${runs[*]}"
"${say[@]}" sbatch --job-name=looped_jax_evaluate --dependency="afterok:${array%%;*}" \
  --kill-on-invalid-dep=yes --gpus-per-node=8 --time=4:00:00 --requeue --open-mode=append \
  "${options[@]}" --nodes=1 launch/evaluate.sh "${evaluate[@]}"
