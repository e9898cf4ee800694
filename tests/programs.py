"""A training run as users start one: a process of its own, or, seconds sooner, in this one."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from looped_jax import train
from looped_jax.runtime import sharding
from tests import QUICK

ROOT = Path(__file__).parents[1]
STEPS = 120


def flags(home, run_dir, overrides, steps, config):
    settings = {
        "data.path": home / "text", "data.tokenizer_vocab_size": 512,
        "model.layers": 1, "model.loops": 2, "model.width": 32, "model.heads": 1,
        "model.seq_len": 32, "train.run_dir": run_dir, "train.steps": steps,
        "train.tokens_per_step": 512, "train.batch_size": 8, "train.log_every": 1,
        "train.eval_every": 60, "train.eval_tokens": 1024, "train.eval_loops": "1,2",
        "train.save_every": 4, "train.sample_tokens": 2,
    }  # fmt: skip
    ours = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={config}", *ours, *overrides]


def start(
    home, run_dir, *overrides, steps=STEPS, environment=None, config="configs/flt.py:tiny",
    program=("-m", "looped_jax.train"),
):  # fmt: skip
    """The program in a process of its own, on one device."""
    mine = {"LOOPED_JAX_CACHE": str(home / "cache"), "PYTHONUNBUFFERED": "1", "XLA_FLAGS": QUICK,
            "PYTHONPATH": str(ROOT)}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *program, *flags(home, run_dir, overrides, steps, config)],
        cwd=ROOT, env={**os.environ, **mine, **(environment or {})}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process):
    """Its exit code and what it said."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run_here(home, run_dir, *overrides, steps=STEPS, config="configs/flt.py:tiny"):
    """As `start` and `finish`, within this process."""
    given = flags(home, run_dir, overrides, steps, config)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(ROOT)
        patch.setenv("LOOPED_JAX_CACHE", str(home / "cache"))
        patch.setattr(sys, "argv", [train.__file__, *given])
        use_few_devices(patch)
        try:
            train.main()
        except SystemExit as stopped:
            code = stopped.code
    return code, out.getvalue(), err.getvalue()


def use_few_devices(patch):
    """As many devices as a mesh has; one, where it takes all that are there."""
    make = sharding.make_mesh

    def smaller(config, devices=None):
        sizes = [max(size, 1) for size in (config.data, config.fsdp, config.tensor)]
        return make(config, devices or jax.devices()[: int(np.prod(sizes))])

    patch.setattr(sharding, "make_mesh", smaller)


def entries(run_dir):
    """The lines of its log."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(run_dir):
    """By step."""
    return {e["step"]: e["train/loss"] for e in entries(run_dir) if "train/loss" in e}
