"""Planner: how a cluster would train a model: layouts that fit, the time of a step, days, energy and cost.

    compute      = 6 N + attention FLOPs of a rank's tokens (model.count) * (1 + repeated) / (assumed MFU * peak)
    exchanges    = of tokens, in full; of weights, what does not fit beside computing, a tenth of it at least
    micro-batch  = compute + exchanges
    step         = micro-batch * (micro-batches + (pp - 1) / virtual) + exchanges of the update
    days         = tokens / batch tokens * step, without stops and restarts
    energy       = GPUs * board power * rest of the server * PUE * time

The assumed MFU is that of computing alone, so that layouts differ by what they exchange and repeat; the MFU of the
step is below it. Published on H100 in bfloat16: 33-39 % for an 8B dense model (torchtitan), 277 of 989 TFLOP/s, 28 %,
for 30B-A3B on one node (NeMo AutoModel). Both include exchanges within a node, so that plans err on the slow side.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pensar.base.config import Config
from pensar.base.errors import ConfigError
from pensar.model.config import ModelConfig
from pensar.model.count import flops_per_token
from pensar.train.accelerators import GIB, Accelerator
from pensar.train.footprint import Memory, Step, memory
from pensar.train.layout import Layout
from pensar.train.traffic import Traffic, traffic

DENSE_MFU, SPARSE_MFU = 0.40, 0.28
REPEATED = {"none": 0.0, "selective": 0.05, "full": 1 / 3}
"""Part of a step's operations that recomputation adds: element-wise ones, or a whole forward pass."""
SEEN = 0.1
"""Part of the exchanges of weights that shows even where computing takes longer."""
EARNED = 1.01
"""Gain in time for which a plan takes one more way of splitting the work."""
POLICIES = ("none", "selective", "full")
ROWS = (1, 2, 4, 8, 16)
MOST_CONTEXT_RANKS, MOST_PARTS = 32, 64
MOST_GPUS = 1 << 17


class Cluster(Config, frozen=True, kw_only=True):
    """What there is and what it shall do; everything below `tokens` is an assumption that may be changed."""

    gpus: int
    accelerator: Accelerator
    tokens: float
    context: int = 4_096
    batch_tokens: int = 1 << 22
    """Of one step, all GPUs together."""
    mfu: float | None = None
    """Of computing alone, by the dense bfloat16 peak; None for 40 % dense, 28 % mixture of experts."""
    margin: float = 0.08
    """Part of the memory that stays free for fragments."""
    overhead_bytes: float = 2.0 * GIB
    """Of a process on its GPU: driver context, collective libraries, workspaces."""
    chunk_tokens: int = 2_048
    muon: bool = False
    exact_balance: bool = True
    """See `loss.exact_balance`: a third more compute where a sparse model makes several passes a step."""
    server: float = 1.4
    """Power of the whole server over that of its GPUs."""
    pue: float = 1.2
    """Power of the data centre over that of its servers."""
    dollars_per_hour: float | None = None
    """Of one GPU; None for the table's."""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ConfigError(f"gpus is {self.gpus}; give 1 or more")
        if not (math.isfinite(self.tokens) and self.tokens > 0):
            raise ConfigError(f"tokens is {self.tokens}; give a positive number such as 1e12")
        if self.context < 1:
            raise ConfigError(f"context is {self.context}; give 1 or more tokens")
        if self.batch_tokens < self.context:
            raise ConfigError(
                f"batch_tokens {self.batch_tokens} is less than one row of {self.context} tokens; raise it"
            )
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise ConfigError(f"mfu is {self.mfu}; it is a share of the peak, above 0 and at most 1")
        if not 0 <= self.margin < 1:
            raise ConfigError(f"margin is {self.margin}; it is a share of the memory, from 0 to below 1")

    @property
    def rows(self) -> int:
        """Of one step."""
        return self.batch_tokens // self.context

    @property
    def usable_bytes(self) -> float:
        """Of one GPU, less the margin."""
        return (1 - self.margin) * self.accelerator.memory_bytes

    def assumed_mfu(self, model: ModelConfig) -> float:
        return self.mfu if self.mfu is not None else SPARSE_MFU if model.num_experts else DENSE_MFU


class Candidate(NamedTuple):
    """A layout with what it needs and takes."""

    layout: Layout
    step: Step
    memory: Memory
    traffic: list[Traffic]
    compute_seconds: float
    """Of one step, all micro-batches."""
    exchange_seconds: float
    """Of one step, as far as nothing is computed meanwhile."""
    bubble_seconds: float
    """Of one step, waiting for a pipeline to fill and to run dry."""

    @property
    def seconds(self) -> float:
        """Of one step."""
        return self.compute_seconds + self.exchange_seconds + self.bubble_seconds


