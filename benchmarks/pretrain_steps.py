"""Steps of pre-training by us and by transformers from the same weights, on one thread, and how they are timed.

Every contender is a function that takes one step (forward, loss, backward, clipping, AdamW) on the batch of its number
and returns the loss. Both sides keep weights in float32 and use fused AdamW; ours compiles its blocks, the peer its
model. Each works in a process of its own, as it does for its users: in one process the allocator of either lives on
what the other has left.
"""

import importlib.util
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pensar.base.ranks import World
from pensar.base.usage import keeping_freed_memory
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3, initialize
from pensar.model.weights import save_model
from pensar.text.packing import Batch
from pensar.train.arithmetic import compiled
from pensar.train.loss import LossConfig
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.step import train_step

PEER = "transformers"
ROWS, CONTEXT = 4, 512
DENSE = ModelConfig(
    vocab_size=4_096,
    hidden_size=256,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=768,
    tied=True,
)
SPARSE = ModelConfig(
    vocab_size=4_096,
    hidden_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    tied=True,
    num_experts=32,
    experts_per_token=4,
    moe_intermediate_size=128,
)
RATE = 1e-3
BETAS = (0.9, 0.95)
CLIP = 1.0
Name = TypeVar("Name", bound=Hashable)
Step = Callable[[], float]
TokensOf = Callable[[int], NDArray[np.int32]]
"""Step -> its tokens [rows, context]."""


def random_tokens(config: ModelConfig, rows: int = ROWS, context: int = CONTEXT) -> TokensOf:
    def tokens_of(step: int) -> NDArray[np.int32]:
        drawn = np.random.default_rng(step).integers(0, config.vocab_size, (rows, context))
        return drawn.astype(np.int32)

    return tokens_of


def batch_of(tokens: NDArray[np.int32]) -> Batch:
    """Every row one document that is learned from its second token on, as in the peer's loss."""
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    ce = (positions > 0).astype(np.float32)
    return Batch(tokens=tokens, positions=positions, segments=np.ones_like(tokens), ce=ce)


def started(config: ModelConfig, seed: int = 0) -> Qwen3:
    model = Qwen3(config)
    initialize(model, seed)
    return model.train()


def our_step(
    model: Qwen3,
    tokens_of: TokensOf,
    stack: ExitStack,
    *,
    optimizer: OptimizerConfig | None = None,
    compiling: bool = True,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    scale: Callable[[int], float] = lambda step: 1.0,
) -> Step:
    """Our training step; `stack` is closed when no more are taken."""
    default = OptimizerConfig(
        muon=False, adamw_lr=RATE, beta1=BETAS[0], beta2=BETAS[1], clip_norm=CLIP, weight_decay=0.0
    )
    updates = Optimizer(model, optimizer or default)
    stack.enter_context(compiled(model, compiling))
    stack.enter_context(keeping_freed_memory())
    numbers, loss = count(), LossConfig()

    def step() -> float:
        number = next(numbers)
        batches = [batch_of(tokens_of(number))]
        with within():
            return train_step(model, updates, batches, scale(number), World(), loss)["loss"]

    return step


def peer_model(config: ModelConfig, **arguments: Any) -> Any:
    """transformers' model with the weights that `started` gives ours."""
    return peer_of(started(config), **arguments)


def peer_of(model: Qwen3, **arguments: Any) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        read = transformers.AutoModelForCausalLM.from_pretrained
        return read(folder, dtype=torch.float32, **arguments).train()


def peer_step(
    model: Any,
    tokens_of: TokensOf,
    *,
    compiling: bool = True,
    fused: bool = True,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Step:
    """The same step by transformers' model and torch's AdamW."""
    parameters = list(model.parameters())
    updates = torch.optim.AdamW(parameters, lr=RATE, betas=BETAS, weight_decay=0.0, fused=fused)
    forward = torch.compile(model) if compiling else model
    numbers = count()

    def step() -> float:
        tokens = torch.from_numpy(tokens_of(next(numbers))).long()
        with within():
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        updates.step()
        updates.zero_grad()
        return float(loss.detach())

    return step


@contextmanager
def apart(start: Callable[[ExitStack], Step]) -> Iterator[Callable[[], float]]:
    """A process of its own that takes a step of `start`'s when asked, and answers with its CPU-seconds."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(start, there), daemon=True)
    process.start()
    there.close()

    def seconds() -> float:
        here.send(True)
        found: float = here.recv()
        return found

    try:
        yield seconds
        here.send(False)
    finally:
        here.close()
        process.join()


def _serve(start: Callable[[ExitStack], Step], asked: Connection) -> None:
    torch.set_num_threads(1)
    with ExitStack() as stack:
        seconds = timed(start(stack))
        while asked.recv():
            asked.send(seconds())


def timed(run: Callable[[], Any]) -> Callable[[], float]:
    """CPU-seconds of a call."""

    def seconds() -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    return seconds


def products(size: int = 1_024, dtype: torch.dtype = torch.float32) -> tuple[Callable[[], None], float]:
    """Some products of square matrices and their floating-point operations: what the hardware allows."""
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))

    def run() -> None:
        for _ in range(4):
            torch.mm(left, right)

    return run, 4.0 * 2 * size**3


def interleaved(
    contenders: Mapping[Name, Callable[[], float]], rounds: int, warm: int = 2
) -> dict[Name, list[float]]:
    """CPU-seconds of each in every round: ours, theirs, ours, theirs, after `warm` rounds that do not count."""
    seconds: dict[Name, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + warm):
        for name, run in contenders.items():
            spent = run()
            if number >= warm:
                seconds[name].append(spent)
    return seconds


def paired(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of how often ours goes into theirs: what slows a round down slows both."""
    return statistics.median(their / our for our, their in zip(ours, theirs, strict=True))


def line(
    metric: str,
    ours: float,
    peer: float | None,
    peer_name: str,
    unit: str,
    *,
    ratio: float | None = None,
    target: float | None = None,
    sign: int = 1,
    limit: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One line of output. `target` is for the ratio where there is one, else for `ours`; `sign` -1: at most that."""
    judged = ours if ratio is None else ratio
    return {
        "metric": metric,
        "ours": rounded(ours),
        "peer": rounded(peer),
        "peer_name": peer_name,
        "unit": unit,
        "ratio": rounded(ratio),
        "limit": rounded(limit),
        "percent_of_limit": None if limit is None else rounded(100 * ours / limit),
        "target": target,
        "reached": None if target is None else (judged - target) * sign >= 0,
        **more,
        "machine": machine(),
    }


def rounded(value: float | None) -> float | None:
    """Four significant digits."""
    return None if value is None else float(f"{value:.4g}")


def peer_name(*kinds: str) -> str:
    return " ".join((f"{PEER} {version(PEER)}", *kinds)) if peer_is_here() else f"{PEER} (not installed)"


def peer_is_here() -> bool:
    return importlib.util.find_spec(PEER) is not None


def machine() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            row.partition(":")[2].strip() for row in info.read_text().splitlines() if "model name" in row
        ]
        name = models[0] if models else name
    return f"{name}, 1 thread, torch {torch.__version__}"
