"""Ouro: all layers four times, scored after every loop, with a gate that says when to leave.

Source: Zhu et al., "Scaling Latent Reasoning via Looped Language Models", 2025 (arXiv 2510.25741),
and the configuration of its 1.4 B model.

As there: the plain loop of all layers, its state normalised after each; a norm before and after
each branch; four loops; losses after all of them, weighted by the gate's probabilities of leaving,
less an entropy that keeps it from choosing early. Its second stage, which trains the gate alone, is
`--config.model.loss=EXIT_GATE --config.train.init_from=RUN`.

Not as there: the MLP is squared-ReLU and 4 D wide, there gated SiLU and 5,632 of 2,048; queries and
keys are normalised; the rotary base is 10,000, there 1,000,000; the closing norm has no gain;
logits are capped; the optimizer is this package's Muon, there AdamW. There the weight of the
entropy falls from 0.1 to 0.05 between stages of training, and 7.7 T tokens are seen; here it stays,
and tokens follow from the parameters. Generating always runs all loops.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def paper(config: ConfigDict) -> None:
    """The 1.4 B model: 1.41 B parameters of ours, 1.43 B of the paper's."""
    _techniques(config)
    config.model.layers = 24
    config.model.width = 2048
    config.model.heads = 16
    config.model.seq_len = 4096
    config.data.tokenizer = "train"
    config.data.tokenizer_vocab_size = 49_152
    config.train.batch_size = 1
    config.train.eval_loops = (1, 2, 3, 4, 8)


def tiny(config: ConfigDict) -> None:
    """Two layers four times."""
    _techniques(config)


def _techniques(config: ConfigDict) -> None:
    config.model.variant = "LT"
    config.model.loops = 4
    config.model.loss = "EXIT"
    config.model.parts.exit_gate.on = True
    config.model.parts.sandwich_norm.on = True
    config.model.parts.sandwich_norm.after = "branch"


PRESETS = {"paper": paper, "tiny": tiny}
