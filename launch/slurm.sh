#!/usr/bin/env bash
# Several nodes under SLURM, one task per node with all its GPUs; submit it from the repository:
#   sbatch --nodes=8 launch/slurm.sh [overrides …]      launch/slurm.sh --dry-run to look first
# looped_jax finds the other tasks through SLURM's variables. Near the end of the time limit SLURM
# sends SIGTERM, the run saves and exits with 75, and the job puts itself back into the queue.
# As one task of slurm_array.sh's array it trains one of RULES with one of SEEDS, below OUT.
#SBATCH --job-name=looped_jax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
say=(); if [[ "${1:-}" == --dry-run ]]; then say=(echo); shift; fi

config=${CONFIG:-configs/flt.py}
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
  read -ra rules <<<"${RULES:?comes from slurm_array.sh}"
  read -ra seeds <<<"${SEEDS:?comes from slurm_array.sh}"
  rule=${rules[SLURM_ARRAY_TASK_ID / ${#seeds[@]}]}
  seed=${seeds[SLURM_ARRAY_TASK_ID % ${#seeds[@]}]}
  config=configs/$rule.py${PRESET:+:$PRESET}
  set -- --config.train.seed="$seed" --config.train.run_dir="$OUT/${rule}_seed$seed" "$@"
fi

# fsdp within a node (fast links), copies across nodes; train.run_dir must be on a shared disk.
# When one task has ended, the others have two minutes to follow: they save together, but do not
# exit in the same instant, so --kill-on-bad-exit would turn the 75 of some into a kill.
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then # which srun does not take over by itself
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
code=0
"${say[@]}" srun --wait=120 python -m looped_jax.train --config "$config" \
  --config.mesh.data=-1 --config.mesh.fsdp="${FSDP:-8}" "$@" || code=$?

if [[ $code == 75 && -n "${SLURM_JOB_ID:-}" ]]; then # saved, not done
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
