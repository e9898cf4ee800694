"""Evaluator: the same decisions whatever the batch, the devices and the company of loop counts."""

import csv
import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import looped_jax
from looped_jax import cli, evaluate
from looped_jax.config.registry import TASKS
from looped_jax.config.settings import MeshConfig, ModelSettings, Settings
from looped_jax.data.tokenizer import train_tokenizer
from looped_jax.errors import DataError
from looped_jax.evaluation import core, evaluator, perplexity, scoring
from looped_jax.evaluation.core import Row
from looped_jax.model import loss, transformer
from looped_jax.plotting import figures
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training import optimizers, train_step
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.run_meta import RunMeta
from looped_jax.training.train_state import TrainState

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / ".." / "shared" / "data" / "core" / "eval_bundle"
WIKITEXT = ROOT / ".." / "shared" / "data" / "wikitext-2-v1" / "valid.txt"
needs_bundle = pytest.mark.skipif(
    not BUNDLE.is_dir(), reason="needs shared/data beside the project"
)
LOOPS = (1, 2, 4)


@pytest.fixture(scope="module")
def model():
    """Random weights, then trained a little on this project's own words."""
    settings = ModelSettings(layers=2, loops=2, width=32, heads=2, seq_len=64, dtype="float32")
    config = resolve(Settings(model=settings), vocab_size=320)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = optimizers.make_optimizer(config, steps=30)
    current = train_step.create(config, optimizer, mesh)
    noise = functools.partial(jax.random.normal, jax.random.key(1))
    current = dataclasses.replace(
        current, params=jax.tree.map(lambda w: w + 0.3 * noise(w.shape), current.params)
    )
    text = np.frombuffer((ROOT / "README.md").read_bytes(), np.uint8).astype(np.int32)
    step, losses = train_step.make_train_step(config, optimizer, mesh), []
    for number in range(30):
        rows = np.stack([text[at : at + 65] for at in range(number * 7, number * 7 + 2400, 300)])
        current, metrics = step(current, rows[None])
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 1
    return config, current.params


@pytest.fixture(scope="module")
def run_dir(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config, params = model
    text = (ROOT / "README.md").read_text()
    train_tokenizer(iter([text]), 320, path=folder / "tokenizer.json")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    checkpoints = Checkpoints(folder)
    checkpoints.save(7, TrainState(params, (), jnp.array(7)), RunMeta(step=7))
    checkpoints.wait()
    return folder


def scorer(model, devices=1, batch_size=4, loops=LOOPS):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    return scoring.SpanScorer(
        model[0].model, model[1], mesh, loop_counts=loops, batch_size=batch_size
    )


def some_rows():
    chance = np.random.default_rng(0)
    rows = []
    for length, start, end in ((10, 4, 9), (64, 63, 64), (30, 1, 30), (3, 2, 2), (20, 18, 20)):
        rows.append(Row(chance.integers(0, 320, length).astype(np.int32), start, end))
    return rows


@functools.partial(jax.jit, static_argnums=(0, 3))
def forward(config, params, tokens, loops):
    """[T, V] of one row."""
    hidden = transformer.forward(config, params, tokens[None], loops=loops).hidden[0]
    return loss.logits(config, params, hidden[0])


def plain_logits(model, tokens, loops):
    """[T, V] of one row, filled up to the length of all: what stands later changes nothing."""
    config, params = model
    row = np.pad(tokens, (0, config.model.seq_len - len(tokens)))
    return np.asarray(forward(config.model, params, row, loops))[: len(tokens)]


def test_spans_equal_a_plain_forward_pass_of_each_row(model):
    nats, hits = scorer(model)(some_rows())
    for index, row in enumerate(some_rows()):
        for column, k in enumerate(LOOPS):
            logits = plain_logits(model, row.tokens, k)
            places = np.arange(row.start, row.end)
            expected = -jax.nn.log_softmax(logits)[places - 1, row.tokens[places]]
            if len(places):
                np.testing.assert_allclose(nats[index, column], expected.mean(), atol=1e-5)
            best = np.asarray(logits.argmax(-1))[places - 1] == row.tokens[places]
            assert hits[index, column] == best.all()


def test_rows_are_filled_up_by_an_eighth_and_few_shapes_compile(model):
    chance = np.random.default_rng(1)
    lengths = [*range(2, 700, 3), *chance.integers(2, 700, 200)]
    rows = [Row(np.zeros(length, np.int32), 1, 2) for length in chance.permutation(lengths)]
    spans = scorer(model, batch_size=8)
    seen, shapes, tokens = [], set(), 0
    for length, width, size, batch in spans._batches(rows):
        seen += batch
        shapes.add((length, width, size))
        longest = max(len(rows[index].tokens) for index in batch)
        assert longest <= length <= max(longest * 9 / 8, longest + 16)
        assert 1 <= len(batch) <= size and size * (length - 1) <= max(8 * 64, length - 1)
        tokens += len(batch) * length
    assert sorted(seen) == list(range(len(rows)))
    assert len(shapes) <= 28  # 8 an octave above 128
    assert tokens <= 1.2 * sum(lengths)


def test_a_row_whose_targets_are_all_likeliest_is_a_hit(model):
    tokens = [5, 9]
    for _ in range(4):
        tokens.append(int(plain_logits(model, tokens, 2)[-1].argmax()))
    right, wrong = np.array(tokens, np.int32), np.array([*tokens[:-1], 0], np.int32)
    _, hits = scorer(model, loops=(2,))([Row(right, 2, 6), Row(wrong, 2, 6), Row(wrong, 2, 5)])
    assert hits[:, 0].tolist() == [True, False, True]


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 1), (1, 64), (8, 4)])
def test_scores_do_not_depend_on_batch_or_devices(model, devices, batch_size):
    plain = scorer(model)(some_rows())
    other = scorer(model, devices, batch_size)(some_rows())
    np.testing.assert_allclose(plain[0], other[0], atol=1e-5)
    np.testing.assert_array_equal(plain[1], other[1])


