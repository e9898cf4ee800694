# For a machine that has only Python and pip: `make train`, `make diagnose`, `make hops`, `make test`.
# `make test` holds every feature and every pair of them; `make test-slow` the other combinations,
# kills and long runs; `make test-parity` the comparison with PyTorch; `make test-targets` the
# compilers of GPUs and TPUs (2.5 GB, in an environment of their own; no such device is needed);
# `make test-all` is all of them, `make check` style and types.
# On a machine with an NVIDIA GPU, `make train CUDA=12` (driver 525 or newer) or `CUDA=13` (580 or
# newer) installs jax for it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TARGETS := .venv-targets
# On users' machines torch is an extra; this build is the one the tests are known to pass with.
TORCH ?= torch==2.13.0
# 12 or 13; empty: jax for the CPU.
CUDA ?=
INSTALLED := $(VENV)/installed$(CUDA:%=-cuda%)

.PHONY: train diagnose hops test test-slow test-all test-parity test-targets check clean

train: $(INSTALLED)
	@if command -v nvidia-smi >/dev/null && ! ls -d $(VENV)/lib/python3*/site-packages/jax_cuda1* \
	  >/dev/null 2>&1; then echo "an NVIDIA GPU is here, but jax is the CPU's: make train CUDA=12" \
	  "(driver 525 or newer) or CUDA=13 (580 or newer) installs the GPU's"; fi
	$(BIN)/python -m looped_jax.train --config configs/flt.py:tiny

diagnose: $(VENV)/installed
	$(BIN)/python -m looped_jax.diagnose --checkpoint runs/FLT_K4_L2_END_D128

hops: $(INSTALLED)
	$(BIN)/python -m benchmarks.hops

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not parity"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-all: test test-slow test-parity test-targets

test-parity: $(VENV)/installed-torch
	$(BIN)/python -c "import torch"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m parity

test-targets: $(TARGETS)/installed
	LOOPED_JAX_TARGETS=1 $(TARGETS)/bin/python -m pytest -n 2 --dist worksteal -m targets

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)/installed-cuda%: $(VENV)/installed
	$(BIN)/pip install --quiet --editable ".[cuda$*]"
	touch $@

$(VENV)/installed-torch: $(VENV)/installed
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

$(TARGETS)/installed: pyproject.toml
	$(PYTHON) -m venv $(TARGETS)
	$(TARGETS)/bin/pip install --quiet --editable ".[dev,targets]"
	touch $@

clean:
	rm -rf $(VENV) $(TARGETS)
