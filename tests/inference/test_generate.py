"""Text: the engine against plain recomputation, whatever stands beside a prompt in its batch."""

import functools
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import looped_jax
from looped_jax import generate
from looped_jax.config.settings import ModelSettings, Settings
from looped_jax.data.tokenizer import train_tokenizer
from looped_jax.errors import ArgumentError, CheckpointError
from looped_jax.inference import decoding
from looped_jax.inference.decoding import Sampling
from looped_jax.model import loss, transformer
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training.checkpoint import Checkpoints
from looped_jax.training.run_meta import RunMeta
from looped_jax.training.train_state import TrainState

ROOT = Path(__file__).parents[2]
PROMPTS = [[5], [7, 11, 3, 60, 2], list(range(40, 64)), [9, 9]]


@pytest.fixture(scope="module")
def model():
    settings = ModelSettings(layers=2, loops=3, width=32, heads=2, seq_len=32, dtype="float32")
    config = resolve(Settings(model=settings), vocab_size=320).model
    params = transformer.init_params(config, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(params))
    noise = {
        n: 0.3 * jax.random.normal(k, params[n].shape) for n, k in zip(params, keys, strict=True)
    }
    return config, noise


@functools.partial(jax.jit, static_argnums=(0, 3))
def full_logits(config, params, tokens, loops):
    """[T, V] of one row, without a cache."""
    hidden = transformer.forward(config, params, tokens[None], loops=loops).hidden[0]
    return loss.logits(config, params, hidden[0])


def recomputed(model, prompt, tokens, loops=3):
    """Greedy text with one full forward pass per token, of rows filled up to one length."""
    config, params = model
    row, end = np.zeros(config.seq_len, np.int32), len(prompt)
    row[:end] = prompt
    for at in range(end, end + tokens):
        row[at] = full_logits(config, params, row, loops)[at - 1].argmax()
    return row[end : end + tokens].tolist()


def streamed(model, prompts, tokens, **settings):
    return np.stack(
        list(decoding.generate_tokens(*model, prompts, tokens=tokens, **settings)), axis=1
    ).tolist()


def test_greedy_text_of_a_padded_batch_is_that_of_full_recomputation(model):
    found = streamed(model, PROMPTS, 6)
    assert found == [recomputed(model, prompt, 6) for prompt in PROMPTS]


def test_more_loops_than_trained(model):
    assert streamed(model, PROMPTS[1:2], 4, loops=5) == [recomputed(model, PROMPTS[1], 4, loops=5)]


def test_same_seed_same_text_whatever_the_batch(model):
    sampling = Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=7)
    together = streamed(model, PROMPTS, 8, sampling=sampling)
    for prompt, text in zip(PROMPTS, together, strict=True):
        assert streamed(model, [prompt], 8, sampling=sampling) == [text]
    other = Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=8)
    assert streamed(model, PROMPTS, 8, sampling=other) != together
    twice = streamed(model, [PROMPTS[1]] * 2, 8, sampling=sampling, draws=[0, 1])
    assert twice[0] == together[1] and twice[1] != twice[0]


def test_one_compile_for_decode_and_one_per_prompt_bucket(model):
    steps = decoding.Steps.of(model[0], sharding.one_device(), 3, "exact")
    before = steps.prefill._cache_size(), steps.decode._cache_size()
    for length in (1, 9, 16, 17, 30, 32):
        streamed(model, [[3] * length] * 3, 16)
    prefills, decodes = steps.prefill._cache_size(), steps.decode._cache_size()
    assert prefills - before[0] == 2  # 16 and 32
    assert decodes - before[1] == 2  # cache lengths 32 and 64
    streamed(model, [[3] * 20] * 3, 3, sampling=Sampling(1.0, 5, 0.5, 3))  # settings are data
    assert steps.decode._cache_size() == decodes


