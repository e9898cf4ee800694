"""Experiments: runs that are trained side by side, stopped, taken up again, and put in a table."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from looped_jax import sweep, train
from looped_jax.config.registry import LOOP_RULES, OBJECTIVES
from looped_jax.config.settings import Settings
from looped_jax.errors import ConfigError
from looped_jax.experiments import workers
from looped_jax.experiments.comparison.run_record import read
from looped_jax.experiments.experiment import THROUGHPUT, Experiment, has_diverged, is_complete
from looped_jax.experiments.grid import Grid
from looped_jax.experiments.workers import Place

TINY = {
    "config": "flt:chain_end",
    "settings": {
        "model.width": 16, "model.loops": 2, "model.seq_len": 12, "train.steps": 6,
        "data.tasks.chain_end.nodes": 6, "data.tasks.chain_end.distance": 1,
        "train.tokens_per_step": 96, "train.batch_size": 8, "train.eval_tokens": 48,
        "train.eval_loops": [1, 2, 3], "train.eval_every": 0,
    },
    "rows": [{"settings": {"model.variant": ["FLT", "LT"]}}],
    "seeds": [0, 1],
}  # fmt: skip
TWO = [Place(), Place()]  # no cores of their own: the tests' machine may have one


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Workers, unlike these tests, see one device each."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", " ".join(flag for flag in flags if "device_count" not in flag))
        yield


def opened(out, places=TWO, **changed):
    settings = TINY["settings"] | changed.pop("settings", {})
    return Experiment.open(Grid.from_dict(TINY | {"settings": settings} | changed), out, places)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An experiment of two rows and two seeds that two workers trained, and what it said."""
    experiment, lines = opened(tmp_path_factory.mktemp("sweep")), []
    assert experiment.train(TWO, lines.append) == {}
    return experiment, lines


def test_every_run_is_trained_and_told(trained):
    experiment, lines = trained
    assert lines[0].startswith("4 runs, 0 of them done; 2 at a time")
    assert sum("complete" in line for line in lines) == 4
    assert all(map(is_complete, experiment.runs)) and not experiment.missing()
    console = (experiment.runs[0].folder / workers.CONSOLE).read_text()
    assert "step 6/6" in console and "summary" in console


def test_what_is_done_stays_done(trained):
    experiment, _ = trained
    again, lines = opened(experiment.out), []
    again.train(TWO, lines.append)
    assert lines == [f"4 runs, 4 of them done; 0 at a time, in {experiment.out}"]


def test_a_worker_trains_as_the_program_does(trained, tmp_path):
    values = trained[0].runs[-1].settings.to_dict()
    values["train"] |= {"run_dir": str(tmp_path), "batch_size": 1}
    train.train(Settings.from_dict(values))
    alone, beside = (read(folder).loss for folder in (tmp_path, trained[0].runs[-1].folder))
    np.testing.assert_allclose(alone, beside, rtol=1e-5)


def test_another_grid_in_the_same_folder_is_refused(trained):
    with pytest.raises(ConfigError, match=r"train.tokens_per_step: 96 there, 192 here"):
        opened(trained[0].out, settings={"train.tokens_per_step": 192})
    with pytest.raises(ConfigError, match=r"data.tasks.chain_end.distance: 1 there, 2 here"):
        opened(trained[0].out, settings={"data.tasks.chain_end.distance": 2})


def test_runs_from_before_a_setting_existed_are_gone_on_with(trained, tmp_path):
    shutil.copytree(trained[0].out, tmp_path / "older")
    for file in tmp_path.glob("older/*/config.json"):
        config = json.loads(file.read_text())
        del config["model"]["embedding"], config["train"]["loop_sampling"]
        file.write_text(json.dumps(config))
    assert opened(tmp_path / "older").missing() == []
    with pytest.raises(ConfigError, match=r"model.embedding: 'separate' there, 'tied' here"):
        opened(tmp_path / "older", settings={"model.embedding": "tied"})


def test_the_program_draws_the_page_of_what_is_there(trained, tmp_path, capsys):
    experiment, _ = trained
    grid = tmp_path / "grid.json.yaml"
    grid.write_text(json.dumps(TINY))  # JSON is YAML
    flags = [str(grid), "--out", str(experiment.out)]
    sweep.main([*flags, "--dry_run"])
    listed = capsys.readouterr().out
    assert "FLT K=2: 6 steps, 576 tokens" in listed and "2 of 2 runs done" in listed
    sweep.main([*flags, "--loops", "1,3", "--metric", "accuracy at 3", "--workers", "1"])
    told = capsys.readouterr().out
    assert "FLT K=2" in told and "accuracy at 3 against the best" in told
    assert (experiment.out / "comparison" / "index.html").is_file()
    table = (experiment.out / "comparison" / "table.csv").read_text()
    assert table.count("\n") == 3 and table.splitlines()[1].startswith("FLT K=2,2,")


@pytest.mark.slow
def test_a_signal_stops_all_and_the_same_command_goes_on(tmp_path):
    long = {"train.steps": 4_000, "train.save_every": 0}
    experiment, lines = opened(tmp_path, settings=long), []

    def stop_when_running():
        logs = [run.folder / "metrics.jsonl" for run in experiment.runs]
        while sum(log.is_file() and log.stat().st_size > 3_000 for log in logs) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop_when_running, daemon=True).start()
    assert experiment.train(TWO, lines.append) == {}
    assert sum("stopped; the same command goes on" in line for line in lines) == 2
    begun = [run for run in experiment.runs if (run.folder / "checkpoints").is_dir()]
    assert len(begun) == 2 and len(experiment.missing()) == 4
    before = {run.name: read(run.folder).steps[-1] for run in begun}
    assert all(0 < step < 4_000 for step in before.values())


