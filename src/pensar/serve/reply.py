"""One choice's reply on its way out: tokens to text, text to thinking, answer and tool calls, cut at stop strings."""

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from pensar.infer.engine import Piece
from pensar.infer.stops import StopStrings
from pensar.serve.tally import Tally
from pensar.serve.wire import FinishReason, TokenLogprob, TopLogprob
from pensar.text.conversation import ToolCall
from pensar.text.reply import Delta, ReplyParser
from pensar.text.tokenizer import StreamDecoder, Tokenizer


@dataclass
class Accounts(Tally):
    """What a choice has cost so far, as far as its client was told."""

    logprobs: list[TokenLogprob] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    """The log-probabilities alone, of the whole reply."""
    forced: list[bool] = field(default_factory=list)


class Reply:
    """Feeds on engine pieces and gives deltas; stop strings act on the answer, not on thinking or tool calls.

    `parser` None is for a continued text, in which nothing but characters counts. Without `tools` on offer a tool
    call is the model's own text and stays text. `prompt` are the tokens that log-probabilities of the prompt are of.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        parser: ReplyParser | None,
        stops: Sequence[str] = (),
        *,
        tools: bool = False,
        prompt: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._prompt = tokenizer, prompt
        self._decoder = StreamDecoder(tokenizer, skip_special=True)
        self._parser = parser
        self._stops = StopStrings(stops)
        self._tools = tools
        self.accounts = Accounts()
        self._scored: Piece | None = None
        self.reasoning = ""
        self.content = ""
        self.tool_calls: list[ToolCall] = []
        self.finish_reason: FinishReason | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the reply while the engine still goes on."""
        return self._stops.hit

    def feed(self, piece: Piece) -> list[Delta]:
        """The deltas that `piece` completes; after the last one `finish_reason` is set."""
        self._count(piece)
        ended = piece.finish_reason is not None
        text = self._decoder.feed(piece.tokens) + (self._decoder.close() if ended else "")
        deltas = list(self._kept(self._read(text, ended)))
        if ended and not self._stops.hit:
            deltas.extend(self._say(self._stops.close()))
        if self._stops.hit:
            self.finish_reason = self.accounts.finish_reason = "stop"
        elif piece.finish_reason in ("length", "deadline"):  # cut off, by its tokens or by its time
            self.finish_reason = "length"
        elif ended:
            self.finish_reason = "tool_calls" if self.tool_calls else "stop"
        return deltas

    def _read(self, text: str, ended: bool) -> list[Delta]:
        if self._parser is None:
            return [Delta("content", text)]
        return self._parser.feed(text) + (self._parser.close() if ended else [])

    def _kept(self, deltas: Sequence[Delta]) -> Iterator[Delta]:
        """The deltas up to a stop string, kept for the whole reply as well."""
        for delta in deltas:
            if self._stops.hit:
                return
            if delta.tool_call is not None and self._tools:
                call = msgspec.structs.replace(delta.tool_call, id=f"call_{uuid.uuid4().hex[:24]}")
                self.tool_calls.append(call)
                yield Delta("tool_call", tool_call=call)
            elif delta.tool_call is not None:
                yield from self._say(self._stops.feed(self._written(delta.tool_call)))
            elif delta.kind == "reasoning":
                self.reasoning += delta.text
                yield delta
            else:
                yield from self._say(self._stops.feed(delta.text))

    def _say(self, text: str) -> Iterator[Delta]:
        if text:
            self.content += text
            yield Delta("content", text)

    def _written(self, call: ToolCall) -> str:
        inner = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        return ("\n" if self.content else "") + f"<tool_call>\n{inner}\n</tool_call>"

    def _count(self, piece: Piece) -> None:
        self.accounts.add(piece)
        if piece.logprobs is not None:
            self.accounts.values += piece.logprobs
            self.accounts.forced += piece.forced
        self.accounts.logprobs += self._entries(piece.tokens, piece.logprobs, piece.top_logprobs)
        if piece.prompt_logprobs is not None:
            self._scored = piece

    def scored_prompt(self) -> list[TokenLogprob]:
        """The entries of the prompt's tokens, where they were asked for; that of the first says nothing.

        Of a long prompt they take a while to make: do it where no other reply has to wait.
        """
        if self._scored is None:
            return []
        return self._entries(self._prompt, self._scored.prompt_logprobs, self._scored.prompt_top_logprobs)

    def _entries(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float] | None,
        tops: Sequence[Sequence[tuple[int, float]]] | None,
    ) -> list[TokenLogprob]:
        entries = []
        for token, logprob, top in zip(tokens, logprobs or (), tops or [[]] * len(tokens), strict=False):
            own, likely = self._likely(token, logprob), [self._likely(*entry) for entry in top]
            entries.append(
                TokenLogprob(token=own.token, logprob=logprob, bytes=own.bytes, top_logprobs=likely)
            )
        return entries

    def _likely(self, token: int, logprob: float) -> TopLogprob:
        data = self._tokenizer.decode_bytes([token])
        return TopLogprob(token=data.decode("utf-8", "replace"), logprob=logprob, bytes=list(data))
