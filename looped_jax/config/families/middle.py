"""Middle: two layers in the middle run twice, from 40% of training on.

Source: logs of the parameter-golf contest of 2026 (openai/parameter-golf), in which models of
eleven layers with such a loop gained 0.002 to 0.003 bits per byte at equal time, more where it was
switched on late; the same placement in Saunshi et al., "Reasoning with Latent Thoughts", 2025
(arXiv 2502.17416). The curriculum is `switch` of docs/sampled_loops.md: one loop before, two after.

As there: layers 5 and 6 of 11 twice; D = 512, 8 heads, 4 of keys and values, MLPs of 4 D and 8,192
entries, which with one table make their 35.9 M parameters; rows of 2,048.

Not as there: embedding and head are separate; the stream is normalised where the loop begins and
ends; none of the contest's other techniques (U-shaped skips, learned residual scales, averaged
weights, quantisation).
"""

from __future__ import annotations

from ml_collections import ConfigDict


def paper(config: ConfigDict) -> None:
    """40.1 M parameters: 35.9 M and a second table."""
    _techniques(config, before=4, after=5)
    config.model.width = 512
    config.model.heads = 8
    config.model.kv_heads = 4
    config.model.seq_len = 2048
    config.data.tokenizer = "train"
    config.data.tokenizer_vocab_size = 8192
    config.train.eval_loops = (1, 2, 3, 4)


def tiny(config: ConfigDict) -> None:
    """Two layers twice between one and one."""
    _techniques(config, before=1, after=1)


def _techniques(config: ConfigDict, *, before: int, after: int) -> None:
    config.model.variant = "LT"
    config.model.layers = 2
    config.model.loops = 2
    parts, sampling = config.model.parts, config.train.loop_sampling
    parts.prelude.on = parts.coda.on = True
    parts.prelude.layers = before
    parts.coda.layers = after
    sampling.curriculum = "switch"
    sampling.curriculum_share = 0.4


PRESETS = {"paper": paper, "tiny": tiny}
