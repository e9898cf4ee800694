"""From an example to rows of tokens, each with the span of targets that is scored.

Every shot, and the example itself, reads context + delimiter + continuation; a blank line parts
them. What is scored depends on the kind of task:

    multiple choice    what follows the tokens that all candidates have in common at the start
    schema             the tokens that all candidates have in common at the end
    language modeling  the tokens after those of the prompt without its continuation
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from looped_jax.errors import UserError
from looped_jax.evaluation.core.bundle import Item, Task

SHOT_SEED = 1234

Encode = Callable[[str], Sequence[int]]


class PromptError(UserError, ValueError):
    """An example whose tokens leave nothing to score, or not what was meant."""


@dataclass(frozen=True)
class Row:
    """A sequence to score; the targets are tokens[start:end].

    The loss at position j predicts token j + 1, so the span's losses are losses[start-1 : end-1];
    1 <= start <= end <= len(tokens). An empty span (start == end) occurs in multiple choice, where
    one choice is the beginning of another. `cropped` says that the beginning did not fit, and `cut`
    that part of the span did not.
    """

    tokens: np.ndarray  # int32 [n]
    start: int
    end: int
    cropped: bool = False
    cut: bool = False


def shots(task: Task, index: int) -> list[Item]:
    """The solved examples shown before item `index`: drawn from the others, seeded by the index."""
    # Sampling from a range that leaves the item out equals sampling from a list of the others.
    others = random.Random(SHOT_SEED + index).sample(range(len(task.items) - 1), task.shots)
    return [task.items[other + (other >= index)] for other in others]


def render(task: Task, index: int) -> list[str]:
    """The texts of item `index`, one per candidate.

    Language modeling gives two: without the continuation, and with it. The first loses the space at
    its end, which most tokenizers join to the word that follows.
    """
    item = task.items[index]
    shown = "".join(
        shot.contexts[shot.gold] + task.delimiter + shot.continuations[shot.gold] + "\n\n"
        for shot in shots(task, index)
    )
    if task.kind == "language_modeling":
        prompt = shown + item.contexts[0] + task.delimiter
        return [prompt.rstrip(), prompt + item.continuations[0]]
    return [
        shown + context + task.delimiter + continuation
        for context, continuation in zip(item.contexts, item.continuations, strict=True)
    ]


def rows(task: Task, item_index: int, encode: Encode, bos_id: int, max_len: int) -> list[Row]:
    """The rows of one example of a drawn task: one per candidate, one for language modeling.

    A row longer than `max_len` loses its beginning, BOS included, as the reference does. Where the
    span itself is longer than max_len − 1, the targets that still have a token before them are
    scored and the row is marked `cut`. Raises PromptError naming the task and the example.
    """
    sequences = [[bos_id, *encode(text)] for text in render(task, item_index)]
    if task.kind == "language_modeling":
        without, sequence = sequences
        start = len(without)
        if sequence[:start] != without or start == len(sequence):
            raise PromptError(
                f"task {task.name}, example {item_index}: the tokens of the prompt are not the "
                "beginning of the tokens of prompt and answer; use a tokenizer that never joins "
                "text across a space"
            )
        return [_row(sequence, start, max_len)]
    if task.kind == "multiple_choice":
        start = _common(sequences)
        return [_row(sequence, start, max_len) for sequence in sequences]
    length = _common([sequence[::-1] for sequence in sequences])
    if not length:
        raise PromptError(
            f"task {task.name}, example {item_index}: the options have no token in common at their "
            "end; use a tokenizer that splits at spaces"
        )
    return [_row(sequence, len(sequence) - length, max_len) for sequence in sequences]


def _common(sequences: list[list[int]]) -> int:
    """How many tokens all sequences share at their start."""
    shortest = min(sequences, key=len)
    for index, token in enumerate(shortest):
        if any(sequence[index] != token for sequence in sequences):
            return index
    return len(shortest)


def _row(sequence: list[int], start: int, max_len: int) -> Row:
    if max_len < 2:
        raise PromptError(f"max_len={max_len} leaves no token to predict from; use at least 2")
    cropped = max(len(sequence) - max_len, 0)
    tokens = np.asarray(sequence[cropped:], np.int32)
    # A first token, BOS or not, has nothing before it and so no loss.
    fits = max(start - cropped, 1)
    cut = cropped > 0 and start - cropped < 1
    return Row(tokens, fits, len(tokens), cropped=cropped > 0, cut=cut)
