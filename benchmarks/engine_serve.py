"""What every contender does in its process: it answers prompts with tokens and says what that cost.

A line of standard input asks, as JSON: prompts (lists of token ids) and how many new tokens each gets. A line of
standard output answers: CPU-seconds of the whole process, whatever threads it computes in, and how many threads took
more than a twentieth of them. This page and the peers' own need nothing of ours, so that a peer may live in another
environment.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts and a number of new tokens -> the new tokens of each; no stop token ends them earlier."""

TASKS = Path("/proc/self/task")


def serve(generate: Generate) -> None:
    """Answers until standard input ends. Whatever the libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        before, start = thread_seconds(), time.process_time()
        replies = generate(asked["prompts"], asked["new"])
        seconds = time.process_time() - start
        lengths = {len(reply) for reply in replies}
        assert len(replies) == len(asked["prompts"]), f"{len(replies)} replies"
        assert lengths == {asked["new"]}, f"replies of {sorted(lengths)} tokens, not of {asked['new']}"
        after = thread_seconds()
        spent = [after[name] - before.get(name, 0.0) for name in after]
        # The system counts a thread's time in hundredths of a second.
        busy = sum(value > max(0.05 * seconds, 0.03) for value in spent)
        answer = {"seconds": seconds, "threads": max(busy, 1), "tokens": replies}
        print(json.dumps(answer), file=answers, flush=True)


def thread_seconds() -> dict[str, float]:
    """CPU-seconds of each thread so far (Linux; elsewhere none is known)."""
    if not TASKS.is_dir():
        return {}
    tick = os.sysconf("SC_CLK_TCK")
    found = {}
    for task in TASKS.iterdir():
        try:
            fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
        except FileNotFoundError:  # it ended meanwhile
            continue
        found[task.name] = (int(fields[11]) + int(fields[12])) / tick
    return found
