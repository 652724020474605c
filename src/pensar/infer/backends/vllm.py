"""vLLM as a backend: its OpenAI-compatible server, with token ids in and out.

Read in vLLM 0.32.0: entrypoints/openai/completion/protocol.py and serving.py (/v1/completions with a prompt of ids,
return_token_ids, return_tokens_as_token_ids, thinking_token_budget), entrypoints/rl/online/api_router.py (/pause,
/resume, /update_weights), entrypoints/serve/dev/rpc (/collective_rpc), entrypoints/serve/lora. Versions differ: old
ones give ids only in place of the texts of log-probabilities, so these are asked for; the flags of /pause have changed,
so both kinds are sent. A server for weight sync is started with VLLM_SERVER_DEV_MODE=1, one for
adapters with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora, and one for thinking budgets with

    --reasoning-parser qwen3 --reasoning-config '{"reasoning_start_str": "<think>", "reasoning_end_str": SENTENCE}'

where SENTENCE is the stop sentence with its closing tag.
"""

import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pensar.base.errors import ConfigError, ModelError, RunError
from pensar.infer.backends.remote import ANY, Delta, Remote
from pensar.infer.backends.streams import Streams, error_text, wait_until_up
from pensar.infer.request import FinishReason, Grammar, Request, TopLogprobs
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import read_config, save_model
from pensar.text.tokenizer import Tokenizer

