"""Sampling: one token per row from logits, each row by its own rules and its own stream of random numbers.

The inverse of the cumulative distribution is taken at one uniform number per row (13 times as fast as
torch.multinomial at 64 x 2,048). The number is a hash of the request's seed and the token's index, so a draw depends
on nothing else in the batch. Shape legend: N rows, V vocabulary, R filtered rows, k kept candidates.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pensar.infer.request import Ints

Rows = npt.NDArray[np.void]
"""Running requests as a structured array; see pensar.infer.rows."""

UNIFORM_BITS = 23
"""One fewer than float32 resolves below 1, so that uniform * total never rounds up to the total."""

MAX_BLOCK, MIN_BLOCK = 64, 16
"""Sizes of the blocks of the vocabulary that the search looks at first; the largest common power of two is taken."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The sampling rules of consecutive rows, as tensors where the rows differ."""

    greedy: Tensor | None
    """True [N] where the row takes the most likely token; None when no row does."""
    all_greedy: bool
    temperature_N1: Tensor | None
    """None when every row has temperature 1."""
    filtered: Tensor | None
    """Indices [R] of the rows with top-k, top-p or min-p; None when there are none."""
    top_k_R1: Tensor
    top_p_R1: Tensor
    min_p_R1: Tensor
    max_k: int
    """Candidates that the filters need, at most; 0 for the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Sampled ids [N]; `sound` [N] is False where the logits held NaN or no finite maximum."""

    ids: Tensor
    sound: Tensor
    log_total: Tensor | None
    """log sum exp of the logits [N], where it was a by-product."""


def rules_of(rows: Rows, device: torch.device) -> Rules:
    """The rules of `rows`, to be kept until the rows change."""
    greedy = rows["temperature"] == 0
    sampled = ~greedy
    filters = sampled & ((rows["top_k"] > 0) | (rows["top_p"] < 1) | (rows["min_p"] > 0))
    chosen = rows[filters]
    temperature = np.where(greedy, 1.0, rows["temperature"])

    def column(values: npt.NDArray[np.generic], dtype: torch.dtype) -> Tensor:
        return torch.tensor(np.ascontiguousarray(values), dtype=dtype, device=device)[:, None]

    return Rules(
        greedy=torch.tensor(greedy, device=device) if greedy.any() else None,
        all_greedy=bool(greedy.all()),
        temperature_N1=column(temperature, torch.float32) if (temperature != 1).any() else None,
        filtered=torch.tensor(np.flatnonzero(filters), device=device) if filters.any() else None,
        top_k_R1=column(chosen["top_k"], torch.int64),
        top_p_R1=column(chosen["top_p"], torch.float32),
        min_p_R1=column(chosen["min_p"], torch.float32),
        max_k=int(chosen["top_k"].max()) if len(chosen) and (chosen["top_k"] > 0).all() else 0,
    )


def sample(logits_NV: Tensor, rules: Rules, uniform_N: Tensor) -> Draw:
    """One token per row; `uniform_N` as `uniforms` makes them."""
    logits_NV = logits_NV.float()
    if rules.all_greedy:
        top_N, ids = logits_NV.max(-1)
        return Draw(ids, top_N.isfinite(), None)
    top_N1 = logits_NV.amax(-1, keepdim=True)
    scaled_NV = logits_NV - top_N1
    if rules.temperature_N1 is not None:
        scaled_NV /= rules.temperature_N1
    kept = scaled_NV[rules.filtered] if rules.filtered is not None else None
    ids, total_N = _invert(scaled_NV.exp_(), uniform_N)
    if kept is not None and rules.filtered is not None:
        ids[rules.filtered] = _sample_filtered(kept, rules, uniform_N[rules.filtered])
    if rules.greedy is not None:
        ids = torch.where(rules.greedy, logits_NV.argmax(-1), ids)
    top_N = top_N1[:, 0]
    return Draw(ids, top_N.isfinite(), None if rules.temperature_N1 is not None else top_N + total_N.log())