def test_loop_counts_scored_together_equal_each_alone(model):
    together = scorer(model)(some_rows())[0]
    for column, k in enumerate(LOOPS):
        alone = scorer(model, loops=(k,))(some_rows())[0][:, 0]
        np.testing.assert_allclose(together[:, column], alone, atol=1e-5)


def core_decisions(model, devices, batch_size):
    bundle = core.load_bundle(BUNDLE)

    def encode(text):  # bytes keep this test apart from any tokenizer
        return list(text.encode())

    results = core.evaluate_tasks(
        bundle,
        encode,
        256,
        scorer(model, devices, batch_size),
        loop_counts=LOOPS,
        max_len=64,
        max_per_task=12,
    )
    return results


@needs_bundle
def test_all_22_tasks_decide_alike_on_any_batch_size_and_devices(model, capsys):
    plain = core_decisions(model, 1, 64)
    assert len(plain) == 22 and all(r.correct.shape == (12, 3) for r in plain)
    print(core.format_table(plain, LOOPS))
    assert capsys.readouterr().out.count("\n") >= 24
    for devices, batch_size in ((1, 1), (8, 8)):
        for ours, theirs in zip(plain, core_decisions(model, devices, batch_size), strict=True):
            np.testing.assert_array_equal(ours.correct, theirs.correct, err_msg=ours.name)


@needs_bundle
def test_the_command_prints_and_draws_everything(run_dir, tmp_path, monkeypatch, capsys):
    flags = [
        "--checkpoint", str(run_dir), "--batch_size", "2",
        "--loops", "1,2,3", "--bundle", str(BUNDLE), "--max_per_task", "12", "--max_len", "64",
        "--wikitext", str(tmp_path / "text.txt"), "--eval_tokens", "2048",
        "--out", str(tmp_path / "out"),
        "--data", str(ROOT / ".." / "shared" / "data" / "fineweb_edu" / "base_data"),
    ]  # fmt: skip
    (tmp_path / "text.txt").write_text(
        "\n".join((ROOT / "README.md").read_text().splitlines()[:60])
    )
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path))
    command = [sys.executable, "-m", "looped_jax.evaluate", *flags]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    for text in (
        "bpb validation",
        "bpb train",
        "ppl WikiText-2 all lines",
        "ppl WikiText-2 text lines",
        "ppl LAMBADA per token",
        "ppl LAMBADA per word",
        "cropped",
        "CORE",
        "3 loops:",
    ):
        assert text in run.stdout
    out = tmp_path / "out"
    scores = json.loads((out / "scores.json").read_text())
    assert scores["loops"] == [1, 2, 3] and len(scores["scores"]["CORE"]) == 3
    assert "core.csv" in {path.name for path in out.iterdir()}
    assert (out / "core_loops_2.csv").read_text().splitlines()[-1].startswith("CORE")
    assert (out / "scores.png").stat().st_size > 10_000 and (out / "scores.svg").exists()
    evaluate.main([*flags, "--modes", "core"])
    assert "core: hellaswag" not in capsys.readouterr().out  # all remembered
    assert json.loads((out / "scores.json").read_text()) == scores  # and nothing is lost


