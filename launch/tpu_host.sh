#!/usr/bin/env bash
# What tpu_pod.sh lets every host of a pod slice do, in its home folder: install what was sent, start
# training with the given flags, detached, and say in one line how it stands. Safe to run at any time.
set -euo pipefail
cd
exec 9>>looped_jax.lock
if ! flock --nonblock 9; then echo "running: $(tail -n 1 looped_jax.log)"; exit; fi
if [[ -f looped_jax.complete && "$(<looped_jax.complete)" == "$*" ]]; then
  echo "complete: $(tail -n 1 looped_jax.log)"; exit
fi

eval "${SETUP:-}"
sum=$(sha256sum looped_jax.tar.gz)
if [[ "$(cat looped_jax/installed 2>/dev/null)" != "$sum" ]]; then
  mkdir -p looped_jax && tar -xzf looped_jax.tar.gz -C looped_jax
  python3 -m pip install --quiet --user uv # the Python of these machines is older than 3.11
  python3 -m uv venv --quiet --clear --python 3.12 looped_jax/.venv
  python3 -m uv pip install --quiet --python looped_jax/.venv/bin/python --editable './looped_jax[tpu]'
  echo "$sum" >looped_jax/installed
fi

# With LOOPED_JAX_CLUSTER=auto JAX asks the TPU's metadata who the other hosts are. The lock is held
# until training ends.
# shellcheck disable=SC2016
LOOPED_JAX_CLUSTER=auto setsid nohup bash -c \
  'cd looped_jax && .venv/bin/python -m looped_jax.train "$@" && echo "$*" >../looped_jax.complete' \
  train "$@" >>looped_jax.log 2>&1 </dev/null &
echo "started: its log is ~/looped_jax.log"
