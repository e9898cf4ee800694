"""A run folder with a log whose statistics are known."""

import json

from looped_jax.config.settings import ModelSettings, OptimConfig, Settings, TrainSettings
from looped_jax.resolve import resolve

STEPS = 60


def record(
    folder, *, loops=2, variant="FLT", inside=True, spike=(), lr=0.02, grad_norm_cv=0.0, seed=0,
    level=5.0, scores=None, every=60, steps=STEPS, last=None, seconds=0.5,
):  # fmt: skip
    """`level`: what the loss falls from, by 1 in STEPS steps; a validation `every` so many steps.

    It gives `scores`, metric -> loop count -> value, less a hundredth of the step. `last`: the
    step, of `steps` in all, where the run ends; NaN where it is negative.
    """
    folder.mkdir(parents=True)
    settings = Settings(
        model=ModelSettings(variant=variant, loops=loops, layers=2),
        optim=OptimConfig(matrix_learning_rate=lr),
        train=TrainSettings(seed=seed, steps=steps, tokens_per_step=1024, run_dir=str(folder)),
    )
    config = resolve(settings, vocab_size=97)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    scores = {"bpb": {1: 2.5, loops: 2.0}} if scores is None else scores
    lines = []
    for step in range(1, abs(last or steps) + 1):
        loss = level - step / STEPS + 0.01 * (-1) ** step + (1.0 if step in spike else 0.0)
        norms = [4.0 * 3**k for k in range(loops)]
        stopped = last is not None and step == -last
        lines.append({"step": step, "train/loss": None if stopped else loss,
                      "train/grad_norm": None if stopped else 1 + grad_norm_cv * (-1) ** step,
                      "loop/residual_norm": norms, "total/seconds": seconds * step,
                      "speed/tokens_per_second": 1024 / seconds})  # fmt: skip
        if inside and step % 10 == 0:
            sign = (-1) ** (step // 10)
            blocks = [[3.0 + 1.5 * sign, 4.0 + 2.0 * sign] for _ in range(loops)]
            lines.append({"step": step, "diagnostics/gradient_block": blocks})
        if step % every == 0:
            of_loops = ((name, k, v) for name, of in scores.items() for k, v in of.items())
            validation = {f"val/{name}_loops_{k}": v - 0.01 * step for name, k, v in of_loops}
            lines.append({"step": step, **validation})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluate(folder, step, loops, scores):
    """What `looped-jax evaluate` leaves in a run's folder."""
    out = folder / "evaluation" / f"step_{step:06d}"
    out.mkdir(parents=True)
    (out / "scores.json").write_text(json.dumps({"step": step, "loops": loops, "scores": scores}))
