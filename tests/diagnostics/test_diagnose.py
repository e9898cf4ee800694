"""Diagnosis: the numbers against float64 numpy, and a page that stands alone."""

import csv
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import colormaps, image
from matplotlib.figure import Figure

from looped_jax import diagnose
from looped_jax.config.settings import ModelSettings, Settings
from looped_jax.data.tokenizer import train_tokenizer
from looped_jax.diagnostics import figures, measure, picture_folders, sections, weight_statistics
from looped_jax.model import transformer
from looped_jax.plotting import html_report
from looped_jax.resolve import resolve
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.run_meta import RunMeta
from looped_jax.training.train_state import TrainState

ROOT = Path(__file__).parents[2]
LOOPS = 3


@pytest.fixture(scope="module")
def model():
    """Weights loud enough that every loop changes predictions."""
    settings = ModelSettings(layers=1, loops=2, width=32, heads=2, seq_len=16, dtype="float32")
    config = resolve(Settings(model=settings), vocab_size=300)
    params = transformer.init_params(config.model, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(params))
    loud = {
        name: weight + 0.4 * jax.random.normal(key, weight.shape)
        for key, (name, weight) in zip(keys, sorted(params.items()), strict=True)
    }
    return config, loud


@pytest.fixture(scope="module")
def run_dir(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("<run>")
    config, params = model
    train_tokenizer(iter([(ROOT / "README.md").read_text()]), 300, path=folder / "tokenizer.json")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    checkpoints = Checkpoints(folder)
    checkpoints.save(7, TrainState(params, (), jnp.array(7)), RunMeta(step=7))
    checkpoints.wait()
    return folder


def random_batch(rows=3, time=16):
    tokens = np.random.default_rng(0).integers(0, 300, (rows, time + 1)).astype(np.int32)
    targets = tokens[:, 1:].copy()
    targets[-1, 5:] = -1  # a row that ends early
    return {"inputs": tokens[:, :-1], "targets": targets}


def test_measurements_equal_those_from_whole_logits_in_float64(model, monkeypatch):
    config, params = model
    monkeypatch.setattr(measure, "LOGITS_AT_ONCE", 20 * config.model.padded_vocab)  # 3 chunks
    batch = random_batch()
    found = measure.measure(config.model, params, [batch], loops=LOOPS)

    hidden = [
        np.asarray(
            transformer.forward(config.model, params, batch["inputs"], loops=k).hidden[0],
            np.float64,
        )
        for k in range(1, LOOPS + 1)
    ]
    cap, vocabulary = 15, config.model.vocab_size
    head = np.asarray(params["head"], np.float64)
    logs = []
    for state in hidden:
        logits = (cap * np.tanh(state @ head / cap))[..., :vocabulary]
        logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    targets = np.maximum(batch["targets"], 0)[..., None]
    for k, log in enumerate(logs):
        p = np.exp(log)
        np.testing.assert_allclose(
            found.nats[k], -np.take_along_axis(log, targets, -1)[..., 0], atol=1e-4
        )
        np.testing.assert_allclose(found.entropy[k], -(p * log).sum(-1), atol=1e-4)
        np.testing.assert_allclose(found.confidence[k], p.max(-1), atol=1e-4)
        np.testing.assert_array_equal(found.prediction[k], log.argmax(-1))
        if k:
            expected = (p * (log - logs[k - 1])).sum(-1)
            np.testing.assert_allclose(found.kl[k - 1], expected, atol=1e-4)
            assert expected[:, 0] == pytest.approx(0, abs=1e-9)  # FLT: one key, no choice
            assert expected[:, 1:].max() > 0.01
            now, before = hidden[k], hidden[k - 1]
            lengths = np.linalg.norm(now, axis=-1) * np.linalg.norm(before, axis=-1)
            np.testing.assert_allclose(
                found.cosine[k - 1], (now * before).sum(-1) / lengths, atol=1e-5
            )
            change = np.linalg.norm(now - before, axis=-1) / np.linalg.norm(before, axis=-1)
            np.testing.assert_allclose(found.change[k - 1], change, atol=1e-5)


def test_settling_agreement_and_means_of_known_predictions():
    prediction = np.array([[[1, 2, 3, 9]], [[1, 5, 3, 8]], [[1, 5, 4, 7]]])  # [3, 1, 4]
    targets = np.array([[1, 5, 0, -1]])
    nothing = np.zeros((2, 1, 4))
    values = np.arange(12.0).reshape(3, 1, 4)
    tokens = measure.TokenMeasurements(
        targets, targets, values, values, values, prediction, nothing, nothing, nothing
    )
    assert tokens.settled().tolist() == [[1, 2, 3, 3]]
    assert tokens.agreement().tolist() == [
        [[True, False, True, False]],
        [[True, True, False, False]],
    ]
    assert tokens.mean(tokens.correct()).tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert tokens.mean(tokens.nats).tolist() == [1, 5, 9]  # the last position is not counted


def test_spectrum_of_a_known_matrix():
    left, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 3)))
    right, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 3)))
    even = weight_statistics.compute({"even": left @ np.diag([2.0, 2.0, 2.0]) @ right.T})["even"]
    assert even.spectral_norm == pytest.approx(2)
    assert even.effective_rank == pytest.approx(3, rel=1e-5)
    assert even.rms == pytest.approx(np.sqrt(12 / 200))
    assert even.counts.sum() == 200
    steep = weight_statistics.compute({"steep": left @ np.diag([2.0, 0.1, 0.1]) @ right.T})["steep"]
    assert 1 < steep.effective_rank < 2


