#!/usr/bin/env bash
# One run on several nodes of Kubernetes, a pod on each, from the forms in launch/kubernetes/:
#   IMAGE=registry/looped_jax NODES=4 launch/kubernetes.sh [--dry-run] [overrides …]
#   KIND=job (an Indexed Job, the default) or jobset; QUEUE=name hands either to Kueue
#   DEVICE=nvidia (the default): COUNT=8 GPUs of a node, ACCELERATOR=nvidia-h100-80gb of GKE's names
#   DEVICE=tpu: ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4 COUNT=4 chips of a node; NODES × COUNT
#     are the chips of the topology
#   NAME=looped-jax, CONFIG=configs/flt.py, CLAIM: a ReadWriteMany volume with data/ and runs/
set -euo pipefail
cd "$(dirname "$0")/kubernetes"
apply=(kubectl apply -f -); if [[ "${1:-}" == --dry-run ]]; then apply=(cat); shift; fi
name=${NAME:-looped-jax} kind=${KIND:-job} nodes=${NODES:-2}

annotations="" exclusive=""
case ${DEVICE:-nvidia} in
  nvidia)
    resource=nvidia.com/gpu count=${COUNT:-8}
    selector=${ACCELERATOR:+"cloud.google.com/gke-accelerator: $ACCELERATOR"}
    if [[ -n "${QUEUE:-}" ]]; then # nodes near each other, where the cluster knows which are
      annotations="kueue.x-k8s.io/podset-preferred-topology: ${BLOCK:-cloud.google.com/gce-topology-block}"
    fi ;;
  tpu)
    resource=google.com/tpu count=${COUNT:-4}
    selector="cloud.google.com/gke-tpu-accelerator: ${ACCELERATOR:?give it, as tpu-v5-lite-podslice}"
    selector+=", cloud.google.com/gke-tpu-topology: ${TOPOLOGY:?give it, as 4x4}"
    chips=$((${TOPOLOGY//x/*}))
    if ((chips != nodes * count)); then
      echo "TOPOLOGY=$TOPOLOGY has $chips chips, NODES=$nodes of COUNT=$count have $((nodes * count))" >&2
      exit 1
    fi
    # one slice is one node pool
    exclusive="alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool" ;;
  *) echo "DEVICE=$DEVICE is neither nvidia nor tpu" >&2; exit 1 ;;
esac
case $kind in
  job) first=$name-0 indent="    " ;;
  jobset) first=$name-train-0-0 indent="            " ;;
  *) echo "KIND=$kind is neither job nor jobset" >&2; exit 1 ;;
esac

# Arguments become a YAML list: single quotes around each, doubled inside.
args=""
for word in --config "${CONFIG:-configs/flt.py}" --config.mesh.data=-1 "$@"; do
  args+=", '${word//\'/\'\'}'"
done
yaml=$(sed '/^#/d' "$kind.yaml") pod=$(sed "/^#/d; s/^/$indent/" pod.yaml)
yaml=${yaml//@POD@/"$pod"}
yaml=${yaml//@NAME@/"$name"}
yaml=${yaml//@FIRST@/"$first"}
yaml=${yaml//@IMAGE@/"${IMAGE:?give the image, which launch/Dockerfile makes}"}
yaml=${yaml//@NODES@/"$nodes"}
yaml=${yaml//@RESOURCE@/"$resource"}
yaml=${yaml//@COUNT@/"$count"}
yaml=${yaml//@SELECTOR@/"$selector"}
yaml=${yaml//@LABELS@/"${QUEUE:+"kueue.x-k8s.io/queue-name: $QUEUE"}"}
yaml=${yaml//@ANNOTATIONS@/"$annotations"}
yaml=${yaml//@EXCLUSIVE@/"$exclusive"}
yaml=${yaml//@CLAIM@/"${CLAIM:-looped-jax}"}
printf '%s\n' "${yaml//@ARGS@/"$args"}" | "${apply[@]}"
