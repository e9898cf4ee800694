"""Checkpoints and tokenizers of the reference: into ours and back, bit for bit, and safely."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402
import tokenizers  # noqa: E402

import looped_jax  # noqa: E402
from looped_jax.config.settings import MeshConfig, ModelSettings, Settings  # noqa: E402
from looped_jax.data.tokenizer import Tokenizer, train_tokenizer  # noqa: E402
from looped_jax.errors import CheckpointError  # noqa: E402
from looped_jax.evaluation import bits_per_byte as ours_bpb  # noqa: E402
from looped_jax.evaluation import scoring  # noqa: E402
from looped_jax.resolve import resolve  # noqa: E402
from looped_jax.runtime import sharding  # noqa: E402
from looped_jax.training.run_folder import write_config  # noqa: E402
from tests.programs import finish, start  # noqa: E402
from torch_ref import tiktoken_reader  # noqa: E402
from torch_ref.checkpoint_files import narrowed  # noqa: E402
from torch_ref.convert import ConvertError, from_reference, main, to_reference  # noqa: E402
from torch_ref.loss import bits_per_byte, nats_and_bytes, token_losses  # noqa: E402
from torch_ref.model import LoopedTransformer  # noqa: E402
from torch_ref.model import ModelConfig as TorchModelConfig  # noqa: E402
from torch_ref.tiktoken_reader import UnsafeTokenizer, to_tokenizer_json  # noqa: E402

pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = [p.stem for p in sorted(GOLDEN.glob("*.npz")) if not p.stem.startswith("train_")]
ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def golden(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    weights = {k.removeprefix("param/"): torch.from_numpy(v) for k, v in arrays.items()
               if k.startswith("param/")}  # fmt: skip
    return json.loads(str(arrays["config"])), weights, arrays


def write(folder, name=None, *, step=7, prefix="", embed="float32", shards=1, **changes):
    """A reference run folder of a golden case."""
    config, weights, arrays = golden(name or CASES[0])
    weights = {**weights, **changes}
    weights = {prefix + k: v for k, v in weights.items() if v is not None}
    key = f"{prefix}transformer.wte.weight"
    if key in weights:
        weights[key] = weights[key].to(getattr(torch, embed))
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        part = dict(list(weights.items())[shard::shards])
        ending = f"-{shard:05d}-of-{shards:05d}" if shards > 1 else ""
        torch.save(part, folder / f"model_{step:06d}{ending}.pt")
    meta = {"step": step, "val_bpb": 1.25, "model_config": config, "user_config": {"note": "ü"}}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    return config, weights, arrays


@pytest.mark.parametrize("name", CASES)
def test_converted_logits_are_the_golden_ones(name, tmp_path):
    _, _, arrays = write(tmp_path / "theirs", name)
    assert from_reference(tmp_path / "theirs", tmp_path / "ours") == 7
    model = looped_jax.load(tmp_path / "ours")
    assert model.step == 7
    counts = [int(k.removeprefix("logits_k")) for k in arrays if k.startswith("logits_k")]
    own = model.config.model.loops
    found = model.logits(arrays["tokens"][..., :], loops=[own, *counts])
    for k, logits in zip([own, *counts], found, strict=True):
        wanted = arrays["logits"] if k == own else arrays[f"logits_k{k}"]
        np.testing.assert_allclose(logits, wanted, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"prefix": "_orig_mod."}, {"embed": "bfloat16"}, {"shards": 3},
     {"prefix": "_orig_mod.", "embed": "bfloat16", "shards": 2}],
)  # fmt: skip
def test_there_and_back_every_bit_type_and_fact_is_kept(options, tmp_path):
    _, weights, _ = write(tmp_path / "theirs", **options)
    from_reference(tmp_path / "theirs", tmp_path / "ours")
    to_reference(tmp_path / "ours", tmp_path / "back")
    found = torch.load(tmp_path / "back" / "model_000007.pt", weights_only=True)
    plain = {k.removeprefix("_orig_mod."): v for k, v in weights.items()}
    assert found.keys() == plain.keys()
    for key, tensor in plain.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    metas = [
        json.loads((tmp_path / d / "meta_000007.json").read_text()) for d in ("theirs", "back")
    ]
    assert metas[0] == metas[1]


@pytest.mark.parametrize("name", [n for n in CASES if "mla" in n.lower() or "kv" in n.lower()][:3])
def test_ours_there_and_back(name, tmp_path):
    write(tmp_path / "theirs", name)
    from_reference(tmp_path / "theirs", tmp_path / "ours")
    record = json.loads((tmp_path / "ours" / "config.json").read_text())
    to_reference(tmp_path / "ours", tmp_path / "mid")
    from_reference(tmp_path / "mid", tmp_path / "again", step=7)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert record["model"] == again["model"]
    one, two = (looped_jax.load(tmp_path / d) for d in ("ours", "again"))
    for key, array in one.params.items():
        np.testing.assert_array_equal(array, two.params[key])


def test_both_programs_give_the_same_bits_per_byte(tmp_path):
    config, weights, _ = write(tmp_path / "theirs", embed="bfloat16")
    from_reference(tmp_path / "theirs", tmp_path / "ours")
    ours = looped_jax.load(tmp_path / "ours")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config["vocab_size"], (4, config["sequence_len"] + 1), np.int32)
    lengths = rng.integers(0, 6, config["vocab_size"]).astype(np.int32)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    counts = (1, 3)
    rows = [{"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}]
    found = ours_bpb.bits_per_byte(
        scoring.make_score_step(ours.config.model, mesh, counts), ours.params, rows, lengths,
        loop_counts=counts, mesh=mesh,
    )  # fmt: skip
    theirs = LoopedTransformer(TorchModelConfig.from_reference(config))
    theirs.load_state_dict({k: v.float() for k, v in weights.items()})
    inputs, targets = (torch.from_numpy(tokens[:, s]) for s in (slice(-1), slice(1, None)))
    with torch.no_grad():
        for k, logits in theirs.logits(inputs, counts).items():
            sums = nats_and_bytes(token_losses(logits, targets), targets, torch.from_numpy(lengths))
            assert bits_per_byte(*sums) == pytest.approx(found[k], abs=1e-4)


def test_the_last_step_is_taken_and_others_can_be_asked_for(tmp_path):
    for step in (3, 12):
        write(tmp_path / "theirs", step=step)
    assert from_reference(tmp_path / "theirs", tmp_path / "a") == 12
    assert from_reference(tmp_path / "theirs", tmp_path / "b", step=3) == 3
    with pytest.raises(ConvertError, match=r"no model_\*.pt of step 4; choose one of \[3, 12\]"):
        from_reference(tmp_path / "theirs", tmp_path / "c", step=4)


def test_weights_trained_further_go_back_as_float32(tmp_path):
    """Narrowing them to the remembered bfloat16 would lose what training added."""
    _, weights, _ = write(tmp_path / "theirs", embed="bfloat16")
    key = "transformer.wte.weight"
    wide = weights[key].float().numpy()
    for values, dtype in ((wide, torch.bfloat16), (wide + 1e-6, torch.float32)):
        assert narrowed({key: values}, {key: "bfloat16"})[key].dtype == dtype


WQ = "transformer.h.0.attn.c_q.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({WQ: None}, f"{WQ} is missing"),
        ({"transformer.h.9.attn.c_q.weight": torch.zeros(2, 2)}, "h.9.attn.c_q.weight is extra"),
        ({WQ: torch.zeros(3, 4)}, rf"{WQ} has shape \(3, 4\), not "),
        ({WQ: torch.zeros(48, 48, dtype=torch.float64)}, WQ),
        ({WQ: 3}, "is int, no tensor"),
    ],
)
def test_a_wrong_tensor_is_named_and_nothing_is_written(changes, message, tmp_path):
    write(tmp_path / "theirs", **changes)
    with pytest.raises(ConvertError, match=message):
        from_reference(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("harm-done"),))


def test_a_checkpoint_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "theirs")
    torch.save({"model": Payload()}, tmp_path / "theirs" / "model_000007.pt")
    with pytest.raises(ConvertError, match="holds more than tensors"):
        from_reference(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "harm-done").exists()


def test_without_a_tokenizer_there_are_logits_but_no_text(tmp_path):
    write(tmp_path / "theirs")
    from_reference(tmp_path / "theirs", tmp_path / "ours")
    model = looped_jax.load(tmp_path / "ours")
    assert model.logits(np.zeros((1, 4), np.int32))[0].shape[:2] == (1, 4)
    with pytest.raises(
        CheckpointError, match="has no tokenizer.json, so it has logits but no text"
    ):
        model.generate(["x"])


def test_a_tokenizer_beside_the_checkpoint_comes_along_and_must_fit(tmp_path):
    config, *_ = write(tmp_path / "theirs")
    train_tokenizer(iter(["some text " * 50]), 300, path=tmp_path / "theirs" / "tokenizer.json")
    if config["vocab_size"] < 265:
        with pytest.raises(ConvertError, match="the tokenizer has .* entries, the model"):
            from_reference(tmp_path / "theirs", tmp_path / "ours")
        assert not (tmp_path / "ours").exists()
    else:
        from_reference(tmp_path / "theirs", tmp_path / "ours")
        assert looped_jax.load(tmp_path / "ours").tokenizer.encode("some text")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "meta_000007.json").unlink(), "holds no meta_000007.json"),
        (lambda f: (f / "meta_000007.json").write_text("{"), "meta_000007.json: "),
        (lambda f: (f / "model_000007.pt").write_bytes(b"PK"), "damaged or holds more"),
        (lambda f: [p.unlink() for p in f.glob("model*")], "holds no model_*.pt"),
    ],
)
def test_the_program_names_what_is_wrong_in_one_line(spoil, words, tmp_path, capsys):
    write(tmp_path / "theirs")
    spoil(tmp_path / "theirs")
    with pytest.raises(SystemExit) as stopped:
        main(["from-reference", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and words in said and len(said.splitlines()) == 1


def test_an_existing_folder_is_left_alone(tmp_path, capsys):
    write(tmp_path / "theirs")
    main(["from-reference", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    assert "step 7; looped_jax.load(" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["from-reference", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    assert "exists already" in capsys.readouterr().err


# ---- tokenizers ----------------------------------------------------------------------------------


def tiktoken_bytes_pair_encode(piece, ranks):
    """What tiktoken does with one piece, written out: join the lowest rank, leftmost first."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        joins = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                 if a + b in ranks]  # fmt: skip
        if not joins:
            return [ranks[p] for p in parts]
        i = min(joins)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def encoding(ranks, special=("<|bos|>",), pattern=r"\S+|\s+"):
    """A pickle as tiktoken makes it, without tiktoken: the class is found by name only."""
    state = {"name": "x", "pat_str": pattern, "mergeable_ranks": ranks,
             "special_tokens": {s: len(ranks) + i for i, s in enumerate(special)}}  # fmt: skip
    parts = pickle.dumps(state, protocol=4)[2:-1]  # without header and STOP
    parts = parts[9:] if parts[:1] == b"\x95" else parts
    return b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81" + parts + b"b."