def test_scores_are_merged_by_metric_and_loop_count(tmp_path):
    before = [1, 4], {"bpb": [3.0, 2.0], "CORE": [0.1, 0.2]}
    now = [2, 4], {"bpb": [2.5, 1.9], "ppl": [9.0, 8.0]}
    loops, merged = evaluator.merge(before, now)
    assert loops == [1, 2, 4] and merged == {
        "bpb": [3.0, 2.5, 1.9], "CORE": [0.1, None, 0.2], "ppl": [None, 9.0, 8.0],
    }  # fmt: skip
    axes = figures.against_loops(merged, loops, trained=4).axes
    assert [list(axis.lines[0].get_ydata()) for axis in axes if axis.get_visible()] == [
        [3.0, 2.5, 1.9], [0.1, 0.2], [9.0, 8.0],
    ]  # fmt: skip
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"step": 3, "saved": 1.5, "loops": [1], "scores": {"bpb": [2.0]}}))
    assert evaluator.read_scores(path, step=3, saved=1.5) == ([1], {"bpb": [2.0]})
    for other in ({"step": 4, "saved": 1.5}, {"step": 3, "saved": 2.5}):
        assert evaluator.read_scores(path, **other) == ((), {})
    for damaged in ("{", json.dumps({"step": 3, "loops": [1], "scores": {"bpb": [2.0, 1.0]}})):
        path.write_text(damaged)
        with pytest.raises(DataError, match="scores.json is damaged .*move it away"):
            evaluator.read_scores(path, step=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "core", "--bundle", "nowhere"], "no CORE bundle at nowhere"),
        (["--modes", "ppl", "--wikitext", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--modes", "bpb", "--data", "nowhere"], "there is no folder or file nowhere"),
        (["--step", "9"], "no checkpoint of step 9"),
    ],
)
def test_bad_input_is_named(run_dir, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint", str(run_dir), "--out", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["notes.txt", "notes.md", "v.parquet", "lines.jsonl"])
def test_any_text_judges_without_the_text_of_training(run_dir, tmp_path, capsys, name, monkeypatch):
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path / "cache"))
    text, path = (ROOT / "README.md").read_text(), tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": [text]}), path)
    else:
        path.write_text(json.dumps({"text": text}) if path.suffix == ".jsonl" else text)
    found = evaluate.main(
        ["--checkpoint", str(run_dir), "--out", str(tmp_path / "out"), "--modes", "bpb",
         "--data", str(path), "--loops", "1,2", "--batch_size", "2", "--eval_tokens", "512"]
    )  # fmt: skip
    assert found["scores"].keys() == {"bpb validation", "ppl validation"}
    bits, ppl = (found["scores"][f"{metric} validation"] for metric in ("bpb", "ppl"))
    assert 0 < bits.max() < 20
    nats = np.log(ppl)  # of a token, as many bytes long at every loop count
    np.testing.assert_allclose(nats[0] / bits[0], nats[1] / bits[1], rtol=1e-6)
    assert 1 < nats[0] / (bits[0] * np.log(2)) < 8
    assert f"bpb: train left out; beside {path} nothing to train on is here" in (
        capsys.readouterr().out
    )


def test_bad_flags_are_refused(run_dir, capsys):
    for arguments in (["--modes", "bpb,cor"], ["--loops", "0,1"], ["--loops", "a"]):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(["--checkpoint", str(run_dir), *arguments])
        assert stopped.value.code == 2
    assert "choose from bpb, sample, core, ppl" in capsys.readouterr().err


class Words:
    """A tokenizer of whole words, to count by hand with."""

    bos_id = 0

    def encode(self, text):
        return [len(word) for word in text.split()]

    def encode_documents(self, texts):
        return [np.array([0, *self.encode(text)], np.int32) for text in texts]


