"""Stop strings: found in a reply as its tokens come, across their borders, and never shown in part.

All strings are looked for at once (Aho and Corasick 1975). The automaton's depth is the length of the longest ending of
the text that could still grow into a stop string, which is what has to be held back. The stop string that is complete
first ends the text, of several the one that begins first; so the result does not depend on how the text was cut.
"""

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pensar.base.errors import ModelError
from pensar.infer.budget import ANSWER, THINKING, Thinking
from pensar.infer.request import MAX_STOP_LENGTH, MAX_STOPS
from pensar.text.tokenizer import SPECIAL_TOKENS, Tokenizer


class StopStrings:
    """Passes text on up to the first stop string, which it swallows.

    Raises ModelError for more or longer strings than can be looked for, and for an empty one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        check_stops(stops)
        self._automaton = _automaton(tuple(stops)) if stops else None
        self._state = 0
        self._held = ""
        self.hit = False
        self.length = 0
        """Characters read, up to the end of the stop string."""
        self.begin: int | None = None
        """Character at which the stop string begins."""

    def feed(self, text: str) -> str:
        """What is certain to be shown with `text`; what could be the beginning of a stop string waits."""
        if self.hit or self._automaton is None:
            self.length += 0 if self.hit else len(text)
            return "" if self.hit else text
        moves, fails, depths, ends = self._automaton
        state = self._state
        for offset, character in enumerate(text):
            while state and character not in moves[state]:
                state = fails[state]
            state = moves[state].get(character, 0)
            if ends[state]:
                self.hit = True
                self.length += offset + 1
                self.begin = self.length - ends[state]
                shown = self._held + text[: offset + 1]
                self._held = ""
                return shown[: len(shown) - ends[state]]
        self._state = state
        self.length += len(text)
        text = self._held + text
        self._held = text[len(text) - depths[state] :]
        return text[: len(text) - depths[state]]

    @property
    def held(self) -> int:
        """Characters at the end of the text that are held back."""
        return len(self._held)

    def close(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held, self._state = self._held, "", 0
        return held


@dataclass(frozen=True, slots=True)
class Match:
    """Where a reply ends because of a stop string."""

    token: int
    """Index in the reply of the token that completed it; the last one that the reply has."""
    begin: int
    """Character of the reply's text (decoded with skip_special) at which it begins and the shown text ends."""


class StopMatcher:
    """Looks for stop strings in the tokens of one reply, in what follows its thinking block and the line feeds there.

    A stop string that is the name of a turn mark, such as `<|im_start|>`, is found as that token.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], thinking: Thinking | None, phase: int
    ) -> None:
        control = tokenizer.control_tokens
        self._marks = {control[stop] for stop in stops if stop in SPECIAL_TOKENS and stop in control}
        self._strings = StopStrings([stop for stop in stops if stop not in SPECIAL_TOKENS])
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._thinking, self._phase = thinking, phase
        self._at_answer = thinking is not None and phase == ANSWER
        self._num_tokens = 0
        self._skipped = 0
        # Of every token that waits: the length of the text up to its end, or to that of a character begun in it.
        self._reaches: deque[int] = deque()
        self.match: Match | None = None

    def feed(self, tokens: Sequence[int]) -> Match | None:
        """The place where the reply ends, once it is known; tokens after it are not looked at."""
        for token in tokens:
            if self.match is not None:
                break
            self._take(token)
        return self.match

    @property
    def safe_tokens(self) -> int:
        """Tokens of the reply in which no part of a stop string can be: those to be shown so far."""
        return self._num_tokens - len(self._reaches)

    def _take(self, token: int) -> None:
        index = self._num_tokens
        self._num_tokens += 1
        text = self._characters.decode(self._tokenizer.decode_bytes([token], skip_special=True))
        if self._is_thinking(token):
            self._skipped += len(text)
            return
        if self._at_answer:
            answer = text.lstrip("\n")
            self._skipped += len(text) - len(answer)
            self._at_answer, text = not answer, answer
        start = self._skipped + self._strings.length
        self._strings.feed(text)
        if self._strings.begin is not None:
            self.match = Match(index, self._skipped + self._strings.begin)
        elif token in self._marks:
            self.match = Match(index, start)
        unfinished = bool(self._characters.getstate()[0])
        self._reaches.append(start + len(text) + unfinished)
        certain = start + len(text) - self._strings.held if self.match is None else self.match.begin
        while self._reaches and self._reaches[0] <= certain:
            self._reaches.popleft()

    def _is_thinking(self, token: int) -> bool:
        """Whether a token belongs to the thinking block."""
        if self._thinking is None or self._phase == ANSWER:
            return False
        before, self._phase = self._phase, self._thinking.after(self._phase, token)
        closed = before == THINKING and self._phase == ANSWER
        self._at_answer = closed
        return closed or self._phase == THINKING


def check_stops(stops: Sequence[str]) -> None:
    """Raises ModelError for stop strings that cannot be looked for."""
    if len(stops) > MAX_STOPS:
        raise ModelError(f"there are {len(stops)} stop strings; at most {MAX_STOPS} can be looked for")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise ModelError(f"a stop string has {len(stop)} characters; give 1 to {MAX_STOP_LENGTH}")


@lru_cache(maxsize=64)
def _automaton(stops: tuple[str, ...]) -> tuple[list[dict[str, int]], list[int], list[int], list[int]]:
    """Of every state its moves, where it falls back to, its depth, and the length of the stop string ending there."""
    moves: list[dict[str, int]] = [{}]
    fails, depths, ends = [0], [0], [0]
    for stop in stops:
        state = 0
        for character in stop:
            if character not in moves[state]:
                moves[state][character] = len(moves)
                moves.append({})
                fails.append(0)
                depths.append(depths[state] + 1)
                ends.append(0)
            state = moves[state][character]
        ends[state] = len(stop)
    waiting = deque(moves[0].values())
    while waiting:
        state = waiting.popleft()
        for character, following in moves[state].items():
            waiting.append(following)
            back = fails[state]
            while back and character not in moves[back]:
                back = fails[back]
            fails[following] = moves[back].get(character, 0)
            ends[following] = ends[following] or ends[fails[following]]
    return moves, fails, depths, ends
