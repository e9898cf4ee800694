#!/usr/bin/env bash
# A TPU pod slice: the same command on every host of it, through gcloud.
#   launch/tpu_pod.sh [--dry-run] NAME ZONE [overrides …]
# LOOPED_JAX_CLUSTER=auto lets JAX ask the TPU's metadata who the other hosts are. train.run_dir and
# data.path must be on storage that all hosts see. The repository must be in ~/looped_jax there.
set -euo pipefail
say=(); if [[ "${1:-}" == --dry-run ]]; then say=(echo); shift; fi
name=${1:?give the name of the TPU}; zone=${2:?give its zone}; shift 2

printf -v train '%q ' python -m looped_jax.train --config "${CONFIG:-configs/flt.py}" \
  --config.mesh.data=-1 "$@"
"${say[@]}" gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd looped_jax && source .venv/bin/activate && LOOPED_JAX_CLUSTER=auto $train"
