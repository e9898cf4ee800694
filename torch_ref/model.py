"""The looped transformer in plain PyTorch; its state dict is the reference's layout.

B batch, T time, D width, H heads, G key/value heads, Dh head width, R latent rank,
F hidden (4D), V vocabulary (padded in the weights, cropped in the logits), K loops, L layers.

Weights stay float32. Each use casts its weight to the compute dtype on the spot, so that the
gradients of the K uses of one weight are summed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_ref.config import ModelConfig

ROPE_BASE = 10_000
ROPE_HEADROOM = 10  # rows this many times the trained context can be scored
LOGIT_CAP = 15.0


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last axis without a learned scale, computed in float32 or wider."""
    eps = torch.finfo(at_least_float32(x.dtype)).eps
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Linear(nn.Linear):
    """A bias-free linear map [..., in] -> [..., out] in the dtype of its input."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


# ------------------------------------------------------------------------------------ attention


def rope_tables(positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, Dh/2], rounded to bfloat16 as the reference keeps them."""
    frequency = ROPE_BASE ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(positions, dtype=torch.float32), frequency)
    return angle.cos().bfloat16(), angle.sin().bfloat16()


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """RoPE with half-split pairs: dimension j turns together with dimension j + Dh/2."""
    x1, x2 = x_BHTD.chunk(2, dim=-1)
    return torch.cat((x1 * cos_TD + x2 * sin_TD, x2 * cos_TD - x1 * sin_TD), dim=-1)


def window_mask(window: int | None, length: int, device: torch.device) -> Tensor | None:
    """Which keys a query sees, [T, T] (query, key); None where the causal mask says it all."""
    if window is None or window >= length:
        return None
    position = torch.arange(length, device=device)
    behind = position[:, None] - position[None, :]
    return (behind >= 0) & (behind < window)


class Attention(nn.Module):
    """Causal attention whose queries may come from another stream than its keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.kv_heads != config.heads
        self.latent = config.attention == "mla"
        width, kv_width = config.width, config.kv_heads * config.head_dim
        self.c_q = Linear(width, width)
        if self.latent:
            self.c_kv_down = Linear(width, config.latent_rank)
            self.c_k_up = Linear(config.latent_rank, width)
            self.c_v_up = Linear(config.latent_rank, width)
        else:
            self.c_k = Linear(width, kv_width)
            self.c_v = Linear(width, kv_width)
        self.c_proj = Linear(width, width)

    def forward(
        self, q_in: Tensor, kv_in: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None
    ) -> Tensor:
        """q_in, kv_in [B, T, D] (both normalised) -> [B, T, D]; mask [T, T] or None for causal."""
        q = self.split(self.c_q(q_in))
        if self.latent:
            latent = norm(self.c_kv_down(kv_in))  # [B, T, R]
            k, v = self.split(self.c_k_up(latent)), self.split(self.c_v_up(latent))
        else:
            k, v = self.split(self.c_k(kv_in)), self.split(self.c_v(kv_in))
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        y_BHTD = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
        )
        return self.c_proj(y_BHTD.transpose(1, 2).flatten(2))

    def split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, T, Dh]


class MLP(nn.Module):
    """W2 · relu(W1 · x)²."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.width, 4 * config.width)
        self.c_proj = Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """One pre-norm layer; queries come from `q_in` instead of the stream where it is given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, q_in: Tensor | None, cos: Tensor, sin: Tensor, mask: Tensor | None
    ) -> Tensor:
        normed = norm(x)
        x = x + self.attn(normed if q_in is None else norm(q_in), normed, cos, sin, mask)
        return x + self.mlp(norm(x))


# ----------------------------------------------------------------------------------- loop rules


def stream_at_start(variant: str, e: Tensor, h: Tensor | None) -> Tensor:
    """The stream [B, T, D] a loop begins with: e the embeddings, h the last loop's outcome."""
    if h is not None and variant == "LT":
        return h
    if h is not None and variant == "LT_i":
        return norm(e + h)
    return norm(e)


