"""`pensar serve`: an OpenAI-compatible server over one model directory."""

import os
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pensar.base import torchrun
from pensar.base.errors import ConfigError, RunError
from pensar.base.ranks import Crew, World
from pensar.cli.options import Flag, ModelFolder, Repeated

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
    device: Literal["cpu", "cuda"] = "cpu",
    weights: Literal["as_is", "bfloat16", "int8", "int4", "float8"] = "as_is",
    cache: Literal["as_is", "bfloat16", "int8"] = "as_is",
    threads: int | None = None,
    pin: Flag = False,
    lookup: Flag = False,
    draft: Path | None = None,
    draft_head: Path | None = None,
    spill_gib: float = 0.0,
    spill_folder: Path | None = None,
    tensor_parallel: int = 1,
    usage: Path | None = None,
    adapter: Annotated[list[str] | None, Repeated] = None,
    adapter_changes: Flag = False,
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
    device
        What computes; the model has to fit into its memory.
    weights
        Bits of the linear layers, float8 on a GPU and the others on a CPU: fewer are faster and round.
    cache
        Bits of keys and values on a CPU: fewer hold longer texts in the same memory, and round.
    threads
        That compute on a CPU; by default as many as are fastest when the server starts.
    pin
        Keep each of them on a core of its own, on a machine that does nothing else.
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
    usage
        A folder for one record of every request: whose it was and what it used, kept over crashes.
    adapter
        A LoRA adapter that requests ask for by the name in `model`: `--adapter NAME=FOLDER`; may be given again.
    adapter_changes
        Let clients load and unload adapters (/v1/load_lora_adapter); loading reads folders of this machine.
    """
    try:
        import pensar.serve.server  # noqa: F401 - whether it can be had
    except ModuleNotFoundError as error:
        raise RunError(f"serving needs {error.name}; install it with: pip install 'pensar[serve]'") from error
    from pensar.serve.service import ServeConfig

    name = model_name or model.absolute().name
    if not name:
        raise ConfigError(f"{model} has no name to serve under; give one with --model-name")
    config = ServeConfig(
        model_name=name, api_key=api_key, max_waiting=max_waiting, adapter_changes=adapter_changes
    )
    adapters = _adapters(adapter or [])
    options: dict[str, Any] = {"slots": slots, "lookup": lookup, "draft": draft}
    options["spill"] = _spill(spill_gib, spill_folder)
    if tensor_parallel == 1 and not torchrun.launched():
        options.update(weights=weights, cache=cache, threads=threads, pin=pin)
        options.update(draft_head=draft_head, device=_there(device), adapters=adapters)
        serve_on_ranks(World(), model, config, host, port, usage, options)
        return
    if adapters or adapter_changes:
        raise ConfigError(
            f"--adapter and --adapter-changes are for a model in one process; leave them out, or --tensor-parallel "
            f"{tensor_parallel}"
        )
    if (weights, cache, draft_head, device) != ("as_is", "as_is", None, "cpu"):
        raise ConfigError(
            f"--weights {weights}, --cache {cache}, --draft-head {draft_head} and --device {device} are for a model "
            f"in one process; leave them out, or --tensor-parallel {tensor_parallel}"
        )
    threads = max(1, (os.cpu_count() or 1) // max(1, tensor_parallel))
    with torchrun.TorchrunCrew() if torchrun.launched() else Crew(tensor_parallel, threads) as crew:
        crew.call(serve_on_ranks, model, config, host, port, usage, options)


def serve_on_ranks(
    world: World,
    model: Path,
    config: "ServeConfig",
    host: str,
    port: int,
    usage: Path | None,
    options: dict[str, Any],
) -> None:
    """Rank 0 serves until a signal ends it; the others compute its steps with it."""
    import torch

    from pensar.infer.outbox import Outbox
    from pensar.infer.tensor_parallel import on_ranks
    from pensar.serve.app import open_service
    from pensar.serve.server import Server, bind

    with ExitStack() as stack:

        def lead(runner: "Runner | None") -> None:
            service = open_service(model, config, runner=runner, outbox=outbox, **options)
            server = Server(service, listening)
            print(greeting(server.url, config.model_name, keyed=config.api_key is not None), flush=True)
            if host not in LOOPBACK and config.api_key is None:
                print("warning: other machines can reach this address and no --api-key is set", flush=True)
            server.serve_until_signal()

        if world.rank == 0:
            # Address and folder first: they cost nothing, and a wrong one should not be found after a long load.
            listening = stack.enter_context(bind(host, port))
            outbox = None if usage is None else Outbox(usage)
        if world.size == 1:
            lead(None)
        else:
            on_ranks(world, model, lead, dtype=torch.float32)


def _there(device: str) -> str:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda and no GPU that torch can use; leave it out to compute on the CPU")
    return device


def _spill(gib: float, folder: Path | None) -> "SpillConfig | None":
    if gib < 0 or (folder is not None and not gib):
        raise ConfigError(
            f"--spill-gib {gib} with --spill-folder {folder}: give the room above 0, or neither"
        )
    if not gib:
        return None
    from pensar.infer.spill import SpillConfig

    return SpillConfig(max_bytes=int(gib * 2**30), folder=folder)


def _adapters(given: list[str]) -> dict[str, Path]:
    """By name; ConfigError for one that is not NAME=FOLDER, or there twice."""
    adapters: dict[str, Path] = {}
    for each in given:
        name, separator, folder = each.partition("=")
        if not name or not separator or not folder or name in adapters:
            raise ConfigError(f"--adapter {each}: give each adapter once, as NAME=FOLDER")
        adapters[name] = Path(folder)
    return adapters


def greeting(url: str, name: str, *, keyed: bool) -> str:
    """The address, and a command line to try it with."""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "What is 2+3?"}}], "thinking_budget": 64}}'
    key = ' -H "Authorization: Bearer $API_KEY"' if keyed else ""
    return (
        f"{name} is served at {url}/v1 (OpenAI-compatible; Ctrl-C ends it). Try:\n"
        f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )
