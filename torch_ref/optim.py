"""The training recipe: Muon for the matrices of the blocks, AdamW for embedding and head.

One optimizer step, after the caller has accumulated the mean gradient:
clip by the global norm -> set rates and momentum for this step -> Muon and AdamW.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from torch_ref.model import LoopedTransformer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
MOMENTUM_FROM, MOMENTUM_TO, MOMENTUM_STEPS = 0.85, 0.95, 300
TUNED_WIDTH = 768  # the width at which the AdamW rates were tuned


@dataclass(frozen=True)
class OptimConfig:
    """Rates and schedule of a run of `steps` optimizer steps.

    The AdamW rates are those at width 768 and are scaled by (width / 768)^-0.5;
    warm-up and warm-down are shares of the run, `final_frac` the multiplier it ends towards.
    """

    steps: int
    matrix_lr: float = 0.02
    embedding_lr: float = 0.2
    unembedding_lr: float = 0.004
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.8, 0.95)
    adam_eps: float = 1e-10
    grad_clip_norm: float = 1.0
    warmup_ratio: float = 0.0
    warmdown_ratio: float = 0.2
    final_frac: float = 0.0
    newton_schulz_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} trains nothing; give at least 1")
        for field in ("warmup_ratio", "warmdown_ratio", "final_frac"):
            if not 0 <= (value := getattr(self, field)) <= 1:
                raise ValueError(f"{field}={value} is not a share; give a number from 0 to 1")
        if not self.grad_clip_norm > 0:
            raise ValueError(
                f"grad_clip_norm={self.grad_clip_norm} would stop all learning; "
                "give a positive norm, or inf for no clipping"
            )


def lr_multiplier(step: int, config: OptimConfig) -> float:
    """Share of the full learning rate at a 0-based step: linear up, flat, linear down.

    Raises ValueError outside the run, where the line down would turn into ascent.
    """
    if not 0 <= step < config.steps:
        raise ValueError(f"step={step} is outside a run of steps={config.steps}; raise steps")
    warmup = round(config.warmup_ratio * config.steps)
    warmdown = round(config.warmdown_ratio * config.steps)
    if step < warmup:
        return (step + 1) / warmup
    if step <= config.steps - warmdown:
        return 1.0
    left = (config.steps - step) / warmdown
    return left + (1 - left) * config.final_frac


def muon_momentum(step: int) -> float:
    """Muon's momentum at a 0-based step: 0.85 to 0.95 over the first 300 steps."""
    done = min(step / MOMENTUM_STEPS, 1.0)
    return (1 - done) * MOMENTUM_FROM + done * MOMENTUM_TO


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Push the singular values of each matrix [N, rows, cols] towards 1, by Newton–Schulz.

    The quintic iteration of Muon (Jordan et al., 2024) with its five steps, in `dtype`.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the smaller Gram matrix
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton–Schulz, for (out, in) matrices; no weight decay.

    Matrices of one shape are orthogonalised as one batch. Raises ValueError on a non-matrix.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = MOMENTUM_TO,
        newton_schulz_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        params = list(params)
        for param in params:
            if param.ndim != 2:
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} is no matrix; give it to AdamW"
                )
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "newton_schulz_dtype": newton_schulz_dtype}
        )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            same_shaped: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    same_shaped[param.shape].append(param)
            for (rows, cols), params in same_shaped.items():
                nesterov = torch.stack([self._nesterov(p, group["momentum"]) for p in params])
                updates = orthogonalize(nesterov, group["newton_schulz_dtype"])
                scale = group["lr"] * math.sqrt(max(1.0, rows / cols))
                torch._foreach_add_(params, list(updates.unbind()), alpha=-scale)
        return loss

    def _nesterov(self, param: Tensor, momentum: float) -> Tensor:
        """Update the parameter's momentum and look one step ahead of it."""
        assert param.grad is not None
        state = self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(param.grad, 1 - momentum)
        return param.grad.lerp(buffer, momentum)


@torch.no_grad()
def clip_by_global_norm(parameters: Iterable[Tensor], largest: float) -> Tensor:
    """Scale the gradients down to a global L2 norm of `largest`; the norm before, [] float32.

    torch.nn.utils.clip_grad_norm_ sums in float32; on CPU the norm of a large head is then off by
    2e-4. Summed in float64 here, it is the gradients' own.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms)).float()
    torch._foreach_mul_(gradients, torch.clamp(largest / norm, max=1.0))
    return norm


class StepFacts(NamedTuple):
    """What one optimizer step did."""

    grad_norm: Tensor  # [] global L2 norm before clipping
    lr_multiplier: float
    muon_momentum: float


class Recipe:
    """Both optimizers of a model and the schedule that drives them."""

    def __init__(self, model: LoopedTransformer, config: OptimConfig) -> None:
        self.config = config
        self.parameters = list(model.parameters())
        scale = (model.config.width / TUNED_WIDTH) ** -0.5
        self.muon = Muon(
            model.transformer.h.parameters(),
            lr=config.matrix_lr,
            newton_schulz_dtype=config.newton_schulz_dtype,
        )
        self.adamw = torch.optim.AdamW(
            [
                {"params": model.lm_head.weight, "lr": config.unembedding_lr * scale},
                {"params": model.transformer.wte.weight, "lr": config.embedding_lr * scale},
            ],
            betas=config.adam_betas,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        )
        for group in (*self.muon.param_groups, *self.adamw.param_groups):
            group["full_lr"] = group["lr"]

    def step(self, step: int) -> StepFacts:
        """Take the 0-based optimizer step `step` from the mean gradients, then clear them."""
        grad_norm = clip_by_global_norm(self.parameters, self.config.grad_clip_norm)
        multiplier, momentum = lr_multiplier(step, self.config), muon_momentum(step)
        for group in (*self.muon.param_groups, *self.adamw.param_groups):
            group["lr"] = group["full_lr"] * multiplier
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for optimizer in (self.muon, self.adamw):
            optimizer.step()
            optimizer.zero_grad()
        return StepFacts(grad_norm, multiplier, momentum)

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
