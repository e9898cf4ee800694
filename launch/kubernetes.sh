#!/usr/bin/env bash
# An indexed Kubernetes job, one pod per node, from launch/kubernetes.yaml:
#   IMAGE=registry/looped_jax NODES=4 launch/kubernetes.sh [--dry-run] [overrides …]
set -euo pipefail
cd "$(dirname "$0")"
apply=(kubectl apply -f -); if [[ "${1:-}" == --dry-run ]]; then apply=(cat); shift; fi

# Arguments become a YAML list: single quotes around each, doubled inside.
args=""
for word in --config "${CONFIG:-configs/flt.py}" --config.mesh.data=-1 "$@"; do
  args+=", '${word//\'/\'\'}'"
done
yaml=$(<kubernetes.yaml)
yaml=${yaml//@NAME@/${NAME:-looped-jax}}
yaml=${yaml//@IMAGE@/${IMAGE:?give the image that has looped_jax installed}}
yaml=${yaml//@NODES@/${NODES:-2}}
yaml=${yaml//@GPUS@/${GPUS:-8}}
yaml=${yaml//@CLAIM@/${CLAIM:-looped-jax}}
printf '%s\n' "${yaml//@ARGS@/$args}" | "${apply[@]}"