@pytest.mark.slow
def test_runs_that_cannot_be_trained_do_not_stop_the_others(tmp_path):
    experiment, lines = opened(tmp_path), []
    broken = experiment.runs[0].folder
    broken.mkdir(parents=True)
    (broken / "checkpoints").write_text("no folder")
    failed = experiment.train(TWO, lines.append)
    assert list(failed) == [experiment.runs[0].name]
    assert [is_complete(run) for run in experiment.runs] == [False, True, True, True]


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_one_run(tmp_path):
    experiment, killed = opened(tmp_path, settings={"train.steps": 3_000}), []

    def kill(running):
        if not killed and any((run.folder / "metrics.jsonl").is_file() for run in running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            killed.append(True)

    ended = {}
    for run, outcome in workers.train_all(experiment.runs[:3], TWO, watch=kill):
        ended[run.name] = outcome
    assert len(ended) == 3 and sum(outcome.failed for outcome in ended.values()) == 1
    assert "exit code -9" in next(o.message for o in ended.values() if o.failed)


@pytest.mark.slow
def test_values_that_are_not_finite_end_a_run_for_good(tmp_path):
    wild = {"optim.embedding_learning_rate": 1e38, "optim.head_learning_rate": 1e38}
    experiment, lines = opened(tmp_path, settings=wild, seeds=[0]), []
    assert experiment.train(TWO, lines.append) == {}
    assert all(map(has_diverged, experiment.runs)) and not experiment.missing()
    assert any("stopped at step" in line for line in lines)


@pytest.mark.slow
def test_equal_seconds_are_measured_in_turns_and_kept(tmp_path):
    rows = [
        {"label": "two loops", "settings": {"model.loops": 2}},
        {"label": "one", "settings": {"model.loops": 1}, "equal": "seconds"},
    ]
    first = opened(tmp_path, rows=rows)
    steps = {run.row.label: run.config.train.steps for run in first.runs}
    assert steps["two loops"] == 6
    expected = 6 * first.seconds["two loops"] / first.seconds["one"]
    assert steps["one"] == max(1, round(expected))
    kept = json.loads((tmp_path / THROUGHPUT).read_text())["seconds"]
    assert opened(tmp_path, rows=rows).seconds == kept == first.seconds


def test_places_are_cores_or_gpus(monkeypatch):
    monkeypatch.setattr(workers, "_gpus", lambda: [])
    cores = workers.places()
    assert sorted(core for place in cores for core in place.cores)
    assert all(len(place.cores) == 1 and place.gpu is None for place in cores)
    with pytest.raises(ConfigError, match=r"--workers=9999: here is room for"):
        workers.places(9999)
    monkeypatch.setattr(workers, "_gpus", lambda: ["0", "3"])
    assert [place.gpu for place in workers.places()] == ["0", "3"]
    shared = workers.places(3)
    assert [place.gpu for place in shared] == ["0", "3", "0"]
    assert shared[0].share == 0.5


@pytest.mark.slow
def test_workers_end_with_the_sweep_that_is_killed(tmp_path):
    grid = tmp_path / "grid.yaml"
    long = TINY["settings"] | {"train.steps": 100_000, "train.save_every": 0}
    grid.write_text(json.dumps(TINY | {"settings": long}))
    flags = [str(grid), "--out", str(tmp_path / "runs"), "--workers", "1"]
    killed = subprocess.Popen([sys.executable, "-m", "looped_jax.sweep", *flags])
    run = tmp_path / "runs" / "FLT_K_2_seed0"
    wait_for(lambda: "step 50/" in text_of(run / workers.CONSOLE) or killed.poll() is not None)
    killed.kill()
    killed.wait()
    wait_for(lambda: "stopped by a signal" in text_of(run / workers.CONSOLE))


def wait_for(happened):
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def text_of(path):
    return path.read_text() if path.is_file() else ""


@pytest.mark.slow
def test_what_files_register_is_known_to_workers(tmp_path):
    """A rule in the file that `config` names, a part of the settings in one that `imports` does."""
    (tmp_path / "own_rule.py").write_text(
        "from looped_jax.config import presets\n"
        "from looped_jax.config.registry import LOOP_RULES\n"
        "from looped_jax.model.loop_rules import LoopRule\n\n"
        "@LOOP_RULES.register('plain_sweep')\n"
        "class Plain(LoopRule):\n"
        "    def start(self, here):\n"
        "        return here.e\n\n"
        "def get_config(preset=None):\n"
        "    return presets.make('plain_sweep', preset)\n"
    )
    (tmp_path / "own_objective.py").write_text(
        "from looped_jax.config.registry import OBJECTIVES\n"
        "from looped_jax.model.objectives import Step\n\n"
        "@OBJECTIVES.register('step_sweep')\n"
        "class StepSweep(Step):\n"
        "    pass\n"
    )
    experiment = opened(
        tmp_path / "runs", config=f"{tmp_path / 'own_rule.py'}:chain_end",
        imports=[str(tmp_path / "own_objective.py")],
        rows=[{"settings": {"model.loss": "step_sweep"}}], seeds=[0],
    )  # fmt: skip
    try:
        assert experiment.train([Place()], print) == {}
        model = json.loads((experiment.runs[0].folder / "config.json").read_text())["model"]
        assert (model["variant"], model["loss"]) == ("plain_sweep", "step_sweep")
    finally:
        del LOOP_RULES._found["plain_sweep"], OBJECTIVES._found["step_sweep"]
