"""Whether training on an accelerator computes what it should: each path against float64 or a plainer path.

Every function takes a device and sizes, so that tests run the same code on a processor; on a GPU
`python -m benchmarks.pretrain_gpu` runs them before it times anything.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_training import Case, batches_of, training
from pensar.model import flash
from pensar.model.attention import Packed
from pensar.model.config import ModelConfig, replace
from pensar.model.moe import grouped
from pensar.model.qwen3 import Qwen3, initialize

HALF_ERROR = 2.0**-6
"""What products and sums in bfloat16 (8 bits) may differ by, as a share of the norm: some roundings of 2^-9."""
SINGLE_ERROR = 1e-5
MODEL_ERROR = 0.05
"""Of a whole model's logits in bfloat16, where roundings of many layers meet."""
FLOAT8_GAP = 0.03
"""Share that the loss in float8 may differ by from that in bfloat16 after some steps."""


class Finding(NamedTuple):
    """One comparison."""

    name: str
    error: float
    allowed: float
    reference: str


def attention(
    device: torch.device, num_tokens: int = 1_024, heads: int = 16, size: int = 128
) -> list[Finding]:
    """Output and gradients of every way to attend within packed documents, against all pairs in float64."""
    segments = packed_segments(4, num_tokens).to(device)
    whole = torch.ones_like(segments)
    findings = []
    ways: dict[str, tuple[torch.dtype, Tensor, Callable[..., Tensor]]] = {
        "packed_bfloat16": (torch.bfloat16, segments, _attend(segments)),
        "packed_float32": (torch.float32, segments, _attend(segments)),
        "whole_rows_bfloat16": (torch.bfloat16, whole, _attend(whole)),
        "whole_rows_float32": (torch.float32, whole, _attend(whole)),
        "dense_mask_bfloat16": (torch.bfloat16, segments, _masked(segments)),
    }
    if device.type == "cuda":
        ways["flex_bfloat16"] = (torch.bfloat16, segments, _flexed(segments))
    for name, (dtype, documents, attend) in ways.items():
        error = _attention_error(attend, documents, heads, size, dtype)
        allowed = SINGLE_ERROR if dtype == torch.float32 else HALF_ERROR
        findings.append(Finding(f"attention_{name}", error, allowed, "all pairs in float64"))
    return findings


def logits(device: torch.device, config: ModelConfig, num_tokens: int = 512) -> list[Finding]:
    """Of a model on the device in float32 against float64 on a processor, and in bfloat16 against float32."""
    model = Qwen3(config).eval()
    initialize(model, 0)
    segments = packed_segments(2, num_tokens)
    tokens = torch.randint(config.vocab_size, segments.shape, generator=torch.Generator().manual_seed(0))
    real = segments != 0

    def computed(dtype: torch.dtype, place: torch.device) -> Tensor:
        model.to(place, dtype)
        positions = _positions(segments).to(place)
        with torch.no_grad():
            hidden = model(tokens.to(place), positions, Packed(segments.to(place)))
            return model.logits(hidden).cpu().double()[real]

    exact = computed(torch.float64, torch.device("cpu"))
    model.to(torch.float32)
    single = computed(torch.float32, device)
    half = computed(torch.bfloat16, device)
    return [
        Finding("logits_float32", relative(single, exact), 10 * SINGLE_ERROR, "float64 on the processor"),
        Finding("logits_bfloat16", relative(half, single), MODEL_ERROR, "float32 on the same device"),
    ]


