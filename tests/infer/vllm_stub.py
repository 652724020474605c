"""A server that speaks vLLM's HTTP API and computes with our engine, for the adapter's tests.

The shapes are those of vLLM 0.32.0: entrypoints/openai/completion/protocol.py, entrypoints/rl/online/api_router.py,
entrypoints/serve/dev/rpc/api_router.py, entrypoints/serve/lora. With `old` it is a server from before return_token_ids
and load_inplace.
"""

import json
import queue
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pensar.base.errors import PensarError
from pensar.infer.engine import Engine, Piece, Request, SamplingParams
from pensar.model.weights import load_model

NAME = "tiny"


class Stub:
    """The engine with the thread that steps it, and what the server has been asked to do."""

    def __init__(self, engine: Engine, *, old: bool = False, step_seconds: float = 0.0) -> None:
        self.engine, self.old, self.step_seconds = engine, old, step_seconds
        self.lock = threading.Lock()
        self.calls: list[str] = []
        """Control calls in their order."""
        self.bodies: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.broken_after: int | None = None
        """Events after which a stream is cut off, or ends with an error."""
        self.breaking = "cut"
        self.paused = self.stopped = False
        self._number = 0
        self._pieces: dict[str, queue.Queue[Piece]] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Asked", (_Asked,), {"stub": self}))
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        self._threads = [
            threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True),
            threading.Thread(target=self._step, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self.stopped = True
        self.server.shutdown()
        self.server.server_close()
        for thread in self._threads:
            thread.join()

    def submit(self, body: dict[str, Any]) -> str:
        with self.lock:
            self._number += 1
            name = f"cmpl-{self._number}"
            self._pieces[name] = queue.Queue()
            self.engine.submit(request_of(name, body))
        return name

    def piece(self, name: str) -> Piece:
        return self._pieces[name].get(timeout=30)

    def abort(self, name: str) -> None:
        with self.lock:
            self.aborted.append(name)
            self.engine.abort(name)

    def _step(self) -> None:
        while not self.stopped:
            with self.lock:
                idle = self.paused or not (self.engine.num_running or self.engine.num_waiting)
                pieces = [] if idle else self.engine.step()
            for piece in pieces:
                self._pieces[piece.id].put(piece)
            time.sleep(0.005 if idle else self.step_seconds)


def request_of(name: str, body: dict[str, Any]) -> Request:
    """What vLLM makes of the body of /v1/completions."""
    params = SamplingParams(
        max_tokens=body.get("max_tokens", 16),
        min_tokens=body.get("min_tokens", 0),
        temperature=body.get("temperature", 1.0),
        top_k=body.get("top_k", 0),
        top_p=body.get("top_p", 1.0),
        min_p=body.get("min_p", 0.0),
        presence_penalty=body.get("presence_penalty", 0.0),
        frequency_penalty=body.get("frequency_penalty", 0.0),
        repetition_penalty=body.get("repetition_penalty", 1.0),
        logit_bias=tuple((int(token), value) for token, value in body.get("logit_bias", {}).items()),
        seed=body.get("seed", 0),
        stop=tuple(body.get("stop", ())),
        stop_ids=tuple(body.get("stop_token_ids", ())),
        ignore_eos=body.get("ignore_eos", False),
        thinking_budget=body.get("thinking_token_budget"),
        logprobs=body.get("logprobs") is not None,
        top_logprobs=body.get("logprobs") or 0,
        prompt_logprobs=body.get("echo", False),
    )
    adapter = "" if body["model"] == NAME else body["model"]
    return Request(name, body["prompt"], params, adapter=adapter, salt=body.get("cache_salt", ""))


class _Asked(BaseHTTPRequestHandler):
    """Answers one request."""

    stub: Stub
    protocol_version = "HTTP/1.0"  # the end of the connection ends a stream

    def log_message(self, *arguments: Any) -> None:
        """Keeps quiet."""

    def do_GET(self) -> None:
        answers = {
            "/health": {},
            "/version": {"version": "0.9.2" if self.stub.old else "0.32.0+cpu"},
            "/v1/models": {
                "object": "list",
                "data": [{"id": NAME, "object": "model", "max_model_len": self.stub.engine.max_positions}],
            },
        }
        path = urlsplit(self.path).path
        self._answer(200 if path in answers else 404, answers.get(path, {"detail": "Not Found"}))

    def do_POST(self) -> None:
        asked = urlsplit(self.path)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(content) if content else {}
        if asked.path == "/v1/completions":
            self._complete(body)
            return
        self.stub.calls.append(asked.path.rsplit("/", 1)[1])
        with self.stub.lock:
            status, answer = self._control(asked.path, parse_qs(asked.query), body)
        self._answer(status, answer)

    def _control(self, path: str, flags: dict[str, list[str]], body: dict[str, Any]) -> tuple[int, Any]:
        engine = self.stub.engine
        try:
            match path:
                case "/pause":
                    assert flags["mode"] == ["keep"]
                    self.stub.paused = True
                case "/resume":
                    self.stub.paused = False
                case "/collective_rpc":
                    assert self.stub.paused
                    assert body["method"] == "reload_weights"
                    engine.load(load_model(Path(body["kwargs"]["weights_path"])), recompute=False)
                case "/reset_prefix_cache" | "/start_weight_update" | "/finish_weight_update":
                    if self.stub.old and path != "/reset_prefix_cache":
                        return 404, {"detail": "Not Found"}
                case "/update_weights":
                    assert self.stub.paused
                    self.stub.bodies.append(body)
                case "/v1/load_lora_adapter":
                    known = body["lora_name"] in engine.scheduler.adapters
                    if known and (self.stub.old or not body.get("load_inplace")):
                        return 400, error(f"The lora adapter '{body['lora_name']}' has already been loaded.")
                    if known:
                        engine.unload_adapter(body["lora_name"])
                    engine.load_adapter(body["lora_name"], Path(body["lora_path"]))
                case "/v1/unload_lora_adapter":
                    engine.unload_adapter(body["lora_name"])
                case _:
                    return 404, {"detail": "Not Found"}
        except PensarError as problem:
            return 400, error(str(problem))
        return 200, {}

    def _complete(self, body: dict[str, Any]) -> None:
        self.stub.bodies.append(body)
        try:
            name = self.stub.submit(body)
        except PensarError as problem:
            self._answer(400, error(str(problem)))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        try:
            self._stream(name, body)
        except OSError:  # the client has gone
            self.stub.abort(name)

    def _stream(self, name: str, body: dict[str, Any]) -> None:
        self.wfile.write(b": a comment that keeps the connection alive\n\n")
        count, piece = 0, None
        while piece is None or piece.finish_reason is None:
            piece = self.stub.piece(name)
            if piece.finish_reason == "error":
                self._event(error(piece.error or ""))
                break
            self._event({"id": name, "choices": [self._choice(piece, body, first=not count)]})
            count += 1
            if count == self.stub.broken_after and piece.finish_reason is None:
                self.stub.abort(name)
                if self.stub.breaking == "cut":
                    return
                self._event(error("EngineCore encountered an issue."))
                break
        else:
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 0}
            usage["prompt_tokens_details"] = {"cached_tokens": piece.cached_tokens}
            self._event({"id": name, "choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _choice(self, piece: Piece, body: dict[str, Any], *, first: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": piece.finish_reason}
        if body.get("return_token_ids") and not self.stub.old:
            choice["token_ids"] = piece.tokens
        if body.get("logprobs") is not None:
            ids, values, tops = list(piece.tokens), list(piece.logprobs or ()), piece.top_logprobs or []
            if body.get("echo") and first:
                ids = [*body["prompt"], *ids]
                values = [None, *(piece.prompt_logprobs or ())[1:], *values]
                tops = [*(piece.prompt_top_logprobs or ([] for _ in body["prompt"])), *tops]
            choice["logprobs"] = {
                "tokens": [f"token_id:{token}" for token in ids],
                "token_logprobs": values,
                "top_logprobs": [{f"token_id:{token}": value for token, value in top} for top in tops],
            }
        return choice

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())

    def _answer(self, status: int, content: Any) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}
