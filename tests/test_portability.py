"""Where Python lacks what only Linux and macOS have, and what each of them counts in."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import looped_jax
from looped_jax import files
from looped_jax.training import progress

ROOT = Path(__file__).parents[1]
IMPORTS_ALL = """
import importlib, pkgutil, sys
sys.modules["resource"] = sys.modules["fcntl"] = None  # importing them raises ImportError
import looped_jax
for module in pkgutil.walk_packages(looped_jax.__path__, "looped_jax."):
    importlib.import_module(module.name)
from looped_jax.training.progress import memory_in_use
assert memory_in_use() == 0
"""


def test_every_module_imports_without_resource_and_fcntl():
    subprocess.run([sys.executable, "-c", IMPORTS_ALL], cwd=ROOT, check=True)


@pytest.mark.parametrize(("system", "peak"), [("linux", 7 * 1024), ("darwin", 7)])
def test_peak_memory_is_in_bytes(monkeypatch, system, peak):
    usage = types.SimpleNamespace(ru_maxrss=7)
    fake = types.SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage)
    monkeypatch.setitem(sys.modules, "resource", fake)
    monkeypatch.setattr(sys, "platform", system)
    assert progress._peak_of_process() == peak


def test_without_fcntl_a_lock_waits_for_windows_own(monkeypatch, tmp_path):
    answers = iter([OSError("held"), OSError("held"), None])

    def locking(descriptor, mode, size):
        if error := next(answers):
            raise error

    monkeypatch.setitem(sys.modules, "fcntl", None)
    fake = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
    monkeypatch.setitem(sys.modules, "msvcrt", fake)
    with (tmp_path / "lock").open("w") as file:
        files.lock(file)
    assert next(answers, "all asked") == "all asked"


def test_the_version_is_pyprojects(monkeypatch):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert looped_jax.__version__ == version

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)  # run from a folder, not installed
    assert looped_jax.__version__ == version


def test_citation_and_changelog_know_the_version():
    assert f"\nversion: {looped_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert looped_jax.__version__ in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("gpu", [True, False])
def test_make_train_offers_the_gpu_build_where_a_gpu_is(tmp_path, gpu):
    for name in (".venv/bin/python", ".venv/bin/pip", *(["path/nvidia-smi"] if gpu else [])):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} $*\n")
        (tmp_path / name).chmod(0o755)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/installed").touch()
    path = f"{tmp_path / 'path'}:{os.environ['PATH']}"

    def make(*words):
        done = subprocess.run(
            ["make", *words], cwd=tmp_path, env={**os.environ, "PATH": path},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    if gpu or shutil.which("nvidia-smi") is None:
        assert ("make train CUDA=12" in make("train")) == gpu
    assert 'pip install --quiet --editable ".[cuda12]"' in make("train", "CUDA=12")
    (tmp_path / ".venv/lib/python3.11/site-packages/jax_cuda12_plugin").mkdir(parents=True)
    assert "make train CUDA=12" not in make("train")
