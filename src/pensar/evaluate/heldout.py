"""Held-out text: documents that no training stage read, as tokens and bytes, for bits per byte."""

from pathlib import Path

from pensar.data.mixture import HELD_OUT
from pensar.data.shards import Shards
from pensar.text.tokenizer import Tokenizer


def held_out_texts(shards: Path, tokenizer: Tokenizer, length: int, num: int) -> list[tuple[list[int], int]]:
    """Up to `num` windows of `length` tokens from the start of held-out documents that are at least that long.

    Returns (tokens, number of bytes that the tokens after the first stand for).
    """
    data = Shards(shards)
    weights, lengths = data.weights(HELD_OUT), data.lengths()
    found: list[tuple[list[int], int]] = []
    for index in range(len(lengths)):
        if weights[index] > 0 and lengths[index] >= length and len(found) < num:
            tokens = [int(token) for token in data.tokens(index)[:length]]
            found.append((tokens, len(tokenizer.decode_bytes(tokens[1:]))))
    return found
