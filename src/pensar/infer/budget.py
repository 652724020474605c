"""Thinking: where each reply stands with its thinking block, and the budget that closes the block.

One state machine over token ids counts the reasoning tokens and decides when the budget is spent, so the two cannot
disagree. It reads a reply as pensar.text.reply does: reasoning is the block at the very beginning, if there is one.
"""

import numpy as np
import numpy.typing as npt

from pensar.base.errors import ModelError
from pensar.infer.request import Ints
from pensar.infer.sampling import Rows
from pensar.text.chat import encode_stop_sentence
from pensar.text.tokenizer import THINK, THINK_END, TURN_START, Tokenizer

BEGINNING, THINKING, ANSWER = 0, 1, 2
"""Phases: nothing but blanks so far, inside the block, after it or never in one."""

NO_BUDGET = np.iinfo(np.int64).max

Bools = npt.NDArray[np.bool_]
Index = slice | Ints
"""Which rows of the running ones."""


class Thinking:
    """The machine for one tokenizer; the state of each row lives in the fields phase, reasoning, budget."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        control = tokenizer.control_tokens
        missing = [name for name in (THINK, THINK_END, TURN_START) if name not in control]
        if missing:
            raise ModelError(
                f"the tokenizer lacks {', '.join(missing)}; a thinking budget needs Qwen3's control tokens"
            )
        self.open_id, self.close_id, self._turn_id = control[THINK], control[THINK_END], control[TURN_START]
        self.stop_sentence: Ints = np.asarray(encode_stop_sentence(tokenizer), np.int64)
        self._blank: dict[int, bool] = {}

    def phase_of(self, prompt: Ints) -> int:
        """The phase in which a reply to `prompt` begins, read from the prompt's last turn."""
        turns = np.flatnonzero(prompt == self._turn_id)
        turn = prompt[turns[-1] :] if len(turns) else prompt
        tags = turn[(turn == self.open_id) | (turn == self.close_id)]
        if not len(tags):
            return BEGINNING
        return THINKING if tags[-1] == self.open_id else ANSWER

    def spent(self, state: Rows, rows: Index, ids: Ints) -> Bools:
        """Where the stop sentence has to stand in place of the token that was drawn.

        A block that closes itself with exactly `budget` tokens inside is left alone.
        """
        over = state["reasoning"][rows] >= state["budget"][rows]
        spent: Bools = over & (state["phase"][rows] == THINKING) & (ids != self.close_id)
        return spent

    def close(self, state: Rows, row: int) -> None:
        """The stop sentence was appended to `row`; none of it is reasoning."""
        state["phase"][row] = ANSWER

    def count(self, state: Rows, rows: Index, ids: Ints, ignored: Bools) -> None:
        """Moves the phases on by one token per row; `ignored` tokens (stop tokens) are not counted as reasoning."""
        phase = state["phase"][rows]
        thinking = phase == THINKING
        if thinking.any():
            closing = thinking & (ids == self.close_id)
            state["reasoning"][rows] += thinking & ~closing & ~ignored
            phase = np.where(closing, ANSWER, phase)
        for row in np.flatnonzero(phase == BEGINNING):  # the first token or two of a reply
            token = int(ids[row])
            if token == self.open_id:
                phase[row] = THINKING
            elif not self._is_blank(token):
                phase[row] = ANSWER
        state["phase"][rows] = phase

    def after(self, phase: int, token: int) -> int:
        """The phase of one row after `token`: what `count` does, for whoever looks ahead."""
        if phase == BEGINNING:
            return THINKING if token == self.open_id else BEGINNING if self._is_blank(token) else ANSWER
        return ANSWER if phase == THINKING and token == self.close_id else phase

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._tokenizer.decode([token]).strip()
        return self._blank[token]
