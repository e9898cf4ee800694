"""The side-by-side comparison: it passes, writes what it says, and notices a wrong weight."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("torch", reason="the comparison needs the torch extra")

from looped_jax.config.settings import Settings
from looped_jax.errors import ConfigError
from torch_ref import agreement, compare

pytestmark = pytest.mark.parity

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "model": {
        "layers": 1, "loops": 2, "width": 32, "heads": 1, "seq_len": 16, "dtype": "float32",
    },
    "data": {"tokenizer_vocab_size": 512},
    "train": {
        "tokens_per_step": 128, "batch_size": 4, "eval_tokens": 256, "eval_loops": (1, 3),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small corpus of this project's own sources, and a cache for the tokenizer."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "text").mkdir()
    sources = [p.read_text() for p in sorted((ROOT / "looped_jax").rglob("*.py"))]
    documents = [part for source in sources for part in source.split("\n\n\n")]
    for name, share in (("a", documents), ("v", documents[::9])):
        pq.write_table(pa.table({"text": share}), folder / "text" / f"{name}.parquet")
    return folder


@pytest.fixture
def config(home, monkeypatch):
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(home / "cache"))
    data = {**SETTINGS["data"], "path": str(home / "text")}
    return Settings.from_dict({**SETTINGS, "data": data})


def test_the_command_passes_and_writes_its_files(home, tmp_path):
    settings = [
        f"--config.{group}.{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
        for group, values in SETTINGS.items()
        for key, v in values.items()
    ]
    command = [sys.executable, "-m", "torch_ref.compare", "--config=configs/flt.py:tiny"]
    command += [*settings, f"--config.data.path={home / 'text'}", f"--out={tmp_path}", "--steps=4"]
    environment = {**os.environ, "LOOPED_JAX_CACHE": str(home / "cache")}
    environment.pop("XLA_FLAGS", None)  # one device
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS: all" in done.stdout and "step 4 of 4" in done.stdout
    record = json.loads((tmp_path / "compare.json").read_text())
    names = " ".join(row["name"] for row in record["rows"])
    for subject in ("logits after 3", "loss after 2", "lm_head.weight", "bits per byte at 1"):
        assert subject in names
    assert len(record["losses"]["jax bfloat16"]) == 4
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "compare.svg").read_text()


def test_a_wrong_weight_fails_and_is_named(config, tmp_path, monkeypatch):
    faithful = compare.to_torch
    wrong = "transformer.h.0.attn.c_v.weight"  # queries and keys are normalised

    def unfaithful(params):
        weights = faithful(params)
        return {**weights, wrong: weights[wrong] * np.float32(1.01)}

    monkeypatch.setattr(compare, "to_torch", unfaithful)
    rows = compare.compare(config, steps=2, out=tmp_path)
    failed = {row.name for row in rows if not row.passed}
    assert {"logits after 2 loops", "loss after 2 loops", f"gradient of {wrong}"} <= failed
    assert "FAIL" in agreement.tally(rows)


def test_a_recipe_that_torch_does_not_have_is_refused(config, tmp_path):
    optim = dataclasses.replace(config.optim, newton_schulz_steps=3)
    with pytest.raises(ConfigError, match=r"optim\.newton_schulz_steps=3.* 5"):
        compare.compare(dataclasses.replace(config, optim=optim), steps=1, out=tmp_path)
    model = dataclasses.replace(config.model, head_width=16)
    with pytest.raises(ConfigError, match=r"model\.head_width=16.* None; leave it out"):
        compare.compare(dataclasses.replace(config, model=model), steps=1, out=tmp_path)


def test_not_a_number_fails():
    nan = float("nan")
    assert not agreement.Row("loss", "nats", nan, 1.0, nan, nan).passed


def test_a_run_that_strays_further_than_rounding_fails():
    def curve(shift):
        return agreement.Curve(losses=[5.0 + shift, 4.0])

    curves = {name: curve(0.0) for name in ("jax float32", "torch float32", "torch nudged")}
    curves |= {"torch bfloat16": curve(1e-3), "jax bfloat16": curve(-1e-3)}
    assert all(row.passed for row in agreement.curve_rows(curves))
    curves["jax bfloat16"] = curve(5e-2)
    curves["jax float32"] = curve(2e-4)
    assert not any(row.passed for row in agreement.curve_rows(curves))


def test_a_mean_is_judged_by_the_roundings_of_its_tokens_not_by_their_lucky_sum():
    rng = np.random.default_rng(0)
    exact, size = np.full((1, 64, 16), 5.0), 0.01

    def measured(losses):
        nats = {1: losses[0].ravel()}
        return compare.Pass({}, losses, {}, {1: float(nats[1].mean() / np.log(2) / 4)}, nats, 4096)

    of_torch = exact + rng.normal(0, size, exact.shape)
    of_torch += 5.0 - of_torch.mean()  # its roundings cancel
    ours = exact + rng.normal(0, size, exact.shape)

    def rows(losses):
        return agreement.pass_rows(measured(losses), measured(of_torch), measured(exact))

    assert len(rows(ours)) == 2 and all(row.passed for row in rows(ours))
    assert rows(ours)[0].difference > 3 * rows(ours)[0].torch_error
    assert not any(row.passed for row in rows(ours + 0.005))