def trained_ranks(text, count):
    ranks = {bytes([i]): i for i in range(256)}
    parts = [text[i : i + 1] for i in range(len(text))]
    while len(ranks) < 256 + count:
        pairs = [a + b for a, b in zip(parts, parts[1:], strict=False) if a + b not in ranks]
        if not pairs:
            break
        best = max(sorted(set(pairs)), key=pairs.count)
        ranks[best] = len(ranks)
        joined = []
        for part in parts:
            if joined and joined[-1] + part == best:
                joined[-1] = best
            else:
                joined.append(part)
        parts = joined
    return ranks


def test_a_tiktoken_file_becomes_a_tokenizer_that_cuts_alike(tmp_path):
    text = ("banana bandana aaaa aaaaaaa abababab naïve 日本語 " * 4).encode()
    ranks = trained_ranks(text, 60)
    (tmp_path / "tokenizer.pkl").write_bytes(encoding(ranks))
    core = Tokenizer(
        tokenizers.Tokenizer.from_str(to_tokenizer_json(tmp_path / "tokenizer.pkl")),
        bos_token=None, source="test",
    )  # fmt: skip
    assert core.bos_id == len(ranks) and core.vocab_size == len(ranks) + 1
    rng = np.random.default_rng(0)
    words = ["banana", "naïve日本語", *("a" * k for k in range(1, 40)), "ab" * 9,
             *("".join(rng.choice(list("abn dï日"), 30)) for _ in range(200))]  # fmt: skip
    for word in words:
        pieces = [p.encode() for p in re.findall(r"\S+|\s+", word)]
        wanted = [t for piece in pieces for t in tiktoken_bytes_pair_encode(piece, ranks)]
        assert core.encode(word) == wanted, word
        assert core.decode(wanted) == word