def test_sampling_filters():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))

    def seen(temperature, top_k, top_p):
        keys = jax.random.split(jax.random.key(0), 300)
        draw = jax.vmap(decoding.sample, in_axes=(None, 0, None, None, None))
        return np.bincount(draw(logits, keys, temperature, top_k, top_p), minlength=4) / 300

    np.testing.assert_allclose(seen(1.0, 0, 1.0), [0.1, 0.4, 0.2, 0.3], atol=0.08)
    np.testing.assert_array_equal(seen(0.0, 0, 1.0), [0, 1, 0, 0])
    assert (seen(1.0, 2, 1.0) > 0).tolist() == [False, True, False, True]
    assert (seen(1.0, 0, 0.65) > 0).tolist() == [False, True, False, True]
    assert (seen(1.0, 0, 0.0) > 0).tolist() == [False, True, False, False]
    assert seen(3.0, 0, 1.0)[0] > seen(0.5, 0, 1.0)[0]


def test_bad_sampling_is_named(model):
    with pytest.raises(ValueError, match="top_p=1.5 is out of range; give 0 to 1"):
        Sampling(top_p=1.5)
    with pytest.raises(ValueError, match="at least one token"):
        streamed(model, [[]], 3)


@pytest.fixture(scope="module")
def run_dir(model, tmp_path_factory):
    """A run folder as training leaves it."""
    folder = tmp_path_factory.mktemp("run")
    config, params = model
    train_tokenizer(iter(["hello world, 日本語 🙂 " * 9]), 320, path=folder / "tokenizer.json")
    whole = Settings(model=config)
    (folder / "config.json").write_text(json.dumps(whole.to_dict()))
    checkpoints = Checkpoints(folder)
    for step, scale in ((3, 0.5), (4, 1.0)):
        weights = {name: scale * weight for name, weight in params.items()}
        checkpoints.save(step, TrainState(weights, (), jnp.array(step)), RunMeta(step=step))
    checkpoints.wait()
    return folder


def test_load_gives_logits_at_any_loop_counts(run_dir, model):
    m = looped_jax.load(run_dir)
    tokens = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    three, one, five = m.logits(tokens, loops=(3, 1, 5))
    assert three.shape == (2, 4, 320) and three.dtype == jnp.float32
    for k, found in ((3, three), (1, one), (5, five)):
        hidden = transformer.forward(*model, tokens, loops=k).hidden[0]
        np.testing.assert_allclose(found, loss.logits(model[0], model[1], hidden), atol=1e-4)
    np.testing.assert_allclose(m.logits(tokens)[0], three, atol=1e-5)
    earlier = looped_jax.load(run_dir, step=3)
    assert (m.step, earlier.step) == (4, 3)
    assert np.abs(earlier.logits(tokens)[0] - three).max() > 0.1
    with pytest.raises(ValueError, match="from 1"):
        m.logits(tokens, loops=(0,))


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_a_kernel_named_for_training_does_not_bind_other_machines(run_dir, tmp_path, kernel):
    shutil.copytree(run_dir, tmp_path / "run")
    config = json.loads((run_dir / "config.json").read_text())
    config["model"]["kernel"] = kernel
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    plain, named = (looped_jax.load(folder) for folder in (run_dir, tmp_path / "run"))
    tokens = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(plain.logits(tokens)[0], named.logits(tokens)[0])
    assert plain.generate(["he"], tokens=4) == named.generate(["he"], tokens=4)


def test_a_notebook_s_manners(run_dir):
    m = looped_jax.load(run_dir)
    assert repr(m).startswith("TrainedModel(FLT, 2 layers looped 3 times, width ")
    assert "step 4, on 1 device(s)" in repr(m)
    assert m.generate("he", tokens=4) == m.generate(["he"], tokens=4)[0]
    assert m.logits("he")[0].shape == (1, 1 + len(m.tokenizer.encode("he")), 320)
    for wrong in ({"loops": 0}, {"loops": -1}, {"tokens": 0}, {"tokens": -5}):
        with pytest.raises(ArgumentError, match="must be a whole number from 1"):
            m.generate("he", **wrong)
    with pytest.raises(ArgumentError, match="cache='first' is unknown"):
        m.generate("he", cache="first")


