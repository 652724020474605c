"""Beam search over HTTP, in vLLM's words: `use_beam_search`, `n` beams, `length_penalty`, `early_stopping`.

A search asks the engine again and again for the leading next tokens of its beams, beside everything else that runs; the
prefix cache keeps what they share. `usage` counts every token that a beam was given, also of beams that were left.
"""

import time
from collections.abc import Callable, Sequence

import msgspec

from pensar.base.errors import ModelError
from pensar.infer.beam import Beam, BeamSearch
from pensar.infer.engine import Completion, Piece, Request
from pensar.serve.failure import invalid, unsupported
from pensar.serve.reply import Reply
from pensar.serve.service import Service
from pensar.serve.tally import Tally, totals_of
from pensar.serve.wire import ChatRequest, CompletionRequest, Usage, usage
from pensar.serve.worker import Job

MAX_BEAM_TOKENS = 16_384
"""Beams times max_tokens of one prompt."""

HARMLESS = {
    "temperature": (0, 1),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
}
"""Values that change nothing: beams are compared by the model's own log-probabilities."""
CONTRARY = (
    *HARMLESS,
    "stream",
    "stop",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "bad_token_ids",
    "structured_outputs",
    "thinking_budget",
    "thinking_token_budget",
    "min_thinking",
    "adaptive_budget",
)
"""Fields that a search cannot honour."""


def check_beams(asked: ChatRequest | CompletionRequest) -> bool:
    """Whether beam search is asked for; ApiError (400) for what cannot be had with it, or only with it."""
    if not asked.use_beam_search:
        for name in ("length_penalty", "early_stopping"):
            if getattr(asked, name) is not None:
                raise invalid(f"{name} is for beam search; send use_beam_search true as well.", name)
        return False
    for name in CONTRARY:
        value = getattr(asked, name, None)
        scored = name == "logprobs" and type(value) is int  # 0 of the likeliest: those of its own tokens
        if (value or scored) and value not in HARMLESS.get(name, ()):
            raise unsupported(name, f"{name} cannot be had with use_beam_search; leave out one of them.")
    if isinstance(asked, ChatRequest):
        kind = None if asked.response_format is None else asked.response_format.type
        if kind not in (None, "text"):
            raise unsupported(
                "response_format", "response_format cannot be had with use_beam_search; leave out one."
            )
        if asked.tools and asked.tool_choice not in (None, "auto", "none"):
            raise unsupported("tool_choice", "tool_choice cannot be had with use_beam_search; leave out one.")
    wanted = getattr(asked, "max_completion_tokens", None) or asked.max_tokens or 0
    if (asked.n or 1) * wanted > MAX_BEAM_TOKENS:
        raise invalid(
            f"n {asked.n} times max_tokens {wanted} is over the limit of {MAX_BEAM_TOKENS:,} for beam search; lower "
            "one of them.",
            "max_tokens",
        )
    return True


