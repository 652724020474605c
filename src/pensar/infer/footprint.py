"""Footprint: the memory that an engine takes when it is full, known before it serves anything."""

from dataclasses import dataclass

from pensar.infer.pages import PagePool
from pensar.infer.step import PAGE, Runner

LOGIT_COPIES = 3
"""Scores as the runner gives them, and what sampling makes of them on its way to a token."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes; the interpreter and its libraries come on top."""

    weights: int
    """The module's and, where a runner keeps its own form of them, that too."""
    cache: int
    """Of a cache whose pages are all in use, and of a spill in memory that is full; taken as they come to be."""
    step: int
    """What a pass holds at its highest."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.step

    def __str__(self) -> str:
        mib = 2**20
        return (
            f"memory: weights {self.weights / mib:,.0f} MiB, cache up to {self.cache / mib:,.0f}, "
            f"a step up to {self.step / mib:,.0f}"
        )


def footprint(runner: Runner, pool: PagePool, *, slots: int, step_tokens: int) -> Footprint:
    """What an engine with this runner and these pages takes at most, log-probabilities of prompts apart."""
    logits = LOGIT_COPIES * 4 * slots * runner.config.vocab_size
    spilled = 0 if pool.spill is None else pool.spill.memory_bytes
    return Footprint(
        weights=runner.weight_bytes(),
        cache=pool.num_pages * runner.page_bytes() + spilled,
        step=runner.step_bytes(step_tokens, (pool.num_pages - 1) * PAGE) + logits,
    )