def logprobs(logits_NV: Tensor, ids_N: Tensor, log_total_N: Tensor | None) -> Tensor:
    """Log-probabilities [N] of `ids_N` under softmax of the logits: temperature 1, unfiltered."""
    logits_NV = logits_NV.float()
    if log_total_N is None:
        log_total_N = logits_NV.logsumexp(-1)
    return logits_NV.gather(-1, ids_N[:, None])[:, 0] - log_total_N


def uniforms(seeds: npt.NDArray[np.uint64], indices: Ints) -> npt.NDArray[np.float32]:
    """Numbers in [0, 1), a function of (seed, index) alone: two rounds of SplitMix64's finaliser."""
    with np.errstate(over="ignore"):
        state = _mix(_mix(seeds) + indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (state >> np.uint64(64 - UNIFORM_BITS)).astype(np.float32) * np.float32(2.0**-UNIFORM_BITS)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", variant 13 of the mixer."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _invert(weights_NV: Tensor, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
    """The first index at which the running sum exceeds uniform * total, and the totals.

    A long row is searched in two steps, first for the block and then inside it: running sums are serial work, sums of
    blocks are not (a third of the time at 64 x 2,048).
    """
    num_rows, vocabulary = weights_NV.shape
    size = math.gcd(vocabulary, MAX_BLOCK)
    if size < MIN_BLOCK:
        return _search(weights_NV, uniform_N)
    blocks = weights_NV.view(num_rows, -1, size)
    sums = blocks.sum(-1)
    cumulative = sums.cumsum(-1)
    total_N1 = cumulative[:, -1:]
    wanted_N1 = uniform_N[:, None] * total_N1
    block_N1 = torch.searchsorted(cumulative, wanted_N1, right=True).clamp_(max=sums.shape[1] - 1)
    inside_N1 = sums.gather(1, block_N1)
    # What is left of the number inside the block, as a uniform number again.
    left_N1 = (wanted_N1 - cumulative.gather(1, block_N1) + inside_N1) / inside_N1
    left_N = left_N1[:, 0].clamp_(0.0, 1.0 - 2.0**-UNIFORM_BITS)
    chosen = blocks[torch.arange(num_rows, device=weights_NV.device), block_N1[:, 0]]
    offset_N, _ = _search(chosen, left_N)
    return block_N1[:, 0] * size + offset_N, total_N1[:, 0]


def _search(weights_NV: Tensor, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
    cumulative_NV = weights_NV.cumsum(-1)
    total_N1 = cumulative_NV[:, -1:]
    ids = torch.searchsorted(cumulative_NV, uniform_N[:, None] * total_N1, right=True)[:, 0]
    return ids.clamp_(max=weights_NV.shape[-1] - 1), total_N1[:, 0]


def _sample_filtered(scaled_RV: Tensor, rules: Rules, uniform_R: Tensor) -> Tensor:
    """Draws among the candidates that survive top-k, top-p (of what top-k left) and min-p, most likely first."""
    vocabulary = scaled_RV.shape[-1]
    num_candidates = min(rules.max_k, vocabulary) if rules.max_k else vocabulary
    values_Rk, candidates_Rk = scaled_RV.topk(num_candidates, dim=-1)
    rank = torch.arange(num_candidates, device=scaled_RV.device)
    limit_R1 = torch.where(rules.top_k_R1 > 0, rules.top_k_R1, vocabulary)
    weights_Rk = values_Rk.exp().masked_fill(rank >= limit_R1, 0.0)
    cumulative_Rk = weights_Rk.cumsum(-1)
    before_Rk = (cumulative_Rk - weights_Rk) / cumulative_Rk[:, -1:]
    dropped = (before_Rk >= rules.top_p_R1) | (weights_Rk < rules.min_p_R1 * weights_Rk[:, :1])
    dropped[:, 0] = False
    chosen, _ = _search(weights_Rk.masked_fill(dropped, 0.0), uniform_R)
    return candidates_Rk.gather(-1, chosen[:, None])[:, 0]
