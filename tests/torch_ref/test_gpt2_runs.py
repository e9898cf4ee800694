"""GPT-2's and nanoGPT's checkpoints: into run folders and back, with their own logits between."""

import dataclasses
import hashlib
import json
import shutil

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[torch]'")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.parity

from tokenizers import pre_tokenizers  # noqa: E402

import looped_jax  # noqa: E402
from looped_jax.config import sources  # noqa: E402
from looped_jax.config.settings import Settings  # noqa: E402
from looped_jax.data import alphabets  # noqa: E402
from looped_jax.errors import DataError  # noqa: E402
from looped_jax.model import transformer  # noqa: E402
from looped_jax.resolve import resolve  # noqa: E402
from tests.data.faulty_server import server  # noqa: E402, F401
from tests.golden_cases import FOLDER  # noqa: E402
from tests.programs import run_here  # noqa: E402
from tests.torch_ref.test_nanochat_runs import write_run  # noqa: E402
from torch_ref import gpt2_names, gpt2_runs, hub_model  # noqa: E402
from torch_ref.checkpoint_files import ConvertError  # noqa: E402
from torch_ref.convert import main  # noqa: E402
from torch_ref.gpt2_runs import from_gpt2, from_nanogpt, to_gpt2  # noqa: E402

GOLDEN = FOLDER / "gpt2"
TINY = gpt2_names.Description(
    1, 1, 32, 32, 260, branch_dropout=0.1, attention_dropout=0.1, embedding_dropout=0.1
)


