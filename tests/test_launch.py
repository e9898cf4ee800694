"""The launch scripts: sound shell, and with --dry-run the commands they promise."""

import os
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from looped_jax import errors

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *Path(__file__).parent.glob("clusters/*.sh")])


def dry(script, *arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = subprocess.run(
        [LAUNCH / script, "--dry-run", *arguments], capture_output=True, text=True,
        env={**clean, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    assert len(lines) == 5
    assert lines[0] == (
        "python -m looped_jax.evaluate --checkpoint runs/pretrain/flt --loops 1,3,6,9,12 "
        "--modes bpb"
    )
    assert lines[4] == "python -m looped_jax.compare " + " ".join(
        [*(f"runs/pretrain/{rule}" for rule in ("flt", "lt_ia", "lt_i", "lt")),
         "--out runs/pretrain/comparison"]
    )  # fmt: skip


def test_one_machine():
    assert dry("single.sh", "--config.mesh.fsdp=8") == (
        "python -m looped_jax.train --config configs/flt.py --config.mesh.data=-1 "
        "--config.mesh.fsdp=8\n"
    )


def test_slurm():
    found = dry("slurm.sh", "--config.model.loops=6", FSDP="4")
    assert found == (
        "srun --wait=120 python -m looped_jax.train --config configs/flt.py "
        "--config.mesh.data=-1 --config.mesh.fsdp=4 --config.model.loops=6\n"
    )
    assert "#SBATCH --signal=TERM@300\n" in (LAUNCH / "slurm.sh").read_text()


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (1, False), (errors.STOPPED_EARLY, True), (137, False)]
)
def test_slurm_requeues_what_was_stopped_early_and_nothing_else(tmp_path, code, requeued):
    """tests/clusters/slurm.sh does it with the real one."""
    for name, does in {"srun": f"exit {code}", "scontrol": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        [LAUNCH / "slurm.sh"], capture_output=True, text=True,
        env={"PATH": path, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert done.stdout == ("requeue 7\n" if requeued else "")


def test_a_slurm_array_trains_every_rule_with_every_seed_and_then_compares():
    given = {"RULES": "flt lt", "SEEDS": "3 5 7", "OUT": "runs/grid", "PRESET": "tiny"}
    array, evaluation = dry(
        "slurm_array.sh",
        "--nodes=2",
        "--",
        "--config.train.steps=9",
        EVALUATE="--modes bpb",
        **given,
    ).splitlines()
    assert array == "sbatch --parsable --array=0-5 --nodes=2 launch/slurm.sh --config.train.steps=9"
    assert "--dependency=afterok:ARRAY" in evaluation
    assert evaluation.endswith("--nodes=1 launch/evaluate.sh --modes bpb")
    folders = [
        dry("slurm.sh", SLURM_ARRAY_TASK_ID=str(task), **given).split("python -m ")[1].split()
        for task in range(6)
    ]
    assert [folder[2] for folder in folders] == 3 * ["configs/flt.py:tiny"] + 3 * [
        "configs/lt.py:tiny"
    ]
    assert [folder[5:7] for folder in folders] == [
        [f"--config.train.seed={seed}", f"--config.train.run_dir=runs/grid/{rule}_seed{seed}"]
        for rule in ("flt", "lt") for seed in (3, 5, 7)
    ]  # fmt: skip


# ---- a TPU pod: two folders are its hosts --------------------------------------------------------

GCLOUD = """#!/bin/bash
cd "$POD"; echo "$4" >>calls; last=${*: -1}
case $4 in
  describe) cat state ;;
  create) echo READY >state ;;
  delete) rm -r state host? ;;
  scp) for host in host0 host1; do mkdir -p $host; cp "$5" $host/; done ;;
  ssh) for host in host0 host1; do HOME=$POD/$host bash -c "${last#--command=}"; done ;;
esac
"""
PYTHON = """#!/bin/bash
if [[ "$*" == *"uv venv"* ]]; then
  mkdir -p "${*: -1}/bin"; echo "$*" >>"$POD/installs"
  printf '%s\\n' '#!/bin/bash' 'echo "$LOOPED_JAX_CLUSTER $*"' \
    'until [[ -f $POD/code ]]; do sleep 0.1; done; exit $(<$POD/code)' >"${*: -1}/bin/python"
  chmod +x "${*: -1}/bin/python"
fi
"""


def test_a_tpu_pod_gets_one_quoted_command():
    copied, started = dry(
        "tpu_pod.sh", "pod", "us-east1-d", "--config.train.run_dir=/a/my run"
    ).splitlines()
    where = "--zone=us-east1-d --worker=all"
    assert copied.startswith("gcloud compute tpus tpu-vm scp ") and copied.endswith(where)
    assert started.startswith(f"gcloud compute tpus tpu-vm ssh pod {where} --command=")
    assert r"run_dir=/a/my\ run" in started


def test_a_tpu_pod_is_made_started_left_alone_and_comes_back(tmp_path):
    for name, text in {"gcloud": GCLOUD, "python3": PYTHON}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def call(*more):
        done = subprocess.run(
            [LAUNCH / "tpu_pod.sh", "pod", "zone", "--config.train.run_dir=/a/my run", *more],
            capture_output=True, text=True,
            env={**os.environ, "PATH": path, "POD": str(tmp_path), "TYPE": "v5litepod-8",
                 "SETUP": "echo mounted >>setup"},
        )  # fmt: skip
        told = [line.split(":")[0] for line in done.stdout.splitlines()]
        return done.returncode, told

    def end(code):
        (tmp_path / "code").write_text(code)
        for host in ("host0", "host1"):  # until its lock is free
            subprocess.run(["flock", tmp_path / host / "looped_jax.lock", "true"], check=True)
        (tmp_path / "code").unlink()

    assert call() == (75, ["pod", "started", "started"])  # it was missing
    assert call() == (75, ["running", "running"])
    log = (tmp_path / "host1" / "looped_jax.log").read_text()
    assert log == (
        "auto -m looped_jax.train --config configs/flt.py --config.mesh.data=-1 "
        "--config.train.run_dir=/a/my run\n"
    )
    assert (tmp_path / "host1" / "looped_jax" / "pyproject.toml").is_file()
    end("134")  # another host died
    assert call() == (75, ["started", "started"])
    assert len((tmp_path / "installs").read_text().splitlines()) == 2  # once a host
    (tmp_path / "state").write_text("PREEMPTED")
    end("75")
    assert call() == (75, ["pod", "started", "started"])
    assert len((tmp_path / "installs").read_text().splitlines()) == 4
    assert (tmp_path / "host0" / "setup").read_text() == "mounted\n"  # on the new disk
    end("0")
    assert call() == (0, ["complete", "complete"])
    assert call("--config.train.steps=9") == (75, ["started", "started"])
    end("0")


# ---- Kubernetes: the forms, filled in ------------------------------------------------------------

DEVICES = {
    "nvidia": {"ACCELERATOR": "nvidia-h100-80gb"},
    "tpu": {
        "DEVICE": "tpu",
        "ACCELERATOR": "tpu-v5-lite-podslice",
        "TOPOLOGY": "4x4",
        "NODES": "4",
    },
}
# What jobset.x-k8s.io/v1alpha2 has, of what is used here.
JOBSET = {
    "network": {"enableDNSHostnames", "publishNotReadyAddresses", "subdomain"},
    "failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "rules": {"action", "name", "onJobFailureReasons"},
    "replicatedJobs": {"name", "replicas", "template"},
}


def manifests(kind, device, *arguments, **environment):
    """What kubectl would get, and the job in it."""
    found = list(
        yaml.safe_load_all(
            dry(
                "kubernetes.sh",
                *arguments,
                KIND=kind,
                IMAGE="img:1",
                **DEVICES[device],
                **environment,
            )
        )
    )
    if kind == "job":
        return found, found[1]
    (one,) = found[0]["spec"]["replicatedJobs"]
    return found, {"apiVersion": "batch/v1", "kind": "Job", "metadata": {}, **one["template"]}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["job", "jobset"])
def test_manifests_are_what_the_api_takes(kind, device):
    found, job = manifests(kind, device, QUEUE="team")
    for one in found if kind == "job" else [job]:
        kubernetes_validate.validate(one, "1.31", strict=True)
    if kind == "jobset":
        spec = found[0]["spec"]
        assert spec.keys() == {"network", "failurePolicy", "replicatedJobs"}
        (rule,), (one,) = spec["failurePolicy"]["rules"], spec["replicatedJobs"]
        parts = {**spec, "rules": rule, "replicatedJobs": one}
        for name, fields in JOBSET.items():
            assert parts[name].keys() == fields
        assert spec["failurePolicy"]["restartStrategy"] in ("Recreate", "BlockingRecreate")
    assert found[-1]["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}


@pytest.mark.parametrize("kind", ["job", "jobset"])
def test_pods_find_the_first_share_their_disk_and_have_memory_to_share(kind):
    _, job = manifests(kind, "nvidia", "--config.train.run_dir=runs/it's a&b", NODES="3")
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
    assert container["command"][:3] == ["python", "-m", "looped_jax.train"]
    assert container["command"][-1] == "--config.train.run_dir=runs/it's a&b"
    given = {entry["name"]: entry.get("value") for entry in container["env"]}
    first = {"job": "looped-jax-0", "jobset": "looped-jax-train-0-0"}[kind]
    assert given["LOOPED_JAX_COORDINATOR"] == f"{first}.{spec['subdomain']}:8476"
    assert given["LOOPED_JAX_PROCESSES"] == "3"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    for folder in ("runs", "data"):
        assert "persistentVolumeClaim" in volumes[mounts[f"/looped_jax/{folder}"]]


def test_devices_are_asked_for_by_name_and_topology():
    for device, resource, count in (("nvidia", "nvidia.com/gpu", 8), ("tpu", "google.com/tpu", 4)):
        _, job = manifests("job", device)
        spec = job["spec"]["template"]["spec"]
        assert spec["containers"][0]["resources"]["limits"] == {resource: count}
        assert [toleration["key"] for toleration in spec["tolerations"]] == [resource]
        chosen = {name.split("-", 1)[1]: value for name, value in spec["nodeSelector"].items()}
        assert "accelerator" in chosen or chosen["tpu-topology"] == "4x4"


def test_pods_stopped_early_are_replaced_and_not_counted():
    """The first rule that fits a pod decides: Ignore makes another, without a count."""
    _, job = manifests("job", "nvidia")
    rules = job["spec"]["podFailurePolicy"]["rules"]
    by_code = {
        code: rule["action"]
        for rule in rules
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert by_code == {errors.STOPPED_EARLY: "Ignore", 2: "FailJob"}
    assert rules[0]["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert rules[0]["action"] == "Ignore" and "backoffLimitPerIndex" in job["spec"]
    found, job = manifests("jobset", "nvidia")
    (rule,) = found[0]["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    ends = job["spec"]["podFailurePolicy"]["rules"]
    assert {rule["action"] for rule in ends} == {"FailJob"}
    assert ends[1]["onExitCodes"]["values"] == [errors.STOPPED_EARLY]


def test_a_slice_that_its_nodes_do_not_make_up_is_refused():
    done = subprocess.run(
        [LAUNCH / "kubernetes.sh", "--dry-run"], capture_output=True, text=True,
        env={**os.environ, **DEVICES["tpu"], "IMAGE": "img:1", "NODES": "3"},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "TOPOLOGY=4x4 has 16 chips, NODES=3 of COUNT=4 have 12\n"
