"""What the page compares: stage against stage, mode against mode, distillation against reinforcement learning."""

import re
from collections.abc import Mapping, Sequence

import msgspec

from pensar.report.contents import (
    FunnelRow,
    Headline,
    Lift,
    Method,
    Results,
    Scored,
    StageRow,
    StageScore,
    Training,
)

REASONING = "reasoning"
THINKING = "thinking"
NON_THINKING = "non-thinking"
COLD_START = "cold-start"
REASONING_RL = "reasoning-rl"
START, RL, ON_POLICY = "start", "rl", "on-policy"


def with_changes(table: Sequence[StageScore], order: Sequence[str]) -> list[StageScore]:
    """The stage table in the order of the work, each score with its change since the stage before."""
    places = {name: place for place, name in enumerate(order)}
    ranked = sorted(table, key=lambda row: places.get(row.after_stage, len(places)))
    before: dict[tuple[str, str], float] = {}
    rows = []
    for row in ranked:
        key = row.benchmark, row.mode
        change = row.score - before[key] if key in before else None
        before[key] = row.score
        rows.append(msgspec.structs.replace(row, change=change))
    return rows


def compared(methods: Sequence[Method], seconds: Mapping[str, float]) -> list[Method]:
    """Each method with its time and with its costs as multiples of reinforcement learning's."""
    timed = [
        msgspec.structs.replace(
            method,
            role=role_of(method),
            seconds=method.seconds if method.seconds is not None else seconds.get(method.stage),
        )
        for method in methods
    ]
    peer = next((method for method in timed if method.role == RL), None)
    if peer is None:
        return timed
    return [
        msgspec.structs.replace(
            method,
            samples_ratio=_ratio(method.samples, peer.samples),
            flops_ratio=_ratio(method.cost_flops, peer.cost_flops),
            seconds_ratio=_ratio(method.seconds, peer.seconds),
        )
        for method in timed
    ]


def role_of(method: Method) -> str:
    """`start`, `rl` or `on-policy` by the words of the method's name, then of its stage's; empty when neither tells."""
    for text in (method.method.lower(), method.stage.lower()):
        words = set(re.findall(r"[a-z]+", text))
        if {"on", "policy"} <= words:
            return ON_POLICY
        if words & {"rl", "grpo", "reinforcement"}:
            return RL
        if words & {"off", "start"}:
            return START
        if words & {"distillation", "distill", "distilled"}:
            return ON_POLICY
    return ""


def headline(
    results: Results, stages: Sequence[StageRow], trainings: Sequence[Training], funnel: Sequence[FunnelRow]
) -> Headline:
    """The numbers of the summary."""
    thinking = _latest(results.stage_table, THINKING)
    direct = _latest(results.stage_table, NON_THINKING)
    methods = {method.role: method for method in results.rl_against_distillation}
    rl, distilled = methods.get(RL), methods.get(ON_POLICY)
    curve = sorted(results.budget_curve, key=lambda point: point.budget)
    parameters = [row.counts["parameters"] for row in stages if isinstance(row.counts.get("parameters"), int)]
    return Headline(
        thinking=thinking,
        non_thinking=direct,
        mode_gap=thinking.score - direct.score if thinking and direct else None,
        rl=_lift(results),
        think_follow=results.think_follow,
        budget_first=curve[0] if curve else None,
        budget_last=curve[-1] if curve else None,
        student_rl=rl,
        student_distilled=distilled,
        distillation_gain=distilled.pass_at_1 - rl.pass_at_1 if distilled and rl else None,
        seconds=round(sum(row.seconds for row in stages), 3),
        cpu_seconds=round(sum(row.cpu_seconds for row in stages), 3),
        peak_memory_bytes=max((row.peak_memory_bytes for row in stages), default=0),
        ranks=max((row.ranks for row in stages), default=0),
        documents_in=funnel[0].documents_in if funnel else None,
        documents_out=funnel[-1].documents_out if funnel else None,
        tokens_trained=sum(training.tokens for training in trainings),
        parameters=max(parameters, default=None),
    )


def _latest(table: Sequence[StageScore], mode: str) -> StageScore | None:
    return next((row for row in reversed(table) if row.benchmark == REASONING and row.mode == mode), None)


def _lift(results: Results) -> Lift | None:
    """Reasoning RL's effect on its validation set, or on the reasoning benchmark where there is no such set."""
    validated: dict[str, Scored] = {row.stage: row for row in results.validation}
    table: dict[str, Scored] = {
        row.after_stage: row
        for row in results.stage_table
        if row.benchmark == REASONING and row.mode == THINKING
    }
    for scores in (validated, table):
        before, after = scores.get(COLD_START), scores.get(REASONING_RL)
        if before is not None and after is not None:
            return Lift(
                before=_plain(before),
                before_stage=COLD_START,
                after=_plain(after),
                after_stage=REASONING_RL,
                points=after.score - before.score,
            )
    return None


def _plain(scored: Scored) -> Scored:
    return Scored(score=scored.score, low=scored.low, high=scored.high, n=scored.n)


def _ratio(value: float | None, peer: float | None) -> float | None:
    return value / peer if value is not None and peer else None