def test_perplexities_count_the_right_tokens(tmp_path):
    seen = []

    def score(rows):
        seen.extend(rows)
        return np.array([[np.log(2.0) / (row.end - row.start)] for row in rows]), None

    lines = ["a bb ccc", "dddd", "a a a"]  # 10 tokens with their starts: two rows of 4 targets
    found = perplexity.text_perplexity(score, Words(), lines, seq_len=4)
    assert [row.tokens.tolist() for row in seen] == [[0, 1, 2, 3, 0], [0, 4, 0, 1, 1]]
    np.testing.assert_allclose(found, np.exp(np.log(2) / 4))
    seen.clear()
    perplexity.text_perplexity(score, Words(), ["a bb", "", "", "ccc"], seq_len=2)
    assert [row.tokens.tolist() for row in seen] == [[0, 1, 2], [2, 0, 0], [0, 0, 3]]


def test_last_words_are_judged_per_token_and_per_word(tmp_path):
    path = tmp_path / "lambada.jsonl"
    path.write_text(
        '{"context": "a bb ccc", "continuation": "dddd eeeee"}\n'
        '{"context": "a", "continuation": "bb"}\n'
    )
    two, one = rows = perplexity.last_words(Words(), path, max_len=5)
    assert two.tokens.tolist() == [1, 2, 3, 4, 5] and (two.start, two.end, two.cropped) == (3, 5, 1)
    assert one.tokens.tolist() == [0, 1, 2] and (one.start, one.end, one.cropped) == (2, 3, 0)

    def score(rows):
        nats = {5: np.log(2.0), 3: np.log(8.0)}  # means over two tokens, and over one
        return np.array([[nats[len(row.tokens)]] for row in rows]), None

    of_tokens, of_words = perplexity.last_word_perplexities(score, rows)
    np.testing.assert_allclose(of_tokens, 32 ** (1 / 3))
    np.testing.assert_allclose(of_words, 32 ** (1 / 2))
    path.write_text('{"context": "a"}\n')
    with pytest.raises(DataError, match="line 1: no context and continuation"):
        perplexity.last_words(Words(), path, max_len=4)


def test_a_limit_draws_last_words_as_core_draws_examples(tmp_path):
    path, words = tmp_path / "lambada.jsonl", ["a" * n for n in range(1, 9)]
    lines = [json.dumps({"context": "a", "continuation": word}) for word in words]
    path.write_text("\n".join(lines))
    few = perplexity.last_words(Words(), path, max_len=9, limit=3)
    assert [row.tokens[-1] - 1 for row in few] == [0, 3, 7]  # seed 1337: test_core's golden draw
    every = perplexity.last_words(Words(), path, max_len=9)
    assert [row.tokens[-1] for row in every] == list(range(1, 9))


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="needs shared/data beside the project")
def test_wikitext_is_the_same_as_text_and_as_parquet():
    parquet = perplexity.read_lines(WIKITEXT.parent / "validation-00000-of-00001.parquet")
    text = perplexity.read_lines(WIKITEXT)
    assert [line.split() for line in text] == [line.split() for line in parquet]
    assert len(text) == 3760 and [not line for line in text] == [not line for line in parquet]
    assert 0 < sum(not line for line in text) < 3760 / 2  # which the reference gives a start each


def test_all_steps_are_judged_in_one_process_with_a_table_and_a_curve(
    model, run_dir, tmp_path, capsys
):
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run_dir, run)
    _, params = model
    checkpoints = Checkpoints(run)
    checkpoints.save(12, TrainState(params, (), jnp.array(12)), RunMeta(step=12))
    checkpoints.wait()
    (tmp_path / "text.txt").write_text((ROOT / "README.md").read_text())
    flags = ["--checkpoint", str(run), "--modes", "bpb", "--data", str(tmp_path / "text.txt"),
             "--loops", "1,2", "--batch_size", "2", "--eval_tokens", "512",
             "--out", str(out)]  # fmt: skip
    found = evaluate.main([*flags, "--all_steps"])
    assert found["steps"] == [7, 12] and found["scores"]["bpb validation"].shape == (2, 2)
    assert (found["scores"]["bpb validation"][0] == found["scores"]["bpb validation"][1]).all()
    printed = capsys.readouterr().out
    assert "step 12 (2 of 2)" in printed and f"all steps: {out}/all_steps.png" in printed
    with (out / "all_steps.csv").open() as file:
        numbers = list(csv.DictReader(file))
    assert [(n["panel"], n["series"], n["x"]) for n in numbers] == [
        (f"{metric} validation", f"{k} loop{'s' * (k > 1)}", str(step))
        for metric in ("bpb", "ppl")
        for k in (1, 2)
        for step in (7, 12)
    ]
    assert (out / "all_steps.svg").is_file() and (out / "step_000007" / "scores.json").is_file()
    with pytest.raises(SystemExit):
        evaluate.main([*flags, "--all_steps", "--step", "7"])
    assert "--step=7 is one checkpoint" in capsys.readouterr().err


