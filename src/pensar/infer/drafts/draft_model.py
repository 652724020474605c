"""DraftModel: a smaller model with the same tokenizer that writes ahead, such as the student for its teacher.

It has a runner and pages of its own. What of a text is in its cache is known by the tokens that it was fed: guesses
that were kept need not be computed again, others are written over.
Shape legend: N tokens of all texts, R texts, P pages of the longest, S logits asked for, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pensar.infer.drafts.proposer import Asked, Drawing, States
from pensar.infer.pages import PagePool
from pensar.infer.request import Ints
from pensar.infer.rows import RunningRows
from pensar.infer.step import PAGE, Runner, StepBatch
from pensar.infer.storage import cache_pages
from pensar.infer.torch_runner import TorchRunner
from pensar.model.qwen3 import Qwen3

STEP_TOKENS = 2_048
"""Tokens of texts that it reads in one step; whose text is longer waits for its guesses."""


class _Text:
    """One request's: its pages, the tokens that belong into them, and how many of these are there already."""

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.num = self.computed = 0
        self._tokens: Ints = np.zeros(64, np.int64)

    @property
    def new(self) -> Ints:
        """Tokens that are to be computed."""
        return self._tokens[self.computed : self.num]

    def keep_equal(self, text: Ints) -> None:
        """Forgets what is not the beginning of `text`, its last token too: that one's logits are wanted."""
        kept = min(self.computed, len(text) - 1)
        wrong = np.flatnonzero(self._tokens[:kept] != text[:kept])
        self.num = self.computed = int(wrong[0]) if len(wrong) else kept

    def add(self, tokens: Ints) -> None:
        if self.num + len(tokens) > len(self._tokens):
            self._tokens = np.concatenate((self._tokens, np.zeros(self.num + len(tokens), np.int64)))
        self._tokens[self.num : self.num + len(tokens)] = tokens
        self.num += len(tokens)


class DraftModel:
    """`slots` texts of up to `max_tokens` are cached, or `cache_tokens` of all together; others get no guesses."""

    wants_states = False

    def __init__(
        self,
        model: Qwen3 | Runner,
        *,
        slots: int = 64,
        max_tokens: int | None = None,
        cache_tokens: int | None = None,
        step_tokens: int = STEP_TOKENS,
    ) -> None:
        self.runner: Runner = TorchRunner(model) if isinstance(model, Qwen3) else model
        most = self.runner.config.max_positions
        self.max_positions = min(most, max_tokens or most)
        self._pool = PagePool(cache_pages(self.runner, slots, self.max_positions, cache_tokens))
        self._reserved = 1
        self._step_tokens = step_tokens
        self._texts: dict[str, _Text] = {}
        """The longest unused first."""

    def propose(self, asked: Asked) -> list[Ints]:
        with Drawing(asked) as drawing:
            texts, logits = self._begin(asked, drawing)
            while texts:
                on, ids = drawing.take(logits)
                texts = [text for text, stays in zip(texts, on.tolist(), strict=True) if stays]
                for text, token in zip(texts, ids, strict=True):
                    text.add(token[None])
                if texts:
                    logits = self._run(texts)
            return drawing.guesses()

    def observe(self, rows: RunningRows, states: Sequence[States]) -> None:
        """Texts say all that there is to know."""

    def forget(self, name: str) -> None:
        text = self._texts.pop(name, None)
        if text is not None:
            self._pool.release(text.pages)

    # ------------------------------------------------------------ inside

    def _begin(self, asked: Asked, drawing: Drawing) -> tuple[list[_Text], Tensor]:
        """Reads what was added to the texts: those whose next token can be guessed now, and its logits."""
        names = [asked.rows.requests[row].id for row in asked.chosen.tolist()]
        read: dict[int, _Text] = {}
        ready: list[int] = []
        left = self._step_tokens
        for index, (name, row, count) in enumerate(zip(names, asked.chosen, asked.counts, strict=True)):
            whole = asked.rows.text(int(row))
            if len(whole) + count > self.max_positions or left <= 0:
                continue
            text = self._texts.pop(name) if name in self._texts else _Text()
            self._texts[name] = text
            text.keep_equal(whole)
            if not self._give_pages(text, len(whole) + int(count), names):
                continue
            text.add(whole[text.num : text.num + left])
            left -= len(text.new)
            read[index] = text
            if text.num == len(whole):
                ready.append(index)
        logits_RV = self._run(list(read.values()))
        at = [place for place, index in enumerate(read) if index in ready]
        drawing.drop(~np.isin(drawing.going, ready))
        return [read[index] for index in ready], logits_RV[at]

    def _run(self, texts: Sequence[_Text]) -> Tensor:
        """Computes the new tokens of each text; the logits after the last of each."""
        if not texts:
            return torch.zeros(0, self.runner.config.vocab_size)
        rows = [(text.new, text.num - len(text.new), text.pages) for text in texts]
        logits_RV = self.runner.run(StepBatch.of(rows, last=True)).logits_SV
        for text in texts:
            text.computed = text.num
        return logits_RV

    def _give_pages(self, text: _Text, length: int, asking: Sequence[str]) -> bool:
        """Pages for `length` tokens, those of the longest unused texts if need be; False where there are none."""
        need = -(-length // PAGE) - len(text.pages)
        if need > self._pool.available:
            for name in [name for name in self._texts if name not in asking]:
                self.forget(name)
                if need <= self._pool.available:
                    break
            else:
                return False
        if need > 0:
            pages = self._pool.take(need)
            text.pages += pages
            if max(pages) >= self._reserved:
                self._reserved = min(self._pool.num_pages, max(2 * self._reserved, max(pages) + 1))
                self.runner.reserve(self._reserved)
        return True
