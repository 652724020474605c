"""llama.cpp as a backend, for small machines: its server in this process (xllamacpp) or elsewhere, over a GGUF file.

Read in llama.cpp b11549: tools/server/README.md and server-context.cpp. The native /completion takes and gives token
ids. It is asked without streaming: a stream leaves out the ids of tokens that end inside a character. So a reply comes
in one piece, and a token of `stop_ids` cuts it when it is there; `ignore_eos` bans the ends of turn and text. Such
tokens have no log-probability either; NaN stands for it. The sampler is llama.cpp's, so equal seeds give other draws
than ours; greedy replies are the same.
"""

import json
import math
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from pensar.base.errors import ConfigError, ModelError, RunError
from pensar.infer.backends.remote import Delta, Remote
from pensar.infer.backends.streams import Streams, error_text
from pensar.infer.request import FinishReason, Request
from pensar.infer.sync import checked_weights
from pensar.model.gguf import export_gguf
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import load_model, save_model
from pensar.text.tokenizer import Tokenizer

SAMPLERS = ("penalties", "top_k", "top_p", "min_p")
"""The order that ours has, but for the temperature, which comes first."""
FINISHES: Mapping[str, FinishReason] = {"eos": "stop", "word": "stop", "limit": "length"}
UNKNOWN = ("thinking_budget", "adaptive_budget", "min_thinking", "min_tokens", "bad_ids", "prompt_logprobs")


