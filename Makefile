# Two commands for a machine that has only Python and pip: `make train` and `make test`.
# `make test-parity` adds the comparison with PyTorch, `make check` style and types.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On users' machines torch is an extra; this build is the one the tests are known to pass with.
TORCH ?= torch==2.13.0

.PHONY: train test test-parity check clean

train: $(VENV)/installed
	$(BIN)/python -m looped_jax.train --config configs/flt.py:tiny

test: $(VENV)/installed
	$(BIN)/python -m pytest

test-parity: $(VENV)/installed-torch
	$(BIN)/python -c "import torch"
	$(BIN)/python -m pytest -m parity

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)/installed-torch: $(VENV)/installed
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

clean:
	rm -rf $(VENV)