def inject(variant: str, layer: int, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a layer makes of h: the stream it works on, and its query source if not the stream."""
    if h is not None and variant == "FLT_res":
        return norm(x + h), None
    if variant == "FLT" or (variant == "LT_ia" and layer == 0):
        return x, h
    return x, None


# ---------------------------------------------------------------------------------------- model


class LoopStates(NamedTuple):
    """What one forward pass leaves behind."""

    hidden: list[Tensor]  # K × [B, T, D], h after each loop: head(hidden[k]) is the model at k + 1
    norms: Tensor  # [K] mean over tokens of the stream's L2 norm, before the closing norm


class Transformer(nn.Module):
    """Embedding and layers, named and nested as the reference's checkpoints have them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab, config.width)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))


class LoopedTransformer(nn.Module):
    """L layers run K times over one stream (arXiv 2605.18797), under any of the five loop rules.

    `dtype` is the compute dtype (float32, bfloat16 or float64); logits are float32 or wider.
    `recompute_loops` keeps only each loop's input for the backward pass.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        recompute_loops: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.recompute_loops = recompute_loops
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.width, config.padded_vocab)
        cos, sin = rope_tables(ROPE_HEADROOM * config.seq_len, config.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw fresh weights: Wo and W2 zero, so that a new model is the same at every K."""
        rng = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name == "transformer.wte.weight":
                fresh = torch.randn(weight.shape, generator=rng)
            elif name == "lm_head.weight":
                fresh = torch.randn(weight.shape, generator=rng) * 0.001
            elif name.endswith("c_proj.weight"):
                fresh = torch.zeros(weight.shape)
            else:
                bound = math.sqrt(3 / weight.shape[1])
                fresh = (torch.rand(weight.shape, generator=rng) * 2 - 1) * bound
            weight.copy_(fresh)

    def forward(self, tokens: Tensor, loops: int | None = None) -> LoopStates:
        """Run tokens [B, T] through `loops` loops (the trained number unless given).

        Raises ValueError when loops < 1 or T exceeds the RoPE table (10 × seq_len).
        """
        loops = self.config.loops if loops is None else loops
        length = tokens.shape[1]
        if loops < 1:
            raise ValueError(f"loops={loops} runs nothing; give at least 1")
        if length > self.cos.shape[0]:
            raise ValueError(
                f"tokens have {length} positions, the RoPE table {self.cos.shape[0]}; "
                "cut the rows or raise seq_len"
            )
        # Looked up before the cast: repeated tokens then add their gradients in float32.
        e = self.transformer.wte(tokens).to(self.dtype)
        cos, sin = self.cos[:length].to(self.dtype), self.sin[:length].to(self.dtype)
        masks = [window_mask(window, length, tokens.device) for window in self.config.windows]

        hidden: list[Tensor] = []
        norms: list[Tensor] = []
        h: Tensor | None = None
        for _ in range(loops):
            # h is an argument: a recomputed closure would see its value at the end of the pass.
            if self.recompute_loops:
                h, stream_norm = checkpoint(
                    self.one_loop, e, h, cos, sin, masks, use_reentrant=False
                )
            else:
                h, stream_norm = self.one_loop(e, h, cos, sin, masks)
            hidden.append(h)
            norms.append(stream_norm)
        return LoopStates(hidden, torch.stack(norms))

    def one_loop(
        self, e: Tensor, h: Tensor | None, cos: Tensor, sin: Tensor, masks: list[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """All layers once: h [B, T, D] (None at first) -> the next h, the stream's mean norm."""
        x = stream_at_start(self.config.variant, e, h)
        for layer, (block, mask) in enumerate(zip(self.transformer.h, masks, strict=True)):
            x, q_in = inject(self.config.variant, layer, x, h)
            x = block(x, q_in, cos, sin, mask)
        stream = x.detach().to(at_least_float32(x.dtype))
        return norm(x), stream.norm(dim=-1).mean()

    def head(self, h: Tensor) -> Tensor:
        """Soft-capped logits [..., V] of h [..., D], in float32 or wider."""
        logits = self.lm_head(h)[..., : self.config.vocab_size]
        logits = logits.to(at_least_float32(logits.dtype))
        return LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)

    def logits(self, tokens: Tensor, loop_counts: Iterable[int]) -> dict[int, Tensor]:
        """Logits [B, T, V] at each of several loop counts, all from one pass of the largest."""
        counts = sorted(set(loop_counts))
        if not counts or counts[0] < 1:
            raise ValueError(f"loop_counts={counts}: give whole numbers from 1, such as (1, 3, 6)")
        hidden = self(tokens, counts[-1]).hidden
        return {count: self.head(hidden[count - 1]) for count in counts}
