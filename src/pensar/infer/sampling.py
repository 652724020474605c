"""Sampling: one token per row from logits, each row by its own rules and its own stream of random numbers.

The inverse of the cumulative distribution is taken at one uniform number per row (13 times as fast as
torch.multinomial at 64 x 2,048). The number is a hash of the request's seed and the token's index, so a draw depends
on nothing else in the batch. Filtered rows look at their leading tokens only, as many as their filters turn out to
need, and equal logits are ordered by id: what a row draws does not depend on how many of them were looked at.
Shape legend: N rows, V vocabulary, R filtered rows, k leading tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pensar.infer.request import Ints

Weigh = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor, Tensor]]
Rows = npt.NDArray[np.void]
"""Running requests as a structured array; see pensar.infer.rows."""

UNIFORM_BITS = 23
"""One fewer than float32 resolves below 1, so that uniform * total never rounds up to the total."""
BELOW_UNIFORM, UNIFORM_STEP = np.uint64(64 - UNIFORM_BITS), np.float32(2.0**-UNIFORM_BITS)

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
"""Of SplitMix64."""

MAX_BLOCK, MIN_BLOCK = 64, 16
"""Sizes of the blocks of the vocabulary that the search looks at first; the largest common power of two is taken."""

MARGIN = 8
"""Leading tokens beyond top-k, so that equal logits at its limit are seen to be equal."""

COLDEST = float(np.finfo(np.float32).tiny)
HOTTEST = 1 / COLDEST
"""Beyond them a temperature or its inverse would be 0 or infinite in float32; it counts as the nearer of the two."""

NO_LIMIT = np.iinfo(np.int64).max

FIRST_LOOK, LOOK_GROWTH = 256, 16
"""Leading tokens that top-p or min-p without top-k begin with, and how many times as many are next."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Temperature, top-k (NO_LIMIT for none), top-p and min-p, each [R, 1], of the rows that have any filter."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    def of(self, rows: Tensor) -> "Filters":
        """Those of some of the rows."""
        return Filters(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows])


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
    filters: Filters | None
    """Of these rows."""
    needs_total: bool
    """Whether some row needs the sum over the whole vocabulary: one without filters, or with top-p alone."""
    max_k: int
    """The largest top-k where every filtered row has one; 0 otherwise."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Sampled ids [N], and of each row the largest logit, NaN or infinite where one is."""

    ids: Tensor
    top_N: Tensor

    @property
    def sound(self) -> npt.NDArray[np.bool_]:
        """False [N] where the logits held NaN or no finite maximum."""
        found: npt.NDArray[np.bool_] = np.isfinite(self.top_N.cpu().numpy())
        return found


def rules_of(rows: Rows, device: torch.device) -> Rules:
    """The rules of `rows`, to be kept until the rows change."""
    greedy = rows["temperature"] == 0
    sampled = ~greedy
    filters = sampled & ((rows["top_k"] > 0) | (rows["top_p"] < 1) | (rows["min_p"] > 0))
    chosen = rows[filters]
    temperature = np.where(greedy, 1.0, np.clip(rows["temperature"], COLDEST, HOTTEST))

    def column(values: npt.NDArray[np.generic], dtype: torch.dtype) -> Tensor:
        return torch.tensor(np.ascontiguousarray(values), dtype=dtype, device=device)[:, None]

    whole = (chosen["top_k"] == 0) & (chosen["top_p"] < 1)
    return Rules(
        greedy=torch.tensor(greedy, device=device) if greedy.any() else None,
        all_greedy=bool(greedy.all()),
        temperature_N1=column(temperature, torch.float32) if (temperature != 1).any() else None,
        filtered=torch.tensor(np.flatnonzero(filters), device=device) if filters.any() else None,
        filters=Filters(
            column(temperature[filters], torch.float32),
            column(np.where(chosen["top_k"] > 0, chosen["top_k"], NO_LIMIT), torch.int64),
            column(chosen["top_p"], torch.float32),
            column(chosen["min_p"], torch.float32),
        )
        if filters.any()
        else None,
        needs_total=bool((sampled & ~filters).any() or whole.any()),
        max_k=int(chosen["top_k"].max()) if len(chosen) and (chosen["top_k"] > 0).all() else 0,
    )


