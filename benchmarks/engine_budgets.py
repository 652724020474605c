"""Thinking budgets are kept to the token: random prompts, budgets from nothing on, answers of a form, and guesses.

A model of random weights thinks for as long as it may. 1,000 requests go through one engine as it is, one that copies
guesses from the text, and one with a draft model that agrees with it now and then. Reasoning tokens are counted again
from the reply: never more than the budget, exactly the budget where the stop sentence was put in, also where the budget
was changed on the way or the answer asked for at once. A stop sentence costs one step, and not one for each token.
What follows is what the grammar asks for, read by its own little reader, and the same with guesses and without.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.engine_budgets_work import CONFIG, Asked, asked_of, tokenizer_of
from benchmarks.pretrain_steps import line
from pensar.infer.drafts.draft_model import DraftModel
from pensar.infer.drafts.lookup import Lookup
from pensar.infer.drafts.proposer import Proposer
from pensar.infer.engine import Engine, Piece
from pensar.infer.runners import runner_for
from pensar.infer.speculate import Speculation
from pensar.model.qwen3 import Qwen3, initialize
from pensar.text.chat import encode_stop_sentence
from pensar.text.tokenizer import THINK, THINK_END, Tokenizer

Line = dict[str, Any]
NUM = 1_000
SLOTS = 16
MAY_BE_NONE = ("free", "perhaps a tool")
"""Forms of a reply that may end in the middle of its thinking."""
NOISE = 0.01
"""Of the draft model's weights, relative to their own spread of 0.3."""