def test_a_tokenizer_trained_here_becomes_a_tiktoken_file_that_cuts_alike(tmp_path):
    text = "banana bandana aaaa aaaaaaa abababab naïve 日本語 " * 9
    train_tokenizer(iter([text]), 320, path=tmp_path / "tokenizer.json")
    main(["tokenizer", str(tmp_path / "tokenizer.json"), str(tmp_path / "tokenizer.pkl")])
    found = tiktoken_reader.read_encoding(tmp_path / "tokenizer.pkl")
    core = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(found["pat_str"]), behavior="isolated")
    pieces = [piece.encode() for piece, _ in split.pre_tokenize_str(text)]
    wanted = [t for p in pieces for t in tiktoken_bytes_pair_encode(p, found["mergeable_ranks"])]
    assert core.encode(text).ids == wanted and max(wanted) > 270  # merges took place


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda found: found["model"]["merges"].reverse(), "merges in the order of ids"),
        (lambda found: found["model"]["vocab"].update({"日": 999}), "not spelled in bytes"),
        (lambda found: found["model"].update(type="Unigram"), "no BPE of bytes"),
        (lambda found: found.update(pre_tokenizer={"type": "Whitespace"}), "regular expression"),
    ],
)
def test_what_tiktoken_would_cut_otherwise_does_not_become_its_file(change, told, tmp_path, capsys):
    train_tokenizer(iter(["banana bandana " * 9]), 300, path=tmp_path / "tokenizer.json")
    found = json.loads((tmp_path / "tokenizer.json").read_text())
    change(found)
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit):
        main(["tokenizer", str(tmp_path / "tokenizer.json"), str(tmp_path / "tokenizer.pkl")])
    assert told in capsys.readouterr().err and not (tmp_path / "tokenizer.pkl").exists()


