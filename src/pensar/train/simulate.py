"""Simulate: a training step of any model in any layout, run by one process that stands for one of the ranks.

The code is that of real training: the model is cut, gathered, computed forward and backward and updated, over a process
group that only pretends and with tensors that have no values (`fakes`), while a `Recorder` notes what they would hold
and exchange. Experts are loaded evenly, rows are whole documents. Layers are alike, so a deep model is run with few of
them and what it needs is extrapolated along a straight line; a third depth shows whether it is one.
"""
# ruff: noqa: SLF001 - pipelines ask each other by private methods alone

import gc
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import _utils as pipelining

from pensar.base.errors import RunError
from pensar.base.ranks import World
from pensar.model.config import ModelConfig, replace
from pensar.model.qwen3 import Qwen3
from pensar.text.packing import Batch
from pensar.train.fakes import Balanced, fake_mode
from pensar.train.footprint import Step, is_sharded, share
from pensar.train.layout import Layout
from pensar.train.loss import LossConfig
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.parallel.mesh import Mesh
from pensar.train.parallel.optimizer import ShardedOptimizer
from pensar.train.parallel.shard import cut, fill
from pensar.train.parallel.step import Meshed
from pensar.train.recompute import recomputed
from pensar.train.recorder import Exchange, Recorder
from pensar.train.step import Spread, train_step

DEPTHS = (4, 5, 7)
"""Layers of one part of the depth: two to draw the line through, and one to see that it is one."""
EDGE = 2
"""Blocks from either end whose backward pass is told apart: at one of them memory is at its most."""
WITHIN = "backward of the blocks between"
_numbers = itertools.count()

Moments = dict[str, dict[str, float]]
"""Moment of a step -> part -> bytes, when all parts together were most."""


@dataclass(frozen=True)
class Simulated:
    """What one rank needs and sends in one step."""

    moments: Moments
    """As those of `footprint.moments`, and forward."""
    exchanges: list[Exchange]
    depths: tuple[int, ...]
    """Layers that were run; one number where that was all of them."""
    bend: float
    """By how much memory or bytes at the third depth are off the line through the first two: parts of peak and sum."""

    @property
    def moment(self) -> str:
        """At which most is needed."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak_bytes(self) -> float:
        return sum(self.moments[self.moment].values())


class _Run(NamedTuple):
    """One simulation of so many layers, with every block's backward pass a moment of its own."""

    moments: Moments
    exchanges: list[Exchange]


def simulate(model: ModelConfig, layout: Layout, step: Step, stage: int = 0) -> Simulated:
    """Of the first rank of part `stage` of the depth, which has the most where parts do not come out even.

    RunError where this process trains over ranks already: torch has one default process group.
    """
    layers = share(model, layout, stage).layers
    if layers <= DEPTHS[-1] * layout.virtual:
        run = _run(model, layout, step, stage)
        return Simulated(folded(run.moments), run.exchanges, (layers,), 0.0)
    parts = layout.pp * layout.virtual
    runs = [_run(replace(model, num_layers=depth * parts), layout, step, stage) for depth in DEPTHS]
    whole, third = (_extrapolated(runs[0], runs[1], depth) for depth in (layers / layout.virtual, DEPTHS[2]))
    return Simulated(folded(whole.moments), whole.exchanges, DEPTHS, _bend(third, runs[2]))


def record(
    model: Qwen3, optimizer: Any, batches: list[Batch], spread: Spread | World, recorder: Recorder, step: Step
) -> Moments:
    """The moments of the second of two steps of a model, real or fake; `recorder` must have been entered.

    The first step makes what stays: states of the optimiser, what FSDP and pipelines learn of shapes.
    """
    config = LossConfig(chunk_tokens=step.chunk_tokens, exact_balance=step.exact_balance)
    marked = _mark(model, recorder)
    updates = _Updates(optimizer, recorder)
    try:
        for _ in range(2):
            gc.collect()
            recorder.claim(model.parameters(), "weights")
            recorder.claim(optimizer.state_dict().values(), "optimizer")
            recorder.watch(model)
            recorder.moment = "forward"
            recorder.begin()
            train_step(model, updates, batches, 1.0, spread, config)
    finally:
        for hook in marked:
            hook.remove()
    found = recorder.peaks()
    return {name: dict(parts) for name, parts in found.items() if name not in ("start", WITHIN)}


