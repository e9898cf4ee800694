"""A generated task through the programs: trained, judged at any loop counts, and seen into."""

import json

import numpy as np
import pytest

import looped_jax
from looped_jax import diagnose, evaluate, generate, train
from looped_jax.config.settings import Settings
from looped_jax.errors import CheckpointError
from looped_jax.resolve import run_name
from tests.tasks.test_task import scalars

LOOPS = (1, 2, 3)


def settings(run_dir, task="steps", *, steps=30, **own):
    return Settings.from_dict(
        {
            "model": {
                "layers": 1, "loops": 2, "width": 32, "heads": 2, "seq_len": 12, "loss": "STEP",
                "dtype": "float32",
            },
            "optim": {"newton_schulz_dtype": "float32", "embedding_learning_rate": 0.05},
            "data": {"task": task, "tasks": {task: {"nodes": 4, "queries": 8} | own}},
            "mesh": {"data": 8},
            "train": {
                "steps": steps, "run_dir": str(run_dir), "tokens_per_step": 768, "batch_size": 8,
                "eval_every": 10, "eval_tokens": 256, "eval_loops": LOOPS, "save_every": 10,
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return train.train(settings(tmp_path_factory.mktemp("run") / "steps"))


def test_it_learns_and_logs_exact_answers_by_loops(run_dir):
    right = {k: scalars(run_dir, f"val/accuracy_loops_{k}") for k in LOOPS}
    assert list(right[1]) == [0, 10, 20, 30]
    assert right[1][0] == 0 and right[1][30] > 0.5  # the first hop is there before the second
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["metric"] == "error_trained" and summary["scores"]["accuracy"]["3"] < 1
    assert not (run_dir / "tokenizer.json").exists()


def test_a_complete_run_is_complete_and_another_size_is_another_run(run_dir, capsys):
    train.train(settings(run_dir))
    told = capsys.readouterr().out
    assert "is complete: 30 steps, error_trained 0." in told
    for program in ("evaluate", "diagnose"):
        assert f"{program} --checkpoint {run_dir}" in told
    with pytest.raises(CheckpointError, match="data.nodes: 4 there, 5 here; data.queries"):
        train.train(settings(run_dir, nodes=5, queries=7))
    names = {run_name(settings(None)), run_name(settings(None, nodes=5, queries=7))}
    assert len(names) == 2 and all(name.startswith("steps_FLT_K2") for name in names)


def test_evaluate_judges_it_as_training_did_and_merges(run_dir, tmp_path, capsys):
    given = ["--checkpoint", str(run_dir), "--out", str(tmp_path), "--mesh", "data=1"]
    found = evaluate.main([*given, "--loops", "1,2,3,9"])
    for column, k in enumerate(LOOPS):
        logged = scalars(run_dir, f"val/accuracy_loops_{k}")[30]
        assert found["scores"]["accuracy"][column] == pytest.approx(logged)
    assert "accuracy_trained" in capsys.readouterr().out
    evaluate.main([*given, "--loops", "5", "--eval_tokens", "64"])
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["loops"] == [1, 2, 3, 5, 9]
    assert {path.suffix for path in tmp_path.glob("scores.*")} == {
        ".json", ".csv", ".pdf", ".png", ".svg",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (evaluate, ["--modes", "bpb"], "--modes=bpb is not for data.task=steps; choose from valid"),
        (evaluate, ["--eval_tokens", "7"], "eval_tokens=7 is less than the 8 targets of one row"),
        (generate, [], "was trained on data.task=steps, which is no text"),
        (diagnose, ["--text", "a"], "was trained on data.task=steps, which is no text"),
        (diagnose, ["--data", "a.txt"], "--data=a.txt is for text, and data.task=steps"),
    ],
)
def test_what_is_for_text_is_refused_in_one_line(run_dir, capsys, program, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        program.main(["--checkpoint", str(run_dir), *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and message in error and error.count("\n") == 1


def test_the_page_measures_each_loop_by_its_own_target(run_dir, tmp_path):
    diagnose.main(
        ["--checkpoint", str(run_dir), "--loops", "3", "--tokens", "256", "--out", str(tmp_path)]
    )
    numbers = json.loads((tmp_path / "measurements.json").read_text())
    logged = [scalars(run_dir, f"val/accuracy_loops_{k}")[30] for k in LOOPS]
    assert numbers["accuracy"] == pytest.approx(logged) and numbers["tokens"] == 256
    by_position = numbers["loss_by_position"][0]
    assert by_position[:4] == [None] * 4 and None not in by_position[4:]
    assert "?0" in (tmp_path / "index.html").read_text()


def test_it_opens(run_dir):
    model = looped_jax.load(run_dir)
    row = np.array([9, 14, 19, 20, *range(4, 8), *range(4, 8)])  # 0>1 1>2 2>3 3>0, then all starts
    (first,) = model.logits(row, loops=1)
    assert (np.asarray(first)[0, 4:].argmax(-1) == [1, 2, 3, 0] * 2).mean() > 0.5
