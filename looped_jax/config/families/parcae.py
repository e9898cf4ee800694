"""Parcae: a third of the layers looped, by a linear system that cannot grow, a count a sequence.

Source: Prairie et al., "Parcae: Scaling Laws for Stable Looped Language Models", 2026 (arXiv
2604.12946), and its public configurations. `paper` is the smallest of four; the others have 4, 6
and 8 layers in each third and widths of 1,024, 1,280 and 1,536, in heads of 128.

As there: as many layers before the loops, in them and after them; a random state before the first
loop; the diagonal injection of the normalised embedding, with a decay of 0.447 at the start;
squared-ReLU MLPs of 4 D; normalised queries and keys; a count for every sequence, a Poisson of mean
8 and at least 1; gradients through the last 4.

Not as there: embedding and head are separate, and every looped layer adds a row of the token's own
to its values, there every other layer of all does, through a gate; the state is normalised between
loops and is not mapped before the coda; logits are capped; initialisation, there orthogonal, and
the rates of the optimizer are this package's.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def paper(config: ConfigDict) -> None:
    """The 140 M model: 143.7 M parameters of ours."""
    _techniques(config, unlooped=2, backward=4)
    config.model.layers = 2
    config.model.loops = 8
    config.model.width = 768
    config.model.heads = 6
    config.model.seq_len = 2048
    config.data.tokenizer = "train"
    config.data.tokenizer_vocab_size = 32_768
    config.train.eval_loops = (1, 2, 4, 8, 16)


def tiny(config: ConfigDict) -> None:
    """One layer, looped four times in the mean, between one and one."""
    _techniques(config, unlooped=1, backward=2)
    config.model.layers = 1


def _techniques(config: ConfigDict, *, unlooped: int, backward: int) -> None:
    config.model.variant = "diagonal"
    parts, sampling = config.model.parts, config.train.loop_sampling
    parts.prelude.on = parts.coda.on = True
    parts.prelude.layers = parts.coda.layers = unlooped
    parts.value_embedding.on = True
    parts.state_init.on = True
    parts.state_init.kind = "like_init"
    parts.state_init.scale = 0.632
    sampling.distribution = "truncated_poisson"
    sampling.per = "sequence"
    sampling.backward_loops = backward


PRESETS = {"paper": paper, "tiny": tiny}
