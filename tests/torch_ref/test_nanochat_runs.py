"""nanochat's checkpoints: into run folders and back, bit for bit, with its own logits between."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[torch]'")
pytestmark = pytest.mark.parity

import looped_jax  # noqa: E402
from looped_jax.config.settings import Settings  # noqa: E402
from looped_jax.resolve import resolve  # noqa: E402
from looped_jax.training.run_folder import write_config  # noqa: E402
from tests.model.test_nanochat import load  # noqa: E402
from tests.torch_ref.test_convert import SHARED, encoding, trained_ranks  # noqa: E402
from torch_ref import nanochat_names  # noqa: E402
from torch_ref.convert import ConvertError, from_nanochat, main, to_nanochat  # noqa: E402


def write(base, name="gpt_seed_a", *, tokenizer=True, tables="float32", **changes):
    """A base directory of nanochat's with one checkpoint; its folder and what is in it."""
    arrays, params, _ = load(name)
    config = json.loads(str(arrays["config"])) | changes
    weights = {n: torch.from_numpy(np.array(w)) for n, w in params.items()}
    for n in weights:
        if "wte" in n or "value_embeds" in n:
            weights[n] = weights[n].to(getattr(torch, tables))
    folder = base / "base_checkpoints" / f"d{config['n_layer']}"
    folder.mkdir(parents=True)
    torch.save({f"_orig_mod.{n}": w for n, w in weights.items()}, folder / "model_000007.pt")
    torch.save({"state": [torch.zeros(3)]}, folder / "optim_000007_rank0.pt")
    meta = {"step": 7, "val_bpb": 1.5, "model_config": config, "user_config": {"run": "dummy"}}
    (folder / "meta_000007.json").write_text(json.dumps(meta))
    if tokenizer:
        (base / "tokenizer").mkdir()
        pickle = encoding(dict(list(trained_ranks(b"ab" * 99, 9).items())))
        (base / "tokenizer" / "tokenizer.pkl").write_bytes(pickle)
    return folder, weights, arrays, meta


@pytest.mark.parametrize("name", ["gpt_seed_a", "gpt_seed_b", "gpt_head_a"])
def test_converted_logits_are_nanochats(name, tmp_path):
    folder, _, arrays, _ = write(tmp_path / "base", name, tokenizer=False)
    assert from_nanochat(folder, tmp_path / "ours") == 7
    model = looped_jax.load(tmp_path / "ours")
    np.testing.assert_allclose(
        model.logits(arrays["idx"], loops=[1])[0], arrays["logits"], rtol=0, atol=2e-5
    )
    assert model.config.model.loops == 1 and model.config.model.dtype == "float32"


@pytest.mark.parametrize("name", ["gpt_seed_a", "gpt_head_a"])
@pytest.mark.parametrize("tables", ["float32", "bfloat16"])
def test_there_and_back_every_bit_type_and_fact_is_kept(name, tables, tmp_path):
    folder, weights, _, meta = write(tmp_path / "base", name, tokenizer=False, tables=tables)
    from_nanochat(folder, tmp_path / "ours")
    back = to_nanochat(tmp_path / "ours", tmp_path / "back")
    assert back.relative_to(tmp_path / "back") == folder.relative_to(tmp_path / "base")
    found = torch.load(back / "model_000007.pt", weights_only=True)
    assert found.keys() == weights.keys()
    for key, tensor in weights.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    assert json.loads((back / "meta_000007.json").read_text()) == meta


def test_the_tokenizer_of_the_base_directory_comes_along_and_goes_back(tmp_path):
    path = SHARED / "tokenizers" / "nanochat-32k"
    if not path.is_dir():
        pytest.skip(f"needs {path}")
    folder, *_ = write(tmp_path / "base", tokenizer=False)
    (tmp_path / "base" / "tokenizer").symlink_to(path)
    with pytest.raises(ConvertError, match="the tokenizer has 32768 entries, the model 61"):
        from_nanochat(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    from looped_jax.data.tokenizer import read_tokenizer
    from torch_ref.tiktoken_reader import to_tokenizer_json

    config = nanochat_names.model_settings(
        dict(n_layer=2, n_embd=32, n_head=2, n_kv_head=2, sequence_len=16, vocab_size=32768,
             window_pattern="SSSL"), "seed", dtype="float32",
    )  # fmt: skip
    run = tmp_path / "run"
    write_run(run, config)
    (run / "tokenizer.json").write_text(to_tokenizer_json(path / "tokenizer.pkl"))
    to_nanochat(run, tmp_path / "again")
    there = tmp_path / "again" / "tokenizer"
    assert (there / "tokenizer.pkl").read_bytes() == (path / "tokenizer.pkl").read_bytes()
    lengths = torch.load(there / "token_bytes.pt", weights_only=True)
    own = read_tokenizer(run / "tokenizer.json", bos_token=None).token_bytes
    assert lengths.dtype == torch.int32 and (lengths.numpy() == own).all()
    main(["from-nanochat", str(tmp_path / "again" / "base_checkpoints" / "d2"),
          str(tmp_path / "third")])  # fmt: skip
    assert looped_jax.load(tmp_path / "third").tokenizer.encode("some text") == (
        read_tokenizer(run / "tokenizer.json", bos_token=None).encode("some text")
    )


def write_run(folder, model):
    """A run folder of fresh weights, as a run of ours leaves it."""
    import jax

    from looped_jax.model import transformer
    from looped_jax.training.checkpoint import Checkpoints
    from looped_jax.training.run_meta import RunMeta
    from looped_jax.training.train_state import TrainState

    config = resolve(Settings(model=model))
    folder.mkdir()
    write_config(folder, config)
    params = transformer.init_params(config.model, jax.random.key(0))
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, TrainState(params, (), np.int32(3)), RunMeta(step=3, score=1.25))


def test_a_model_trained_here_goes_there(tmp_path):
    arrays, params, _ = load("gpt_head_a")
    config = json.loads(str(arrays["config"]))
    write_run(tmp_path / "run", nanochat_names.model_settings(config, "head"))
    back = to_nanochat(tmp_path / "run", tmp_path / "base")
    found = torch.load(back / "model_000003.pt", weights_only=True)
    assert {n: tuple(w.shape) for n, w in found.items()} == {n: w.shape for n, w in params.items()}
    meta = json.loads((back / "meta_000003.json").read_text())
    assert meta == {"step": 3, "val_bpb": 1.25, "model_config": config}


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(loops=2), "model.loops=2, and nanochat has no loops"),
        (dict(soft_cap=30.0), "model.soft_cap=30.0, where nanochat's model has 15"),
        (dict(variant="FLT"), "model.variant='FLT', where nanochat's model has 'LT'"),
    ],
)
def test_what_is_no_model_of_nanochats_does_not_go_there(changes, told, tmp_path):
    config = json.loads(str(load("gpt_seed_a")[0]["config"]))
    run = tmp_path / "run"
    write_run(run, nanochat_names.model_settings(config, "seed", **changes))
    with pytest.raises(ConvertError, match=told):
        to_nanochat(run, tmp_path / "base")
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    "change, told",
    [
        (dict(n_embd=40), "does not fit its meta"),
        (dict(n_head=0), "n_head=0 is no count"),
        (dict(l3_after_layers=[1]), "lookup layers have no counterpart"),
        (dict(gate="new"), "unknown fields .'gate'."),
    ],
)
def test_what_cannot_be_is_told_by_name(change, told, tmp_path):
    folder, *_ = write(tmp_path / "base", tokenizer=False, **change)
    with pytest.raises(ConvertError, match=told):
        from_nanochat(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
