"""Whether the engine's kernels for GPUs compute what they should: each against its twin in float64, then the runner.

Every function takes a device and sizes, so that Triton's interpreter runs the same code on a processor; on a GPU
`python -m benchmarks.engine_gpu` runs them before it times anything.
"""

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_checks import HALF_ERROR, MODEL_ERROR, SINGLE_ERROR, Finding, relative
from benchmarks.pretrain_steps import peer_of
from pensar.infer.cuda import twins
from pensar.infer.cuda.cache import SLAB, SlabCache
from pensar.infer.cuda.runner import CudaRunner
from pensar.infer.cuda.work import Work, work_of
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.step import PAGE, Runner, StepBatch
from pensar.infer.torch_runner import TorchRunner
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3, initialize

Row = tuple[list[int], int, list[int]]
"""New tokens, how many the cache holds, pages."""
ALLOWED = {torch.float32: SINGLE_ERROR, torch.float16: HALF_ERROR / 4, torch.bfloat16: HALF_ERROR}
FLOAT8_STEP = 2.0**-3
"""Between neighbours of float8_e4m3, as a share; what is not rounded to the nearest is off by this at most."""
FLOAT8_MODEL_ERROR = 0.2
"""Of a small random model's logits whose products are in float8, each rounded by up to 2^-4."""
RunnerOf = Callable[[Qwen3], CudaRunner]


def kernels(
    device: torch.device, dtype: torch.dtype, tested: ModuleType, *, width: int = 1_024, size: int = 128
) -> Iterator[Finding]:
    """All of `tested`, the module with the kernels, at this width of the stream and of a head."""
    draw = _Drawn(device, dtype)
    x, stream, gain = draw(5, width), draw(5, width), draw(width)
    for name, with_stream in (("norm", None), ("add_norm", stream)):
        found = tested.add_norm(x.clone(), None if with_stream is None else with_stream.clone(), gain, 1e-6)
        exact = twins.add_norm(*_wide(x, with_stream, gain), 1e-6)
        yield _finding(name, dtype, [*zip(found, exact, strict=True)])
    gates = draw(5, 3 * width)
    yield _finding("swiglu", dtype, [(tested.swiglu(gates), twins.swiglu(gates.double()))])
    yield from _row_products(draw, dtype, tested, width)
    values, scales = tested.quantize(x)
    back = values.float() * scales
    # The interpreter loses the carry of some roundings.
    counted = 1.0 if device.type == "cuda" else 0.9
    yield Finding(f"quantize_{_of(dtype)}", _worst(back, x, counted), FLOAT8_STEP, "the values themselves")
    yield from _attention(device, dtype, tested, size)
    if (
        device.type == "cuda" or dtype != torch.bfloat16
    ):  # the interpreter multiplies bfloat16 as if it were integers
        yield from _experts(draw, dtype, tested, width)