@pytest.mark.parametrize("name", ["nanochat-32k", "nanochat-65k"])
def test_nanochat_tokenizers_cut_real_text_alike(name, tmp_path):
    path = SHARED / "tokenizers" / name / "tokenizer.pkl"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    found = tiktoken_reader.read_encoding(path)
    ranks = found["mergeable_ranks"]
    out = tmp_path / "tokenizer.json"
    main(["tokenizer", str(path), str(out)])
    from looped_jax.data.tokenizer import read_tokenizer

    main(["tokenizer", str(out), str(tmp_path / "back.pkl")])
    assert (tmp_path / "back.pkl").read_bytes() == path.read_bytes()
    core = read_tokenizer(out, bos_token=None)
    lengths = torch.load(path.parent / "token_bytes.pt", weights_only=True).numpy()
    for token, rank in ranks.items():  # the reference counts 3 bytes for what is no UTF-8 alone
        assert core.token_bytes[rank] == len(token)
        assert lengths[rank] == len(token.decode(errors="replace").encode())
    assert not core.token_bytes[len(ranks) :].any()
    texts = [p.read_text("utf-8", "replace")[:20_000]
             for p in sorted((SHARED / "tokenizers" / "gpt2-cs336").glob("*"))
             if p.suffix in (".en", ".txt")]  # fmt: skip
    texts += ["Grüße, 日本語のテキスト 🙂🙃 — ½ ≠ ¾\r\n\t x" * 20]
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(found["pat_str"]), behavior="isolated")
    for text in texts:
        pieces = [piece.encode() for piece, _ in split.pre_tokenize_str(text)]
        wanted = [t for piece in pieces for t in tiktoken_bytes_pair_encode(piece, ranks)]
        assert core.encode(text) == wanted
        assert core.decode(wanted) == text
    try:
        import tiktoken
    except ImportError:
        return
    theirs = tiktoken.Encoding(name="x", **found)
    for text in texts:
        assert core.encode(text) == theirs.encode_ordinary(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Payload()), "wants to run"),
        (b"cos\nsystem\n(S'true'\ntR.", "it wants to run os.system; nothing of it was run"),
        (pickle.dumps({"pat_str": "x"}), "holds no tiktoken Encoding"),
        (b"not a pickle", "is no pickle"),
        (encoding({b"a": 0}), "lacks single bytes"),
        (encoding({**{bytes([i]): i for i in range(256)}, b"ab": 300}), "not 0, 1, 2"),
    ],
)
def test_a_file_that_is_anything_else_is_refused(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.pkl").write_bytes(content)
    with pytest.raises(UnsafeTokenizer, match=message):
        to_tokenizer_json(tmp_path / "tokenizer.pkl")
    assert not (tmp_path / "harm-done").exists()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [8])
