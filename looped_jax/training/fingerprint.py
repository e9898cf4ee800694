"""What a run has to share with the one that it continues, to end with the same weights."""

from __future__ import annotations

from typing import Any

from looped_jax.config.resolved import Config
from looped_jax.config.settings import PERFORMANCE, Settings
from looped_jax.errors import CheckpointError

Fingerprint = dict[str, Any]  # nested, ready for JSON
TRAIN = ("seed", "steps", "tokens_per_step", "init_from", "init_optimizer", "loop_sampling")
SHOWN = 5  # differences that are spelt out


def of(config: Config, *, rows: dict[str, dict], hosts: int) -> Fingerprint:
    """The fingerprint of a run.

    `rows` is its task's: which rows are trained on. `hosts` is the number of processes that read
    different ones: it sets their order.
    """
    settings = config.to_dict()
    return {
        "model": {k: v for k, v in settings["model"].items() if k not in PERFORMANCE},
        "optim": settings["optim"],
        "train": {k: settings["train"][k] for k in TRAIN},
        **rows,
        "data": {"hosts": hosts, **rows["data"]},
    }


def check(saved: Fingerprint, current: Fingerprint, *, run_dir: str) -> None:
    """Raise CheckpointError that spells out the differences between two fingerprints.

    A setting that one of them does not have stands at its default: settings that came later refuse
    no older run.
    """
    defaults = _flat(_defaults())
    before, now = (defaults | _flat(each) for each in (saved, current))
    different = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if different == ["data.hosts"]:
        bound = now.get("data.packing.name")  # whose rows follow from what each host has at hand
        raise CheckpointError(
            f"train.run_dir={run_dir}: {before['data.hosts']} hosts read its text, now "
            f"{now['data.hosts']} would, in another order; start as many"
            + (
                f", which data.packing={bound} wants"
                if bound
                else ", or go on at the same place in "
                "the text, in the new order, with --config.data.allow_host_change=True"
            )
        )
    if different:
        shown = [
            f"{key}: {_short(before.get(key, 'absent'))} there, "
            f"{_short(now.get(key, 'absent'))} here"
            for key in different[:SHOWN]
        ]
        more = len(different) - len(shown)
        raise CheckpointError(
            f"train.run_dir={run_dir} holds another run: {'; '.join(shown)}"
            + (f"; and {more} more" if more else "")
            + ". Undo the difference, or give a new folder, as --config.train.run_dir=runs/mine"
        )


def _defaults() -> dict[str, Any]:
    groups = ("model.", "optim.", "train.init", "train.loop_sampling.")
    leaves = {k: v for k, v in Settings().leaves().items() if k.startswith(groups)}
    return {k: v for k, v in leaves.items() if k.removeprefix("model.") not in PERFORMANCE}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        items = [_flat(value, f"{prefix}.{key}" if prefix else key) for key, value in tree.items()]
        return {key: value for item in items for key, value in item.items()}
    return {prefix: list(tree) if isinstance(tree, tuple) else tree}
