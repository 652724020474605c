"""What the engine's benchmark for a GPU measures: shapes and loads, ours and the peer's work on them."""

import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from benchmarks import gpu_checks
from pensar.infer.cuda import twins
from pensar.infer.cuda.graphs import rerun
from pensar.infer.cuda.runner import CudaRunner
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.runners import runner_for
from pensar.infer.step import PAGE, Runner, StepBatch
from pensar.model import hardware
from pensar.model.config import ModelConfig, replace
from pensar.model.hf import to_hf
from pensar.model.qwen3 import Qwen3


class Load(NamedTuple):
    """Requests with from `least` to `most` tokens of prompt, and of reply."""

    num: int
    least: int
    most: int
    slots: int


class Served(NamedTuple):
    """Seconds; gaps are those between two pieces of one reply."""

    tokens: int
    prompt_tokens: int
    seconds: float
    first_p50: float
    first_p99: float
    gap_p50: float
    gap_p99: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured, and where."""

    device: torch.device
    config: ModelConfig
    dtype: torch.dtype
    prompt: int
    decoded: int
    batches: tuple[int, ...]
    load: Load
    rounds: int


def gpu_work(config: ModelConfig, *, quick: bool) -> Work:
    load = Load(num=256, least=100, most=1_024, slots=256)
    return Work(
        torch.device("cuda", 0), config, torch.bfloat16, 128, 256, (16, 64), load, rounds=2 if quick else 5
    )


def small_work() -> Work:
    shape = gpu_checks.small(vocab_size=96)
    config = replace(
        shape, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96
    )
    load = Load(num=4, least=3, most=8, slots=4)
    return Work(torch.device("cpu"), config, torch.float32, 8, 4, (2,), load, rounds=1)


def model_on(work: Work) -> Qwen3:
    """Random weights, drawn where they are."""
    torch.manual_seed(0)
    with work.device:
        model = Qwen3(work.config).eval().to(work.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.normal_(std=work.config.initializer_range)
    return model


def runner_on(
    device: torch.device, model: Qwen3, *, weights: Literal["as_is", "float8"] = "as_is"
) -> CudaRunner:
    """What serves a model on this device; on a processor the same steps by kernels interpreted, or their twins."""
    if device.type == "cpu":
        return CudaRunner(model, weights, kernels=kernels_of(device), capture=rerun)
    runner = runner_for(model, weights)
    if not isinstance(runner, CudaRunner):
        raise RuntimeError(f"{type(runner).__name__} computes, not CudaRunner; is triton installed?")
    return runner


def kernels_of(device: torch.device) -> ModuleType:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
    if device.type == "cpu" and not interpreted:
        return twins
    from pensar.infer.cuda import kernels

    return kernels


def warm_up(runner: Runner, num_tokens: int) -> None:
    if isinstance(runner, CudaRunner):
        runner.warm_up(num_tokens)


def peer_seconds(work: Work) -> Callable[[list[list[int]], int], float]:
    """Greedy generation of so many tokens by transformers, with weights of the same shape."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    shape = transformers.Qwen3Config.from_dict(to_hf(work.config, dtype=work.dtype))
    with work.device:
        build = transformers.AutoModelForCausalLM.from_config
        model = build(shape, dtype=work.dtype, attn_implementation="sdpa").eval()

    def seconds(prompts: list[list[int]], new: int) -> float:
        ids = torch.tensor(prompts, device=work.device)
        options: dict[str, Any] = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}
        start = _now(work.device)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), eos_token_id=None, pad_token_id=0, **options
            )
        taken = _now(work.device) - start
        assert out.shape[1] == len(prompts[0]) + new
        return taken

    return seconds


def our_seconds(engine: Engine, prompts: list[list[int]], new: int) -> float:
    """Of a greedy generation whose prompts the cache does not know."""
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    salt = fresh_salt()
    requests = [Request(str(number), prompt, params, salt=salt) for number, prompt in enumerate(prompts)]
    start = _now(engine.runner.device)
    done = engine.run(requests)
    taken = _now(engine.runner.device) - start
    assert all(len(reply.tokens) == new for reply in done)
    return taken


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def has_float8(device: torch.device) -> bool:
    return device.type == "cpu" or hardware.capability(device) >= hardware.ADA


def fresh_salt() -> str:
    """What no request before has had, so that nothing of a prompt is in the cache."""
    return str(time.perf_counter_ns())


def served(engine: Engine, load: Load, config: ModelConfig) -> Served:
    """All arrive at once; sampled at temperature 0.6 as the published runs are."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(load.least, load.most + 1, (load.num, 2)).tolist()
    salt = fresh_salt()
    begin = time.perf_counter()
    for number, (prompt, reply) in enumerate(lengths):
        params = SamplingParams(max_tokens=reply, temperature=0.6, seed=number, ignore_eos=True)
        tokens = rng.integers(0, config.vocab_size, prompt).tolist()
        engine.submit(Request(f"{salt}.{number}", tokens, params, salt=salt))
    last: dict[str, float] = {}
    first, gaps, total = [], [], 0
    while engine.num_running or engine.num_waiting:
        pieces = engine.step()
        now = time.perf_counter()
        for piece in pieces:
            if not piece.tokens:
                continue
            total += len(piece.tokens)
            if piece.id in last:
                gaps.append(now - last[piece.id])
            else:
                first.append(now - begin)
            last[piece.id] = now
    assert total == sum(reply for _, reply in lengths)
    (first_p50, first_p99), (gap_p50, gap_p99) = (
        np.quantile(values, (0.5, 0.99)).tolist() for values in (first, gaps)
    )
    seconds = max(last.values()) - begin
    return Served(
        total, sum(prompt for prompt, _ in lengths), seconds, first_p50, first_p99, gap_p50, gap_p99
    )


def step_seconds(runner: Runner, batch: int, done: int, num: int) -> float:
    """Of one step of so many single tokens by the runner alone, its scores waited for: the mean of `num` of them."""
    pages = -(-(done + num + 1) // PAGE)
    runner.reserve(batch * pages + 1)
    numbers = [list(range(1 + row * pages, 1 + (row + 1) * pages)) for row in range(batch)]
    steps = [StepBatch.of([([1], done + at, numbers[row]) for row in range(batch)]) for at in range(num + 1)]
    begin = 0.0
    for at, step in enumerate(steps):
        if at == 1:
            begin = time.perf_counter()
        output = runner.run(step)
        if output.logits_SV.is_cuda:
            torch.cuda.synchronize(output.logits_SV.device)
    return (time.perf_counter() - begin) / num
