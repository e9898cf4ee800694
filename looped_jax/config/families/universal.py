"""Universal Transformer: one layer, told where a token stands and which loop it is in.

Source: Dehghani et al., "Universal Transformers", 2018 (arXiv 1807.03819); sizes of its base model
from the authors' tensor2tensor.

As there: one layer six times; sinusoids of position and of loop, added to the state before each of
them; the norm stands after each sum, as the one before the next branch has nothing left to do.

Not as there: this is the decoder alone, as a language model, there an encoder and a decoder that
looks at it; loops are not left early by a halting probability for each token; rotary embeddings
come on top of the sinusoids; the ReLU is squared; norms take no mean away; queries and keys are
normalised; no dropout; separate embedding and head, which the vocabulary decides (there 32 k pieces
of a corpus for translation); the optimizer is this package's Muon, there Adam.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def paper(config: ConfigDict) -> None:
    """The base model's layer: 12.6 M parameters, of 79.7 M with the vocabulary's tables."""
    _techniques(config)
    config.model.loops = 6
    config.model.width = 1024
    config.model.heads = 16
    config.data.tokenizer = "train"
    config.data.tokenizer_vocab_size = 32_768
    config.train.eval_loops = (1, 2, 3, 6, 12)


def tiny(config: ConfigDict) -> None:
    """One layer four times."""
    _techniques(config)


def _techniques(config: ConfigDict) -> None:
    config.model.variant = "LT"
    config.model.layers = 1
    parts = config.model.parts
    parts.loop_embedding.on = True
    parts.loop_embedding.kind = "sinusoidal"
    parts.loop_embedding.positions = True
    parts.sandwich_norm.on = True
    parts.sandwich_norm.after = "sum"


PRESETS = {"paper": paper, "tiny": tiny}