TOKEN = "token_id:"
TELLS_IDS = (0, 10, 2)
"""The first version with return_token_ids."""
LEAST_LOGPROB = -9999.0
"""What vLLM writes for minus infinity."""
FINISHES: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class Vllm(Remote):
    """A running vLLM server; `model` is the name that it serves, by default its first.

    With `folder`, the model directory that it was started with, prompts are checked against the vocabulary and `load`
    knows the shape of weights that come by name. `shared` is a folder that the server sees as well, for new weights.
    """

    def __init__(
        self,
        address: str,
        tokenizer: Tokenizer | None = None,
        *,
        model: str = "",
        folder: Path | None = None,
        shared: Path | None = None,
        api_key: str = "",
        connections: int = 256,
        start_seconds: float = 0.0,
    ) -> None:
        streams = Streams(address, api_key=api_key, connections=connections)
        if start_seconds:
            wait_until_up(streams, "/health", start_seconds)
        served = _served(streams, model)
        config = None if folder is None else read_config(folder)
        super().__init__(
            streams,
            Completions(served["id"], tells_ids=_version(streams) >= TELLS_IDS),
            tokenizer,
            vocab_size=ANY if config is None else config.vocab_size,
            max_positions=int(served.get("max_model_len") or ANY),
        )
        self._config, self._shared = config, shared
        self._num_saved = 0

    def load(self, weights: Mapping[str, Tensor] | Qwen3) -> None:
        """New weights through a directory in `shared` that the server reads; requests wait meanwhile.

        What runs goes on with the keys and values of the old weights; nothing of them is reused for new requests. A
        token that was under way when the server paused may bear the new version.
        """
        if self._shared is None:
            raise ConfigError(
                "this backend has no shared folder to hand weights over in; give shared=, a path that the vLLM server "
                "sees as well"
            )
        self._num_saved += 1
        folder = Path(self._shared) / f"weights-{self._num_saved}"
        save_model(self._module(weights), folder)
        asked = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._paused(lambda: self._post("/collective_rpc", asked, "VLLM_SERVER_DEV_MODE=1"))
        self.version += 1

    def transfer(self, info: Mapping[str, Any], send: Callable[[], None] | None = None) -> None:
        """New weights through vLLM's own transfer engine, which --weight-transfer-config chooses.

        `info` is that engine's update_info (for NCCL the names, types and shapes); `send` broadcasts at the same time
        as the server receives.
        """

        def whole() -> None:
            # Older servers have one call for all of it.
            begins = self.streams.ask("POST", "/start_weight_update")[0] != 404
            with ThreadPoolExecutor(1) as beside:
                sent = None if send is None else beside.submit(send)
                self._post("/update_weights", {"update_info": dict(info)}, "--weight-transfer-config")
                if sent is not None:
                    sent.result()
            if begins:
                self._post("/finish_weight_update", {}, "--weight-transfer-config")

        self._paused(whole)
        self.version += 1

    def load_adapter(self, name: str, folder: Path) -> None:
        """The server reads `folder` itself; an adapter of the same name is replaced."""
        asked = {"lora_name": name, "lora_path": str(folder)}
        status, answer = self.streams.ask("POST", "/v1/load_lora_adapter", asked | {"load_inplace": True})
        if status == 400 and "already" in error_text(answer):  # before load_inplace
            self.unload_adapter(name)
            status, answer = self.streams.ask("POST", "/v1/load_lora_adapter", asked)
        _refuse(
            status,
            answer,
            f"adapter {name!r} in {folder}",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora",
        )

    def unload_adapter(self, name: str) -> None:
        status, answer = self.streams.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        _refuse(status, answer, f"adapter {name!r}", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora")

    def _paused(self, work: Callable[[], None]) -> None:
        """Does `work` while no token is drawn and requests are kept, then forgets the prefixes of old weights."""
        # mode is of 0.19 and later, wait_for_inflight_requests of those before, which cannot keep requests.
        flags = "mode=keep&wait_for_inflight_requests=true&clear_cache=true"
        self._post(f"/pause?{flags}", None, "VLLM_SERVER_DEV_MODE=1")
        self.settle()
        try:
            work()
            self._post("/reset_prefix_cache", None, "VLLM_SERVER_DEV_MODE=1")
        finally:
            self._post("/resume", None, "VLLM_SERVER_DEV_MODE=1")

    def _post(self, path: str, body: Mapping[str, Any] | None, needed: str) -> None:
        status, answer = self.streams.ask("POST", path, body)
        _refuse(status, answer, path, needed)

    def _module(self, weights: Mapping[str, Tensor] | Qwen3) -> Qwen3:
        if isinstance(weights, Qwen3):
            return weights
        if self._config is None:
            raise ConfigError("weights by name need folder=, the model directory that vLLM was started with")
        with torch.device("meta"):
            model = Qwen3(self._config)
        own = {name: parameter.shape for name, parameter in model.named_parameters()}
        odd = sorted(own.keys() ^ weights.keys()) or sorted(
            name for name, shape in own.items() if weights[name].shape != shape
        )
        if odd:
            raise ModelError(f"the new weights differ from the model in {len(odd)} places, such as {odd[0]}")
        model.load_state_dict(dict(weights), assign=True)
        return model


class Completions:
    """/v1/completions."""

    path = "/v1/completions"

    def __init__(self, model: str, *, tells_ids: bool = True) -> None:
        self._model, self._tells_ids = model, tells_ids

    def body(self, request: Request) -> dict[str, Any]:
        params = request.params
        for name in ("adaptive_budget", "min_thinking"):
            if getattr(params, name):
                raise ModelError(f"request {request.id} has {name}, which vLLM does not know; leave it out")
        body: dict[str, Any] = {
            "model": request.adapter or self._model,
            "prompt": [int(token) for token in request.tokens],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": params.max_tokens,
            "min_tokens": params.min_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "repetition_penalty": params.repetition_penalty,
            "seed": params.seed,
            "stop": list(params.stop),
            "stop_token_ids": list(params.stop_ids),
            "ignore_eos": params.ignore_eos,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if params.logprobs or params.top_logprobs or params.prompt_logprobs or not self._tells_ids:
            body["logprobs"] = params.top_logprobs
        # A ban is the strongest bias that the API allows.
        bias = {str(token): value for token, value in params.logit_bias} | dict.fromkeys(
            map(str, params.bad_ids), -100.0
        )
        optional = {
            "logit_bias": bias,
            "thinking_token_budget": params.thinking_budget,
            "echo": params.prompt_logprobs,
            "user": request.user,
            "priority": request.priority,
            "cache_salt": request.salt,
            "structured_outputs": None if params.grammar is None else _structured(request.id, params.grammar),
        }
        return body | {
            name: value
            for name, value in optional.items()
            if value or (name == "thinking_token_budget" and value is not None)
        }

    def delta(self, request: Request, content: dict[str, Any], begun: bool) -> Delta:
        delta = Delta()
        details = (content.get("usage") or {}).get("prompt_tokens_details") or {}
        delta.cached_tokens = details.get("cached_tokens")
        for choice in content.get("choices") or ():
            known = choice.get("logprobs") or {}
            logprobs = [
                LEAST_LOGPROB if value is None else value for value in known.get("token_logprobs", ())
            ]
            tops = [_tops(top, request.params.top_logprobs) for top in known.get("top_logprobs") or ()]
            ids = [_id_of(token) for token in known.get("tokens", ())]
            if request.params.prompt_logprobs and not begun and logprobs:
                # With `echo` the first event begins with the prompt, whose first token nothing precedes.
                length = len(request.tokens)
                delta.prompt_logprobs += [0.0, *logprobs[1:length]]
                if request.params.top_logprobs:
                    delta.prompt_tops += [[], *tops[1:length]]
                logprobs, tops, ids = logprobs[length:], tops[length:], ids[length:]
            tokens = choice.get("token_ids")
            delta.tokens += ids if tokens is None else tokens
            if request.params.logprobs or request.params.top_logprobs:
                delta.logprobs += logprobs
            if request.params.top_logprobs:
                delta.tops += tops
            reason = choice.get("finish_reason")
            if reason is not None:
                delta.finish_reason = FINISHES.get(reason, "error")
        return delta


def _structured(name: str, grammar: Grammar) -> dict[str, Any]:
    """A grammar as vLLM's structured_outputs."""
    match grammar.kind:
        case "json_schema":
            return {"json": json.loads(grammar.text)}
        case "json_object":
            return {"json_object": True}
        case "choice":
            return {"choice": json.loads(grammar.text)}
        case "regex":
            return {"regex": grammar.text}
        case "ebnf":
            return {"grammar": grammar.text}
    raise ModelError(
        f"request {name} has a grammar of kind {grammar.kind!r}, which vLLM's completions do not know"
    )


def _id_of(token: str) -> int:
    if not token.startswith(TOKEN):
        raise ValueError(f"vLLM gave the text {token!r} in place of a token id; it is older than 0.4.3")
    return int(token.removeprefix(TOKEN))


def _tops(top: Mapping[str, float] | None, count: int) -> TopLogprobs:
    """The likeliest; the one that was drawn may come on top of them."""
    pairs = [(_id_of(token), value) for token, value in (top or {}).items()]
    return sorted(pairs, key=lambda pair: -pair[1])[:count]


def _served(streams: Streams, model: str) -> dict[str, Any]:
    """The entry of /v1/models."""
    status, answer = streams.ask("GET", "/v1/models")
    if status != 200:
        raise RunError(f"{streams.address}/v1/models answered {status}: {error_text(answer)}")
    entries: list[dict[str, Any]] = answer["data"]
    for entry in entries:
        if model in ("", entry["id"]):
            return entry
    names = ", ".join(entry["id"] for entry in entries)
    raise ConfigError(f"{streams.address} does not serve {model!r}; it serves {names}")


def _version(streams: Streams) -> tuple[int, ...]:
    """As numbers; what stands behind them, such as rc1 or +cpu, is left out."""
    status, answer = streams.ask("GET", "/version")
    text = answer.get("version", "") if status == 200 and isinstance(answer, dict) else ""
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0])[:3])


def _refuse(status: int, answer: Any, what: str, needed: str) -> None:
    if status == 404:
        raise RunError(f"vLLM has no way to take {what} ({error_text(answer)}); start it with {needed}")
    if status >= 400:
        raise RunError(f"vLLM refused {what} with status {status}: {error_text(answer)}")
