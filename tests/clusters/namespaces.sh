#!/usr/bin/env bash
# Three hosts in network namespaces on one bridge, each with a name and an address of its own, train
# one run. One starts late; one loses its link while they train; one is killed. Each time the others
# have to end by themselves, and the same command has to go on.
#   tests/clusters/namespaces.sh       as root with iproute2, in an environment with looped_jax
#   STEPS=200 HEARTBEAT=20 tests/clusters/namespaces.sh      on a machine that is slow or busy
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d /tmp/hosts.XXXXXX)
heartbeat=${HEARTBEAT:-10} late=${LATE:-15}
export LOOPED_JAX_HEARTBEAT=$heartbeat LOOPED_JAX_CACHE=$work/cache JAX_PLATFORMS=cpu
PYTHONPATH=$PWD; export PYTHONPATH PYTHONUNBUFFERED=1
XLA_FLAGS="$(python -c 'import tests; print(tests.QUICK)')"; export XLA_FLAGS # of compiling
hosts=(looped0 looped1 looped2)

end() {
  for pid in $(jobs -p); do kill -KILL "$pid" 2>/dev/null || true; done
  for host in "${hosts[@]}"; do
    ip netns del "$host" 2>/dev/null || true
    rm -rf "/etc/netns/$host"
  done
  ip link del looped 2>/dev/null || true
  echo "what was left: $work"
}
trap end EXIT

ip link add looped type bridge
ip link set looped up
for i in 0 1 2; do
  host=${hosts[i]}
  ip netns add "$host"
  ip link add "looped-$i" type veth peer name eth0 netns "$host"
  ip link set "looped-$i" master looped up
  ip -n "$host" addr add "10.77.0.$((i + 1))/24" dev eth0
  ip -n "$host" link set eth0 up
  ip -n "$host" link set lo up
  mkdir -p "/etc/netns/$host" # which ip netns exec puts over /etc
  printf '127.0.0.1 localhost\n10.77.0.%s %s\n' 1 looped0 2 looped1 3 looped2 >"/etc/netns/$host/hosts"
done

cat looped_jax/*/*.py >"$work/text.txt"
train=(python -m looped_jax.train --config configs/flt.py:tiny --config.data.path="$work/text.txt"
  --config.data.tokenizer_vocab_size=512 --config.model.layers=1 --config.model.loops=2
  --config.model.width=32 --config.model.heads=1 --config.model.seq_len=32
  --config.train.tokens_per_step=768 --config.train.batch_size=8 --config.train.eval_every=0
  --config.train.eval_first=False --config.train.eval_tokens=1024 "--config.train.eval_loops=1,2"
  --config.train.save_every=20 --config.train.sample_every=0 --config.train.log_every=10
  --config.train.steps="${STEPS:-1200}" --config.train.run_dir="$work/run" --config.mesh.data=-1)
pids=()
start() { # HOST ATTEMPT
  # shellcheck disable=SC2016
  LOOPED_JAX_COORDINATOR=10.77.0.1:8476 LOOPED_JAX_PROCESSES=3 LOOPED_JAX_PROCESS=$1 \
    ip netns exec "${hosts[$1]}" unshare --uts bash -c 'hostname "$0"; exec "$@"' \
    "${hosts[$1]}" "${train[@]}" >"$work/$2-$1.log" 2>&1 &
  pids[$1]=$!
}
says() { # LOG TEXT, waited for
  for ((tenth = 0; tenth < 6000; tenth++)); do
    if grep -q "$2" "$work/$1.log"; then return; fi
    sleep 0.1
  done
  echo "$1 never said $2" >&2; tail -n 20 "$work/$1.log" >&2; exit 1
}
ended() { # ATTEMPT WHEN HOST…: all these hosts, and none with 0
  local attempt=$1 since=$2 code; shift 2
  for host in "$@"; do
    code=0; wait "${pids[$host]}" 2>/dev/null || code=$?
    echo "${hosts[$host]} ended with $code, $((SECONDS - since)) s later"
    if [[ $code == 0 ]]; then tail -n 20 "$work/$attempt-$host.log" >&2; exit 1; fi
  done
}

echo "== ${hosts[2]} starts $late s late"
start 0 first; start 1 first; sleep "$late"; start 2 first
says first-0 "step 40/"; grep -o "3 processes, 3 of which read different rows" "$work/first-0.log"
echo "== ${hosts[1]} loses its link"
ip link set looped-1 down; since=$SECONDS
ended first "$since" 0 2 1
ip link set looped-1 up

echo "== the same command; ${hosts[2]} is killed"
for i in 0 1 2; do start $i second; done
says second-0 "continuing"; grep -o "continuing .*" "$work/second-0.log"
from=$(grep -oP "from step \K\d+" "$work/second-0.log" | head -1)
says second-0 "step $((from + 40))/"
kill -KILL "${pids[2]}"; since=$SECONDS
ended second "$since" 2 0 1

echo "== the same command again"
for i in 0 1 2; do start $i third; done
for i in 0 1 2; do wait "${pids[$i]}"; done
grep -o "continuing .*\|step ${STEPS:-1200}/.*" "$work/third-0.log" | cut -c1-100
python - "$work/run/metrics.jsonl" "${STEPS:-1200}" <<'END'
import json, sys
losses = [entry for entry in map(json.loads, open(sys.argv[1])) if "train/loss" in entry]
steps = [entry["step"] for entry in losses]
assert steps == sorted(set(steps)) and steps[-1] == int(sys.argv[2]), steps
print(f"{len(steps)} logged steps, each once; loss {losses[0]['train/loss']:.3f} to {losses[-1]['train/loss']:.3f}")
END
echo "all as it should be"