class Cost(NamedTuple):
    """What the whole training takes."""

    flops: float
    steps: float
    days: float
    tokens_per_second: float
    """Of one GPU."""
    mfu: float
    """Of the step, exchanges and waiting included."""
    kwh: float
    gpu_hours: float
    dollars: float


def plan(model: ModelConfig, cluster: Cluster) -> list[Candidate]:
    """All layouts that fit, the best first: the fastest, and of those about as fast the plainest.

    Of the forms that differ in rows and recomputation only, the best is kept. Raises ConfigError when none fits,
    naming the smallest number of GPUs that would do, and when a step has too few rows for so many GPUs.
    """
    best: dict[str, Candidate] = {}
    tightest: float | None = None
    for layout, step in _forms(model, cluster):
        need = memory(model, layout, step, cluster.overhead_bytes)
        tightest = need.total if tightest is None else min(tightest, need.total)
        if need.total > cluster.usable_bytes:
            continue
        found = _timed(model, cluster, layout, step, need)
        name = ",".join(str(size) for size in _sizes(layout))
        if name not in best or _order(found) < _order(best[name]):
            best[name] = found
    if tightest is None:
        raise ConfigError(
            f"{cluster.rows} rows a step (batch_tokens {cluster.batch_tokens}, context {cluster.context}) are too few "
            f"for {cluster.gpus} GPUs; raise batch_tokens to {cluster.gpus * cluster.context} or take fewer GPUs"
        )
    if not best:
        raise ConfigError(_too_small(model, cluster, tightest))
    return sorted(best.values(), key=_order)


def cost(model: ModelConfig, cluster: Cluster, best: Candidate) -> Cost:
    """Of the whole training with a layout of `plan`."""
    operations = flops_per_token(model, cluster.context)
    batch = cluster.rows * cluster.context
    steps = cluster.tokens / batch
    seconds = steps * best.seconds
    gpu_hours = cluster.gpus * seconds / 3600
    gpu = cluster.accelerator
    price = gpu.dollars_per_hour if cluster.dollars_per_hour is None else cluster.dollars_per_hour
    each = batch / best.seconds / cluster.gpus
    return Cost(
        flops=operations * cluster.tokens,
        steps=steps,
        days=seconds / 86_400,
        tokens_per_second=each,
        mfu=each * operations / gpu.bf16_flops,
        kwh=gpu_hours * gpu.watts / 1000 * cluster.server * cluster.pue,
        gpu_hours=gpu_hours,
        dollars=gpu_hours * price,
    )


