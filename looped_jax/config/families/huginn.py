"""Huginn: four layers, looped a random number of times, between two before and two after them.

Source: Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning: A Recurrent Depth
Approach", 2025 (arXiv 2502.05171), and the configuration of its 3.5 B model.

As there: prelude, core and coda of 2, 4 and 2 layers; a random state before the first loop, of
variance 2/5; a learned map of state and embedding at the start of each loop; a norm before each
branch and one after each sum, in all layers; one loop count a step, 1 + Poisson of a log-normal
rate of 32 in the mean; gradients through the last 8.

Not as there: the MLP is squared-ReLU and 4 D wide, there gated SiLU and 17,920 of 5,280; embedding
and head are separate; queries and keys are normalised, there they have biases; the rotary base is
10,000, there 50,000; norms before branches and the one that closes a loop have no gain; logits are
capped; the map starts as equal shares of both; initialisation and optimizer are this package's
(Muon), there scaled normal and Adam. In evaluation the state of a position is always the same one,
there each run draws its own. The batch and the number of tokens are smaller: there 16.8 M a step
and 800 B in all.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def paper(config: ConfigDict) -> None:
    """3.42 B parameters; the paper's have 3.56 B. At 32 loops a token passes 132 layers."""
    _techniques(config, unlooped=2, backward=8)
    config.model.layers = 4
    config.model.loops = 32
    config.model.width = 5280
    config.model.heads = 55
    config.model.seq_len = 4096
    config.data.tokenizer = "train"
    config.data.tokenizer_vocab_size = 65_536
    config.train.batch_size = 1
    config.train.eval_loops = (1, 4, 8, 16, 32, 64)


def tiny(config: ConfigDict) -> None:
    """One layer before two that are looped five times in the mean, and one after."""
    _techniques(config, unlooped=1, backward=2)


def _techniques(config: ConfigDict, *, unlooped: int, backward: int) -> None:
    config.model.variant = "linear"
    config.model.rules.linear.state = config.model.rules.linear.embedding = 0.707
    parts, sampling = config.model.parts, config.train.loop_sampling
    parts.prelude.on = parts.coda.on = True
    parts.prelude.layers = parts.coda.layers = unlooped
    parts.sandwich_norm.on = True
    parts.sandwich_norm.after = "sum"
    parts.state_init.on = True
    parts.state_init.kind = "like_init"
    parts.state_init.scale = 0.632
    sampling.distribution = "log_normal_poisson"
    sampling.backward_loops = backward


PRESETS = {"paper": paper, "tiny": tiny}
