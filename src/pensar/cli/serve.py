"""`pensar serve`: an OpenAI-compatible server over one model directory."""

import shlex
from pathlib import Path
from typing import Literal

from pensar.base.errors import ConfigError, RunError
from pensar.cli.options import Flag, ModelFolder

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    model: ModelFolder,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    model_name: str | None = None,
    max_waiting: int = 256,
    slots: int = 64,
    weights: Literal["as_is", "bfloat16", "int8", "int4"] = "as_is",
    lookup: Flag = False,
    draft: Path | None = None,
    draft_head: Path | None = None,
) -> None:
    """Serve a model over the OpenAI-compatible protocol.

    The first Ctrl-C (or SIGTERM) lets running requests finish, the second one ends them.

    Parameters
    ----------
    host
        Address to listen on; 0.0.0.0 lets other machines in.
    port
        0 takes any free one.
    api_key
        Key that clients have to send; by default everybody may ask.
    model_name
        What clients put into `model`; by default the directory's name.
    max_waiting
        Requests that may wait while the batch is full; further ones are answered 429.
    slots
        Replies that are written at once.
    weights
        Bits of the linear layers on a CPU: fewer are faster and round.
    lookup
        Guess tokens ahead by looking for the last ones earlier in the text. Guesses change no reply.
    draft
        A smaller model of the same tokenizer to guess with.
    draft_head
        A trained head of this model to guess with.
    """
    try:
        from pensar.serve.app import open_service
        from pensar.serve.server import Server, bind
    except ModuleNotFoundError as error:
        raise RunError(f"serving needs {error.name}; install it with: pip install 'pensar[serve]'") from error
    from pensar.serve.service import ServeConfig

    name = model_name or model.absolute().name
    if not name:
        raise ConfigError(f"{model} has no name to serve under; give one with --model-name")
    config = ServeConfig(model_name=name, api_key=api_key, max_waiting=max_waiting)
    # The address first: it costs nothing, and a wrong one should not be found after a long load.
    with bind(host, port) as listening:
        service = open_service(
            model, config, slots=slots, weights=weights, lookup=lookup, draft=draft, draft_head=draft_head
        )
        server = Server(service, listening)
        print(greeting(server.url, name, keyed=api_key is not None), flush=True)
        if host not in LOOPBACK and api_key is None:
            print("warning: other machines can reach this address and no --api-key is set", flush=True)
        server.serve_until_signal()


def greeting(url: str, name: str, *, keyed: bool) -> str:
    """The address, and a command line to try it with."""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "What is 2+3?"}}], "thinking_budget": 64}}'
    key = ' -H "Authorization: Bearer $API_KEY"' if keyed else ""
    return (
        f"{name} is served at {url}/v1 (OpenAI-compatible; Ctrl-C ends it). Try:\n"
        f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )
