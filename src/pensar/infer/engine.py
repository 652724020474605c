"""Engine: requests in, pieces out; every step admits what waits and adds one token to all that run.

The same engine serves users and makes rollouts: `load` swaps the weights in place, and the log-probabilities that it
reports are those of the model's own distribution, which is what a trainer computes.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from pensar.base.errors import ConfigError, ModelError
from pensar.infer.budget import Thinking
from pensar.infer.cache import Paged
from pensar.infer.request import (
    Completion,
    FinishReason,
    Ints,
    Piece,
    Request,
    SamplingParams,
    checked_prompt,
)
from pensar.infer.rows import RunningRows
from pensar.infer.sampling import Rules, logprobs, rules_of, sample, uniforms
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import check_tokenizer
from pensar.text.tokenizer import THINK, Tokenizer

__all__ = ["Completion", "Engine", "Piece", "Request", "SamplingParams"]

MAX_PREFILL_TOKENS = 8_192
"""Prompt tokens computed in one step, so that running replies are not held up; a longer prompt goes alone."""


class Engine:
    """Continuous batching over one model; not thread-safe.

    `slots` replies run at once, further requests wait in order of arrival. A request may use up to
    `max_tokens_per_slot` positions (at most and by default the model's max_positions). Without a tokenizer nothing
    but stop_ids and max_tokens ends a reply and there is no thinking.
    """

    def __init__(
        self,
        model: Qwen3,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 64,
        max_tokens_per_slot: int | None = None,
    ) -> None:
        if slots < 1:
            raise ConfigError(f"slots is {slots}; an engine needs at least 1")
        end_ids: tuple[int, ...] = ()
        thinking = None
        if tokenizer is not None:
            check_tokenizer(model.config, tokenizer.vocab_size)
            end_ids = (tokenizer.eos_id, tokenizer.pad_id)
            thinking = Thinking(tokenizer) if THINK in tokenizer.control_tokens else None
        self.model = model
        self.slots = slots
        self.max_positions = min(
            model.config.max_positions, max_tokens_per_slot or model.config.max_positions
        )
        weight = model.model.embed_tokens.weight
        self._device = weight.device
        self._cache = Paged(model.config, slots, self.max_positions, weight.device, weight.dtype)
        self._rows = RunningRows(slots, thinking, end_ids)
        self._can_think = thinking is not None
        self._waiting: deque[tuple[Request, Ints]] = deque()
        self._live: set[str] = set()
        self._finished: dict[str, tuple[Completion, int]] = {}
        self._rules: Rules | None = None
        # The model keeps its RoPE frequencies from the first use on: let that not be in inference mode.
        model.rope_tables(torch.zeros(1, 1, dtype=torch.int64, device=weight.device))

    @property
    def num_running(self) -> int:
        return self._rows.num

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises ModelError, naming value and limit, for one that the model cannot serve."""
        prompt = checked_prompt(request, self.model.config.vocab_size, self.max_positions)
        if request.id in self._live:
            raise ModelError(f"request id {request.id!r} is in use by an unfinished request; choose another")
        if request.params.thinking_budget is not None and not self._can_think:
            raise ModelError(
                f"request {request.id} has thinking_budget {request.params.thinking_budget}, but the tokenizer has no "
                f"{THINK}; leave the budget out"
            )
        self._live.add(request.id)
        self._waiting.append((request, prompt))

    def step(self) -> list[Piece]:
        """Admits waiting requests, adds a token to every running one, and returns what is new.

        A request admitted in this step gets two tokens. One with NaN in its logits ends with finish_reason "error"
        and leaves the others alone.
        """
        with self._inference():
            self._advance()
        pieces = []
        for name, (completion, reported) in self._finished.items():
            pieces.append(_piece(name, completion, reported, completion.finish_reason))
        self._finished.clear()
        for row in range(self._rows.num):
            state = self._rows.state[row]
            if state["length"] > state["reported"]:
                completion = self._rows.completion(row, "length", start=int(state["reported"]))
                state["reported"] = state["length"]
                pieces.append(_piece(self._rows.requests[row].id, completion, 0, None))
        return pieces

    def abort(self, name: str) -> Completion | None:
        """Takes out a request and returns what it has so far; None where no such request is unfinished."""
        for entry in self._waiting:
            if entry[0].id == name:
                self._waiting.remove(entry)
                self._live.discard(name)
                return Completion(tokens=[], logprobs=[], forced=[], finish_reason="abort")
        for row, request in enumerate(self._rows.requests):
            if request.id == name:
                completion = self._rows.completion(row, "abort")
                with torch.inference_mode():
                    self._release(row)
                return completion
        self._finished.pop(name, None)
        self._live.discard(name)
        return None

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """Serves `requests` to their ends; one that the engine refuses has finish_reason "error" and its reason.

        Requests that were submitted before go on meanwhile and are reported by the next `step`.
        """
        results: list[Completion | None] = [None] * len(requests)
        open_requests: dict[str, int] = {}
        for index, request in enumerate(requests):
            try:
                self.submit(request)
                open_requests[request.id] = index
            except ModelError as error:
                results[index] = Completion(
                    tokens=[], logprobs=[], forced=[], finish_reason="error", error=str(error)
                )
        try:
            with self._inference():
                while open_requests:
                    self._advance()
                    for name in [name for name in self._finished if name in open_requests]:
                        results[open_requests.pop(name)] = self._finished.pop(name)[0]
        finally:
            for name in open_requests:  # only when a step raised or was interrupted
                self.abort(name)
        return [result for result in results if result is not None]

    def load(self, weights: Mapping[str, Tensor] | Qwen3) -> None:
        """Copies weights of the same shapes into the model; what runs goes on as if it had always had them.

        The cache is computed anew for the running replies. Raises ModelError where names or shapes differ, before
        anything is changed.
        """
        new = dict(weights.named_parameters()) if isinstance(weights, Qwen3) else weights
        own = dict(self.model.named_parameters())
        if new.keys() != own.keys():
            odd = sorted(new.keys() ^ own.keys())
            raise ModelError(f"the new weights differ from the model in {len(odd)} names, such as {odd[0]}")
        for name, parameter in own.items():
            if new[name].shape != parameter.shape:
                raise ModelError(
                    f"{name} has shape {list(new[name].shape)} in the new weights and {list(parameter.shape)} in the "
                    "model; an engine keeps one shape, make a new one"
                )
        with torch.no_grad():
            for name, parameter in own.items():
                if new[name].data_ptr() != parameter.data_ptr():
                    parameter.copy_(new[name])
        with self._inference():
            self._recompute()

    def _advance(self) -> None:
        for batch in _batches(self._admit()):
            self._prefill(batch)
        if self._rows.num:
            self._decode()

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Inference mode, and evaluation mode for a model that is in training otherwise."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            if training:
                self.model.train()

    def _admit(self) -> list[tuple[Request, Ints]]:
        """Takes waiting requests, first come first served, as slots and the step's prompt tokens allow."""
        admitted: list[tuple[Request, Ints]] = []
        seen: set[bytes] = set()
        num_tokens = 0
        while self._waiting and self._rows.num + len(admitted) < self.slots:
            prompt = self._waiting[0][1]
            key = prompt.tobytes()
            if key not in seen:
                seen.add(key)
                num_tokens += len(prompt)
                if admitted and num_tokens > MAX_PREFILL_TOKENS:
                    break
            admitted.append(self._waiting.popleft())
        return admitted

    def _prefill(self, batch: list[tuple[Request, Ints]]) -> None:
        """Computes the prompts of `batch` (equal ones once) and draws the first token of each."""
        first = self._rows.num
        unique: dict[bytes, int] = {}
        prompts: list[Ints] = []
        source: list[int] = []
        for _, prompt in batch:
            key = prompt.tobytes()
            if key not in unique:
                unique[key] = len(prompts)
                prompts.append(prompt)
            source.append(unique[key])
        hidden = self._forward_prompts(first, prompts, source)
        for request, prompt in batch:
            self._rows.add(request, prompt)
        self._rules = None
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self._device)
        logits = self.model.logits(hidden[torch.arange(len(prompts), device=self._device), last])
        if len(prompts) < len(batch):
            logits = logits[torch.tensor(source, device=self._device)]
        rows = slice(first, first + len(batch))
        self._commit(rows, logits, rules_of(self._rows.state[rows], self._device))

    def _forward_prompts(self, first_row: int, prompts: Sequence[Ints], source: list[int]) -> Tensor:
        """Fills the cache rows from `first_row` on; hidden states [prompts, longest, D]."""
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        tokens = np.empty((len(prompts), longest), np.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            # Padding repeats the prompt's own token, so that a broken embedding spoils no other request.
            tokens[row, len(prompt) :] = prompt[-1]
        shared = None if len(source) == len(prompts) else source
        self._cache.begin_prefill(first_row, longest, shared, len(source))
        positions = torch.arange(longest, device=self._device).expand(len(prompts), longest)
        hidden: Tensor = self.model(torch.from_numpy(tokens).to(self._device), positions, self._cache)
        return hidden

    def _decode(self) -> None:
        rows = slice(0, self._rows.num)
        state = self._rows.state[rows]
        if self._rules is None:
            self._rules = rules_of(state, self._device)
        positions = state["position"].copy()
        tokens = torch.from_numpy(state["last"].copy()).to(self._device)
        self._cache.begin_decode(positions)
        hidden = self.model(
            tokens[:, None], torch.from_numpy(positions).to(self._device)[:, None], self._cache
        )
        state["position"] += 1
        self._commit(rows, self.model.logits(hidden[:, 0]), self._rules)

    def _commit(self, rows: slice, logits: Tensor, rules: Rules) -> None:
        """Draws a token for each of `rows` and retires the replies that this ends."""
        state = self._rows.state[rows]
        uniform = torch.from_numpy(uniforms(state["seed"], state["length"])).to(self._device)
        draw = sample(logits, rules, uniform)
        ids, forced, stopped = self._rows.decide(rows, draw.ids.cpu().numpy())
        wanted = None
        if state["logprobs"].any():
            final = torch.from_numpy(ids).to(self._device) if forced.any() else draw.ids
            wanted = logprobs(logits, final, draw.log_total).cpu().numpy()
        sound = draw.sound.cpu().numpy()
        full = self._rows.append(rows, ids, forced, wanted)
        ended = stopped | full | ~sound
        for offset in np.flatnonzero(ended)[::-1].tolist():  # downwards: the last row fills a gap
            row = rows.start + offset
            if not sound[offset]:
                self._fail(row)
            else:
                self._finish(row, "stop" if stopped[offset] else "length")

    def _fail(self, row: int) -> None:
        state = self._rows.state[row]
        state["length"] -= 1  # the token drawn from NaN is none
        reason = (
            f"the model gave NaN or infinite logits at position {int(state['position'])} of request "
            f"{self._rows.requests[row].id}; check the weights, or the precision they are kept in"
        )
        self._cache.wipe(row)
        self._finish(row, "error", reason)

    def _finish(self, row: int, reason: FinishReason, error: str | None = None) -> None:
        name = self._rows.requests[row].id
        reported = int(self._rows.state[row]["reported"])
        self._finished[name] = (self._rows.completion(row, reason, error=error), reported)
        self._release(row)

    def _release(self, row: int) -> None:
        self._live.discard(self._rows.requests[row].id)
        last = self._rows.release(row)
        if row != last:
            self._cache.move(last, row, int(self._rows.state[row]["position"]))
        self._rules = None

    def _recompute(self) -> None:
        """Fills the cache anew for the running rows."""
        row = 0
        while row < self._rows.num:
            contexts = [self._rows.context(row)]
            while row + len(contexts) < self._rows.num:
                context = self._rows.context(row + len(contexts))
                longest = max(len(context), *(len(other) for other in contexts))
                if longest * (len(contexts) + 1) > MAX_PREFILL_TOKENS:
                    break
                contexts.append(context)
            self._forward_prompts(row, contexts, list(range(len(contexts))))
            row += len(contexts)


def _batches(admitted: list[tuple[Request, Ints]]) -> Iterator[list[tuple[Request, Ints]]]:
    """Requests of similar prompt lengths together, equal prompts side by side."""
    batch: list[tuple[Request, Ints]] = []
    for entry in sorted(admitted, key=lambda entry: (len(entry[1]), entry[1].tobytes())):
        if batch and len(entry[1]) > 1.5 * len(batch[0][1]) + 32:
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def _piece(name: str, completion: Completion, start: int, reason: FinishReason | None) -> Piece:
    return Piece(
        id=name,
        tokens=completion.tokens[start:],
        logprobs=completion.logprobs[start:] if completion.logprobs else None,
        forced=completion.forced[start:],
        finish_reason=reason,
        reasoning_tokens=completion.num_reasoning_tokens,
        error=completion.error,
    )
