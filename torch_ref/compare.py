"""Both implementations side by side: the same weights and real batches, a verdict per row.

    python -m torch_ref.compare --config flt:tiny --steps 50 --out runs/compare

First one pass of each (logits, losses, gradients, bits per byte), judged against a float64 run of
the PyTorch one; then N optimizer steps of each from a fresh start. Prints a table, writes
compare.json, .png and .svg, and exits with 1 when a row fails. Alone in this package it imports
the JAX side, which it is there to judge.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import torch
from absl import logging
from jax.sharding import Mesh

from looped_jax import cli, errors, files, tasks
from looped_jax.config.resolved import Config, micro_batches
from looped_jax.config.settings import MeshConfig, ModelSettings, Settings
from looped_jax.data import pipeline
from looped_jax.errors import ConfigError
from looped_jax.evaluation import scoring
from looped_jax.evaluation.bits_per_byte import bits_per_byte
from looped_jax.model import attention_kernels, loss, transformer
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training import optimizers, train_step
from torch_ref import loss as torch_loss
from torch_ref import optim as torch_optim
from torch_ref.agreement import Curve, Row, curve_rows, draw, pass_rows, table, tally
from torch_ref.config import FIXED, ModelConfig
from torch_ref.model import LoopedTransformer
from torch_ref.names import to_reference

EVAL_TOKENS = 8_192
LOGITS_AT_ONCE = 2**21  # rows of the single pass are cut to about so many logits per loop count

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Pass:
    """What one program makes of one batch and of the validation rows; gradients by torch name."""

    logits: dict[int, np.ndarray]  # loop count -> [B, T, V]
    losses: np.ndarray  # [loops, B, T] nats of each token after each loop
    gradients: Weights
    bpb: dict[int, float]  # loop count -> bits per byte of the validation rows
    validation: dict[int, np.ndarray] = field(default_factory=dict)  # -> [N] their tokens' nats
    val_bytes: float = 1.0  # of those rows


@dataclass(frozen=True)
class Text:
    """Real rows: `train` [N, M, rows, T + 1] by step and micro-batch, `val` batches, byte sizes."""

    train: np.ndarray
    val: list[dict[str, np.ndarray]]
    token_bytes: np.ndarray


def compare(config: Config, *, steps: int, out: Path) -> list[Row]:
    """Run both programs, print and write what they say; the rows, each with its verdict.

    One device each: CUDA where torch has it, and whatever JAX's first device is. Raises
    ConfigError for settings that the PyTorch side does not have, and DataError.
    """
    if steps < 1:
        raise ConfigError(f"steps={steps} trains nothing; give at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    config, text = open_text(config, steps)
    check_recipe(config)
    log = Progress()
    log(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}, torch {torch.__version__} on "
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}; "
        f"compute {config.model.dtype}, {steps} steps"
    )
    # True float32 products on both sides; bfloat16 ones are not affected.
    with jax.default_matmul_precision("highest"):
        rows = single_pass(config, text, mesh, device, log)
        curves = train_all(config, text, mesh, device, log)
    rows += curve_rows(curves)
    print(table(rows), flush=True)
    print(tally(rows), flush=True)
    record = {
        "config": config.to_dict(),
        "rows": [dataclasses.asdict(row) for row in rows],
        "losses": {name: curve.losses for name, curve in curves.items()},
    }
    files.write_json(out / "compare.json", record, indent=1)
    draw(rows, curves, out / "compare")
    log(f"written: {out}/compare.json, .png and .svg")
    return rows


def open_text(settings: Settings, steps: int) -> tuple[Config, Text]:
    """The config of a run of `steps` steps, and the rows that run would see."""
    task = tasks.text.Text(settings)
    config = resolve(settings, vocab_size=task.vocab_size)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    num_micro_batches, seq_len = micro_batches(config, devices=1), config.model.seq_len
    rows = task.train_rows(config, batch_size=num_micro_batches * config.train.batch_size)
    train = np.stack([next(rows) for _ in range(steps)])
    rows.close()
    val = pipeline.val_rows(
        task.corpus,
        task.tokenizer,
        seq_len=seq_len,
        batch_size=rows_at_once(config),
        max_tokens=min(config.train.eval_tokens, EVAL_TOKENS),
    )
    token_bytes = task.tokenizer.token_bytes
    sizes = np.zeros(config.model.vocab_size, token_bytes.dtype)
    sizes[: len(token_bytes)] = token_bytes  # a wider table has tokens without text
    return config, Text(train.reshape(steps, num_micro_batches, -1, seq_len + 1), val, sizes)


def rows_at_once(config: Config) -> int:
    wanted = LOGITS_AT_ONCE // (config.model.seq_len * config.model.padded_vocab)
    return min(max(1, wanted), config.train.batch_size)


# ---- one pass ------------------------------------------------------------------------------------


def single_pass(
    config: Config, text: Text, mesh: Mesh, device: torch.device, log: Progress
) -> list[Row]:
    params = loud(transformer.init_params(config.model, jax.random.key(config.train.seed)))
    weights = to_torch(params)
    tokens = text.train[0, 0, : rows_at_once(config)]
    counts = tuple(sorted({*config.train.eval_loops, config.model.loops}))
    compute = getattr(torch, config.model.dtype)
    ours = jax_pass(config, params, tokens, text, counts, mesh)
    log("one pass: jax")
    theirs = torch_pass(config, weights, tokens, text, counts, compute, device)
    log("one pass: torch")
    exact = torch_pass(config, weights, tokens, text, counts, torch.float64, device)
    log("one pass: torch in float64")
    return pass_rows(ours, theirs, exact)


def loud(params: transformer.Params) -> transformer.Params:
    """Fresh weights, but with output projections and a head that matter.

    Fresh ones are zero and tiny: every loop would do nothing, every logit be nearly 0.
    """
    rng = np.random.default_rng(0)
    for name, weight in params.items():
        if name.endswith((".out", ".down")):
            noise = rng.standard_normal(weight.shape, np.float32)
            params = params | {name: jax.numpy.asarray(noise / weight.shape[0] ** 0.5)}
    head = params["head"]  # drawn with a deviation of 0.001
    return params | {"head": head * (1000 / head.shape[0] ** 0.5)}


def to_torch(params: transformer.Params) -> Weights:
    """The same weights under the names and in the layout of torch_ref."""
    return to_reference({name: np.asarray(weight) for name, weight in params.items()})


def jax_pass(
    config: Config,
    params: transformer.Params,
    tokens: np.ndarray,
    text: Text,
    counts: tuple[int, ...],
    mesh: Mesh,
) -> Pass:
    model, deepest = config.model, max(counts)
    attend = attention_kernels.for_mesh(model, mesh, training=True)

    @jax.jit
    def look(params: transformer.Params, tokens: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        every = tuple(range(deepest))
        hidden = transformer.forward(
            model, params, tokens[:, :-1], loops=deepest, return_loops=every, attend=attend
        ).hidden
        nats = loss.token_losses(model, params, hidden, tokens[:, 1:])
        return nats, [loss.logits(model, params, hidden[k - 1]) for k in counts]

    losses, logits = jax.device_get(look(params, tokens))
    gradients = jax.jit(functools.partial(train_step.gradients, config, mesh))
    grads, _ = gradients(params, tokens[None])
    score = scoring.make_score_step(model, mesh, counts)
    bpb = bits_per_byte(score, params, text.val, text.token_bytes, loop_counts=counts, mesh=mesh)
    return Pass(dict(zip(counts, logits, strict=True)), losses, to_torch(grads), bpb)


def torch_pass(
    config: Config,
    weights: Weights,
    tokens: np.ndarray,
    text: Text,
    counts: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Pass:
    model = torch_model(config, weights, dtype, device)
    rows = torch.from_numpy(tokens).to(device)
    torch_loss.score(model, rows[:, :-1], rows[:, 1:]).objective.backward()
    gradients = {n: p.grad.cpu().numpy() for n, p in model.named_parameters() if p.grad is not None}
    sizes = torch.from_numpy(text.token_bytes).to(device)
    of_tokens: dict[int, list[np.ndarray]] = {k: [] for k in counts}
    nats, n_bytes = np.zeros(len(counts)), 0
    with torch.no_grad():
        hidden = model(rows[:, :-1], max(counts)).hidden
        losses = [torch_loss.token_losses(model.head(h), rows[:, 1:]).cpu().numpy() for h in hidden]
        logits = {k: model.head(hidden[k - 1]).cpu().numpy() for k in counts}
        for batch in text.val:
            inputs, targets = (torch.from_numpy(batch[k]).to(device) for k in ("inputs", "targets"))
            states = model(inputs, max(counts)).hidden
            for i, k in enumerate(counts):
                found = torch_loss.token_losses(model.head(states[k - 1]), targets)
                more, size = torch_loss.nats_and_bytes(found, targets, sizes)
                nats[i] += more
                of_tokens[k].append(found.cpu().numpy().ravel())
            n_bytes += size
    bpb = {k: torch_loss.bits_per_byte(nats[i], n_bytes) for i, k in enumerate(counts)}
    validation = {k: np.concatenate(found) for k, found in of_tokens.items()}
    return Pass(logits, np.array(losses), gradients, bpb, validation, n_bytes)


def torch_model(
    config: Config, weights: Weights, dtype: torch.dtype, device: torch.device
) -> LoopedTransformer:
    fields = {f.name: getattr(config.model, f.name) for f in dataclasses.fields(ModelConfig)}
    model = LoopedTransformer(ModelConfig(**fields), dtype, recompute_loops=device.type == "cuda")
    model.load_state_dict({n: torch.from_numpy(np.array(w)) for n, w in weights.items()})
    return (model.double() if dtype == torch.float64 else model).to(device)


# ---- N optimizer steps ---------------------------------------------------------------------------


def train_all(
    config: Config, text: Text, mesh: Mesh, device: torch.device, log: Progress
) -> dict[str, Curve]:
    """Both programs with each kind of orthogonalisation, and torch again from nudged weights."""
    start = to_torch(transformer.init_params(config.model, jax.random.key(config.train.seed)))
    curves = {}
    for dtype in ("float32", "bfloat16"):
        chosen = dataclasses.replace(config.optim, newton_schulz_dtype=dtype)
        run = dataclasses.replace(config, optim=chosen)
        curves[f"jax {dtype}"] = train_jax(run, text, mesh, log)
        curves[f"torch {dtype}"] = train_torch(run, start, text, device, log, f"torch {dtype}")
        if dtype == "float32":
            name = "torch nudged"
            curves[name] = train_torch(run, nudged(start), text, device, log, name)
    return curves


def nudged(weights: Weights) -> Weights:
    """Each weight moved to a neighbouring float32, up or down at random: rounding made visible."""
    rng = np.random.default_rng(0)
    return {
        name: np.nextafter(w, np.where(rng.random(w.shape) < 0.5, -np.inf, np.inf), dtype=w.dtype)
        for name, w in weights.items()
    }


def train_jax(config: Config, text: Text, mesh: Mesh, log: Progress) -> Curve:
    optimizer = optimizers.make_optimizer(config)
    current = train_step.create(config, optimizer, mesh)
    start = to_torch(current.params)
    step = train_step.make_train_step(config, optimizer, mesh)
    curve = Curve()
    for tokens in text.train:
        current, metrics = step(current, tokens)
        curve.add(metrics["loss"].item(), metrics["grad_norm"].item())
        log.step(f"jax {config.optim.newton_schulz_dtype}", curve, len(text.train))
    end = to_torch(current.params)
    curve.moved = {name: end[name] - start[name] for name in start}
    return curve


def train_torch(
    config: Config, start: Weights, text: Text, device: torch.device, log: Progress, name: str
) -> Curve:
    o = config.optim
    model = torch_model(config, start, getattr(torch, config.model.dtype), device)
    recipe = torch_optim.Recipe(
        model,
        torch_optim.OptimConfig(
            steps=len(text.train),
            matrix_lr=o.matrix_learning_rate,
            embedding_lr=o.embedding_learning_rate,
            unembedding_lr=o.head_learning_rate,
            weight_decay=o.weight_decay,
            adam_betas=(o.beta1, o.beta2),
            adam_eps=o.eps,
            grad_clip_norm=o.grad_clip_norm or float("inf"),
            warmup_ratio=o.warmup_ratio,
            warmdown_ratio=o.warmdown_ratio,
            final_frac=o.final_lr_fraction,
            newton_schulz_dtype=getattr(torch, o.newton_schulz_dtype),
        ),
    )
    curve = Curve()
    for index, micro_batches_ in enumerate(text.train):
        last_losses = []
        for rows in torch.from_numpy(micro_batches_).to(device):
            scores = torch_loss.score(model, rows[:, :-1], rows[:, 1:])
            (scores.objective / len(micro_batches_)).backward()
            last_losses.append(scores.losses[-1].item())
        facts = recipe.step(index)
        curve.add(float(np.mean(last_losses)), facts.grad_norm.item())
        log.step(name, curve, len(text.train))
    curve.moved = {
        name: weight.detach().cpu().numpy() - start[name]
        for name, weight in model.named_parameters()
    }
    return curve


def check_recipe(config: Config) -> None:
    """Raise ConfigError where the model or optimizer is set to what torch_ref does not have."""
    if config.optim.optimizer != "muon":
        raise ConfigError(
            f"optim.optimizer={config.optim.optimizer}: the PyTorch side has muon alone; "
            "leave it at that to compare"
        )
    if parts := config.model.parts.on():
        raise ConfigError(f"model.parts.{parts[0]}: the PyTorch side has no parts; leave it off")
    if config.model.embedding != "separate":
        raise ConfigError(
            f"model.embedding={config.model.embedding}: the PyTorch side has separate matrices; "
            "leave it out"
        )
    for name in FIXED:
        if getattr(config.model, name) != (value := getattr(ModelSettings(), name)):
            raise ConfigError(
                f"model.{name}={getattr(config.model, name)}: the PyTorch side always has {value}; "
                "leave it out to compare"
            )
    constants = {
        "momentum_start": torch_optim.MOMENTUM_FROM,
        "momentum_end": torch_optim.MOMENTUM_TO,
        "momentum_warmup_steps": torch_optim.MOMENTUM_STEPS,
        "newton_schulz_steps": torch_optim.NEWTON_SCHULZ_STEPS,
    }
    for name, value in constants.items():
        if getattr(config.optim, name) != value:
            raise ConfigError(
                f"optim.{name}={getattr(config.optim, name)}: the PyTorch side always has "
                f"{value}; leave it at that to compare"
            )


class Progress:
    """Lines with the seconds since the start; of the steps, a few a run."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def __call__(self, line: str) -> None:
        print(f"[{time.perf_counter() - self.began:5.1f} s] {line}", flush=True)

    def step(self, name: str, curve: Curve, steps: int) -> None:
        done = len(curve.losses)
        if done == steps or done % max(1, steps // 5) == 0:
            self(f"{name}: step {done} of {steps}, loss {curve.losses[-1]:.4f}")


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--steps", type=cli.at_least(1), default=50, help="of each run")
    flags.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of results")


def main(argv: Sequence[str] | None = None) -> None:
    logging.set_verbosity(logging.ERROR)
    made = {"prog": "python -m torch_ref.compare", "description": __doc__}
    args = cli.parse_settings(add_flags, sys.argv[1:] if argv is None else argv, **made)
    with errors.printed(code=2):
        rows = compare(args.settings, steps=args.steps, out=args.out)
    raise SystemExit(0 if all(row.passed for row in rows) else 1)


if __name__ == "__main__":
    main()