def runners(
    device: torch.device, config: ModelConfig, dtype: torch.dtype, runner_of: RunnerOf, *, prompt: int = 300
) -> Iterator[Finding]:
    """Scores of our runner against torch's over the same steps: a chunk, single tokens, guesses, all at once, and after
    the cache has grown under what was recorded."""
    model = Qwen3(config).eval()
    initialize(model, 0)
    model.to(device, dtype)
    theirs, ours = TorchRunner(model), runner_of(model)
    rng = np.random.default_rng(0)
    text = rng.integers(0, config.vocab_size, (3, prompt + 12)).tolist()
    need = -(-(prompt + 12) // PAGE)
    starts = (1, 1 + need, 1 + 2 * need + SLAB)
    pages = [list(range(start, start + need))[::-1] for start in starts]
    for runner in (theirs, ours):
        runner.reserve(2 * need + 1)
    steps: dict[str, list[Row]] = {
        "chunk": [(text[0][:prompt], 0, pages[0])],
        "one": [(text[0][prompt : prompt + 1], prompt, pages[0])],
        "mixed": [
            (text[0][prompt + 1 : prompt + 2], prompt + 1, pages[0]),
            (text[1][: prompt // 2], 0, pages[1]),
            (text[2][:3], 0, pages[2]),
        ],
        "next_chunk": [(text[1][prompt // 2 : prompt], prompt // 2, pages[1])],
        "three": [
            (text[0][prompt + 2 : prompt + 3], prompt + 2, pages[0]),
            (text[1][prompt : prompt + 1], prompt, pages[1]),
            (text[2][3:4], 3, pages[2]),
        ],
        "guesses": [(text[0][prompt + 3 : prompt + 8], prompt + 3, pages[0])],
        "grown": [(text[2][4:5], 4, pages[2])],
    }
    allowed = MODEL_ERROR if dtype != torch.float32 else 10 * SINGLE_ERROR
    for name, rows in steps.items():
        batch = StepBatch.of(rows)
        for runner in (theirs, ours):
            runner.reserve(int(batch.pages_RP.max()) + 1)
        error = relative(ours.run(batch).logits_SV, theirs.run(batch).logits_SV)
        yield Finding(f"runner_{name}_{_of(dtype)}", error, allowed, "the model by torch")


def float8(
    device: torch.device, config: ModelConfig, dtype: torch.dtype, runner_of: RunnerOf
) -> Iterator[Finding]:
    """Scores in float8, of one token and of several, against those of the weights as they are."""
    model = Qwen3(config).eval()
    initialize(model, 0)
    model.to(device, dtype)
    theirs, ours = TorchRunner(model), runner_of(model)
    text = np.random.default_rng(0).integers(0, config.vocab_size, 17).tolist()
    for runner in (theirs, ours):
        runner.reserve(3)
    for name, rows in (("many", [(text[:16], 0, [1, 2])]), ("one", [(text[16:], 16, [1, 2])])):
        batch = StepBatch.of(rows)
        error = relative(ours.run(batch).logits_SV, theirs.run(batch).logits_SV)
        yield Finding(f"float8_{name}", error, FLOAT8_MODEL_ERROR, f"{_of(dtype)} by torch")


def greedy(
    device: torch.device, config: ModelConfig, runner_of: RunnerOf, *, prompt: int = 100, new: int = 32
) -> Finding:
    """The share of tokens that differ from those of transformers, greedily in float32 from equal weights."""
    model = Qwen3(config).eval()
    initialize(model, 0)
    peer = peer_of(model).to(device).eval()
    model.to(device)
    prompts = np.random.default_rng(1).integers(0, config.vocab_size, (3, prompt)).tolist()
    found = replies(runner_of(model), prompts, new)
    ids = torch.tensor(prompts, device=device)
    options: dict[str, Any] = {
        "do_sample": False,
        "min_new_tokens": new,
        "max_new_tokens": new,
        "pad_token_id": 0,
    }
    with torch.inference_mode():
        out = peer.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **options)
    expected = out[:, prompt:].tolist()
    differing = np.mean(np.array(found) != np.array(expected))
    return Finding("greedy_tokens", float(differing), 0.0, "transformers")


def replies(runner: Runner, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """Greedy continuations of so many tokens."""
    engine = Engine(runner, slots=len(prompts))
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    requests = [Request(str(number), list(prompt), params) for number, prompt in enumerate(prompts)]
    return [reply.tokens for reply in engine.run(requests)]


# ---------------------------------------------------------------- one kernel


def _row_products(draw: "_Drawn", dtype: torch.dtype, tested: ModuleType, width: int) -> Iterator[Finding]:
    x, weight, gain = draw(1, width), draw(2 * width, width), draw(width)
    stream = draw(1, width)
    small, scales = twins.quantize(weight)
    ways: dict[str, tuple[Tensor, Tensor | None, dict[str, Any]]] = {
        "plain": (weight, None, {}),
        "normed": (weight, None, {"gain_D": gain, "eps": 1e-6}),
        "gated": (weight, None, {"gain_D": gain, "eps": 1e-6, "gated": True}),
        "added": (weight[:width], None, {"stream_1O": stream}),
        "float8": (small, scales[:, 0], {"gain_D": gain, "eps": 1e-6}),
        "float8_gated": (small, scales[:, 0], {"gain_D": gain, "eps": 1e-6, "gated": True}),
    }
    for name, (matrix, scale, more) in ways.items():
        found = tested.row_product(x, matrix, scale, **more)
        wide = {key: value.double() if isinstance(value, Tensor) else value for key, value in more.items()}
        exact = twins.row_product(x.double(), matrix.float().double(), scale, **wide)
        yield _finding(f"row_product_{name}", dtype, [(found, exact)])


def _experts(draw: "_Drawn", dtype: torch.dtype, tested: ModuleType, width: int) -> Iterator[Finding]:
    """Eight experts of which two have no rows, few rows and many."""
    weight, down = draw(8, width, width), draw(8, width, width // 2)
    small, scales = twins.quantize(weight)
    for name, num in (("few", 13), ("many", 8 * 40)):
        x = draw(num, width)
        chosen = torch.randint(0, 6, (2 * num,), generator=draw.generator).to(x.device)
        order = chosen.argsort(stable=True)
        counts = torch.zeros(8, dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, chosen, torch.ones_like(chosen))
        for kind, matrix, scale in (("", weight, None), ("_float8", small, scales[..., 0])):
            found = tested.grouped_product(x, order // 2, counts, matrix, scale, gated=True)
            exact = twins.grouped_product(
                x.double(), order // 2, counts, matrix.float().double(), scale, gated=True
            )
            yield _finding(f"experts_{name}{kind}", dtype, [(found, exact)])
        inner = draw(2 * num, width // 2)
        found = tested.grouped_product(inner, None, counts, down)
        exact = twins.grouped_product(inner.double(), None, counts, down.double())
        yield _finding(f"experts_{name}_back", dtype, [(found, exact)])


def _attention(device: torch.device, dtype: torch.dtype, tested: ModuleType, size: int) -> Iterator[Finding]:
    """Writing of keys and values and attention over them: single tokens, guesses and a chunk of rows of any length, and
    padding; pages in three slabs, the first of them nobody's."""
    config = ModelConfig(
        vocab_size=2,
        hidden_size=16,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=size,
        intermediate_size=16,
    )
    cache, exact_cache = (SlabCache(config, device, kind) for kind in (dtype, torch.float64))
    generator = torch.Generator().manual_seed(2)
    for one in (cache, exact_cache):
        one.reserve(3 * SLAB)
    for slab, exact_slab in zip(cache.slabs, exact_cache.slabs, strict=True):
        slab.copy_(torch.randn(slab.shape, generator=generator))
        exact_slab.copy_(slab)
    pages = np.random.default_rng(0).permutation(np.arange(1, 3 * SLAB)).tolist()
    rows: list[Row] = [
        ([0], 0, pages[:1]),
        ([0], 150, pages[1:11]),
        ([0] * 5, 60, pages[11:16]),
        ([0] * 45, 17, pages[16:20]),
        ([0] * 30, 0, pages[20:22]),
    ]
    _, work = work_of(StepBatch.of(rows), 4, device)
    draw = _Drawn(device, dtype)
    num = len(work.positions_N)
    qkv, norms = draw(num, 12 * size), draw(2, size)
    angles = torch.rand(256, size // 2, generator=generator) * 6
    table = torch.cat((angles.cos(), angles.sin()), -1).to(device, dtype)
    padded = Work(
        work.positions_N.clone().index_fill_(0, torch.tensor([1], device=device), -1),
        *(work.row_N, work.pages_RP, work.alone_T, work.tiles_T, work.tile_tokens),
    )
    if device.type != "cuda" and dtype == torch.bfloat16:
        padded = work  # attention is left out
    q = tested.heads(qkv, norms, table, 1e-6, cache, 1, padded)
    exact_q = twins.heads(*_wide(qkv, norms, table), 1e-6, exact_cache, 1, padded)
    yield _finding("heads", dtype, [(q, exact_q), *zip(cache.slabs, exact_cache.slabs, strict=True)])
    if device.type != "cuda" and dtype == torch.bfloat16:
        return
    found = tested.attention(q, cache, 1, padded)
    exact = twins.attention(q.double(), _as_wide(exact_cache, cache), 1, padded)
    yield _finding("attention", dtype, [(found, exact)])


def _as_wide(wide: SlabCache, cache: SlabCache) -> SlabCache:
    """The float64 cache with the values of the other."""
    for into, slab in zip(wide.slabs, cache.slabs, strict=True):
        into.copy_(slab)
    return wide


class _Drawn:
    """Normal values, the same for every device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.generator, self._device, self._dtype = torch.Generator().manual_seed(0), device, dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self._device, self._dtype)


def _wide(*values: Tensor | None) -> list[Any]:
    return [None if value is None else value.double() for value in values]


def _finding(name: str, dtype: torch.dtype, pairs: Sequence[tuple[Tensor, Tensor]]) -> Finding:
    error = max(relative(found, exact) for found, exact in pairs)
    return Finding(f"{name}_{_of(dtype)}", error, ALLOWED[dtype], "its twin in float64")


def _worst(found: Tensor, exact: Tensor, counted: float) -> float:
    """The largest difference of a value, as a share of it, among the best share of those that are not small."""
    wide = exact.float()
    share = (found - wide).abs() / wide.abs().clamp(min=1e-9)
    return float(share[wide.abs() > wide.abs().amax(-1, keepdim=True) * 2.0**-6].quantile(counted))


def _of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