def test_what_many_devices_trained_converts_on_one(home, tmp_path, devices):
    """Training is a process of its own with eight devices; converting runs with one."""
    settings = ("--config.mesh.fsdp=4", "--config.train.batch_size=1", "--config.model.heads=1")
    many = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    code, _, err = finish(start(home, tmp_path / "run", *settings, steps=4, environment=many))
    assert code == 0, err
    one = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    for command in (("to-reference", "run", "theirs"), ("from-reference", "theirs", "back")):
        done = subprocess.run(
            [sys.executable, "-m", "torch_ref.convert", command[0],
             *(str(tmp_path / name) for name in command[1:])],
            cwd=ROOT, env=one, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    ours, again = (looped_jax.load(tmp_path / name) for name in ("run", "back"))
    for name, weight in ours.params.items():
        np.testing.assert_array_equal(weight, again.params[name])


def test_an_embedding_that_the_reference_lacks_is_refused_by_name(tmp_path):
    settings = Settings(model=ModelSettings(layers=1, embedding="factorised"))
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", resolve(settings, vocab_size=97))
    with pytest.raises(ConvertError, match="has model.embedding=factorised, which the reference"):
        to_reference(tmp_path / "run", tmp_path / "theirs")


def test_a_setting_that_the_reference_always_has_is_refused_by_name(tmp_path):
    settings = Settings(model=ModelSettings(layers=1, soft_cap=0.0))
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", resolve(settings, vocab_size=97))
    with pytest.raises(ConvertError, match="has model.soft_cap=0.0, and the reference always 15"):
        to_reference(tmp_path / "run", tmp_path / "theirs")


def test_a_model_with_parts_is_refused_by_name(home, tmp_path):
    part = "--config.model.parts.kv_shift.on=True"
    code, _, err = finish(start(home, tmp_path / "run", part, steps=4))
    assert code == 0, err
    with pytest.raises(ConvertError, match="has the parts kv_shift, which the reference does not"):
        to_reference(tmp_path / "run", tmp_path / "theirs")
