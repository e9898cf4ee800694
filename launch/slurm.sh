#!/usr/bin/env bash
# Several nodes under SLURM, one task per node with all its GPUs:
#   sbatch --nodes=8 launch/slurm.sh [overrides …]      launch/slurm.sh --dry-run to look first
# looped_jax finds the other tasks through SLURM's variables. Near the end of the time limit SLURM
# sends SIGTERM, the run saves and exits with 0, and the job puts itself back into the queue.
#SBATCH --job-name=looped_jax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=runs/slurm-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
say=(); if [[ "${1:-}" == --dry-run ]]; then say=(echo); shift; fi

# fsdp within a node (fast links), copies across nodes; train.run_dir must be on a shared disk.
train=(python -m looped_jax.train --config "${CONFIG:-configs/flt.py}"
  --config.mesh.data=-1 --config.mesh.fsdp="${FSDP:-8}" "$@")
log=$("${say[@]}" srun --kill-on-bad-exit=1 "${train[@]}" | tee /dev/stderr)

# "stopped by a signal" is what a run says that was cut off by the time limit.
if [[ -n "${SLURM_JOB_ID:-}" && "$log" == *"stopped by a signal"* ]]; then
  "${say[@]}" scontrol requeue "$SLURM_JOB_ID"
fi
