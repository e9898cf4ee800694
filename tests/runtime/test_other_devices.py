"""What one machine trained is opened on another: other device counts, other meshes, two processes.

Each program runs in a process of its own, since a process has one number of devices.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import looped_jax
from looped_jax import generate
from tests import QUICK
from tests.programs import finish, losses, run_here, start

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / ".." / "shared" / "data" / "core" / "eval_bundle"
OPENED = """
import sys, numpy as np, looped_jax
m = looped_jax.load(sys.argv[1])
rows = np.arange(3 * 20).reshape(3, 20) % 500
logits = np.stack(m.logits(rows, loops=(1, 2, 3)))
np.savez(sys.argv[2], rows=rows, logits=logits, texts=m.generate(["def ", "class"], tokens=6))
"""


def environment(home, devices, processes=()):
    return {
        **os.environ,
        "LOOPED_JAX_CACHE": str(home / "cache"),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
        **dict(processes),
    }


def run(home, devices, *command):
    """A Python program on so many fake devices; what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment(home, devices),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def together(home, devices, *command):
    """The same program in two processes of so many devices each; what each prints."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    programs = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, text=True,
            env=environment(
                home, devices,
                {
                    "LOOPED_JAX_COORDINATOR": f"localhost:{port}", "LOOPED_JAX_PROCESSES": "2",
                    "LOOPED_JAX_PROCESS": str(process),
                }.items(),
            ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for process in range(2)
    ]  # fmt: skip
    answers = [program.communicate(timeout=300) for program in programs]
    assert [p.returncode for p in programs] == [0, 0], [err[-2000:] for _, err in answers]
    lines = [out.splitlines(keepends=True) for out, _ in answers]
    gloo = ("[Gloo]", "peer ranks")  # two threads of it may break one line into two
    return ["".join(x for x in each if not any(word in x for word in gloo)) for each in lines]


@pytest.fixture(scope="module", params=[8, pytest.param(1, marks=pytest.mark.slow)])
def trained(home, tmp_path_factory, request):
    """(devices that trained it, run folder): on eight, fsdp, data and tensor hold two each."""
    run_dir = tmp_path_factory.mktemp(f"trained_on_{request.param}")
    settings = ("--config.model.heads=2", "--config.train.batch_size=2")
    if request.param == 8:  # as this process has
        mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
        code, _, err = run_here(home, run_dir, *settings, *mesh, steps=8)
    else:
        code, _, err = finish(start(home, run_dir, *settings, steps=8))
    assert code == 0, err
    return request.param, run_dir


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_opens_and_writes_on_any_number_of_devices(home, trained, tmp_path, devices):
    _, run_dir = trained
    run(home, devices, "-c", OPENED, run_dir, tmp_path / "few.npz")
    with np.load(tmp_path / "few.npz") as few:
        model = looped_jax.load(run_dir)  # with eight
        np.testing.assert_array_equal(few["logits"], model.logits(few["rows"], loops=(1, 2, 3)))
        assert few["texts"].tolist() == model.generate(["def ", "class"], tokens=6)


@pytest.mark.slow
def test_every_program_takes_it_elsewhere(home, trained, tmp_path):
    here, run_dir = trained
    elsewhere = {8: 1, 1: 8}[here]
    texts, scores = [], []
    for devices in (here, elsewhere):
        program = ("-m", "looped_jax.generate", "--checkpoint", run_dir, "--temperature=0")
        texts.append(run(home, devices, *program, "--prompt=def ", "--tokens=8"))
        out = tmp_path / f"evaluation_{devices}"
        program = ("-m", "looped_jax.evaluate", "--checkpoint", run_dir, f"--out={out}")
        run(home, devices, *program, "--modes=bpb,sample", "--eval_tokens=2048", "--batch_size=4")
        scores.append(json.loads((out / "scores.json").read_text())["scores"])
    assert texts[0] == texts[1] and "def " in texts[0]
    for name, values in scores[0].items():
        np.testing.assert_allclose(values, scores[1][name], rtol=1e-5)
    page = tmp_path / "page"
    run(
        home, elsewhere, "-m", "looped_jax.diagnose", "--checkpoint", run_dir, f"--out={page}",
        "--tokens=256",
    )  # fmt: skip
    assert (page / "index.html").is_file()


def test_a_run_goes_on_elsewhere(home, trained, tmp_path):
    here, run_dir = trained
    moved = tmp_path / "moved"
    shutil.copytree(run_dir, moved)
    shutil.rmtree(moved / "checkpoints" / "8")
    settings = ("--config.model.heads=2", "--config.train.batch_size=2")
    elsewhere = environment(home, {8: 1, 1: 8}[here])
    code, out, err = finish(start(home, moved, *settings, steps=8, environment=elsewhere))
    assert code == 0 and "from step 4" in out, err
    before, after = losses(run_dir), losses(moved)
    assert list(before) == list(after) == list(range(1, 9))
    np.testing.assert_allclose(list(before.values()), list(after.values()), atol=1e-4)


@pytest.mark.slow
def test_meshes_and_processes_change_no_text_and_no_score(home, trained, tmp_path):
    _, run_dir = trained
    generate = ("-m", "looped_jax.generate", "--checkpoint", run_dir, "--temperature=0.7")
    generate += ("--samples=3", "--prompt=import ", "--tokens=8", "--seed=5")
    alone = run(home, 1, *generate)
    assert run(home, 8, *generate, "--mesh=data=2,fsdp=2,tensor=2") == alone
    first, second = together(home, 2, *generate, "--mesh=data=2,tensor=2")
    assert first == alone and second == ""
    evaluate = ("-m", "looped_jax.evaluate", "--checkpoint", run_dir, "--modes=bpb,sample")
    evaluate += ("--eval_tokens=2048", "--batch_size=4")
    for name, devices, mesh in (("one", 1, "data=1"), ("eight", 8, "fsdp=4,tensor=2")):
        run(home, devices, *evaluate, f"--mesh={mesh}", f"--out={tmp_path / name}")
    first, second = together(home, 2, *evaluate, f"--out={tmp_path / 'two'}")
    assert "bpb validation" in first and second == ""
    one, eight, two = (
        json.loads((tmp_path / name / "scores.json").read_text())["scores"]
        for name in ("one", "eight", "two")
    )
    for name, values in one.items():
        np.testing.assert_allclose(values, eight[name], rtol=1e-5)
        np.testing.assert_allclose(values, two[name], rtol=1e-5)
    samples = {(tmp_path / name / "samples.txt").read_text() for name in ("one", "eight", "two")}
    assert len(samples) == 1


@pytest.mark.skipif(not BUNDLE.is_dir(), reason="needs shared/data beside the project")
@pytest.mark.slow
def test_tasks_are_decided_alike_in_two_processes(home, trained, tmp_path):
    _, run_dir = trained
    core = ("-m", "looped_jax.evaluate", "--checkpoint", run_dir, "--modes=core", "--loops=1,2")
    core += (f"--bundle={BUNDLE}", "--max_per_task=11", "--max_len=64")
    run(home, 1, *core, f"--out={tmp_path / 'one'}")
    first, second = together(home, 2, *core, f"--out={tmp_path / 'two'}")
    assert "CORE" in first and second == ""
    one, two = ((tmp_path / name / "core_loops_2.csv").read_text() for name in ("one", "two"))
    assert one == two
    # Interrupted, and gone on with: all processes leave out what the first has finished.
    state = tmp_path / "two" / "core_state.jsonl"
    lines = state.read_text().splitlines(keepends=True)
    state.write_text("".join(lines[: len(lines) // 2]))
    together(home, 2, *core, f"--out={tmp_path / 'two'}")
    assert state.read_text() == "".join(lines)


def test_a_mesh_that_cannot_cut_the_model_is_refused(trained, capsys):
    _, run_dir = trained
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--checkpoint", str(run_dir), "--mesh=tensor=8"])
    assert stopped.value.code == 1
    assert "mesh.tensor=8 does not divide model.heads=2" in capsys.readouterr().err
