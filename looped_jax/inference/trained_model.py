"""A trained model ready to use: logits at any loop counts, and text."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from looped_jax.config.registry import TASKS
from looped_jax.config.resolved import Config, ModelConfig
from looped_jax.data.tokenizer import Tokenizer, read_tokenizer
from looped_jax.errors import CheckpointError, DataError
from looped_jax.files import check_on_disk
from looped_jax.inference.decoding import GREEDY, Sampling, generate_tokens
from looped_jax.inference.inspection import Edit, Run, loop_counts, study, token_ids
from looped_jax.model import loss, transformer
from looped_jax.model.transformer import Params
from looped_jax.runtime import sharding
from looped_jax.training import checkpoint
from looped_jax.training.run_folder import read_config


class TrainedModel:
    """Weights, tokenizer and configuration of one checkpoint.

    config: model.config's frozen dataclass; params: the flat dict of model/transformer.py, float32
    mesh: the devices that hold and run it; of several processes all call its methods, alike
    """

    def __init__(
        self,
        config: Config,
        params: Params,
        tokenizer: Tokenizer | None,
        *,
        step: int,
        folder: Path | None = None,
        mesh: Mesh | None = None,
    ):
        self.config, self.step = config, step
        self.mesh = mesh or sharding.one_device()
        self.params = jax.device_put(params, transformer.shardings(config.model, self.mesh))
        self._tokenizer, self._folder = tokenizer, folder

    def __repr__(self) -> str:
        m, count = self.config.model, sum(leaf.size for leaf in self.params.values())
        parts = f", parts {', '.join(m.parts.on())}" if m.parts.on() else ""
        return (
            f"TrainedModel({m.variant}, {m.layers} layers looped {m.loops} times, width {m.width}"
            f"{parts}, {count:,} parameters, step {self.step}, on {self.mesh.size} device(s))"
        )

    @property
    def has_text(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError where there is none, as in a model of no text: logits it has."""
        if self._tokenizer is None and (task := self.config.data.task) != "text":
            raise CheckpointError(
                f"{self._folder} was trained on data.task={task}, which is no text: it has logits, "
                "and `looped-jax evaluate` judges it"
            )
        if self._tokenizer is None:
            raise CheckpointError(
                f"{self._folder} has no tokenizer.json, so it has logits but no text; put the one "
                "it was trained with there"
            )
        return self._tokenizer

    @functools.cached_property
    def task(self) -> Any:
        """The tasks.task.Task it was trained on: its rows, and how their tokens read.

        Made when first asked for; for text its corpus must be here. Raises ConfigError, DataError.
        """
        return TASKS[self.config.data.task](self.config)

    @classmethod
    def load(
        cls,
        run_dir: str | os.PathLike[str],
        *,
        step: int | None = None,
        mesh: Mesh | None = None,
    ) -> TrainedModel:
        """Open a run folder: config.json, checkpoints/ and, if there is one, tokenizer.json.

        On the devices of `mesh`, one by default, whatever trained it. Raises CheckpointError, and
        ConfigError for a mesh that cannot cut the model or a folder that is an address.
        """
        check_on_disk(run_dir, "run_dir")
        folder = Path(run_dir)
        try:
            config = read_config(folder)
            path = folder / "tokenizer.json"
            bos = config.data.bos_token
            tokenizer = read_tokenizer(path, bos_token=bos) if path.is_file() else None
        except DataError as error:
            raise CheckpointError(f"{folder} is damaged: {error}") from error
        mesh = mesh or sharding.one_device()
        shapes = transformer.init_shapes(config.model)
        sharding.check_divisible(config, mesh, transformer.weights(config.model))
        where = transformer.shardings(config.model, mesh)
        shapes = {name: leaf.update(sharding=where[name]) for name, leaf in shapes.items()}
        step, params = checkpoint.load_params(folder, shapes, step=step)
        return cls(config, params, tokenizer, step=step, folder=folder, mesh=mesh)

    def logits(
        self,
        tokens: str | Sequence[str] | np.ndarray,
        *,
        loops: int | Sequence[int] | None = None,
    ) -> tuple:
        """Float32 logits [B, T, V] of tokens, one array per loop count, from one pass.

        By default at the trained loop count alone. Any positive counts, in any order. Tokens as in
        `run`. Raises ArgumentError.
        """
        counts, tokens = loop_counts(self, loops), token_ids(self, tokens)
        run = _logits(self.config.model, self.mesh, counts)
        spec = P(sharding.BATCH_AXES)
        rows = sharding.put(sharding.fill_rows(tokens, self.mesh), self.mesh, spec)
        return tuple(logits[: len(tokens)] for logits in run(self.params, rows))

    def run(
        self,
        tokens: str | Sequence[str] | np.ndarray,
        *,
        loops: int | Sequence[int] | None = None,
        record: Sequence[str] = (),
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        edit: Edit | Sequence[Edit] = (),
        start: tuple[int, np.ndarray] | None = None,
    ) -> Run:
        """One pass over tokens [B, T], [T] or texts, and a view inside: inference/inspection.py."""
        return study(
            self, tokens, loops=loops, record=record, layers=layers, positions=positions,
            edits=(edit,) if isinstance(edit, Edit) else tuple(edit), start=start,
        )  # fmt: skip

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        tokens: int = 64,
        loops: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        cache: str = "exact",
    ) -> Any:
        """The text that follows each prompt, up to a stop token or `tokens` tokens.

        One text for one prompt, a list for several. Raises ArgumentError.
        """
        if isinstance(prompts, str):
            return self.generate(
                [prompts], tokens=tokens, loops=loops, temperature=temperature, top_k=top_k,
                top_p=top_p, seed=seed, cache=cache,
            )[0]  # fmt: skip
        texts = [""] * len(prompts)
        sampling = Sampling(temperature, top_k, top_p, seed)
        for pieces in self.stream(
            prompts, tokens=tokens, loops=loops, sampling=sampling, cache=cache
        ):
            texts = [text + (piece or "") for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def stream(
        self,
        prompts: Sequence[str],
        *,
        tokens: int,
        loops: int | None = None,
        sampling: Sampling = GREEDY,
        draws: Sequence[int] | None = None,
        cache: str = "exact",
    ) -> Iterator[list[str | None]]:
        """One piece of text per prompt and step; None once a prompt has met its stop token.

        Characters whose bytes are spread over several tokens come with the last of them.
        """
        tokenizer = self.tokenizer
        starts = [tokenizer.prompt(prompt) for prompt in prompts]
        new: list[list[int]] = [[] for _ in prompts]
        shown = [""] * len(prompts)
        live = [True] * len(prompts)
        steps = generate_tokens(
            self.config.model,
            self.params,
            starts,
            tokens=tokens,
            loops=loops,
            sampling=sampling,
            draws=draws,
            cache=cache,
            mesh=self.mesh,
        )
        for number, ids in enumerate(steps, start=1):
            pieces: list[str | None] = []
            for row, token in enumerate(ids.tolist()):
                if not live[row]:
                    pieces.append(None)
                    continue
                live[row] = number < tokens and token not in tokenizer.stop_ids
                if token not in tokenizer.stop_ids:
                    new[row].append(token)
                text = tokenizer.decode(new[row])
                if live[row]:  # the rest of a character may still be to come
                    text = text.removesuffix("\ufffd")
                pieces.append(text[len(shown[row]) :])
                shown[row] = text
            yield pieces
            if not any(live):
                return


@functools.lru_cache(maxsize=64)
def _logits(config: ModelConfig, mesh: Mesh, counts: tuple[int, ...]) -> jax.stages.Wrapped:
    """Jitted (params, tokens [B, T]) -> float32 [N, B, T, V], known to every process."""
    run = transformer.make_hidden_states(config, mesh, counts)

    def logits(params: Params, tokens: jax.Array) -> jax.Array:
        return loss.logits(config, params, run(params, tokens))

    rows, of_loops = P(sharding.BATCH_AXES), P(None, sharding.BATCH_AXES)
    program = transformer.on_mesh(
        config,
        mesh,
        logits,
        in_specs=(rows,),
        out_specs=of_loops,
    )
    return jax.jit(program, out_shardings=NamedSharding(mesh, P()))