def weigh(
    logits_NV: Tensor, temperature_N1: Tensor | None, uniform_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row a draw from softmax(logits / temperature), the largest logit, and the sum of exp((logit - largest) /
    temperature), each [N]; the last two are NaN or infinite where a logit is.

    Without `uniform_N` the likeliest token, of equal ones the first, in place of a draw; the sum is then of no use.
    """
    if uniform_N is None:
        top_N, ids_N = _largest(logits_NV)
        return ids_N, top_N, top_N
    top_N1 = logits_NV.amax(-1, keepdim=True)
    scaled_NV = logits_NV - top_N1
    if temperature_N1 is not None:
        scaled_NV /= temperature_N1
    ids_N, total_N = _invert(scaled_NV.exp_(), uniform_N)
    return ids_N, top_N1[:, 0], total_N


def sample(logits_NV: Tensor, rules: Rules, uniform_N: Tensor | None, weigh: Weigh = weigh) -> Draw:
    """One token per row; `uniform_N` as `uniforms` makes them, None where no row is drawn for (`rules.all_greedy`).

    Rows without filters are drawn by `weigh`.
    """
    logits_NV = logits_NV.float()
    if rules.all_greedy or uniform_N is None:
        ids, top_N, _ = weigh(logits_NV, None, None)
        return Draw(ids, top_N)
    total_N: Tensor | None = None
    if rules.needs_total:
        ids, top_N, total_N = weigh(logits_NV, rules.temperature_N1, uniform_N)
    else:
        top_N = logits_NV.amax(-1)
        ids = torch.zeros(len(logits_NV), dtype=torch.int64, device=logits_NV.device)
    if rules.filtered is not None:
        ids[rules.filtered] = _draw_filtered(logits_NV, top_N[:, None], total_N, rules, uniform_N)
    if rules.greedy is not None:
        ids = torch.where(rules.greedy, weigh(logits_NV, None, None)[0], ids)
    return Draw(ids, top_N)


def logprobs(logits_NV: Tensor, ids_N: Tensor, top_N: Tensor | None = None) -> Tensor:
    """Log-probabilities [N] of `ids_N` under softmax of the logits: temperature 1, unfiltered.

    `top_N`: the largest logits, where they are known.
    """
    logits_NV = logits_NV.float()
    return logits_NV.gather(-1, ids_N[:, None])[:, 0] - _log_total(logits_NV, top_N)


def _log_total(logits_NV: Tensor, top_N: Tensor | None = None) -> Tensor:
    """log sum exp [N], as the trainer's loss takes it (pensar.train.head): a row's own at any number of threads."""
    if top_N is None:
        top_N = logits_NV.amax(-1)
    return top_N - logits_NV.softmax(-1).amax(-1).log()


def top_logprobs(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids [N, k] and log-probabilities [N, k] of each row's likeliest tokens, the likeliest first, equal ones by id."""
    logits_NV = logits_NV.float()
    values_Nk, ids_Nk = _leading(logits_NV, k + MARGIN)
    return ids_Nk[:, :k], values_Nk[:, :k] - _log_total(logits_NV)[:, None]


def uniforms(seeds: npt.NDArray[np.uint64], indices: Ints) -> npt.NDArray[np.float32]:
    """Numbers in [0, 1), a function of (seed, index) alone: two rounds of SplitMix64's finaliser."""
    state = _mix(_mix(seeds) + indices.astype(np.uint64) * GOLDEN)
    state >>= BELOW_UNIFORM
    return state.astype(np.float32) * UNIFORM_STEP


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", variant 13 of the mixer."""
    x = x + GOLDEN
    x ^= x >> SHIFTS[0]
    x *= FACTORS[0]
    x ^= x >> SHIFTS[1]
    x *= FACTORS[1]
    x ^= x >> SHIFTS[2]
    return x


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


def _largest(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row and the first id that has it, by blocks (5 times as fast as torch.max)."""
    num_rows, vocabulary = logits_NV.shape
    size = math.gcd(vocabulary, 128)
    if size < MIN_BLOCK:
        top_N, ids = logits_NV.max(-1)
        return top_N, ids
    blocks = logits_NV.reshape(num_rows, -1, size)
    maxima = blocks.amax(-1)
    block_N = maxima.argmax(-1)
    rows = torch.arange(num_rows, device=logits_NV.device)
    return maxima[rows, block_N], block_N * size + blocks[rows, block_N].argmax(-1)


def _leading(logits_NV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits [N, k] of each row, the largest first, and their ids; equal ones by id.

    They stand in at most `count` groups of tokens, those with the largest maxima, and only these groups are looked
    into; where groups have equal maxima, others of those equal to the last logit may come out.
    """
    num_rows, vocabulary = logits_NV.shape
    count = min(count, vocabulary)
    size = math.gcd(vocabulary, 2 ** int(math.log2(max(1.0, math.sqrt(vocabulary / count)))))
    if size < 4:
        inside, ids = logits_NV, torch.arange(vocabulary, device=logits_NV.device).expand(num_rows, -1)
    else:
        groups = logits_NV.reshape(num_rows, size, -1)  # a token's group is its id modulo their number
        chosen = groups.amax(1).topk(count, sorted=False).indices[:, None].expand(-1, size, -1)
        inside = groups.gather(2, chosen).flatten(1)
        first = torch.arange(size, device=logits_NV.device)[:, None] * groups.shape[2]
        ids = (first + chosen).flatten(1)
    # Floats as integers of the same order, with the id below: one number says which of two tokens goes first.
    bits = inside.contiguous().view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    best = ((bits.long() << 32) + (0xFFFFFFFF - ids)).topk(count).values
    ids = 0xFFFFFFFF - (best & 0xFFFFFFFF)
    return logits_NV.gather(1, ids), ids


def _draw_filtered(
    logits_NV: Tensor, top_N1: Tensor, total_N: Tensor | None, rules: Rules, uniform_N: Tensor
) -> Tensor:
    """Draws [R] among the tokens that survive top-k, top-p (of what top-k left) and min-p, most likely first."""
    rows, filters = rules.filtered, rules.filters
    assert rows is not None
    assert filters is not None
    vocabulary = logits_NV.shape[1]
    count = min(rules.max_k + MARGIN if rules.max_k else FIRST_LOOK, vocabulary)
    if logits_NV.device.type != "cpu" and not rules.max_k:
        count = vocabulary  # looking again would wait for the device
    ids_R = torch.zeros(len(rows), dtype=torch.int64, device=logits_NV.device)
    left = torch.arange(len(rows), device=logits_NV.device)
    while True:
        total_L1 = None if total_N is None else total_N[rows, None]
        logits_LV = logits_NV if len(rows) == len(logits_NV) else logits_NV[rows]
        ids, sure = _draw_among(logits_LV, top_N1[rows], total_L1, filters.of(left), uniform_N[rows], count)
        ids_R[left] = ids
        if count == vocabulary or logits_NV.device.type != "cpu" or bool(sure.all()):
            return ids_R
        left, rows = left[~sure], rows[~sure]
        count = min(LOOK_GROWTH * count, vocabulary)


def _draw_among(
    logits_LV: Tensor,
    top_L1: Tensor,
    total_L1: Tensor | None,
    filters: Filters,
    uniform_L: Tensor,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Draws [L] that look at `count` leading tokens, and whether the filters need no more than these."""
    values_Lk, ids_Lk = _leading(logits_LV, count)
    weights_Lk = ((values_Lk - top_L1) / filters.temperature).exp()
    last_L1 = weights_Lk[:, -1:]
    # All tokens above the last value are there, of those equal to it some may be missing.
    above = values_Lk > values_Lk[:, -1:]
    rank = torch.arange(weights_Lk.shape[1], device=weights_Lk.device)
    weights_Lk = weights_Lk.masked_fill(rank >= filters.top_k, 0.0)
    cumulative_Lk = weights_Lk.cumsum(-1)
    limited = filters.top_k < NO_LIMIT
    total = (
        cumulative_Lk[:, -1:] if total_L1 is None else torch.where(limited, cumulative_Lk[:, -1:], total_L1)
    )
    nucleus_L1 = torch.where(filters.top_p < 1, filters.top_p * total, torch.inf)
    dropped = (cumulative_Lk - weights_Lk >= nucleus_L1) | (weights_Lk < filters.min_p * weights_Lk[:, :1])
    dropped[:, 0] = False
    chosen, _ = _search(weights_Lk.masked_fill(dropped, 0.0), uniform_L)
    sure = (filters.top_k <= above.sum(-1, keepdim=True)) | (last_L1 == 0)
    sure |= ~limited & (last_L1 < filters.min_p)
    sure |= ~limited & ((cumulative_Lk * above).amax(-1, keepdim=True) >= nucleus_L1)
    return ids_Lk.gather(-1, chosen[:, None])[:, 0], sure[:, 0]
