"""How much a cache may hold, and what is left to do when memory runs out all the same."""

import os
from collections.abc import Sequence

import numpy as np
import torch

from pensar.base.errors import ConfigError
from pensar.infer.scheduler import Plan
from pensar.infer.step import PAGE, Runner, StepOutput

SHARE_OF_MEMORY = 0.25
"""Of a processor's memory, which others use too; of a GPU's free memory it is SHARE_OF_GPU."""
SHARE_OF_GPU = 0.85


def cache_pages(runner: Runner, slots: int, max_positions: int, cache_tokens: int | None) -> int:
    """Pages of a cache for `cache_tokens` tokens, or for full slots as far as memory allows; page 0 comes on top."""
    page_bytes = runner.page_bytes()
    memory = int(_memory(runner.device))
    if cache_tokens is not None:
        pages = -(-cache_tokens // PAGE)
        if cache_tokens < PAGE or pages * page_bytes > memory:
            most = memory // page_bytes * PAGE
            raise ConfigError(
                f"cache_tokens {cache_tokens:,} needs {pages * page_bytes / 2**20:,.0f} MiB; give {PAGE} to {most:,}"
            )
        return pages + 1
    wanted = slots * -(-max_positions // PAGE)
    allowed = int(memory * (SHARE_OF_GPU if runner.device.type == "cuda" else SHARE_OF_MEMORY)) // page_bytes
    return max(1, min(wanted, allowed)) + 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether what failed may succeed in smaller parts."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The allocator of a CPU says it in words alone.
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


def merged(parts: Sequence[tuple[Plan, StepOutput | None]]) -> tuple[Plan, StepOutput | None]:
    """Consecutive parts of one step as one."""
    plans = [plan for plan, _ in parts]
    plan = Plan(
        np.concatenate([plan.rows for plan in plans]),
        np.concatenate([plan.counts for plan in plans]),
        np.concatenate([plan.drafts for plan in plans]),
        np.concatenate([plan.wanted for plan in plans]),
    )
    outputs = [output for _, output in parts if output is not None]
    if not outputs:
        return plan, None
    return plan, StepOutput(
        torch.cat([output.logits_SV for output in outputs]),
        torch.cat([output.hidden_SD for output in outputs]),
    )


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