def budgets(quick: bool) -> Iterator[Line]:
    torch.set_num_threads(1)
    tokenizer = tokenizer_of()
    asked = asked_of(tokenizer, NUM // 10 if quick else NUM)
    plain: Served | None = None
    for name in ("alone", "lookup", "draft_model"):
        start = time.process_time()
        served = Served(tokenizer, asked, proposer_of(name))
        served.run()
        same = None if plain is None else served.compare(plain)
        plain = plain or served
        yield line(
            f"budgets_{name}",
            len(served.faults),
            None,
            "none",
            f"faults in {len(asked):,} replies",
            target=0,
            sign=-1,
            first_faults=served.faults[:3],
            counts=dict(sorted(served.counts.items())),
            tokens_per_pass=None
            if served.guesser is None
            else round(served.guesser.acceptance.tokens_per_pass, 3),
            same_as_without_guesses=same,
            cpu_seconds=round(time.process_time() - start, 1),
        ) | {"limit": 0.0}
        yield line(
            f"budgets_{name}_stop_sentence",
            served.steps_of_sentence / max(1, served.counts["stop sentences that were answered"]),
            float(len(served.sentence)),
            "a step for every token of it",
            "steps",
            ratio=served.steps_of_sentence
            / max(1, served.counts["stop sentences that were answered"])
            / len(served.sentence),
            target=round(1 / len(served.sentence), 4),
            sign=-1,
        ) | {"limit": 1.0}


def model_of(noise: float = 0.0) -> Qwen3:
    """Random weights, and beside them the same with noise: a draft model that is often right."""
    model = Qwen3(CONFIG).eval()
    initialize(model, 0)
    if noise:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += noise * torch.randn(parameter.shape, generator=generator)
    return model


def proposer_of(name: str) -> Proposer | None:
    if name == "alone":
        return None
    return Lookup() if name == "lookup" else DraftModel(runner_for(model_of(NOISE)))


class Served:
    """All requests through one engine, and what of their replies is not as it should be."""

    def __init__(self, tokenizer: Tokenizer, asked: Sequence[Asked], proposer: Proposer | None) -> None:
        self.tokenizer, self.asked = tokenizer, {one.request.id: one for one in asked}
        self.sentence = encode_stop_sentence(tokenizer)
        self.guesser = None if proposer is None else Speculation(proposer, max_drafts=6, adaptive=False)
        self.engine = Engine(runner_for(model_of()), tokenizer, slots=SLOTS, speculation=self.guesser)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.steps_of_sentence = 0
        self.replies: dict[str, list[int]] = {}
        self._bounds = {one.request.id: one.request.params.thinking_budget or 0 for one in asked}
        self._changes = {one.request.id for one in asked if one.change_at is not None}
        self._pieces: dict[str, list[tuple[int, Piece]]] = {one.request.id: [] for one in asked}

    def run(self) -> None:
        for one in self.asked.values():
            self.engine.submit(one.request)
        step = 0
        while self.engine.num_running or self.engine.num_waiting:
            step += 1
            self._change()
            for piece in self.engine.step():
                self._pieces[piece.id].append((step, piece))
                if piece.finish_reason is not None:
                    self._ended(self.asked[piece.id], self._pieces[piece.id])
        self.counts["steps"] = step

    def compare(self, plain: "Served") -> str:
        """How many replies are the other engine's, of those that nobody changed on the way."""
        left = [name for name, one in self.asked.items() if one.change_at is None]
        same = sum(self.replies[name] == plain.replies[name] for name in left)
        if same < len(left):
            self.faults.append(f"{len(left) - same} replies are others than without guesses")
        return f"{same} of {len(left)}"

    def _change(self) -> None:
        """Budgets that are to be changed at this moment."""
        for name in list(self._changes):
            one, pieces = self.asked[name], self._pieces[name]
            thought = pieces[-1][1].reasoning_tokens if pieces else 0
            assert one.change_at is not None
            if not pieces and one.change_at:
                continue
            if thought < one.change_at and pieces[-1][1].finish_reason is None:
                continue
            self._changes.discard(name)
            if pieces and (pieces[-1][1].finish_reason is not None or any(_flags(pieces))):
                continue
            if one.change_to is None:
                found, self._bounds[name] = self.engine.finish_thinking(name), thought
            else:
                found = self.engine.set_budget(name, one.change_to)
                self._bounds[name] = max(one.change_to, thought)
            self.counts["budgets changed"] += 1
            if not found:
                self.faults.append(f"{name} was not found")

    def _ended(self, one: Asked, pieces: list[tuple[int, Piece]]) -> None:
        tokens = [token for _, piece in pieces for token in piece.tokens]
        forced, last = _flags(pieces), pieces[-1][1]
        name = one.request.id
        self.replies[name] = tokens
        self.counts[f"ended: {last.finish_reason}"] += 1
        self.counts["tokens"] += len(tokens)
        thought = self._thought(one, tokens, forced)
        bound = self._bounds[name]
        self.counts["reasoning tokens"] += thought
        if thought != last.reasoning_tokens:
            self.faults.append(f"{name} has {thought} reasoning tokens, {last.reasoning_tokens} were said")
        if thought > bound:
            self.faults.append(f"{name} has {thought} reasoning tokens of {bound}")
        if any(forced):
            self._forced(name, tokens, forced, thought, pieces)
        elif thought:
            self.counts["closed by itself"] += 1
        if last.finish_reason == "error":
            self.faults.append(f"{name}: {last.error}")
        elif last.finish_reason == "stop":
            self._answered(one, tokens)

    def _forced(
        self, name: str, tokens: list[int], forced: list[bool], thought: int, pieces: list[tuple[int, Piece]]
    ) -> None:
        """The whole sentence, at the budget exactly, and the answer one step later."""
        self.counts["stop sentences"] += 1
        self.counts["stop sentences at a budget of nothing"] += not thought
        if thought != self._bounds[name]:
            self.faults.append(f"{name} was closed after {thought} tokens of {self._bounds[name]}")
        first = forced.index(True)
        if tokens[first : first + len(self.sentence)] != self.sentence or sum(forced) != len(self.sentence):
            self.faults.append(f"{name} was closed by another text than the stop sentence")
        begun = next(step for step, piece in pieces if any(piece.forced))
        after = [step for step, piece in pieces if step >= begun and piece.tokens and not piece.forced[-1]]
        if after:
            self.counts["stop sentences that were answered"] += 1
            self.steps_of_sentence += after[0] - begun
            if after[0] - begun != 1:
                self.faults.append(f"the stop sentence of {name} took {after[0] - begun} steps")

    def _answered(self, one: Asked, tokens: list[int]) -> None:
        """An answer that is whole has the form that was asked for."""
        close = self.tokenizer.special(THINK_END)
        if one.thinks and close not in tokens and one.form.name in MAY_BE_NONE:
            self.counts["ended while thinking"] += 1
            return
        behind = tokens[tokens.index(close) + 1 :] if one.thinks and close in tokens else tokens
        answer = self.tokenizer.decode(behind, skip_special=True).lstrip("\n")
        try:
            holds = one.form.holds(answer)
        except ValueError:
            holds = False
        self.counts[f"answers: {one.form.name}"] += 1
        self.counts["tool calls"] += answer.count("</tool_call>")
        if not holds:
            self.faults.append(f"{one.request.id} has to answer with {one.form.name}, and says {answer!r}")

    def _thought(self, one: Asked, tokens: list[int], forced: list[bool]) -> int:
        """Reasoning tokens, counted from the reply."""
        at = 0
        if not one.opened:
            while one.thinks and at < len(tokens) and not self.tokenizer.decode([tokens[at]]).strip():
                at += 1
            if not one.thinks or at == len(tokens) or tokens[at] != self.tokenizer.special(THINK):
                return 0
            at += 1
        ends = {self.tokenizer.special(THINK_END), self.tokenizer.eos_id, self.tokenizer.pad_id}
        stop = next(
            (n for n in range(at, len(tokens)) if forced[n] or tokens[n] in ends), len(tokens)
        )  # a reply that ends in its thinking ends there
        return stop - at


def _flags(pieces: Sequence[tuple[int, Piece]]) -> list[bool]:
    return [flag for _, piece in pieces for flag in piece.forced]