def even_batches(model: ModelConfig, layout: Layout, step: Step) -> list[Batch]:
    """The rows of all ranks in one step, each a whole document."""
    micro = layout.micro_batches if layout.pp > 1 else 1
    shape = (layout.data * step.rows * micro, step.context)
    columns = np.broadcast_to(np.arange(step.context, dtype=np.int32), shape)
    tokens = columns % model.vocab_size
    batch = Batch(
        tokens=tokens,
        positions=columns.copy(),
        segments=np.ones(shape, np.int32),
        ce=np.ones(shape, np.float32),
    )
    return [batch] * step.accumulate


class _Updates:
    """An optimiser that tells a recorder when the backward pass is over."""

    def __init__(self, optimizer: Any, recorder: Recorder) -> None:
        self._optimizer, self._recorder = optimizer, recorder
        self.parameters = optimizer.parameters

    def clip(self) -> float:
        self._recorder.claim((parameter.grad for parameter in self.parameters), "gradients")
        self._recorder.moment = "update"
        norm: float = self._optimizer.clip()
        return norm

    def update(self, scale: float, world: World) -> None:
        self._optimizer.update(scale, world)

    def clear(self) -> None:
        self._optimizer.clear()


def _mark(model: Qwen3, recorder: Recorder) -> list[Any]:
    """Hooks by which the recorder knows the moment: which block's backward pass, or what comes before and after."""
    blocks = list(model.model.layers)

    def at(moment: str) -> Any:
        def mark(*_: Any) -> None:
            recorder.moment = moment

        return mark

    def enter(_: Any, inputs: tuple[Any, ...]) -> None:
        recorder.moment = "forward"
        if inputs[0].requires_grad:
            inputs[0].register_hook(at("end of backward"))

    def leave(number: int) -> Any:
        def mark(_: Any, inputs: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(at(_position(number, len(blocks))))
            if number == len(blocks) - 1:
                recorder.moment = "loss"

        return mark

    hooks = [block.register_forward_hook(leave(number)) for number, block in enumerate(blocks)]
    return [blocks[0].register_forward_pre_hook(enter, prepend=True), *hooks]


def _run(model: ModelConfig, layout: Layout, step: Step, stage: int) -> _Run:
    rank = stage * layout.ranks // layout.pp
    with ExitStack() as stack:
        spread: Spread | World = World()
        mesh = None
        named: dict[str, str] = {}
        if is_sharded(layout, step):
            stack.enter_context(_pretended_ranks(layout.ranks, rank))
            mesh = Mesh(layout, torch.device("cpu"), tag=f"_simulated{next(_numbers)}")
            named = dimensions(mesh)
            spread = Meshed(mesh)
            if layout.pp > 1:
                stack.enter_context(_known_shapes(model, layout, step))
        with torch.device("meta"):
            module = Qwen3(model).train()
        if mesh is not None:
            cut(module, mesh, torch.bfloat16 if step.compute_bytes == 2 else None)
        stack.enter_context(fake_mode())
        stack.enter_context(Balanced())  # type: ignore[no-untyped-call]
        if mesh is None:
            module.to_empty(device="cpu")
        else:
            fill(module, mesh, lambda name, window: torch.empty([part.stop - part.start for part in window]))
        config = OptimizerConfig(muon=step.muon)
        optimizer = Optimizer(module, config) if mesh is None else ShardedOptimizer(module, config, mesh)
        stack.enter_context(recomputed(module, layout.recompute))
        recorder = Recorder({model.vocab_size, model.vocab_size // layout.tp}, named)
        stack.enter_context(recorder)
        moments = record(module, optimizer, even_batches(model, layout, step), spread, recorder, step)
        return _Run(moments, recorder.exchanges())


@contextmanager
def _pretended_ranks(size: int, rank: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore  # makes the backend known

    if dist.is_initialized():
        raise RunError(
            "cannot simulate ranks while this process is one of real ones; use a process of its own"
        )
    dist.init_process_group("fake", store=FakeStore(), world_size=size, rank=rank)
    try:
        yield
    finally:
        dist.destroy_process_group()


def dimensions(mesh: Mesh) -> dict[str, str]:
    """Names of the groups that a step talks to -> which ranks they are."""
    named: dict[str, str] = {}
    worlds = {"all": mesh.world, "data": mesh.data, "tokens": mesh.tokens, "stage": mesh.stage}
    for name, world in worlds.items():
        named[world.group.group_name] = name
    experts = mesh.expert_dims, ("replicate", "expert_shard", "ep")
    weights = mesh.dims, ("pp", "replicate", "shard", "tp")
    for arranged, names in (experts, (mesh.token_dims, ("cp",)), weights):
        for name in names:
            group = arranged.get_group(name + mesh.tag)
            named[group.group_name] = name.replace("_", " ")
    if mesh.layout.pp > 1 and mesh.ends is not None:
        named[mesh.ends.group.group_name] = "ends"
    return named


@contextmanager
def _known_shapes(model: ModelConfig, layout: Layout, step: Step) -> Iterator[None]:
    """Pipelines learn the shape of what they pass on from each other, and the other parts are not there."""
    shape = (step.rows, step.context // layout.cp // layout.tp, model.hidden_size)
    dtype = torch.bfloat16 if step.compute_bytes == 2 else torch.float32
    stream = torch.empty(shape, dtype=dtype, device="meta")
    forward = pipelining.extract_tensor_metas((stream.clone().requires_grad_(),))
    backward = pipelining.extract_tensor_metas((stream,))
    assert forward is not None
    assert backward is not None

    def receive(part: PipelineStage, other: int) -> Any:
        if other < part.stage_index:
            return pipelining._StageForwardMeta(forward)
        return pipelining._StageBackwardMeta(backward)

    stages: Any = PipelineStage
    before = stages._recv_meta, stages._send_meta
    stages._recv_meta, stages._send_meta = receive, lambda *_: None
    try:
        yield
    finally:
        stages._recv_meta, stages._send_meta = before


def folded(moments: Moments) -> Moments:
    """Without telling blocks apart: the last ones' backward pass is the first, the first ones' belongs to its end."""
    found: Moments = {}
    for moment, parts in moments.items():
        name = "end of backward" if moment.endswith("from the first") else moment.partition(",")[0]
        if name not in found or sum(parts.values()) > sum(found[name].values()):
            found[name] = parts
    return found


def _position(number: int, layers: int) -> str:
    """Name of a block's backward pass."""
    if layers - 1 - number < EDGE:
        return f"backward, {layers - 1 - number} from the last"
    return f"backward, {number} from the first" if number < EDGE else WITHIN


def _extrapolated(one: _Run, other: _Run, layers: float) -> _Run:
    """The line through two runs whose depths differ by one layer a part, `DEPTHS[:2]`."""
    ahead = layers - DEPTHS[0]
    moments: Moments = {}
    for moment, parts in one.moments.items():
        names = {**parts, **other.moments[moment]}
        pairs = {name: (parts.get(name, 0.0), other.moments[moment].get(name, 0.0)) for name in names}
        moments[moment] = {name: first + ahead * (second - first) for name, (first, second) in pairs.items()}
    exchanges = []
    for first, second in zip(one.exchanges, other.exchanges, strict=True):
        calls = first.calls + ahead * (second.calls - first.calls)
        moved = first.num_bytes + ahead * (second.num_bytes - first.num_bytes)
        exchanges.append(first._replace(calls=calls, num_bytes=moved))
    return _Run(moments, exchanges)


def _bend(line: _Run, seen: _Run) -> float:
    totals = {name: sum(parts.values()) for name, parts in seen.moments.items()}
    peak = max(totals.values())
    off = [abs(sum(parts.values()) - totals[name]) / peak for name, parts in line.moments.items()]
    moved = sum(one.num_bytes for one in seen.exchanges) or 1.0
    pairs = zip(line.exchanges, seen.exchanges, strict=True)
    return max(off + [abs(drawn.num_bytes - found.num_bytes) / moved for drawn, found in pairs])