def test_numbers_line_up():
    lines = evaluator.table({"bpb": [1.5, -0.0125], "ppl": [8.4e8, 1234.5]}, (1, 2)).split("\n")
    assert [line.split() for line in lines[1:]] == [
        ["bpb", "1.5000", "-0.0125"], ["ppl", "8.4e+08", "1234.5000"],
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1


def test_what_cannot_be_had_offline_is_left_out_at_the_end_unless_asked_for(
    run_dir, tmp_path, monkeypatch
):
    """WikiText-2 comes after all else; no server answers at the port."""
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    folder = tmp_path / "bundle" / "eval_data" / "language_understanding"
    folder.mkdir(parents=True)
    (folder / "lambada_openai.jsonl").write_text('{"context": "A run", "continuation": "of"}\n')
    flags = ["--checkpoint", str(run_dir), "--out", str(tmp_path / "out"), "--loops", "1,2",
             "--bundle", str(tmp_path / "bundle")]  # fmt: skip
    lines = []
    args = cli.parse("evaluate", flags)
    found = evaluator.Evaluator(looped_jax.load(run_dir), args, lines.append).ppl()
    assert found.keys() == {"ppl LAMBADA per token", "ppl LAMBADA per word"}
    assert "WikiText-2 left out: http://127.0.0.1:9/" in lines[-1] and "--wikitext" in lines[-1]
    args = cli.parse("evaluate", [*flags, "--modes", "ppl"])
    with pytest.raises(DataError, match=r"127.0.0.1:9/datasets/Salesforce/wikitext/.* failed"):
        evaluator.Evaluator(looped_jax.load(run_dir), args, lines.append).ppl()
    assert TASKS["text"].modes[-1] == "ppl"


def test_scores_of_prompts_that_were_cropped_otherwise_are_not_mixed(run_dir, tmp_path):
    def write(scores, *more):
        flags = ["--checkpoint", str(run_dir), "--out", str(tmp_path), *more]
        judge = evaluator.Evaluator(looped_jax.load(run_dir), cli.parse("evaluate", flags), print)
        judge.write(scores)
        report = json.loads((tmp_path / "scores.json").read_text())
        return report["loops"], report["scores"], report["prompts"]["max_len"]

    write({"CORE": [0.1], "bpb train": [2.0]}, "--loops", "1")
    same = [1, 2], {"CORE": [0.1, 0.2], "bpb train": [2.0, None]}, 640
    assert write({"CORE": [0.2]}, "--loops", "2") == same
    more = [1, 2], {**same[1], "ppl WikiText-2 all lines": [3.0, None]}, 640
    assert write({"ppl WikiText-2 all lines": [3.0]}, "--loops", "1", "--max_len", "64") == more
    loops, scores, max_len = write({"CORE": [0.3]}, "--loops", "2", "--max_len", "64")
    assert max_len == 64 and scores["CORE"] == [None, 0.3]
    assert scores["bpb train"] == [2.0, None]


def test_scores_that_are_no_numbers_are_null_and_read_again(run_dir, tmp_path):
    args = cli.parse("evaluate", ["--checkpoint", str(run_dir), "--out", str(tmp_path),
                                  "--loops", "1,2"])  # fmt: skip
    judge = evaluator.Evaluator(looped_jax.load(run_dir), args, print)
    judge.write({"bpb validation": [float("nan"), float("inf")], "ppl": [2.0, float("nan")]})

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    text = (tmp_path / "scores.json").read_text()
    scores = json.loads(text, parse_constant=no_constant)["scores"]
    assert scores == {"bpb validation": [None, None], "ppl": [2.0, None]}
    judge.write({"CORE": [0.1, 0.2]})  # and the figure of all of them is drawn
    assert json.loads((tmp_path / "scores.json").read_text())["scores"] == {
        **scores, "CORE": [0.1, 0.2],
    }  # fmt: skip
