"""Checkpoints of a run through orbax: asynchronous and atomic.

Layout: <run_dir>/checkpoints/<step>/{params, training, meta}. `params` alone is what evaluation
needs; `training` adds the optimizer and step; `meta` is JSON, see training/run_meta.py. A step
folder appears by one rename once everything in it is written.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from looped_jax.errors import CheckpointError
from looped_jax.files import check_writable
from looped_jax.training.run_meta import RunMeta
from looped_jax.training.train_state import TrainState

# What shows that files are damaged or missing; what else goes wrong, as memory or a disk that does
# not answer, says nothing about them.
_DAMAGED = (KeyError, json.JSONDecodeError)
_DAMAGE = ("DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND")  # of tensorstore


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        keep: int = 2,
        keep_every: int = 0,
        keep_best: int = 0,
        read_only: bool = False,
    ):
        """Open <run_dir>/checkpoints, made if needed; half-written leftovers are removed.

        Kept are the newest `keep`, those of every `keep_every`-th step, and the `keep_best` with
        the lowest validation score in their meta.
        With `read_only` nothing is made or removed: the run may be going on. Raises CheckpointError
        when the folder cannot be written, or read_only finds none.
        """
        self.folder = Path(run_dir).resolve() / "checkpoints"
        if not read_only:
            check_writable(self.folder)
            if jax.process_index() == 0:  # orbax would do it in a thread that it never joins
                for leftover in self.folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
        elif not self.folder.is_dir():
            raise CheckpointError(f"train.run_dir={run_dir} holds no checkpoint yet; train first")
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_kept(keep, keep_every, keep_best), read_only=read_only
            ),
            item_names=("params", "training", "meta"),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, meta: RunMeta) -> None:
        """Start writing; returns once the arrays are copied. Raises CheckpointError.

        An error of the previous, still running save is raised here too.
        """
        params, training = _split(state)
        finite = meta.score is not None and math.isfinite(meta.score)  # NaN is no best
        try:
            self._manager.save(
                step,
                metrics={"score": meta.score} if finite else None,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    training=ocp.args.StandardSave(training),
                    meta=ocp.args.JsonSave(meta.to_json()),
                ),
            )
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Until what was saved is on disk under its final name. Raises CheckpointError."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """Let what is being saved finish; threads of the manager must not outlive the program.

        A failed save is no news beside an `error` that ends the block: it becomes a note of it.
        """
        try:
            self.wait()
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(str(failed))
        finally:
            self._manager.close()

    def meta(self, step: int) -> RunMeta:
        """What a checkpoint knows of its run. Raises CheckpointError when it is damaged."""
        return RunMeta.from_json(self._read(step, meta=ocp.args.JsonRestore())["meta"])

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The train state, laid out as `abstract_state` (shapes, types, shardings) asks.

        Raises CheckpointError when it is damaged or of another layout.
        """
        params, training = _split(abstract_state)
        restored = self._read(
            step,
            params=ocp.args.StandardRestore(params),
            training=ocp.args.StandardRestore(training),
        )
        leaves = {**restored["training"], **restored.params}
        paths, structure = jax.tree_util.tree_flatten_with_path(abstract_state)
        return jax.tree.unflatten(structure, [leaves[_name(path)] for path, _ in paths])

    def _read(self, step: int, **items: ocp.args.CheckpointArgs) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            damaged = isinstance(error, _DAMAGED) or reason.startswith(_DAMAGE)
            raise CheckpointError(
                f"{self.folder / str(step)} is damaged ({reason}); move that folder away to go on "
                "from the checkpoint before it"
                if damaged
                else f"{self.folder / str(step)} cannot be read ({reason}), which may pass: keep "
                "it and try again; LOOPED_JAX_TRACEBACK=1 shows where it comes from"
            ) from error

    def _failed(self, error: Exception) -> CheckpointError:
        reason = str(error).strip().splitlines()
        kept = max(_steps_in(self.folder), default=None)  # the manager forgets it before it goes
        return CheckpointError(
            f"saving to {self.folder} failed ({reason[0] if reason else type(error).__name__}); "
            + (f"the checkpoint of step {kept} is intact" if kept is not None else "none exists")
            + "; free space or make the folder writable, then start the same command again"
        )


def _kept(keep: int, every: int, best: int) -> policies.PreservationPolicy:
    kinds: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
    if every:
        kinds.append(policies.EveryNSteps(every))
    if best:
        lowest = policies.BestN(
            get_metric_fn=lambda metrics: metrics.get("score", metrics.get("bpb")),
            reverse=True,
            n=best,
            keep_checkpoints_without_metrics=False,
        )
        kinds.append(lowest)
    return policies.AnyPreservationPolicy(kinds)


def saved_steps(run_dir: str | Path) -> list[int]:
    """Steps of the complete checkpoints of a run, in order."""
    return _steps_in(Path(run_dir).resolve() / "checkpoints")


def _steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def load_params(
    run_dir: str | Path, shapes: Mapping[str, Any], *, step: int | None = None
) -> tuple[int, dict[str, jax.Array]]:
    """Step and parameters of one checkpoint, the newest by default, without the optimizer.

    Arrays lie where the shardings of `shapes` say, on one device without them: wherever they were
    saved from. Raises CheckpointError that names what is missing or misshapen.
    """
    folder, steps = Path(run_dir).resolve() / "checkpoints", saved_steps(run_dir)
    if not steps or (step is not None and step not in steps):
        raise CheckpointError(
            f"{folder} holds no checkpoint of step {step}; choose one of {steps}"
            if steps
            else f"{folder} holds no checkpoint; give the folder of a run, as runs/FLT_K4_L2_END"
        )
    step = steps[-1] if step is None else step
    try:
        with ocp.StandardCheckpointer() as reader:
            # Without a sharding orbax would ask for the very devices that saved.
            here = SingleDeviceSharding(jax.local_devices()[0])
            named = {
                f"params/{name}": shape.update(sharding=shape.sharding or here)
                for name, shape in shapes.items()
            }
            found = reader.restore(folder / str(step) / "params", named)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{folder / str(step)} does not fit its config.json or is damaged ({reason})"
        ) from error
    return step, {name: found[f"params/{name}"] for name in shapes}


def _split(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """Leaves by name, params apart: names on disk outlive the library that shaped the tree."""
    leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    params = {name: leaf for name, leaf in leaves.items() if name.startswith("params/")}
    return params, {name: leaf for name, leaf in leaves.items() if name not in params}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
