"""The launch scripts: sound shell, and with --dry-run the commands they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def dry(script, *arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = subprocess.run(
        [LAUNCH / script, "--dry-run", *arguments], capture_output=True, text=True,
        env={**clean, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout or done.stderr  # slurm.sh shows what runs beside reading it


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_shell(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of the dev extra
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


def test_pretraining_runs_the_four_rules_in_order():
    lines = dry("pretrain.sh", "--config.train.steps=9").splitlines()
    assert lines == [
        f"python -m looped_jax.train --config configs/{rule}.py "
        f"--config.train.run_dir=runs/pretrain/{rule} --config.train.steps=9"
        for rule in ("flt", "lt_ia", "lt_i", "lt")
    ]
    assert "configs/lt.py:tiny" in dry("pretrain.sh", PRESET="tiny", RULES="lt")


def test_evaluation_judges_what_pretraining_made():
    lines = dry("evaluate.sh", "--modes", "bpb").splitlines()
    assert len(lines) == 4
    assert lines[0] == (
        "python -m looped_jax.evaluate --checkpoint runs/pretrain/flt --loops 1,3,6,9,12 "
        "--modes bpb"
    )


def test_one_machine():
    assert dry("single.sh", "--config.mesh.fsdp=8") == (
        "python -m looped_jax.train --config configs/flt.py --config.mesh.data=-1 "
        "--config.mesh.fsdp=8\n"
    )


def test_slurm_and_its_requeue():
    found = dry("slurm.sh", "--config.model.loops=6", FSDP="4")
    assert found == (
        "srun --kill-on-bad-exit=1 python -m looped_jax.train --config configs/flt.py "
        "--config.mesh.data=-1 --config.mesh.fsdp=4 --config.model.loops=6\n"
    )
    assert "--signal=TERM@300" in (LAUNCH / "slurm.sh").read_text()


def test_a_tpu_pod_gets_one_quoted_command():
    found = dry("tpu_pod.sh", "pod", "us-east1-d", "--config.train.run_dir=/disk/my run")
    assert found.startswith("gcloud compute tpus tpu-vm ssh pod --zone=us-east1-d --worker=all")
    assert "LOOPED_JAX_CLUSTER=auto python -m looped_jax.train" in found
    assert r"run_dir=/disk/my\ run" in found


def test_kubernetes_gets_yaml_whatever_the_arguments():
    found = dry("kubernetes.sh", "--config.train.run_dir=runs/it's mine", IMAGE="img:1", NODES="3")
    service, job = yaml.safe_load_all(found)
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
    assert service["metadata"]["name"] == spec["subdomain"] == "looped-jax"
    assert container["command"][:3] == ["python", "-m", "looped_jax.train"]
    assert container["command"][-1] == "--config.train.run_dir=runs/it's mine"
    given = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert given["LOOPED_JAX_COORDINATOR"] == "looped-jax-0.looped-jax:8476"
    assert given["LOOPED_JAX_PROCESSES"] == "3"
    assert "@" not in found