class LlamaCpp(Remote):
    """A model directory served by llama.cpp in this process, `slots` replies at a time of `positions` each.

    `kind` is the type of the matrices, a name of `pensar.model.ggml.KINDS`. Needs `pip install xllamacpp`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kind: str = "q8_0",
        file: Path | None = None,
        slots: int = 4,
        positions: int = 4_096,
        threads: int = 1,
        exact: bool = False,
    ) -> None:
        """`file` is where the GGUF file is kept, and taken from if it is there; by default a temporary one.

        `exact` attends in float32, not in float16.
        """
        self._folder, self._kind = Path(folder), kind
        self._scratch = tempfile.TemporaryDirectory(prefix="pensar-gguf-")
        self._slots, self._positions, self._threads, self._exact = slots, positions, threads, exact
        path = Path(self._scratch.name) / "model.gguf" if file is None else Path(file)
        if not path.is_file():
            export_gguf(self._folder, path, kind)
        self._server = self._started(path)
        streams = Streams(self._server.listening_address, connections=slots)
        meta, tokenizer = _meta(streams), Tokenizer.load(self._folder)
        super().__init__(
            streams,
            Completion(tokenizer),
            tokenizer,
            vocab_size=int(meta["n_vocab"]),
            max_positions=min(positions, int(meta["n_ctx_train"])),
        )

    def load(self, weights: Mapping[str, Tensor] | Qwen3) -> None:
        """Writes the weights as a file and starts the server anew; only between requests."""
        if self._replies:
            raise RunError(
                f"llama.cpp cannot take new weights while {len(self._replies)} requests are under way; wait for them"
            )
        model = load_model(self._folder)
        new = checked_weights(model, weights)
        source = Path(self._scratch.name) / f"version-{self.version + 1}"
        model.load_state_dict({name: value.detach() for name, value in new.items()}, assign=True)
        tokenizer = Tokenizer.load(self._folder)
        save_model(model, source, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        tokenizer.save(source)
        path = export_gguf(source, source / "model.gguf", self._kind)
        self._server = None  # its threads end with it
        self._server = self._started(path)
        self.streams = Streams(self._server.listening_address, connections=self._slots)
        self.version += 1

    def load_adapter(self, name: str, folder: Path) -> None:
        raise ConfigError(
            f"adapter {name!r}: llama.cpp takes adapters at its start only; merge it into the model, or use our engine"
        )

    def unload_adapter(self, name: str) -> None:
        raise ModelError(f"no adapter {name!r} is loaded; loaded: none")

    def close(self) -> None:
        """Ends the server and removes what was written for it."""
        self._server = None
        with suppress(OSError):
            self._scratch.cleanup()

    def _started(self, path: Path) -> Any:
        try:
            import xllamacpp
        except ImportError as error:
            raise ConfigError(
                "the llama.cpp backend needs xllamacpp; install it by: pip install xllamacpp"
            ) from error
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel, params.n_ctx = self._slots, self._slots * self._positions
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._threads
        params.warmup, params.n_gpu_layers = False, 0
        if self._exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return xllamacpp.Server(params)


class LlamaServer(Remote):
    """A running llama-server (`llama-server -m FILE.gguf -np SLOTS`)."""

    def __init__(self, address: str, tokenizer: Tokenizer | None = None, *, api_key: str = "") -> None:
        streams = Streams(address, api_key=api_key)
        meta = _meta(streams)
        super().__init__(
            streams,
            Completion(tokenizer),
            tokenizer,
            vocab_size=int(meta["n_vocab"]),
            max_positions=int(meta.get("n_ctx") or meta["n_ctx_train"]),
        )

    def load(self, weights: Mapping[str, Tensor] | Qwen3) -> None:
        raise RunError("a running llama-server cannot take new weights; start it with another file")

    def load_adapter(self, name: str, folder: Path) -> None:
        raise ConfigError(f"adapter {name!r}: llama-server takes adapters at its start only, by --lora")

    def unload_adapter(self, name: str) -> None:
        raise ModelError(f"no adapter {name!r} is loaded; loaded: none")


class Completion:
    """The native /completion."""

    path = "/completion"

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer = tokenizer

    def body(self, request: Request) -> dict[str, Any]:
        params = request.params
        for name in UNKNOWN:
            if getattr(params, name):
                raise ModelError(
                    f"request {request.id} has {name}, which llama.cpp does not know; leave it out"
                )
        if params.thinking_budget is not None or request.adapter:
            name = "an adapter" if request.adapter else "thinking_budget 0"
            raise ModelError(f"request {request.id} has {name}, which llama.cpp does not know; leave it out")
        body: dict[str, Any] = {
            "prompt": [int(token) for token in request.tokens],
            "n_predict": params.max_tokens,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "seed": params.seed % 2**32,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "repeat_penalty": params.repetition_penalty,
            "repeat_last_n": len(request.tokens) + params.max_tokens,
            "stop": list(params.stop),
            "ignore_eos": params.ignore_eos,
            "samplers": ["temperature", *SAMPLERS] if params.temperature else ["penalties", "temperature"],
            "logit_bias": [[token, bias] for token, bias in params.logit_bias],
            "return_tokens": True,
            "stream": False,
        }
        if params.logprobs or params.top_logprobs:
            body["n_probs"] = max(1, params.top_logprobs)
        if params.grammar is not None:
            body |= _grammar(request)
        return body

    def delta(self, request: Request, content: dict[str, Any], begun: bool) -> Delta:
        params = request.params
        delta = Delta(
            tokens=list(content["tokens"]), finish_reason=FINISHES.get(content["stop_type"], "error")
        )
        delta.cached_tokens = int((content.get("timings") or {}).get("cache_n", 0))
        for entry in self._told(delta.tokens, content.get("completion_probabilities") or ()):
            delta.logprobs.append(math.nan if entry is None else float(entry["logprob"]))
            if params.top_logprobs:
                tops = () if entry is None else entry["top_logprobs"]
                delta.tops.append([(int(top["id"]), float(top["logprob"])) for top in tops])
        stop = next((at for at, token in enumerate(delta.tokens) if token in params.stop_ids), None)
        if stop is not None:
            for values in (delta.tokens, delta.logprobs, delta.tops):
                del values[stop + 1 :]
            delta.finish_reason = "stop"
        return delta

    def _told(
        self, tokens: Sequence[int], entries: Sequence[dict[str, Any]]
    ) -> Iterator[dict[str, Any] | None]:
        """What is told of each token; nothing of those after which the text ends inside a character."""
        if not entries:
            return
        text, left = b"", deque(entries)
        for token in tokens:
            if self._tokenizer is not None:
                text = (text + self._tokenizer.decode_bytes([token], skip_special=True))[-4:]
            known = left and left[0]["id"] == token and not ends_inside_a_character(text)
            yield left.popleft() if known else None


def ends_inside_a_character(text: bytes) -> bool:
    """By llama.cpp's rule: one of the last bytes begins a character that is longer than what follows."""
    for back, byte in enumerate(reversed(text[-4:]), start=1):
        length = 2 if byte >> 5 == 0b110 else 3 if byte >> 4 == 0b1110 else 4 if byte >> 3 == 0b11110 else 0
        if back < length:
            return True
    return False


def _grammar(request: Request) -> dict[str, Any]:
    grammar = request.params.grammar
    assert grammar is not None
    if grammar.kind == "json_schema":
        return {"json_schema": json.loads(grammar.text)}
    if grammar.kind == "json_object":
        return {"json_schema": {}}
    if grammar.kind == "ebnf":
        return {"grammar": grammar.text}
    raise ModelError(
        f"request {request.id} has a grammar of kind {grammar.kind!r}, which llama.cpp does not know"
    )


def _meta(streams: Streams) -> dict[str, Any]:
    status, answer = streams.ask("GET", "/v1/models")
    if status != 200:
        raise RunError(f"{streams.address}/v1/models answered {status}: {error_text(answer)}")
    found: dict[str, Any] = answer["data"][0]["meta"]
    return found