def experts(
    device: torch.device, num_tokens: int = 8_192, hidden: int = 2_048, width: int = 768
) -> list[Finding]:
    """Products of tokens grouped by expert, some without any, and their gradients, against a loop in float64."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(32, width, hidden, generator=generator).to(device, torch.bfloat16)
    chosen = torch.randint(0, 29, (num_tokens,), generator=generator)  # three experts get nothing
    counts = torch.bincount(chosen, minlength=32).to(device)
    rows = torch.randn(num_tokens, hidden, generator=generator).to(device, torch.bfloat16)
    grad = torch.randn(num_tokens, width, generator=generator).to(device, torch.bfloat16)

    def by_loop(x: Tensor, w: Tensor, _: Tensor) -> Tensor:
        parts = x.split(counts.tolist())
        return torch.cat([F.linear(part, one) for part, one in zip(parts, w.unbind(), strict=True)])

    found = _with_gradients(grouped, (rows, weights), counts, grad)
    exact = _with_gradients(by_loop, (rows.double(), weights.double()), counts, grad.double())
    error = max(relative(mine, theirs) for mine, theirs in zip(found, exact, strict=True))
    return [Finding("grouped_experts_bfloat16", error, HALF_ERROR, "a loop in float64")]


def float8_follows(config: ModelConfig, steps: int = 60, plain: str = "bfloat16") -> list[Finding]:
    """The loss of a small model on text that can be learnt, in float8 and in another precision, over its last steps."""
    ends = {}
    for precision in (plain, "float8"):
        case = Case(config=config, context=256, rows=8, precision=precision, lr=1e-3)
        with training(case, batches_of(case, learnable=True)) as step:
            losses = [step()["loss"] for _ in range(steps)]
        ends[precision] = float(np.mean(losses[-steps // 6 :]))
    gap = abs(ends["float8"] / ends[plain] - 1)
    return [Finding("float8_loss", gap, FLOAT8_GAP, f"{plain}, {steps} steps")]


def small(vocab_size: int = 2_048, **changes: int) -> ModelConfig:
    """A shape of a few million parameters, wide enough for every kernel."""
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=512,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        intermediate_size=1_536,
        tied=True,
    )
    return replace(config, **changes)


def packed_segments(rows: int, num_tokens: int) -> Tensor:
    """Rows of documents of unlike lengths; the last row ends in padding."""
    rng = np.random.default_rng(0)
    out = torch.zeros(rows, num_tokens, dtype=torch.int32)
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(1, num_tokens), size=row + 1, replace=False))
        out[row] = torch.from_numpy(np.searchsorted(cuts, np.arange(num_tokens), side="right") + 1)
    out[-1, -num_tokens // 8 :] = 0
    return out


def relative(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over that of the exact values."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def _attend(segments: Tensor) -> Callable[..., Tensor]:
    packed = Packed(segments)
    return lambda q, k, v: packed(0, q, k, v)


def _flexed(segments: Tensor) -> Callable[..., Tensor]:
    blocks = flash.block_mask(segments)
    return lambda q, k, v: flash.flex(q, k, v, blocks)


def _masked(segments: Tensor) -> Callable[..., Tensor]:
    mask = flash.dense_mask(segments)
    return lambda q, k, v: flash.masked(q, k, v, mask)


def _attention_error(
    attend: Callable[..., Tensor], segments: Tensor, heads: int, size: int, dtype: torch.dtype
) -> float:
    """The largest of output and three gradients, over tokens of documents."""
    generator = torch.Generator().manual_seed(0)
    shape = (*segments.shape, heads, size)
    device, real = segments.device, segments != 0
    given = [
        torch.randn(*shape[:2], num, size, generator=generator).to(device, dtype)
        for num in (heads, heads // 2, heads // 2)
    ]
    grad = torch.randn(shape, generator=generator).to(device, dtype) * real[..., None, None]
    found = _with_gradients(lambda q, k, v, _: attend(q, k, v), given, None, grad)
    exact = _with_gradients(
        lambda q, k, v, _: naive(q, k, v, segments), [x.double() for x in given], None, grad.double()
    )
    return max(relative(mine[real], theirs[real]) for mine, theirs in zip(found, exact, strict=True))


def naive(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Tensor:
    """Softmax attention over all pairs that a document and causality allow, a head at a time."""
    group = q.shape[2] // k.shape[2]
    mask = flash.dense_mask(segments)[:, 0]
    heads = []
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // group].mT * q.shape[-1] ** -0.5
        heads.append(scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v[:, :, head // group])
    return torch.stack(heads, 2)


def _with_gradients(
    function: Callable[..., Tensor],
    given: "list[Tensor] | tuple[Tensor, ...]",
    rest: Tensor | None,
    grad: Tensor,
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = function(*leaves, rest)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _positions(segments: Tensor) -> Tensor:
    columns = torch.arange(segments.shape[1]).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return columns - torch.where(starts, columns, 0).cummax(1).values