def test_text_ends_at_the_tokenizer_s_stop_token(run_dir):
    m = looped_jax.load(run_dir)
    ids = streamed(
        (m.config.model, m.params), [[m.tokenizer.bos_id, *m.tokenizer.encode("he")]], 8
    )[0]
    plain = m.generate(["he"], tokens=8)[0]
    assert plain == m.tokenizer.decode(ids)
    m.tokenizer.stop_ids = frozenset({ids[3]})
    cut = m.generate(["he"], tokens=8)[0]
    assert cut == m.tokenizer.decode(ids[: ids.index(ids[3])])


def test_characters_of_several_tokens_are_streamed_whole(run_dir, monkeypatch):
    m = looped_jax.load(run_dir)
    smile = [int(i) for i in "🙂é".encode()]
    byte_ids = {bytes([b]): i for i, b in enumerate(_byte_order())}
    script = iter([np.array([byte_ids[bytes([b])]]) for b in smile])
    monkeypatch.setattr(
        "looped_jax.inference.trained_model.generate_tokens", lambda *a, **k: script
    )
    pieces = [piece for (piece,) in m.stream([""], tokens=6)]
    assert pieces == ["", "", "", "🙂", "", "é"]


def _byte_order():
    """Bytes in the order of their ids: those with a printable character first."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return shown + [b for b in range(256) if b not in shown]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "is no run folder .config.json is missing"),
        (
            lambda f: (f / "config.json").write_text("{"),
            "is damaged: config.json: Expecting property name",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{"), "is damaged: .* is no tokenizer.json"),
    ],
)
def test_folders_that_are_no_runs_are_named(run_dir, tmp_path, spoil, message):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((run_dir / name).read_text())
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        looped_jax.load(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        looped_jax.load(tmp_path)


def test_a_run_without_its_tokenizer_has_logits_but_no_text(run_dir, tmp_path):
    (tmp_path / "config.json").write_text((run_dir / "config.json").read_text())
    (tmp_path / "checkpoints").symlink_to(run_dir / "checkpoints")
    model = looped_jax.load(tmp_path)
    assert model.logits(np.zeros((1, 3), np.int32))[0].shape[:2] == (1, 3)
    with pytest.raises(CheckpointError, match="has no tokenizer.json, so it has logits but no"):
        model.generate(["he"])


def test_missing_steps_and_shapes_are_named(run_dir, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9; choose one of \[3, 4\]"):
        looped_jax.load(run_dir, step=9)
    values = json.loads((run_dir / "config.json").read_text())
    values["model"]["width"] = 64
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer.json").write_text((run_dir / "tokenizer.json").read_text())
    (tmp_path / "checkpoints").symlink_to(run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match="does not fit its config.json"):
        looped_jax.load(tmp_path)


def test_the_command_from_outside_writes_as_from_within(run_dir, capsys):
    flags = ["--checkpoint", str(run_dir), "--prompt", "hello", "--tokens", "5", "--samples", "2"]
    flags += ["--loops", "2", "--top_k", "9"]
    command = [sys.executable, "-m", "looped_jax.generate", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    generate.main(flags)
    assert done.stdout == capsys.readouterr().out and done.stdout.count("hello") >= 2
    assert "tokens/s" in done.stderr


def test_a_text_for_every_line_at_the_loops_that_were_last_named(run_dir, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nloops=1\nhello\nworld\n"))
    flags = ["--checkpoint", str(run_dir), "--tokens", "4", "--temperature", "0"]
    generate.main([*flags, "--interactive"])
    said = capsys.readouterr()
    model = looped_jax.load(run_dir)
    expected = [
        prompt + model.generate(prompt, tokens=4, loops=loops)
        for prompt, loops in (("hello", None), ("hello", 1), ("world", 1))
    ]
    assert said.out == "\n".join(expected) + "\n"
    assert "1 loops" in said.err and "warning" not in said.err


def test_a_text_longer_than_the_rows_of_training_is_told(run_dir, capsys):
    generate.main(["--checkpoint", str(run_dir), "--prompt", "hello", "--tokens", "40"])
    assert "trained on rows of 32" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--prompt", "hello"], ["--samples", "2"]])
def test_lines_of_input_leave_no_room_for_other_prompts(run_dir, capsys, flags):
    with pytest.raises(SystemExit):
        generate.main(["--checkpoint", str(run_dir), "--interactive", *flags])
    assert f"leave {flags[0]} out" in capsys.readouterr().err
