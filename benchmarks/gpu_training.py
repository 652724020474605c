"""Trainings to be measured on one GPU: ours by the path that a recipe takes, and the peer's."""

import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pensar.base.ranks import World
from pensar.model.config import ModelConfig
from pensar.text.packing import Batch
from pensar.train.arithmetic import compiled, shard_precision
from pensar.train.float8 import float8
from pensar.train.layout import Layout
from pensar.train.loss import LossConfig
from pensar.train.optimizer import OptimizerConfig
from pensar.train.parallel.mesh import Mesh
from pensar.train.parallel.optimizer import ShardedOptimizer
from pensar.train.parallel.parts import Window
from pensar.train.parallel.run import opened_mesh, spread_model
from pensar.train.parallel.step import Meshed
from pensar.train.recompute import Recompute, recomputed
from pensar.train.step import train_step

Batches = Sequence[Batch]
Step = Callable[[], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A training of one shape."""

    config: ModelConfig
    context: int
    rows: int
    precision: Any = "auto"
    compile: bool = False
    recompute: Recompute = "none"
    muon: bool = False
    lr: float = 1e-4
    documents: int = 1
    """In a row."""

    @property
    def tokens(self) -> int:
        return self.context * self.rows

    def but(self, **changes: Any) -> "Case":
        return dataclasses.replace(self, **changes)


def batches_of(case: Case, num: int = 4, *, learnable: bool = False) -> Batches:
    """Rows of documents of equal length: random tokens, or such that most follow from the one before."""
    rng = np.random.default_rng(0)
    follower = rng.permutation(case.config.vocab_size)
    shape = (case.rows, case.context)
    length = case.context // case.documents
    columns = np.broadcast_to(np.arange(case.context, dtype=np.int32), shape)
    made = []
    for _ in range(num):
        tokens = rng.integers(0, case.config.vocab_size, shape)
        if learnable:
            for column in range(1, case.context):
                kept = rng.random(case.rows) < 0.9
                tokens[:, column] = np.where(kept, follower[tokens[:, column - 1]], tokens[:, column])
        positions = columns % length
        made.append(
            Batch(
                tokens=tokens.astype(np.int32),
                positions=positions.astype(np.int32),
                segments=(columns // length + 1).astype(np.int32),
                ce=(positions > 0).astype(np.float32),
            )
        )
    return made


@contextmanager
def training(case: Case, batches: Batches) -> Iterator[Step]:
    """Steps of our training in a layout of one rank; each call takes the next of the batches."""
    with opened_mesh(World(), Layout()) as mesh:
        _forget(mesh.device)
        model = spread_model(case.config, mesh, drawn_on(mesh.device), case.precision)
        config = OptimizerConfig(muon=case.muon, lr=case.lr, adamw_lr=case.lr, weight_decay=0.1)
        optimizer, ranks = ShardedOptimizer(model, config, mesh), Meshed(mesh)
        loss, number = LossConfig(compile=case.compile), 0

        def step() -> dict[str, float]:
            nonlocal number
            batch = batches[number % len(batches)]
            number += 1
            return train_step(model, optimizer, [batch], 1.0, ranks, loss)

        with (
            float8(model, _precision(case, mesh) == "float8"),
            compiled(model, case.compile),
            recomputed(model, case.recompute),
        ):
            yield step


@contextmanager
def peer_training(case: Case, batches: Batches, device: torch.device) -> Iterator[Step]:
    """The same with transformers: bfloat16 by autocast over float32 weights, fused AdamW, clipped gradients."""
    import transformers

    _forget(device)
    config = case.config
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": max(config.max_positions, case.context),
        "tie_word_embeddings": config.tied,
        "use_cache": False,
    }
    ways = {"attn_implementation": "sdpa"}
    if config.num_experts:
        sparse = {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": True,
            "output_router_logits": True,
        }
        ways["experts_implementation"] = "grouped_mm"
        shape: Any = transformers.Qwen3MoeConfig(**values, **sparse)
    else:
        shape = transformers.Qwen3Config(**values, intermediate_size=config.intermediate_size)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32, **ways).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=case.lr, weight_decay=0.1, fused=True)
    if case.compile:
        model.compile()
    data = [torch.from_numpy(batch.tokens).long().to(device) for batch in batches]
    number = 0

    def step() -> dict[str, float]:
        nonlocal number
        tokens = data[number % len(data)]
        number += 1
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss.detach())}

    yield step


def seconds_of(steps: dict[str, Step], rounds: int, warm_up: int = 3) -> dict[str, float]:
    """Median seconds of a step of each, in turns, by the device's own clock."""
    for step in steps.values():
        for _ in range(warm_up):
            step()
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            step()
            end.record()
            torch.cuda.synchronize()
            spent[name].append(begin.elapsed_time(end) / 1_000)
    return {name: float(np.median(values)) for name, values in spent.items()}


def peak_bytes(step: Step, steps: int = 3) -> int:
    """Largest memory of tensors in steps after the first, which makes what stays."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps - 1):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def drawn_on(device: torch.device) -> Callable[[str, Window], Tensor]:
    """Initial weights made where they are needed: billions of them take a processor minutes."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(name: str, window: Window) -> Tensor:
        shape = [part.stop - part.start for part in window]
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=device)
        return torch.randn(shape, generator=generator, device=device) * 0.02

    return draw


def _precision(case: Case, mesh: Mesh) -> str:
    """Processors have no units for float8, and a slow kernel: enough for a test."""
    return str(case.precision) if mesh.device.type == "cpu" else shard_precision(case.precision, mesh.device)


def _forget(device: torch.device) -> None:
    """Frees what earlier trainings left: memory, and compiled code whose number the compiler limits."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