def test_pictures_of_attention_are_those_of_their_loop_layer_and_head(tmp_path):
    """What changes between two of them is drawn anew, also the title."""
    weights = np.zeros((2, 1, 2, 3, 3))
    weights[0, 0, 1] = np.tril(np.ones((3, 3)) / [[1], [2], [3]])
    told = picture_folders.write_attention(tmp_path, weights, ["$a", " b", "$"], most=9)
    assert told == f"{tmp_path}/attention_heatmaps: 4 of 4 pictures"
    found = {path.name: image.imread(path) for path in (tmp_path / "attention_heatmaps").iterdir()}
    drawn = found["attn_loop1_layer1_head2.png"]
    empty = [found[f"attn_loop{k}_layer1_head{h}.png"] for k, h in ((1, 1), (2, 1), (2, 2))]
    middle = tuple(size // 2 for size in drawn.shape[:2])
    purple = np.array(colormaps["viridis"](0.0)[:3])
    assert all(np.abs(one[middle][:3] - purple).max() < 0.01 for one in empty)
    assert np.abs(drawn[middle][:3] - colormaps["viridis"](0.5)[:3]).max() < 0.01  # of two keys
    assert (empty[0] != empty[1]).any()  # by the title
    assert len({one.shape for one in found.values()}) == 1


def test_few_pictures_are_of_loops_and_weights_from_the_first_to_the_last(tmp_path):
    weights = np.zeros((5, 1, 2, 2, 2))
    folder = tmp_path / "attention_heatmaps"
    told = picture_folders.write_attention(tmp_path, weights, ["a", "b"], most=7)
    assert told == f"{folder}: 6 of 10 pictures, all with --pictures=10; loops 1, 3, 5"
    assert {path.name.split("_")[1] for path in folder.iterdir()} == {"loop1", "loop3", "loop5"}
    picture_folders.write_attention(tmp_path, weights, ["a", "b"], most=1)
    assert [path.name for path in folder.iterdir()] == ["attn_loop5_layer1_head2.png"]
    told = picture_folders.write_attention(tmp_path, weights, ["a", "b"], most=0)
    assert told.endswith("0 of 10 pictures, all with --pictures=10") and not [*folder.iterdir()]
    matrices = weight_statistics.compute({name: np.eye(2) for name in "abc"} | {"v": np.ones(2)})
    told = picture_folders.write_weights(tmp_path, matrices, most=2)
    assert told.endswith("weight_distributions: 2 of 3 pictures, all with --pictures=3")
    drawn = figures.weight_histogram("a", matrices["a"])
    assert "largest singular value 1" in drawn.axes[0].get_title()
    assert len(matrices["a"].counts) == 50


def test_a_page_escapes_what_it_is_given_and_carries_its_pictures(tmp_path):
    figure = Figure()
    figure.subplots().plot([1, 2])
    section = html_report.Section("a < b", "<script>alert(1)</script>", figure, "line")
    text = html_report.write(tmp_path, "<title>", "x & y", ["<b>"], [section]).read_text()
    assert "<script" not in text and "<b>" not in text and "a &lt; b" in text
    assert (tmp_path / "line.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("data:image/png;base64,") == 1


@pytest.fixture(scope="module")
def arguments(home, run_dir):
    return ["--checkpoint", str(run_dir), "--data", str(home / "text"),
            "--tokens", "64", "--loops", str(LOOPS), "--batch_size", "2"]  # fmt: skip


def test_any_text_is_diagnosed_at_fewer_loops_than_trained(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "notes.txt").write_text((ROOT / "README.md").read_text())
    given = [*arguments, "--out", str(tmp_path / "page"), "--data", str(tmp_path / "notes.txt"),
             "--pictures", "0"]  # fmt: skip
    diagnose.main([*given, "--loops", "1"])
    text = (tmp_path / "page" / "index.html").read_text()
    assert "measured on 64 validation tokens" in text and "looped_jax" in text  # its first words


def test_the_program_writes_one_page_that_needs_nothing_else(arguments, model, tmp_path, capsys):
    out = tmp_path / "page"
    diagnose.main([*arguments, "--out", str(out), "--text", "<i>if looped:</i>"])
    text = (out / "index.html").read_text()
    assert f"open {out / 'index.html'}" in capsys.readouterr().out
    assert not re.search(r"(src|href)='(?!data:)|https?:", text) and "<i>" not in text
    assert "&lt;i&gt;if looped" in text
    numbers = json.loads((out / "measurements.json").read_text())
    assert numbers["loops"] == LOOPS and len(numbers["loss"]) == LOOPS
    assert len(numbers["kl"]) == LOOPS - 1 and min(numbers["kl"]) > 0
    assert np.shape(numbers["residual_norm"]) == (LOOPS, 1)
    assert set(numbers["weights"]) == set(
        transformer.init_params(model[0].model, jax.random.key(0))
    )
    pictures = {path.stem for path in out.glob("*.png")}
    assert {"loss", "movement", "settling", "attention", "spectra"} <= pictures
    assert "How it was trained" not in text and "training_curves" not in pictures  # it has no log
    attention = {path.name for path in (out / "attention_heatmaps").iterdir()}
    assert attention == {  # a place for each of three loops, one layer, two heads
        f"attn_loop{k}_layer1_head{h}.png" for k in (1, 2, 3) for h in (1, 2)
    }
    matrices = {name for name, w in model[1].items() if w.ndim > 1}
    drawn = {path.name for path in (out / "weight_distributions").iterdir()}
    assert drawn == {f"weights_{name}.png" for name in matrices}


def test_the_runs_log_is_drawn_where_there_is_one_and_refused_where_it_is_damaged(
    arguments, run_dir, tmp_path, capsys
):
    log = run_dir / "metrics.jsonl"
    entries = [
        {"step": step, "train/loss": 5.0 - step, "train/loss_smooth": 5.0, "train/grad_norm": 1.0,
         "loop/residual_norm": [3.0, 4.0]}
        for step in (1, 2)
    ]  # fmt: skip
    entries[1] |= {"val/bpb_loops_2": 3.0, "val/ppl_loops_2": 40.0}
    entries[1] |= {f"diagnostics/{name}": [[1.0], [2.0]] for name in sections.INSIDE}
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    try:
        diagnose.main([*arguments, "--out", str(tmp_path), "--pictures", "0"])
        text = (tmp_path / "index.html").read_text()
        assert "How it was trained" in text and "Inside training step 2" in text
        assert {"training_curves", "inside"} <= {path.stem for path in tmp_path.glob("*.png")}
        with (tmp_path / "training_curves.csv").open() as file:
            drawn = {row["panel"]: row["y"] for row in csv.DictReader(file)}
        assert drawn["validation, perplexity per token"] == "40"
        log.write_text("{\n")
        capsys.readouterr()
        with pytest.raises(SystemExit):
            diagnose.main([*arguments, "--out", str(tmp_path)])
        error = capsys.readouterr().err
        assert error.startswith("error: ") and str(log) in error and error.count("\n") == 1
    finally:
        log.unlink()


def test_a_missing_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        diagnose.main(["--checkpoint", str(tmp_path / "nowhere")])
    assert "nowhere" in capsys.readouterr().err
