"""Report: what a step has added to the running replies, as pieces for their callers."""

import numpy as np

from pensar.infer.request import Ints, Piece, piece_of
from pensar.infer.rows import RunningRows


def new_pieces(rows: RunningRows) -> list[Piece]:
    """What can be shown and was not yet, and is from now on. One token a row, which is the usual step, goes by columns.

    A token whose log-probability is asked for is shown when that is known, and none in which a stop string may have
    begun.
    """
    state = rows.state[: rows.num]
    known = np.where(state["logprobs"], np.minimum(state["computed"] + 1, state["total"]), state["total"])
    for row, matcher in enumerate(rows.stops if any(rows.stops) else ()):
        if matcher is not None:
            known[row] = min(int(known[row]), rows.safe(row))
    news = known - state["reported"]
    plain = (news == 1) & state["plain"]
    pieces = _single(rows, np.flatnonzero(plain))
    for row in np.flatnonzero((news > 0) & ~plain).tolist():
        start = int(state["reported"][row])
        part = rows.completion(row, "length", start=start, stop=int(known[row]))
        pieces.append(piece_of(rows.requests[row].id, part, 0, None, first=start == state["prompt"][row]))
    state["reported"] = np.maximum(known, state["reported"])
    return pieces


def _single(rows: RunningRows, chosen: Ints) -> list[Piece]:
    """The pieces of rows that have one new token each."""
    state, at = rows.state, rows.state["reported"][chosen]
    columns = (
        chosen.tolist(),
        rows.tokens[chosen, at].tolist(),
        rows.logprobs[chosen, at].tolist(),
        rows.forced[chosen, at].tolist(),
        rows.versions[chosen, at].tolist(),
        state["logprobs"][chosen].tolist(),
        state["reasoning"][chosen].tolist(),
        state["cached"][chosen].tolist(),
        rows.thinking_left(chosen),
    )
    return [
        Piece(
            id=rows.requests[row].id,
            tokens=[token],
            logprobs=[logprob] if wanted else None,
            forced=[forced],
            finish_reason=None,
            reasoning_tokens=reasoning,
            reasoning_left=left,
            cached_tokens=cached,
            version=version,
        )
        for row, token, logprob, forced, version, wanted, reasoning, cached, left in zip(
            *columns, strict=True
        )
    ]
