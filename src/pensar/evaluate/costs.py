"""What a way of training cost: samples drawn and floating-point operations, from a stage's own records."""

from pathlib import Path

import msgspec

from pensar.model.count import forward_flops_per_token, parameters
from pensar.model.weights import read_config


class Cost(msgspec.Struct, frozen=True):
    samples: int
    flops: float


class _Row(msgspec.Struct):
    step: int
    tokens: float = 0.0
    learned_tokens: float | None = None
    """Where fewer were learned than drawn."""


class _Rollout(msgspec.Struct):
    step: int
    tokens: int


def cost(stage: Path, teacher: Path | None = None) -> Cost:
    """Cost of the rollouts and updates in a stage's folder, counted from its rollouts.jsonl and metrics.jsonl.

    Drawing a token costs one forward pass, learning from it three; a teacher adds one forward pass of its own. Replies
    that taught nothing, since all of their group were alike, are drawn and not learned. Attention is counted at the
    mean length of the rollouts, and not at all for a stage without any.
    """
    config = read_config(stage)
    drawn = [msgspec.json.decode(line, type=_Rollout) for line in _lines(stage / "rollouts.jsonl")]
    rows = [msgspec.json.decode(line, type=_Row) for line in _lines(stage / "metrics.jsonl")]
    learned = [row.tokens if row.learned_tokens is None else row.learned_tokens for row in rows]
    context = max(1, int(sum(row.tokens for row in rows) / len(drawn))) if drawn else 1
    forward = forward_flops_per_token(config, context)
    flops = sum(rollout.tokens for rollout in drawn) * forward + 3 * sum(learned) * forward
    if teacher is not None:
        flops += sum(learned) * forward_flops_per_token(read_config(teacher), context)
    return Cost(len(drawn), flops)


def size_of(model: Path) -> int:
    """Total number of parameters of a model directory."""
    return parameters(read_config(model)).total


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []
