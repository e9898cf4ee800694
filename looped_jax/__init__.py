"""Looped language models in JAX. `load` opens a trained run for notebooks and other programs.

m = looped_jax.load("runs/FLT_K4_L2_END_D128")
m.logits(tokens, loops=(1, 4)), m.generate(["Once"]), m.run("Once", record=("state",))
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from looped_jax.inference.inspection import Edit, Run
    from looped_jax.inference.trained_model import TrainedModel

    __version__: str

__all__ = ["Edit", "Run", "TrainedModel", "__version__", "load"]


def load(
    run_dir: str | os.PathLike[str], *, step: int | None = None, mesh: Mesh | None = None
) -> TrainedModel:
    """The model of a run folder, ready to use; see TrainedModel.

    `step` picks a checkpoint, the newest by default; `mesh` (runtime.sharding.mesh_of) names the
    devices, one by default, whatever number trained it. Raises CheckpointError, or ConfigError for
    a mesh that cannot cut the model.
    """
    from looped_jax.inference.trained_model import TrainedModel

    return TrainedModel.load(run_dir, step=step, mesh=mesh)


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: data workers import us without jax."""
    if name in ("Edit", "Run"):
        from looped_jax.inference import inspection

        return getattr(inspection, name)
    if name == "TrainedModel":
        from looped_jax.inference.trained_model import TrainedModel

        return TrainedModel
    if name == "__version__":
        return _version()
    raise AttributeError(f"looped_jax has no {name!r}; it has {', '.join(__all__)}")


def _version() -> str:
    """What pyproject.toml says: the installed package's copy of it, else the one beside us."""
    from importlib import metadata

    try:
        return metadata.version("looped_jax")
    except metadata.PackageNotFoundError:
        import tomllib
        from pathlib import Path

        text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
        return tomllib.loads(text)["project"]["version"]
