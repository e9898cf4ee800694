"""Examples run as they stand: the code cells of each notebook, in order, without Jupyter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from looped_jax import train

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def code_of(notebook):
    """Its code cells as one program."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_where_no_run_is_yet(notebook, tmp_path):
    for name in ("configs", "looped_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {k: v for k, v in os.environ.items() if k not in ("LOOPED_JAX_RUN", "XLA_FLAGS")}
    subprocess.run(
        [sys.executable, "-c", code_of(notebook)],
        cwd=tmp_path, env={**environment, "MPLBACKEND": "agg"}, check=True,
    )  # fmt: skip
    assert list(tmp_path.glob("runs/*/checkpoints"))


def test_chains_are_walked_in_runs_that_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    (tmp_path / "configs").mkdir()
    small = {"steps": 1, "batch_size": 8, "eval_loops": "4", "eval_tokens": 16, "eval_first": False}
    for rule in ("FLT", "LT"):
        run = tmp_path / "runs" / "hops" / "chain_ends" / f"{rule}_K_4_seed0"
        given = {f"train.{name}": value for name, value in small.items()}
        given |= {"model.variant": rule, "train.run_dir": run}
        flags = [f"--config.{name}={value}" for name, value in given.items()]
        train.main(["--config", "flt:chain_ends_16", *flags])
    capsys.readouterr()
    exec(code_of(ROOT / "examples" / "chain_ends.ipynb"), {})
    assert capsys.readouterr().out.startswith("edges")  # it trained nothing
    assert len(list(tmp_path.glob("runs/*"))) == 1


def test_notebooks_are_committed_with_what_they_print():
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text("utf-8"))["cells"]
        outputs = [o for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
        assert any("image/png" in o.get("data", {}) for o in outputs), notebook
        assert not [o for o in outputs if o["output_type"] == "error"], notebook
