"""The training program as users meet it: killed, stopped, misled, and started again."""

import ast
import json
import math
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import time

import jax
import numpy as np
import pytest

from looped_jax import errors
from looped_jax.config.settings import MeshConfig
from looped_jax.data.builtin_corpus import BUILTIN_VAL_SHARD
from looped_jax.runtime import distributed, sharding
from looped_jax.training import optimizers, train_step
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.run_folder import read_config
from tests import QUICK
from tests.programs import ROOT, STEPS, entries, finish, run_here, start


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never said; {process.stderr.read()}")


def until(happened):
    deadline = time.monotonic() + 20
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.0005)


def final_state(run_dir):
    """Every array of the last checkpoint, optimizer included."""
    config = read_config(run_dir)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = optimizers.make_optimizer(config)
    checkpoints = Checkpoints(run_dir)
    assert checkpoints.latest() == STEPS
    return checkpoints.restore(STEPS, train_step.abstract(config, optimizer, mesh))


def assert_same_run(left, right):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(final_state(left)),
        jax.tree.leaves(final_state(right)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b, err_msg=str(path))


SELDOM = "--config.train.save_every=60"  # a save takes longer than ten steps


@pytest.fixture(scope="module")
def uninterrupted(home, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    code, out, err = finish(start(home, run_dir, SELDOM))
    assert code == 0, err
    return run_dir, out


def test_a_run_reports_scores_saves_and_speaks(uninterrupted):
    run_dir, out = uninterrupted
    assert "model.loops = 2" in out  # the resolved configuration
    assert f"{STEPS} steps of 512 tokens, by train.steps={STEPS}" in out
    counted = Checkpoints(run_dir).meta(STEPS).parameters
    assert counted["usage_weighted"] > counted["unique"] > 0
    assert f"parameters by count: all {counted['all']:,}, unique {counted['unique']:,}" in out
    assert out.index("temporaries") < out.index(f"step 1/{STEPS} ")
    final = [line for line in out.splitlines() if "validation bits per byte" in line][-1]
    assert "at 1 loops" in final and "at 2 loops" in final and "best unigram model" in final
    ours, unigram = (float(final.split(mark)[0].split()[-1]) for mark in (" at 2 loops", ")"))
    assert ours < unigram
    assert out.count("sample: ") == 4
    assert json.loads((run_dir / "config.json").read_text())["train"]["steps"] == STEPS
    steps = [entry for entry in entries(run_dir) if "train/loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, STEPS + 1))
    wanted = {
        "train/loss", "train/loss_smooth", "train/ppl", "train/grad_norm",
        "train/learning_rate_multiplier", "loop/residual_norm", "speed/tokens_per_second",
        "speed/flop_utilization",
        "speed/flop_utilization_reference", "speed/data_wait_seconds", "memory/bytes",
    }  # fmt: skip
    assert wanted <= steps[0].keys()
    assert steps[0]["train/ppl"] == pytest.approx(math.exp(steps[0]["train/loss"]))
    assert len(steps[0]["loop/residual_norm"]) == 2
    assert list((run_dir / "tensorboard").glob("events.*"))


def test_validation_is_bits_per_byte_and_perplexity_from_the_first_step_on(uninterrupted):
    run_dir, out = uninterrupted
    scored = {e["step"]: e for e in entries(run_dir) if "val/bpb_loops_2" in e}
    assert list(scored) == [0, 60, STEPS]
    assert out.index("step 0 validation") < out.index(f"step 1/{STEPS} ")
    at_first, at_last = scored[0], scored[STEPS]
    # a fresh model finds every one of the 512 tokens as likely as any other
    assert at_first["val/ppl_loops_1"] == pytest.approx(at_first["val/ppl_loops_2"], rel=1e-3)
    assert at_first["val/ppl_loops_2"] == pytest.approx(512, rel=0.02)
    for k in (1, 2):  # the same nats per token and per byte: as many bytes a token at any time
        bytes_per_token = [
            math.log2(each[f"val/ppl_loops_{k}"]) / each[f"val/bpb_loops_{k}"]
            for each in (at_first, at_last)
        ]
        assert bytes_per_token[0] == pytest.approx(bytes_per_token[1])
    assert f"perplexity per token: {at_last['val/ppl_loops_1']:.2f}" in out


def test_a_complete_run_has_one_summary(uninterrupted):
    run_dir, out = uninterrupted
    summary = json.loads((run_dir / "summary.json").read_text())
    log = entries(run_dir)
    steps = [e for e in log if "train/loss" in e]
    bpb = {e["step"]: e["val/bpb_loops_2"] for e in log if "val/bpb_loops_2" in e}
    best = min((60, STEPS), key=bpb.get)
    assert (summary["best"], summary["best_step"]) == (bpb[best], best)
    assert summary["scores"]["bpb"]["2"] == bpb[STEPS] and summary["metric"] == "bpb"
    assert summary["steps"] == STEPS and summary["tokens"] == 512 * STEPS
    assert summary["seconds"] == pytest.approx(
        sum(512 / e["speed/tokens_per_second"] for e in steps)
    )
    rates = [e["speed/tokens_per_second"] for e in steps]
    assert summary["tokens_per_second"] == pytest.approx(statistics.median(rates))
    last = steps[-1]
    for name in ("tokens", "flops", "seconds", "epochs"):
        assert summary[name] == last[f"total/{name}"] > 0
        assert [e[f"total/{name}"] for e in steps] == sorted(e[f"total/{name}"] for e in steps)
    assert summary["peak_memory_bytes"] >= last["memory/bytes"] > 1e8
    assert (summary["kernel"], summary["devices"]) == ("xla", "1 cpu")
    assert out.count("\nsummary\n") == 1 and out.index("sample: ") < out.index("\nsummary\n")
    table = out[out.index("\nvalidation, bpb\n") : out.index("\nsummary\n")].splitlines()
    assert table[2].split() == ["step", "1", "loop", "2", "loops"]
    assert [line.split()[0] for line in table[3:6]] == ["0", "60", str(STEPS)]
    assert table[5].split()[2] == f"{bpb[STEPS]:.4f}"
    assert (run_dir / "validation.png").read_bytes().startswith(b"\x89PNG")
    assert f"{summary['best']:.4f} after step {best}" in out


def test_samples_at_intervals_are_printed_kept_and_the_same_after_a_resume(home, tmp_path):
    run, more = tmp_path / "run", ("--config.train.sample_every=2", "--config.train.save_every=2",
                                   "--config.train.sample_temperature=1.0")  # fmt: skip
    code, out, err = run_here(home, run, *more, steps=6)
    assert code == 0 and out.count("step 2 sample: ") == 4, err
    text = (run / "metrics" / "samples.txt").read_text()
    assert [line for line in text.splitlines() if line[0] != " "] == ["step 2", "step 4", "step 6"]
    prompts = [line for line in text.splitlines() if line.startswith("  '")]
    assert len(set(prompts)) == 4 and len(prompts) == 12
    assert all(f"\n      {ast.literal_eval(p.strip())[:3]}" in text for p in prompts)  # and text
    shutil.rmtree(run / "checkpoints" / "6")
    code, _, err = run_here(home, run, *more, steps=6)
    assert code == 0 and (run / "metrics" / "samples.txt").read_text() == text, err
    greedy = tmp_path / "greedy"
    likeliest = "--config.train.sample_temperature=0.0"
    code, _, err = run_here(home, greedy, more[0], likeliest, steps=2)
    assert (greedy / "metrics" / "samples.txt").read_text() != text.split("step 4")[0]


@pytest.mark.slow
def test_ten_kills_end_with_the_weights_of_the_uninterrupted_run(home, uninterrupted, tmp_path):
    chance, during_save = random.Random(0), 0
    for kill in range(10):
        saved = {path.name for path in tmp_path.glob("checkpoints/[0-9]*")}
        process = start(home, tmp_path)
        wait_for(process, "continuing" if saved else "compiled")
        if kill % 3 == 0:  # once a save is complete
            until(lambda saved=saved: {p.name for p in tmp_path.glob("checkpoints/*[0-9]")} - saved)
        elif kill % 3 == 1:  # while one is under way
            until(lambda: list(tmp_path.glob("checkpoints/*tmp*")))
            during_save += bool(list(tmp_path.glob("checkpoints/*tmp*")))
        else:  # whenever, the start included
            time.sleep(chance.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        assert finish(process)[0] == -signal.SIGKILL, f"kill {kill} came after the end"
    assert during_save >= 2
    code, out, err = finish(start(home, tmp_path))
    assert code == 0, err
    assert "continuing" in out
    assert_same_run(tmp_path, uninterrupted[0])
    losses = [
        [(e["step"], e["train/loss"]) for e in entries(folder) if "train/loss" in e]
        for folder in (tmp_path, uninterrupted[0])
    ]
    assert losses[0] == losses[1]  # every step once, with the same loss


@pytest.mark.slow
def test_a_killed_run_of_sampled_loops_ends_with_the_same_weights(home, tmp_path):
    sampled = (
        "--config.train.loop_sampling.distribution=log_normal_poisson",
        "--config.train.loop_sampling.per=sequence",
        "--config.train.loop_sampling.backward_loops=2",
        "--config.train.save_every=20",
    )
    code, _, err = finish(start(home, tmp_path / "whole", *sampled))
    assert code == 0, err
    process = start(home, tmp_path / "killed", *sampled)
    until(lambda: list(tmp_path.glob("killed/checkpoints/20")))
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    code, out, err = finish(start(home, tmp_path / "killed", *sampled))
    assert code == 0 and "continuing" in out, err
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    drawn = [e["loop/drawn"] for e in entries(tmp_path / "killed") if "loop/drawn" in e]
    assert len(set(drawn)) > 10


def test_sigterm_saves_and_leaves_with_code_75(home, uninterrupted, tmp_path):
    other = "--config.train.save_minutes=0.001", "--config.train.eval_first=False"
    process = start(home, tmp_path, *other)  # which change nothing in what is learnt
    wait_for(process, "step 3/")
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == errors.STOPPED_EARLY == 75, err
    assert "stopped by a signal after step" in out and "looped_jax.train" in out
    stopped_at = int(out.split("stopped by a signal after step ")[1].split(",")[0])
    assert 3 <= stopped_at < STEPS
    code, out, err = finish(start(home, tmp_path, SELDOM))
    assert code == 0 and f"from step {stopped_at}" in out, err
    assert_same_run(tmp_path, uninterrupted[0])
    log = [e for e in entries(tmp_path) if "train/loss" in e]
    assert not [e for e in entries(tmp_path) if e["step"] == 0]  # nor when it goes on
    seconds = [e["total/seconds"] for e in log]  # go on where they were
    assert len(log) == STEPS and seconds == sorted(seconds)
    epochs = [e["total/epochs"] for e in log]
    assert epochs == [e["total/epochs"] for e in entries(uninterrupted[0]) if "total/epochs" in e]


@pytest.mark.slow
def test_one_text_file_trains_shuffled_and_goes_on_exactly(home, tmp_path):
    text = "\n\n".join(p.read_text() for p in sorted((ROOT / "looped_jax").rglob("*.py")))
    (tmp_path / "notes.txt").write_text(text)
    more = [
        f"--config.data.path={tmp_path / 'notes.txt'}", "--config.data.shuffle_seed=3",
        "--config.data.tokenizer=train", "--config.train.eval_every=0",
    ]  # fmt: skip
    code, _, err = finish(start(home, tmp_path / "whole", *more, steps=12))
    assert code == 0, err
    process = start(home, tmp_path / "cut", *more, steps=12)
    wait_for(process, "step 5/")
    process.send_signal(signal.SIGTERM)
    process.communicate()
    code, out, err = finish(start(home, tmp_path / "cut", *more, steps=12))
    assert code == 0 and "continuing" in out, err
    losses = [
        {e["step"]: e["train/loss"] for e in entries(tmp_path / name) if "train/loss" in e}
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    for setting, difference in (("shuffle_seed=4", "data.shuffle_seed: 3 there, 4 here"),
                                ("val_share=0.2", "data.train")):  # fmt: skip
        code, _, err = finish(
            start(home, tmp_path / "cut", *more, f"--config.data.{setting}", steps=12)
        )
        assert code == 1 and "holds another run" in err and difference in err


def test_a_signal_saves_before_a_due_validation_which_comes_first_when_it_goes_on(
    home, tmp_path, monkeypatch
):
    each = "--config.train.eval_every=2", "--config.train.eval_first=False"
    with monkeypatch.context() as patch:
        patch.setattr(distributed.StopSignal, "requested", lambda self, step: step == 2)
        code, out, err = run_here(home, tmp_path, *each, steps=3)
    assert code == errors.STOPPED_EARLY, err
    assert "stopped by a signal after step 2" in out and "step 2 validation" not in out
    code, out, err = run_here(home, tmp_path, *each, steps=3)
    assert code == 0, err
    assert out.index("step 2 validation") < out.index("step 3/3") < out.index("step 3 validation")
    bpb = {e["step"]: e["val/bpb_loops_2"] for e in entries(tmp_path) if "val/bpb_loops_2" in e}
    assert list(bpb) == [2, 3]
    best = Checkpoints(tmp_path).meta(3)
    assert (best.best, best.best_step) == min((score, step) for step, score in bpb.items())


def test_after_a_run_signals_do_what_they_did_before(home, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    code, _, err = run_here(home, tmp_path, "--config.train.eval_every=0", steps=1)
    assert code == 0, err
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_complete_run_is_left_alone(home, uninterrupted):
    run_dir, _ = uninterrupted
    code, out, err = run_here(home, run_dir)
    assert code == 0 and f"is complete: {STEPS} steps" in out, err


def test_what_it_says_comes_next_works_when_it_is_copied(home, uninterrupted):
    _, out = uninterrupted
    commands = [line.strip() for line in out.split("\nnext\n")[1].splitlines()[1::2]]
    assert len(commands) == 3
    environment = {**os.environ, "LOOPED_JAX_CACHE": str(home / "cache"), "XLA_FLAGS": QUICK}
    done = subprocess.run(
        shlex.split(commands[0]), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "1 of 1" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("--config.model.loops=3", "model.loops: 2 there, 3 here"),
        ("--config.optim.beta1=0.9", "optim.beta1: 0.8 there, 0.9 here"),
        ("--config.data.train_shards=1", "data.train"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(home, uninterrupted, override, difference):
    code, out, err = run_here(home, uninterrupted[0], override)
    assert code == 1 and "compiled" not in out
    assert err.startswith("error: ") and "holds another run" in err and difference in err


def test_a_loss_that_is_not_finite_stops_the_run(home, tmp_path):
    code, out, err = run_here(home, tmp_path, "--config.optim.embedding_learning_rate=1e30")
    assert code == 1
    assert err.startswith("error: stopped at step "), err
    assert "last good checkpoint is step" in err
    assert "to go on from it: " in err and "-m looped_jax.train --config=configs/flt.py" in err
    last = entries(tmp_path)[-1]
    assert f"stopped at step {last['step']}: " in err  # the folder tells it, too
    assert last["train/loss"] is None or last["train/grad_norm"] is None


@pytest.mark.parametrize("blocked", ["run_dir"])
def test_an_unwritable_folder_is_named_before_any_compile(home, tmp_path, blocked):
    (tmp_path / blocked).write_text("a file, not a folder")
    code, out, err = run_here(home, tmp_path / blocked)
    assert code == 1 and "compiled" not in out
    assert "train.run_dir" in err and "cannot be written" in err


def test_a_missing_validation_shard_is_named(home, tmp_path):
    code, _, err = run_here(home, tmp_path, "--config.data.val_shard=none.parquet")
    assert code == 1 and "data.val_shard" in err and "none.parquet" in err
    assert BUILTIN_VAL_SHARD not in err


def test_a_named_kernel_trains_scores_and_samples(home, tmp_path):
    """Samples have rows of 16 tokens, which the TPU's kernel refuses; it must not matter."""
    sizes = (
        "--config.model.kernel=splash",
        "--config.model.width=128",
        "--config.model.seq_len=128",
    )
    code, out, err = run_here(home, tmp_path, *sizes, "--config.train.batch_size=4", steps=2)
    assert code == 0, err
    assert "\nattention: splash\n" in out and "sample: " in out


def test_a_kernel_that_cannot_be_had_is_refused_before_anything_is_made(home, tmp_path):
    code, out, err = run_here(home, tmp_path / "run", "--config.model.kernel=cudnn")
    assert code == 1 and "step compiled" not in out
    assert err.endswith(
        "error: model.kernel=cudnn: cudnn needs an NVIDIA GPU, this is cpu; or choose "
        "model.kernel=auto\n"
    )
    assert not (tmp_path / "run").exists()
