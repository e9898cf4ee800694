#!/usr/bin/env bash
# The SLURM scripts of launch/ on a real SLURM of one node, this one: a run of two tasks that a signal
# stops and that requeues itself, one that reaches its time limit and is cancelled, one that fails,
# and an array of two rules × two seeds with its evaluation.
#   apt-get install slurm-wlm munge
#   tests/clusters/slurm.sh               as root, in an environment with looped_jax; some minutes
#   MINUTES=5 tests/clusters/slurm.sh     on a machine that is slow or busy
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d /tmp/slurm.XXXXXX)
export SLURM_CONF=$work/slurm.conf LOOPED_JAX_CACHE=$work/cache JAX_PLATFORMS=cpu FSDP=1
MINUTES=${MINUTES:-2} # time limit of one of the jobs; longer where Python takes a minute to start
export LOOPED_JAX_HEARTBEAT=20 CONFIG=configs/flt.py:tiny PRESET=tiny LOOPS=1,2
PYTHONPATH=$PWD; export PYTHONPATH
XLA_FLAGS="$(python -c 'import tests; print(tests.QUICK)')"; export XLA_FLAGS # of compiling

cat >"$SLURM_CONF" <<END
ClusterName=one
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5 # a requeued job waits that long; two minutes by default
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
MailProg=/bin/true
MinJobAge=3600
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
mkdir "$work/state" "$work/spool"
touch "$work"/gpu{0..7} # which CPUs stand in for
echo "Name=gpu File=$work/gpu[0-7]" >"$work/gres.conf"

end() {
  scancel --user=root || true
  for ((second = 0; second < 60; second++)); do # what still runs would report to the next start
    if [[ -z $(squeue --noheader --states=R,CG 2>/dev/null) ]]; then break; fi
    sleep 1
  done
  for daemon in slurmd slurmctld; do
    if [[ -f $work/$daemon.pid ]]; then kill "$(<"$work/$daemon.pid")" || true; fi
  done
  echo "what was left: $work"
}
trap end EXIT
if ! munge -n >/dev/null 2>&1; then
  mkdir -p /run/munge && chown munge:munge /run/munge && runuser -u munge -- munged
fi
slurmctld; slurmd
for ((second = 0; second < 30; second++)); do
  if [[ $(sinfo --noheader --format=%t) == idle ]]; then break; fi
  sleep 1
done
sinfo --version; sinfo

field() { scontrol show job "$1" | grep -oP "(?<=\b$2=)\S+" | head -1; }
is() { # JOB FIELD VALUE, waited for
  for ((second = 0; second < 900; second++)); do
    if [[ $(field "$1" "$2") == "$3" ]]; then echo "job $1: $2=$3"; return; fi
    sleep 1
  done
  echo "job $1: $2=$(field "$1" "$2"), not $3" >&2; tail -n 30 slurm-"$1".out >&2; exit 1
}
says() { # JOB TEXT, waited for
  for ((second = 0; second < 900; second++)); do
    if grep -q "$2" "$work/$1.out" 2>/dev/null; then return; fi
    sleep 0.2
  done
  echo "job $1 never said $2" >&2; tail -n 30 "$work/$1.out" >&2; exit 1
}
cat looped_jax/*/*.py >"$work/text.txt"
tiny=(--config.data.path="$work/text.txt" --config.data.tokenizer_vocab_size=512 --config.model.layers=1 --config.model.loops=2
  --config.model.width=32 --config.model.heads=1 --config.model.seq_len=32
  --config.train.tokens_per_step=512 --config.train.batch_size=8 --config.train.eval_every=0
  --config.train.eval_first=False --config.train.eval_tokens=1024 "--config.train.eval_loops=1,2"
  --config.train.save_every=0 --config.train.sample_every=0 --config.train.log_every=10)
submit() {
  sbatch --parsable --output="$work/%j.out" --cpus-per-task=1 --gpus-per-node=2 --nodes=1 "$@" "${tiny[@]}"
}

echo "== two tasks, stopped by a signal, requeued, complete"
job=$(submit --ntasks-per-node=2 launch/slurm.sh --config.train.steps=600 \
  --config.train.run_dir="$work/runs/two")
says "$job" "step 20/"; scancel --signal=TERM "$job"
is "$job" Restarts 1; is "$job" JobState COMPLETED; is "$job" ExitCode 0:0
grep -E "^[0-9]+ processes,|stopped by|continuing|step 600/" "$work/$job.out" | cut -c1-100

echo "== what fails is not requeued"
job=$(submit --ntasks-per-node=1 launch/slurm.sh --config.train.init_from="$work/none")
is "$job" JobState FAILED; is "$job" ExitCode 1:0; is "$job" Restarts 0
grep -E "^error" "$work/$job.out" | cut -c1-100

echo "== an array, and its evaluation"
RULES="flt lt" SEEDS="0 1" OUT=$work/runs/array EVALUATE="--modes bpb --eval_tokens 1024" \
  launch/slurm_array.sh --output="$work/%j.out" --cpus-per-task=1 --gpus-per-node=2 --nodes=1 \
  -- --config.train.steps=30 "${tiny[@]}" | tee "$work/array"
evaluation=$(grep -oP "(?<=Submitted batch job )\d+" "$work/array")
is "$evaluation" JobState COMPLETED; is "$evaluation" ExitCode 0:0
ls "$work/runs/array" "$work/runs/array/comparison"
echo "== its time limit; cancelled after that, it does not come back"
job=$(submit --ntasks-per-node=1 --time="$MINUTES" --signal=TERM@60 launch/slurm.sh \
  --config.train.steps=1000000 --config.train.run_dir="$work/runs/limit")
is "$job" Restarts 1; says "$job" "continuing"; scancel "$job"; sleep 10
is "$job" JobState CANCELLED; is "$job" Restarts 1
grep -E "stopped by|continuing" "$work/$job.out" | cut -c1-100

echo "all as it should be"
