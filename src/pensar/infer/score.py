"""Scoring: the log-probability of every token of a text given those before it.

Shape legend: B rows, T tokens, D hidden, N predicted tokens of all rows, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pensar.infer.request import Ints
from pensar.infer.sampling import logprobs
from pensar.model.attention import Packed
from pensar.model.qwen3 import Qwen3

MAX_BATCH_TOKENS = 8_192
"""Tokens of one forward pass, padding included; a longer sequence goes alone."""
MAX_LOGITS = 2**25
"""Logits held at once, as the vocabulary of a large model times a long text would not fit."""


def score(model: Qwen3, sequences: Sequence[Ints]) -> list[list[float]]:
    """Per sequence one log-probability per token; the first, which nothing predicts, is 0."""
    scores: list[list[float]] = [[] for _ in sequences]
    device = model.model.embed_tokens.weight.device
    for batch in _batches(sequences):
        longest = max(len(sequences[index]) for index in batch)
        tokens = np.zeros((len(batch), longest), np.int64)
        real = np.zeros((len(batch), longest), np.bool_)
        for row, index in enumerate(batch):
            tokens[row, : len(sequences[index])] = sequences[index]
            real[row, 1 : len(sequences[index])] = True
        with torch.inference_mode():
            values = _score_batch(
                model, torch.from_numpy(tokens).to(device), torch.from_numpy(real).to(device)
            )
        for row, index in enumerate(batch):
            scores[index] = values[row, : len(sequences[index])].tolist()
    return scores


def _score_batch(model: Qwen3, tokens_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Log-probabilities [B, T] in float32, 0 where `real_BT` is False."""
    positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    hidden_BTD = model(tokens_BT, positions_BT, Packed())
    predicted = real_BT[:, 1:]
    hidden_ND, targets_N = hidden_BTD[:, :-1][predicted], tokens_BT[:, 1:][predicted]
    rows = max(1, MAX_LOGITS // model.config.vocab_size)
    parts: list[Tensor] = []
    for start in range(0, len(targets_N), rows):
        logits = model.logits(hidden_ND[start : start + rows])
        parts.append(logprobs(logits, targets_N[start : start + rows]))
    scores_BT = torch.zeros(tokens_BT.shape, device=tokens_BT.device)
    if parts:
        scores_BT[real_BT] = torch.cat(parts)
    return scores_BT


def _batches(sequences: Sequence[Ints]) -> Iterator[list[int]]:
    """Indices of sequences of similar length, longest first, within MAX_BATCH_TOKENS."""
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    start = 0
    while start < len(order):
        count = max(1, MAX_BATCH_TOKENS // len(sequences[order[start]]))
        yield order[start : start + count]
        start += count