def layouts(model: ModelConfig, cluster: Cluster) -> Iterator[Layout]:
    """Every arrangement of the cluster's GPUs that the model allows."""
    node = cluster.accelerator.gpus_per_node
    for pp in _divisors(cluster.gpus, MOST_PARTS):
        for tp in _divisors(cluster.gpus // pp, node):
            within = cluster.gpus // pp // tp
            for cp in _divisors(within, MOST_CONTEXT_RANKS):
                for shard in _divisors(within // cp, within):
                    among = math.gcd(shard * cp * tp, model.num_experts or 1)
                    for ep in _divisors(among, model.num_experts or 1):
                        replicas = within // cp // shard
                        micro = cluster.rows // (replicas * shard) if pp > 1 else 1
                        if micro < 1:
                            continue
                        layout = Layout(
                            dp_replicate=replicas,
                            dp_shard=shard,
                            cp=cp,
                            tp=tp,
                            ep=ep,
                            pp=pp,
                            micro_batches=micro,
                        )
                        if _legal(layout, model, cluster):
                            yield layout


def _forms(model: ModelConfig, cluster: Cluster) -> Iterator[tuple[Layout, Step]]:
    """Every layout with every number of rows a forward pass and every form of recomputation."""
    for layout in layouts(model, cluster):
        share = -(-cluster.rows // layout.data)
        for rows in ROWS:
            if rows > share or (layout.pp > 1 and share % rows):
                continue
            passes = -(-share // rows)
            step = Step(
                context=cluster.context,
                rows=rows,
                accumulate=1 if layout.pp > 1 else passes,
                chunk_tokens=cluster.chunk_tokens,
                muon=cluster.muon,
                exact_balance=cluster.exact_balance,
            )
            for policy in POLICIES:
                if not _replayable(layout, model, policy):
                    continue
                micro = passes if layout.pp > 1 else 1
                yield _with(layout, micro, step.accumulate, policy), step


def _with(layout: Layout, micro_batches: int, accumulate: int, recompute: str) -> Layout:
    names = ("dp_replicate", "dp_shard", "cp", "tp", "ep", "pp")
    values: dict[str, Any] = dict(zip(names, _sizes(layout), strict=True))
    values |= {"micro_batches": micro_batches, "accumulate": accumulate, "recompute": recompute}
    return Layout(**values)


def _replayable(layout: Layout, model: ModelConfig, recompute: str) -> bool:
    try:
        layout.check_recompute(model, recompute)
    except ConfigError:
        return False
    return True


def _legal(layout: Layout, model: ModelConfig, cluster: Cluster) -> bool:
    if layout.data > cluster.rows or (layout.pp > 1 and cluster.rows % layout.data):
        return False
    try:
        layout.check(model, cluster.context, cluster.rows)
    except ConfigError:
        return False
    return True


def _timed(model: ModelConfig, cluster: Cluster, layout: Layout, step: Step, need: Memory) -> Candidate:
    """By the slowest part of the depth: the first has most layers, the last the output projection."""
    gpu = cluster.accelerator
    deepest = math.ceil(model.num_layers / layout.pp) * layout.pp / model.num_layers
    several = layout.pp > 1 or (step.exact_balance and step.accumulate > 1)
    counted = 1 / 3 if model.num_experts and several else 0.0
    operations = (
        flops_per_token(model, step.context) * step.tokens(layout) / (layout.tp * layout.pp) * deepest
    )
    compute = operations * (1 + REPEATED[layout.recompute] + counted)
    compute /= cluster.assumed_mfu(model) * gpu.bf16_flops
    slowest: list[Traffic] = []
    exposed = -1.0
    for stage in sorted({0, layout.pp - 1}):
        moved = traffic(model, layout, step, gpu, stage)
        weights = _seconds(moved, "weights")
        shown = _seconds(moved, "tokens") + max(SEEN * weights, weights - compute)
        if shown > exposed:
            slowest, exposed = moved, shown
    times = layout.micro_batches if layout.pp > 1 else step.accumulate
    waiting = (layout.pp - 1) / layout.virtual
    return Candidate(
        layout=layout,
        step=step,
        memory=need,
        traffic=slowest,
        compute_seconds=times * compute,
        exchange_seconds=times * exposed + _seconds(slowest, "step"),
        bubble_seconds=waiting * (compute + exposed),
    )


def _seconds(moved: Sequence[Traffic], kind: str) -> float:
    return sum(one.seconds for one in moved if one.kind == kind)


def _order(one: Candidate) -> tuple[float, float]:
    """By time, where every further way of splitting must earn its complication, then by memory."""
    ways = sum(size > 1 for size in _sizes(one.layout))
    return float(f"{one.seconds * EARNED**ways:.3g}"), one.memory.total


def _sizes(layout: Layout) -> tuple[int, ...]:
    return layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp, layout.ep, layout.pp


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]


def _too_small(model: ModelConfig, cluster: Cluster, tightest: float) -> str:
    have = f"{cluster.accelerator.memory_bytes / GIB:.0f} GiB"
    text = f"{cluster.gpus} GPUs of {have}: the smallest need of any layout is {tightest / GIB:.0f} GiB a GPU"
    enough = _enough(model, cluster)
    if enough is None:
        return f"{text}, and more GPUs do not help; shorten the context or take GPUs with more memory"
    return f"{text}, and {cluster.margin:.0%} stay free; {enough} GPUs are the fewest that would do"


def _enough(model: ModelConfig, cluster: Cluster) -> int | None:
    """The fewest GPUs that hold the model: any number up to a node, then whole nodes; None if no number does."""
    node = cluster.accelerator.gpus_per_node
    for gpus in range(cluster.gpus + 1, node + 1):
        if _fits(model, cluster, gpus):
            return gpus
    low, high = max(1, cluster.gpus // node), max(2, cluster.gpus // node + 1)
    while not _fits(model, cluster, high * node):
        low, high = high, 2 * high
        if high * node > MOST_GPUS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(model, cluster, middle * node) else (middle, high)
    return high * node


def _fits(model: ModelConfig, cluster: Cluster, gpus: int) -> bool:
    """By the least that a rank can need: one row a pass, whole blocks computed again."""
    changed = Cluster(**{name: getattr(cluster, name) for name in cluster.__struct_fields__} | {"gpus": gpus})
    return any(
        memory(model, layout, step, cluster.overhead_bytes).total <= cluster.usable_bytes
        for layout, step in _forms(model, changed)
        if step.rows == 1 and layout.recompute == "full"
    )
