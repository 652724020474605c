"""`pensar serve`: an OpenAI-compatible server over one model directory."""

import os
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pensar.base import torchrun
from pensar.base.errors import ConfigError, RunError
from pensar.base.ranks import Crew, World
from pensar.cli.options import Flag, ModelFolder

if TYPE_CHECKING:
    from pensar.infer.spill import SpillConfig
    from pensar.infer.step import Runner
    from pensar.serve.service import ServeConfig

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
    spill_gib: float = 0.0,
    spill_folder: Path | None = None,
    tensor_parallel: int = 1,
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
    spill_gib
        Room for what the cache of texts has to give away, in memory or in the folder.
    spill_folder
        Where that is a file, which is gone when the server ends.
    tensor_parallel
        Processes that compute the model together, each with its part of the weights; under torchrun, torchrun says.
    """
    try:
        import pensar.serve.server  # noqa: F401 - whether it can be had
    except ModuleNotFoundError as error:
        raise RunError(f"serving needs {error.name}; install it with: pip install 'pensar[serve]'") from error
    from pensar.serve.service import ServeConfig

    name = model_name or model.absolute().name
    if not name:
        raise ConfigError(f"{model} has no name to serve under; give one with --model-name")
    config = ServeConfig(model_name=name, api_key=api_key, max_waiting=max_waiting)
    options: dict[str, Any] = {"slots": slots, "lookup": lookup, "draft": draft}
    options["spill"] = _spill(spill_gib, spill_folder)
    if tensor_parallel == 1 and not torchrun.launched():
        options |= {"weights": weights, "draft_head": draft_head}
        serve_on_ranks(World(), model, config, host, port, options)
        return
    if weights != "as_is" or draft_head is not None:
        raise ConfigError(
            f"--weights {weights} and --draft-head {draft_head} are for a model in one process; leave them out, or "
            f"--tensor-parallel {tensor_parallel}"
        )
    threads = max(1, (os.cpu_count() or 1) // max(1, tensor_parallel))
    with torchrun.TorchrunCrew() if torchrun.launched() else Crew(tensor_parallel, threads) as crew:
        crew.call(serve_on_ranks, model, config, host, port, options)


def serve_on_ranks(
    world: World, model: Path, config: "ServeConfig", host: str, port: int, options: dict[str, Any]
) -> None:
    """Rank 0 serves until a signal ends it; the others compute its steps with it."""
    import torch

    from pensar.infer.tensor_parallel import on_ranks
    from pensar.serve.app import open_service
    from pensar.serve.server import Server, bind

    with ExitStack() as stack:

        def lead(runner: "Runner | None") -> None:
            server = Server(open_service(model, config, runner=runner, **options), listening)
            print(greeting(server.url, config.model_name, keyed=config.api_key is not None), flush=True)
            if host not in LOOPBACK and config.api_key is None:
                print("warning: other machines can reach this address and no --api-key is set", flush=True)
            server.serve_until_signal()

        if world.rank == 0:
            # The address first: it costs nothing, and a wrong one should not be found after a long load.
            listening = stack.enter_context(bind(host, port))
        if world.size == 1:
            lead(None)
        else:
            on_ranks(world, model, lead, dtype=torch.float32)


def _spill(gib: float, folder: Path | None) -> "SpillConfig | None":
    if gib < 0 or (folder is not None and not gib):
        raise ConfigError(
            f"--spill-gib {gib} with --spill-folder {folder}: give the room above 0, or neither"
        )
    if not gib:
        return None
    from pensar.infer.spill import SpillConfig

    return SpillConfig(max_bytes=int(gib * 2**30), folder=folder)


def greeting(url: str, name: str, *, keyed: bool) -> str:
    """The address, and a command line to try it with."""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "What is 2+3?"}}], "thinking_budget": 64}}'
    key = ' -H "Authorization: Bearer $API_KEY"' if keyed else ""
    return (
        f"{name} is served at {url}/v1 (OpenAI-compatible; Ctrl-C ends it). Try:\n"
        f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )
