"""CORE, the centred mean accuracy over 22 in-context tasks (DataComp-LM, arXiv:2406.11794).

bundle.py reads the bundle, prompts.py turns an example into rows of tokens, metric.py turns losses
into accuracies and tables, runner.py runs the whole through a scorer that the caller brings.
No model code here: anything that can score rows of tokens can be evaluated.
"""

from looped_jax.evaluation.core.bundle import (
    SHUFFLE_SEED,
    Bundle,
    BundleError,
    Item,
    Task,
    cached_bundle,
    draw,
    load_bundle,
    load_task,
)
from looped_jax.evaluation.core.metric import (
    TaskResult,
    centered,
    core_mean,
    decide,
    format_all,
    format_csv,
    format_table,
)
from looped_jax.evaluation.core.prompts import PromptError, Row, rows
from looped_jax.evaluation.core.runner import ResumeError, evaluate_tasks

__all__ = [
    "SHUFFLE_SEED",
    "Bundle",
    "BundleError",
    "Item",
    "PromptError",
    "ResumeError",
    "Row",
    "Task",
    "TaskResult",
    "cached_bundle",
    "centered",
    "core_mean",
    "decide",
    "draw",
    "evaluate_tasks",
    "format_all",
    "format_csv",
    "format_table",
    "load_bundle",
    "load_task",
    "rows",
]
