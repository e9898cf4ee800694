"""The loops of every training step: drawn by the host, a part of the batch; see row_draws.py."""

from __future__ import annotations

import functools

import numpy as np

from looped_jax.config.registry import LOOP_RULES
from looped_jax.config.resolved import Config
from looped_jax.errors import ConfigError
from looped_jax.model import loop_costs

KEY = "train.loop_sampling"


class LoopSampler:
    """Loop counts for the rows of each step. Raises ConfigError.

    on: whether train.loop_sampling asks for anything
    longest: the most loops that gradients pass: what the step is compiled for
    """

    def __init__(self, config: Config):
        self._config, self._settings = config, config.train.loop_sampling
        self.on, self.longest = self._settings.on, self._settings.longest(config.model.loops)
        self._rows = config.train.tokens_per_step // config.model.seq_len
        check(config)

    def columns(self, step: int) -> dict[str, np.ndarray]:
        """What batches hold for it, int32 [rows] each: "loops" and "backward_loops"; off, nothing.

        Of all rows of a step.
        """
        if not self.on:
            return {}
        loops = self.draw(step)
        return {"loops": loops, "backward_loops": np.full_like(loops, self.backward(step))}

    def draw(self, step: int) -> np.ndarray:
        """Loops of all rows of a step, int32 [rows]; steps count from 1."""
        random = np.random.Generator(np.random.Philox(key=(self._config.train.seed, step)))
        each = random.random(self._rows if self._settings.per == "sequence" else 1)
        ends = np.cumsum(self._probabilities)
        drawn = 1 + np.minimum(np.searchsorted(ends, each, side="right"), len(ends) - 1)
        return np.broadcast_to(self._grown(drawn, step), self._rows).astype(np.int32)

    def backward(self, step: int) -> int:
        """k, the last loops of `step` that gradients pass, at most."""
        share = self._share(self._settings.backward_curriculum, step)
        return int(loop_costs.grown(self.longest, share))

    def expected(self, step: int) -> float:
        """Mean loops of a row in `step`, over all that could be drawn."""
        counts = self._grown(np.arange(1, len(self._probabilities) + 1), step)
        return float(counts @ self._probabilities)

    def flops(self, micro_batches: int) -> float:
        """Training FLOPs of all steps of the run, each of so many micro-batches."""
        train, total = self._config.train, 0.0
        for step in range(1, train.steps + 1):
            spent = self.draw(step).reshape(micro_batches, -1).max(1)
            backward = np.minimum(spent, self.backward(step))
            model = self._config.model
            total += loop_costs.step_flops(model, float(spent.mean()), float(backward.mean()))
        return train.tokens_per_step * total

    def describe(self) -> list[str]:
        """Lines for the console: what is drawn, and a warning where gradients cannot arrive."""
        if not self.on:
            return []
        settings, last = self._settings, self._config.train.steps
        grow = {"counts": settings.curriculum, "gradients": settings.backward_curriculum}
        grow = {what: how for what, how in grow.items() if how != "none"}
        told = "".join(
            f"; {what} grow ({how}) in the first {settings.curriculum_share:.0%} of steps"
            for what, how in grow.items()
        )
        lines = [
            f"loops per {settings.per}: {settings.distribution}, {self.expected(last):.2f} in the "
            f"mean at the end, gradients through the last {self.longest} at most{told}"
        ]
        rule, longest = LOOP_RULES[self._config.model.variant], len(self._probabilities)
        if longest > self.backward(1) and not rule.rereads_embedding:
            lines.append(
                f"warning: model.variant={self._config.model.variant} reads the embedding in the "
                f"first loop alone, and {KEY} runs up to {longest} loops with gradients through "
                f"the last {self.backward(1)}: in such steps its input gets none. Choose FLT or "
                f"another rule that reads it again, or {KEY}.backward_loops={longest}"
            )
        return lines

    @functools.cached_property
    def _probabilities(self) -> np.ndarray:
        return loop_costs.probabilities(self._settings, self._config.model.loops)

    def _grown(self, counts: np.ndarray, step: int) -> np.ndarray:
        return loop_costs.grown(counts, self._share(self._settings.curriculum, step))

    def _share(self, curriculum: str, step: int) -> float:
        """The share of full depth in `step`: 0 at the first, 1 from curriculum_share of them on."""
        end = self._settings.curriculum_share * self._config.train.steps
        return loop_costs.growth(curriculum, step - 1, end)


def check(config: Config) -> None:
    """Raise ConfigError for loops that cannot be sampled so, and for settings without effect."""
    settings, model = config.train.loop_sampling, config.model
    curricula = (settings.curriculum, settings.backward_curriculum)
    if settings.curriculum_share != 1 and curricula == ("none", "none"):
        raise ConfigError(
            f"{KEY}.curriculum_share={settings.curriculum_share} has no curriculum to end; give "
            f"{KEY}.curriculum=linear, sqrt or switch, or leave it out"
        )
    if settings.per == "sequence" and settings.distribution == "fixed":
        raise ConfigError(
            f"{KEY}.per=sequence: with {KEY}.distribution=fixed all sequences are alike; choose "
            "another distribution, or leave it out"
        )
    if not settings.on:
        return
    if model.scored_loops() != (model.loops - 1,):
        raise ConfigError(
            f"model.loss={model.loss} reads loops before the last, which a step with {KEY} may "
            "not have; give model.loss=END"
        )
    most, backward = (
        len(loop_costs.probabilities(settings, model.loops)),
        settings.longest(model.loops),
    )
    if most < backward:
        raise ConfigError(
            f"{KEY}.backward_loops={backward} is more than the {most} loops that "
            f"{KEY}.distribution={settings.distribution} gives at most; give {most} or fewer"
        )
