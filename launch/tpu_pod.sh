#!/usr/bin/env bash
# A TPU pod slice, through gcloud: makes it where it is missing or was preempted, installs this commit
# on every host, starts the same command on all of them, detached, and leaves.
#   TYPE=v5litepod-16 launch/tpu_pod.sh [--dry-run] NAME ZONE [overrides …]
#   VERSION=v2-alpha-tpuv5-lite its software; SPOT=1 for a preemptible one
#   SETUP='mountpoint -q /disk || sudo mount 10.0.0.2:/share /disk' on every host, before it starts
# train.run_dir and data.path must be on storage that all hosts see. Given again at any time it leaves
# alone what runs, starts what has ended early, and tells which. Exit code 0: the run is complete; 75:
# not yet. To see a run through preemptions, from a machine that stays:
#   while launch/tpu_pod.sh NAME ZONE …; [ $? = 75 ]; do sleep 300; done
# The pod stays, and costs, until you delete it.
# Each host has its log in ~/looped_jax.log:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=0 --command='tail -f looped_jax.log'
set -euo pipefail
cd "$(dirname "$0")/.."
say=(); if [[ "${1:-}" == --dry-run ]]; then say=(echo); shift; fi
name=${1:?give the name of the TPU}; zone=${2:?give its zone}; shift 2
tpu=(gcloud compute tpus tpu-vm)

state=READY
if ! ((${#say[@]})); then # what is not there has no state
  state=$("${tpu[@]}" describe "$name" --zone="$zone" --format='value(state)' 2>/dev/null || true)
fi
case $state in
  READY) ;;
  CREATING | STARTING | RESTARTING | REPAIRING | DELETING) echo "$name: $state"; exit 75 ;;
  STOPPED) "${tpu[@]}" start "$name" --zone="$zone" ;;
  PREEMPTED | TERMINATED | "")
    echo "$name: ${state:-missing}, made anew"
    if [[ -n "$state" ]]; then "${tpu[@]}" delete "$name" --zone="$zone" --quiet; fi
    "${tpu[@]}" create "$name" --zone="$zone" --version="${VERSION:-v2-alpha-tpuv5-lite}" \
      --accelerator-type="${TYPE:?give it, as v5litepod-16}" ${SPOT:+--spot} ;;
  *) echo "$name: $state, which is for you to mend" >&2; exit 1 ;;
esac

sent=$(mktemp -d); trap 'rm -r "$sent"' EXIT
git archive --format=tar.gz -o "$sent/looped_jax.tar.gz" HEAD -- . ':!benchmarks' ':!docs' ':!examples' ':!tests'
"${say[@]}" "${tpu[@]}" scp "$sent/looped_jax.tar.gz" "$name:looped_jax.tar.gz" --zone="$zone" --worker=all
printf -v command '%q ' env "SETUP=${SETUP:-}" bash -c "$(<launch/tpu_host.sh)" tpu_host.sh \
  --config "${CONFIG:-configs/flt.py}" --config.mesh.data=-1 "$@"
if ((${#say[@]})); then # without the script's text
  printf -v command '%q ' launch/tpu_host.sh --config "${CONFIG:-configs/flt.py}" --config.mesh.data=-1 "$@"
fi
"${say[@]}" "${tpu[@]}" ssh "$name" --zone="$zone" --worker=all --command="$command" | tee "$sent/said"
if ((${#say[@]})) || ! grep -qE '^(started|running)' "$sent/said"; then exit 0; fi
exit 75