class BeamAnswer:
    """One request in work by a search for each of its prompts; `replies` has their beams, the best first."""

    def __init__(
        self,
        service: Service,
        requests: Sequence[Request],
        asked: ChatRequest | CompletionRequest,
        name: str,
        make_reply: Callable[[Request], Reply],
    ) -> None:
        """Of `requests`, one for each prompt, max_tokens is lowered to what the limit allows. Raises ApiError (400)."""
        self._service, self.id, self._make_reply = service, name, make_reply
        most = MAX_BEAM_TOKENS // (asked.n or 1)
        self.requests = [
            msgspec.structs.replace(
                each,
                params=msgspec.structs.replace(each.params, max_tokens=min(each.params.max_tokens, most)),
            )
            for each in requests
        ]
        tokenizer = service.tokenizer
        ends = () if asked.ignore_eos else (tokenizer.eos_id, tokenizer.pad_id)
        try:
            self._searches = [
                BeamSearch(
                    each,
                    num_beams=asked.n or 1,
                    end_ids=ends,
                    length_penalty=1.0 if asked.length_penalty is None else asked.length_penalty,
                    early_stopping=asked.early_stopping or False,
                )
                for each in self.requests
            ]
        except ModelError as error:
            raise invalid(f"{error}.", "n") from error
        self.replies: list[list[Reply]] = [[] for _ in requests]
        self._tallies = [Tally(finish_reason="abort") for _ in requests]
        self._job: Job | None = None
        """The round that is not counted yet, and how many sequences of it each search has."""
        self._groups: list[int] = []
        self._started = time.monotonic()
        self._begun = self._settled = False

    def usage(self) -> Usage:
        """What the search has used."""
        lengths = [len(request.tokens) for request in self.requests]
        return usage(**msgspec.structs.asdict(totals_of(lengths, self._tallies)))

    async def finish(self) -> None:
        """Searches to the end; ApiError where the engine takes nothing or fails."""
        with self._service.worker.held():
            while any(asked := [self._in_time(*pair) for pair in self._pairs()]):
                await self._advance(asked)
        for search, request, replies, tally in zip(
            self._searches, self.requests, self.replies, self._tallies, strict=True
        ):
            replies.extend(self._written(request, beam) for beam in search.results())
            whole = all(beam.ended for beam in search.results())
            tally.finish_reason = "stop" if whole else "length"

    def abandon(self) -> None:
        """Counts a client that left."""
        self._service.metrics.aborted.add()

    def close(self) -> None:
        """Takes what is left out of the engine and has the usage recorded, if there is any; may be called twice."""
        if self._settled or not self._begun:
            return
        self._settled = True
        if self._job is None:
            self._settle()
        else:  # in the middle of a round, which counts for what the engine has drawn of it
            self._job.abort()
            self._job.when_released(self._settle)

    def _settle(self) -> None:
        if self._job is not None:
            self._count(self._job)
        lengths = [len(request.tokens) for request in self.requests]
        totals = totals_of(lengths, self._tallies)
        self._service.count(totals, time.monotonic() - self._started)
        if self._service.meter is not None:
            model = self._service.config.model_name
            self._service.meter.write(totals.record(self.requests[0], self._tallies, self.id, model))

    def _count(self, job: Job) -> None:
        """Adds a round, of which `self._groups` says how many sequences each search has."""
        tallies = iter(job.tallies)
        for number, total in zip(self._groups, self._tallies, strict=True):
            own = [next(tallies) for _ in range(number)]
            if own and not total.completion_tokens:
                total.cached_tokens = own[0].cached_tokens
            total.completion_tokens += sum(tally.completion_tokens for tally in own)
            total.reasoning_tokens += sum(tally.reasoning_tokens for tally in own)
            total.version = max([total.version, *(tally.version for tally in own)])
            if any(tally.finish_reason == "error" for tally in own):
                total.finish_reason = "error"

    # ------------------------------------------------------------ a round

    def _pairs(self) -> list[tuple[BeamSearch, Request]]:
        return list(zip(self._searches, self.requests, strict=True))

    def _in_time(self, search: BeamSearch, request: Request) -> list[Request]:
        """What a search asks for next; nothing, and the search is over, when its time has passed."""
        if request.timeout_seconds is None:
            return search.requests()
        left = request.timeout_seconds - (time.monotonic() - self._started)
        if left <= 0:
            search.cut()
        return [msgspec.structs.replace(each, timeout_seconds=left) for each in search.requests()]

    async def _advance(self, asked: list[list[Request]]) -> None:
        """One token more for every beam of every search."""
        requests = [each for group in asked for each in group]
        self._groups = [len(group) for group in asked]
        self._job = self._service.worker.submit(requests, held=self._begun)
        self._begun = True
        completions = await self._completions(len(requests))
        self._count(self._job)
        self._job = None
        for search, group in zip(self._searches, asked, strict=True):
            own, completions = completions[: len(group)], completions[len(group) :]
            if group:
                search.take(own)

    async def _completions(self, count: int) -> list[Completion]:
        """What the engine makes of a round."""
        assert self._job is not None
        found: dict[int, Completion] = {}
        while len(found) < count:
            for part in await self._job.next():
                if part.piece.finish_reason is not None:
                    found[part.index] = _completion(part.piece)
        return [found[index] for index in range(count)]

    def _written(self, request: Request, beam: Beam) -> Reply:
        reply = self._make_reply(request)
        reply.feed(
            Piece(
                id=request.id,
                tokens=beam.tokens,
                logprobs=None,
                forced=[False] * len(beam.tokens),
                finish_reason="stop" if beam.ended else "length",
                reasoning_tokens=0,
            )
        )
        return reply


def _completion(piece: Piece) -> Completion:
    """Of a request for one token, which comes in one piece."""
    return Completion(
        tokens=piece.tokens,
        logprobs=piece.logprobs or [],
        forced=piece.forced,
        finish_reason=piece.finish_reason or "length",
        top_logprobs=piece.top_logprobs or [],
    )
