"""Looped language models in JAX. `load` opens a trained run for notebooks and other programs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from looped_jax.inference.trained_model import TrainedModel


def load(
    run_dir: str | os.PathLike[str], *, step: int | None = None, mesh: Mesh | None = None
) -> TrainedModel:
    """The model of a run folder: `m.logits(tokens, loops=(1, 3))`, `m.generate(["Once"])`.

    `step` picks a checkpoint, the newest by default; `mesh` (sharding.mesh_of) names the devices,
    one by default, whatever number trained it. Raises CheckpointError.
    """
    from looped_jax.inference.trained_model import (
        TrainedModel,  # jax only when asked for: workers import us too
    )

    return TrainedModel.load(run_dir, step=step, mesh=mesh)
