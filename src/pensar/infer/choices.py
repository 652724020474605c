"""Choices: one request into n with seeds of their own, and the best of several replies."""

import math
from collections.abc import Sequence

import msgspec

from pensar.base.errors import ModelError
from pensar.base.files import seed_of
from pensar.infer.request import Completion, Request

MAX_CHOICES = 128


def expand(request: Request, n: int, best_of: int | None = None) -> list[Request]:
    """`best_of` (by default `n`) requests for the same prompt, named `id-0`, `id-1`, ..., each with a seed of its own.

    The engine computes and keeps the prompt once. With more than `n` the log-probabilities are asked for, so that
    `best` can choose. Raises ModelError for numbers out of range, and for several greedy replies to choose from.
    """
    count = n if best_of is None else best_of
    if not 1 <= n <= count <= MAX_CHOICES:
        raise ModelError(
            f"request {request.id} has n {n} and best_of {count}; give 1 <= n <= best_of <= {MAX_CHOICES}"
        )
    params = request.params
    if count > n and params.temperature == 0:
        raise ModelError(
            f"request {request.id} has best_of {count} at temperature 0, where all replies are the same; raise it"
        )
    return [
        msgspec.structs.replace(
            request,
            id=f"{request.id}-{index}",
            params=msgspec.structs.replace(
                params, seed=seed_of("choice", params.seed, index), logprobs=params.logprobs or count > n
            ),
        )
        for index in range(count)
    ]


def best(completions: Sequence[Completion], n: int) -> list[Completion]:
    """The `n` replies with the highest mean log-probability per token, the highest first; failed ones last."""
    return sorted(completions, key=mean_logprob, reverse=True)[:n]


def mean_logprob(completion: Completion) -> float:
    """Mean log-probability of the tokens that the model drew itself; minus infinity where it failed or drew none."""
    if completion.finish_reason == "error":
        return -math.inf
    return mean_of_drawn(completion.logprobs, completion.forced)


def mean_of_drawn(logprobs: Sequence[float], forced: Sequence[bool]) -> float:
    """The same of a reply's log-probabilities, given which tokens were forced."""
    drawn = [value for value, put in zip(logprobs, forced, strict=True) if not put and not math.isnan(value)]
    return sum(drawn) / len(drawn) if drawn else -math.inf