def copy(folder, **changes):
    """The golden GPT-2 as a folder, config.json changed."""
    folder.mkdir()
    shutil.copy(GOLDEN / "model.safetensors", folder)
    config = json.loads((GOLDEN / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def rewrite(folder, change):
    """Its tensors as `change` makes them."""
    path = folder / "model.safetensors"
    tensors = {n: t.clone() for n, t in safetensors.load_file(path).items()}  # not the file itself
    safetensors.save_file(change(tensors), path)


def older(tensors):
    """As the hub's first files are: no prefix, masks beside, the head told twice."""
    plain = {n.removeprefix("transformer."): t for n, t in tensors.items()}
    for layer in range(2):
        plain[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32)
        plain[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return plain | {"lm_head.weight": plain["wte.weight"].clone()}


def shards(folder):
    """Its tensors in two files, and the index that lists them, as large models have them."""
    path = folder / "model.safetensors"
    tensors = {n: t.clone() for n, t in safetensors.load_file(path).items()}
    path.unlink()
    shard_of = {n: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, n in enumerate(tensors)}
    for name in set(shard_of.values()):
        own = {n: tensors[n] for n, of in shard_of.items() if of == name}
        safetensors.save_file(own, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return folder


def golden():
    with np.load(GOLDEN / "gpt2.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("kind", ["now", "older", "sharded"])
def test_logits_are_gpt2s_and_every_bit_goes_back(kind, tmp_path):
    there, arrays = copy(tmp_path / "there"), golden()
    if kind == "older":
        rewrite(there, older)
    given = shards(copy(tmp_path / "sharded")) if kind == "sharded" else there
    assert from_gpt2(str(given), tmp_path / "ours") == 0
    model = looped_jax.load(tmp_path / "ours")
    first, second = model.logits(arrays["tokens"], loops=(1, 2))
    np.testing.assert_allclose(first, arrays["logits"], rtol=0, atol=2e-5)
    assert np.abs(first - second).max() > 0.1  # loops it has not been trained for, but can be
    saving = tmp_path / "ours" / "checkpoints" / "9.orbax-checkpoint-tmp"
    saving.mkdir()  # as of a run that goes on
    back = to_gpt2(tmp_path / "ours", tmp_path / "back")
    assert saving.is_dir()
    found = safetensors.load_file(back / "model.safetensors")
    kept = safetensors.load_file(there / "model.safetensors")
    kept = {n: t for n, t in kept.items() if not n.endswith((".attn.bias", "masked_bias"))}
    kept.pop("lm_head.weight", None)
    assert found.keys() == kept.keys()
    for name, tensor in kept.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert (back / "config.json").read_text() == (there / "config.json").read_text()


def test_narrow_tensors_go_back_as_narrow(tmp_path):
    there = copy(tmp_path / "there")
    rewrite(there, lambda tensors: {n: t.to(torch.bfloat16) for n, t in tensors.items()})
    from_gpt2(str(there), tmp_path / "ours")
    found = safetensors.load_file(to_gpt2(tmp_path / "ours", tmp_path / "b") / "model.safetensors")
    for name, tensor in safetensors.load_file(there / "model.safetensors").items():
        assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("bias", ["bias", "nobias"])
def test_a_checkpoint_of_nanogpt_computes_here_and_in_gpt2s_layout(bias, tmp_path):
    with np.load(GOLDEN / f"nanogpt_{bias}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    theirs = json.loads(str(arrays["settings"]))
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
    weights = {
        f"_orig_mod.{n.removeprefix('param0/')}": torch.from_numpy(a)
        for n, a in arrays.items() if n.startswith("param0/")
    }  # fmt: skip
    weights["_orig_mod.lm_head.weight"] = weights["_orig_mod.transformer.wte.weight"]
    saved = {
        "model": weights, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "iter_num": 7,
        "model_args": {name: theirs[name] for name in sizes} | {"dropout": 0.2},
        "best_val_loss": torch.tensor(4.0), "config": {"device": "cpu"},
    }  # fmt: skip
    torch.save(saved, tmp_path / "ckpt.pt")
    main(["from-nanogpt", str(tmp_path / "ckpt.pt"), str(tmp_path / "ours")])
    to_gpt2(tmp_path / "ours", tmp_path / "there")
    from_gpt2(str(tmp_path / "there"), tmp_path / "again")
    tokens = arrays["tokens"][0, :, :-1].astype(np.int32)
    for run in ("ours", "again"):
        model = looped_jax.load(tmp_path / run)
        (logits,) = model.logits(tokens)
        np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=2e-5)
        assert model.config.model.parts["attention_dropout"].rate == 0.2
    assert looped_jax.load(tmp_path / "ours").step == 7


def test_nothing_of_a_file_is_unpickled(tmp_path):
    class Harm:
        def __reduce__(self):
            return (print, ("harm",))

    torch.save({"model": {}, "model_args": Harm()}, tmp_path / "ckpt.pt")
    with pytest.raises(ConvertError, match="holds more than tensors and plain values"):
        from_nanogpt(tmp_path / "ckpt.pt", tmp_path / "ours")


def tiny(folder):
    """A GPT-2 with words: 256 bytes, three merges and the end of text."""
    model = resolve(Settings(model=gpt2_names.model_settings(TINY))).model
    params = transformer.init_params(model, jax.random.key(0))
    theirs = gpt2_names.to_gpt2({n: np.asarray(a) for n, a in params.items()}, TINY.vocab_size)
    folder.mkdir()
    tensors = {n: torch.from_numpy(np.array(a)) for n, a in theirs.items()}
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = dict(model_type="gpt2", n_layer=1, n_head=1, n_embd=32, n_positions=32, vocab_size=260)
    (folder / "config.json").write_text(json.dumps(config))
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "Ġthe", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n")
    return folder


def serve(there, served):
    """The folder as the hub lists and gives it."""
    served.files = {path.name: path.read_bytes() for path in there.iterdir()}
    served.files["README.md"] = b"#"
    entries = [
        {"type": "file", "path": name, "size": len(content),
         **({"lfs": {"oid": hashlib.sha256(content).hexdigest()}} if "tensors" in name else {})}
        for name, content in served.files.items()
    ]  # fmt: skip
    served.files["main"] = json.dumps(entries).encode()
    return served.url.removesuffix("/file")


def test_a_model_of_the_hub_by_name_with_its_tokenizer(server, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path / "cache"))
    endpoint = serve(tiny(tmp_path / "there"), server)
    server.acts["model.safetensors"] = ["cut"]  # goes on where it broke
    from_gpt2("gpt2", tmp_path / "ours", endpoint=endpoint, backoff=0.01)
    model = looped_jax.load(tmp_path / "ours")
    asked = [path for path, _ in server.requests]
    assert "/openai-community/gpt2/resolve/main/vocab.json" in asked
    assert not any("README" in path for path in asked)
    assert model.tokenizer.encode("to the") == [83, 78, 258]
    assert model.tokenizer.bos_id == 259
    assert isinstance(model.generate("the", tokens=4), str)
    main(["from-gpt2", "gpt2", str(tmp_path / "twice"), "--endpoint", endpoint])
    assert len(server.requests) == len(asked)  # what is there and was checked is not asked for
    assert sum("safetensors" in path for path in asked) == 2  # cut, then its rest
    shutil.rmtree(tmp_path / "cache")
    server.files["model.safetensors"] = server.files["model.safetensors"][:-1] + b"?"
    with pytest.raises(DataError, match="SHA-256"):
        from_gpt2("gpt2", tmp_path / "x", endpoint=endpoint, retries=0)
    assert not (tmp_path / "x").exists()


def test_what_is_not_there_is_named(server, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path / "cache"))
    server.files["main"] = b'[{"type": "file", "path": "config.json", "size": 2}]'
    endpoint = server.url.removesuffix("/file")
    with pytest.raises(ConvertError, match="a/b has no model.safetensors on the hub"):
        from_gpt2("a/b", tmp_path / "x", endpoint=endpoint)
    with pytest.raises(ConvertError, match="'../../x' is no folder and no model of the hub"):
        hub_model.download("../../x", list)


def test_shards_of_the_hub_are_read_by_their_index(server, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("LOOPED_JAX_CACHE", str(tmp_path / "cache"))
    there = shards(tiny(tmp_path / "there"))
    from_gpt2("a/b", tmp_path / "ours", endpoint=serve(there, server))
    assert looped_jax.load(tmp_path / "ours").config.model.layers == 1
    (there / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConvertError, match="00002-of-00002.safetensors is missing; save the model"):
        from_gpt2(str(there), tmp_path / "x")
    shutil.copy(
        there / "model-00001-of-00002.safetensors", there / "model-00002-of-00002.safetensors"
    )
    with pytest.raises(
        ConvertError, match="00002-of-00002.safetensors holds .*, against model.saf"
    ):
        from_gpt2(str(there), tmp_path / "x")
    (there / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    with pytest.raises(ConvertError, match="'../b' is no shard's name"):
        from_gpt2(str(there), tmp_path / "x")


def test_fine_tuning_begins_with_it_and_one_loop_of_two_stays_gpt2(home, tmp_path):
    from_gpt2(str(tiny(tmp_path / "there")), tmp_path / "ours")
    ours = looped_jax.load(tmp_path / "ours")
    preset = f"nanogpt:finetune@{tmp_path / 'ours'}"
    given = Settings.from_dict(sources.read(preset))
    assert given.optim.groups["matrix"].learning_rate == 3e-5
    assert given.data.tokenizer == str(tmp_path / "ours" / "tokenizer.json")
    rates = (f"optim.groups.{group}.learning_rate" for group in ("matrix", "table", "vector"))
    code, out, err = run_here(
        home, tmp_path / "tuned", *(f"--config.{rate}=0.0" for rate in rates),
        steps=1, config=preset,
    )  # fmt: skip
    assert code == 0, err
    assert f"starting with the weights of {tmp_path / 'ours'}" in out
    tuned, tokens = looped_jax.load(tmp_path / "tuned"), np.arange(30)
    assert tuned.config.model.loops == 2 and tuned.config.train.batch_size == 8
    dropped = {"dropout", "attention_dropout"}  # in the import as its config.json says, there 0
    assert {*ours.config.model.parts.on()} - {*tuned.config.model.parts.on()} == dropped
    first, second = tuned.logits(tokens, loops=(1, 2))
    np.testing.assert_array_equal(first, ours.logits(tokens)[0])
    assert np.abs(first - second).max() > 1e-3
    with pytest.raises(ConvertError, match="model.loops=2, and GPT-2 has no loops"):
        to_gpt2(tmp_path / "tuned", tmp_path / "back")


def test_a_model_trained_here_goes_there(tmp_path):
    write_run(tmp_path / "run", gpt2_names.model_settings(TINY))
    (words := tmp_path / "run" / "tokenizer.json").write_text(
        alphabets.of_characters("abc").to_str()
    )
    found = json.loads((to_gpt2(tmp_path / "run", tmp_path / "words") / "config.json").read_text())
    assert "bos_token_id" not in found  # of characters no document begins with a token
    words.unlink()
    back = to_gpt2(tmp_path / "run", tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["attn_pdrop"] == 0.1
    from_gpt2(str(back), tmp_path / "again")
    first, again = (looped_jax.load(tmp_path / run) for run in ("run", "again"))
    assert first.config.model.parts == again.config.model.parts
    for name, array in first.params.items():
        if name == "embed":  # what fills the vocabulary up stays behind
            array, found = array[:260], again.params[name][:260]
        else:
            found = again.params[name]
        np.testing.assert_array_equal(array, found, err_msg=name)


def test_biases_of_the_mlp_alone_go_there_with_zeros_for_attention(tmp_path):
    settings = gpt2_names.model_settings(TINY)
    biases = dataclasses.replace(settings.parts["biases"], attention=False)
    parts = type(settings.parts)({**settings.parts.changed(), "biases": biases})
    write_run(tmp_path / "run", dataclasses.replace(settings, parts=parts))
    from_gpt2(str(to_gpt2(tmp_path / "run", tmp_path / "back")), tmp_path / "again")
    first, again = (looped_jax.load(tmp_path / run).params for run in ("run", "again"))
    added = again.keys() - first.keys()
    assert {name.rpartition(".")[2] for name in added} == {"query", "key", "value", "out"}
    assert not any(np.asarray(again[name]).any() for name in added)
    for name in first.keys() - {"embed"}:
        np.testing.assert_array_equal(first[name], again[name], err_msg=name)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "llama"}, "model_type='llama' is no gpt2"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True has no"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False has no counterpart"),
        ({"add_cross_attention": True}, "add_cross_attention=True has no counterpart"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False has no counterpart"),
        ({"activation_function": "relu"}, "activation_function='relu' has no counterpart"),
        ({"n_inner": 100}, "n_inner=100 is not 4 · n_embd"),
        ({"n_layer": "2"}, "n_layer='2' is no count"),
        ({"n_layer": 3}, "config.json: h.2.attn.c_proj.weight is missing"),
        ({"n_positions": 16}, r"wpe.weight has shape \(32, 48\), not \(16, 48\)"),
    ],
)
def test_what_is_no_such_gpt2_is_refused(changes, told, tmp_path):
    with pytest.raises(ConvertError, match=told):
        from_gpt2(str(copy(tmp_path / "there", **changes)), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_checkpoint_that_is_not_here_is_not_called_damaged(tmp_path):
    with pytest.raises(ConvertError, match=r"ckpt.pt cannot be read \(No such file.*; give a ckpt"):
        gpt2_runs.from_nanogpt(tmp_path / "ckpt.pt", tmp_path / "run")
    (tmp_path / "ckpt.pt").write_bytes(b"PK")
    with pytest.raises(ConvertError, match="ckpt.pt is damaged or holds more than tensors"):
        gpt2_runs.from_nanogpt(tmp_path / "ckpt.pt", tmp_path / "run")


def test_an_untied_head_and_a_damaged_file_are_refused(tmp_path):
    there = copy(tmp_path / "there")
    rewrite(there, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1})
    with pytest.raises(ConvertError, match="lm_head.weight is not wte.weight"):
        from_gpt2(str(there), tmp_path / "ours")
    (there / "model.safetensors").write_bytes(b"\xff" * 99)
    with pytest.raises(ConvertError, match="model.safetensors is damaged"):
        from_gpt2(str(there), tmp_path / "ours")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"soft_cap": 15.0}, "model.soft_cap=15.0, where GPT-2 has 0.0"),
        ({"variant": "linear"}, "model.variant='linear', which has weights"),
        ({"embedding": "separate"}, "model.embedding='separate', where GPT-2 has 'tied'"),
    ],
)
def test_what_is_no_model_of_gpt2s_does_not_go_there(changes, told, tmp_path):
    settings = dataclasses.replace(gpt2_names.model_settings(TINY), **changes)
    write_run(tmp_path / "run", settings)
    with pytest.raises(ConvertError, match=told):
        to_gpt2(tmp_path / "run", tmp_path / "back")
