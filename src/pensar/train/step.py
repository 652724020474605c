"""One optimiser step over all ranks: share the rows, sum the gradients, refuse what is bad, update."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pensar.base.ranks import World
from pensar.model.moe import expert_counts, routings
from pensar.model.qwen3 import Qwen3
from pensar.text.packing import Batch
from pensar.train.balance import Balance, ExpertUse
from pensar.train.guard import BadStep, refuse_not_finite
from pensar.train.loss import Inputs, LossConfig, Totals, batch_loss, inputs_of, weights_of

Judge = Callable[[Mapping[str, float]], None]
"""Raises BadStep when the metrics of a step, the same on all ranks, forbid its update."""


class Updates(Protocol):
    """What a step asks of an optimiser."""

    parameters: list[nn.Parameter]

    def clip(self) -> float: ...

    def update(self, scale: float, world: World) -> None: ...

    def clear(self) -> None: ...


class Spread(Protocol):
    """How the work of a step is spread over ranks."""

    @property
    def data(self) -> World:
        """The ranks over which rows are dealt out."""
        ...

    @property
    def tokens(self) -> World:
        """The ranks over which tokens are, each of them on one: those of `data`, and those that split contexts."""
        ...

    def share(self, batch: Batch) -> Batch | None:
        """This rank's rows; None where it has none and need not take part."""
        ...

    def inputs(self, batch: Batch) -> Inputs:
        """What this rank's model takes of its rows."""
        ...

    @property
    def routed(self) -> World:
        """The ranks whose tokens the routers of this rank's layers share out."""
        ...

    def balance(
        self, model: Qwen3, num_tokens: int, batches: Sequence[Batch | None], config: LossConfig
    ) -> Balance:
        """The balance of a sparse model's step about to begin, of `num_tokens` over all ranks."""
        ...

    def backward(self, model: Qwen3, batches: Sequence[Batch | None], work: "Work") -> Tensor:
        """Forward and backward of this rank's part of each micro-batch; returns the `Totals` of all of them."""
        ...

    def reduce_gradients(self, optimizer: Updates) -> None:
        """Sums the gradients of all ranks, where the backward pass has not done so."""
        ...


class Witness(Protocol):
    """Who looks on while a step is taken, on every rank; nothing that it does changes the step."""

    def looking(self, model: Qwen3, spread: Spread) -> AbstractContextManager[None]:
        """Around forward and backward."""
        ...

    def inputs(self, inputs: Inputs, segments: Tensor) -> Inputs:
        """What a micro-batch's forward pass takes; `segments` are those of its whole rows."""
        ...

    def gradients(self, model: Qwen3) -> None:
        """Those of the whole step are there, not yet clipped."""
        ...

    def updated(self, model: Qwen3, totals: Totals) -> None:
        """The step was taken; `totals` are those of all ranks."""
        ...


@dataclass(frozen=True)
class Work:
    """What the losses of a step's micro-batches have in common."""

    normalisers: tuple[float, float, float]
    loss: LossConfig
    teacher: Qwen3 | None
    balance: Balance | None
    witness: Witness | None = None
    num_groups: int = 0
    """Groups of tokens whose loss is summed apart."""


class Replicated:
    """Every rank has the whole model and some of the rows."""

    def __init__(self, world: World) -> None:
        self.data = self.tokens = self.routed = world

    def share(self, batch: Batch) -> Batch | None:
        return share(batch, self.data)

    def inputs(self, batch: Batch) -> Inputs:
        return inputs_of(batch)

    def balance(
        self, model: Qwen3, num_tokens: int, batches: Sequence[Batch | None], config: LossConfig
    ) -> Balance:
        return counted(self, model, num_tokens, batches, config)

    def backward(self, model: Qwen3, batches: Sequence[Batch | None], work: Work) -> Tensor:
        return one_by_one(self, model, batches, work)

    def reduce_gradients(self, optimizer: Updates) -> None:
        reduce_gradients(optimizer, self.data)


def train_step(
    model: Qwen3,
    optimizer: Updates,
    batches: list[Batch],
    scale: float,
    ranks: World | Spread,
    loss_config: LossConfig,
    teacher: Qwen3 | None = None,
    *,
    judge: Judge = refuse_not_finite,
    use: ExpertUse | None = None,
    witness: Witness | None = None,
) -> dict[str, float]:
    """Updates the model by the micro-batches of one step, the same list on every rank; returns its metrics.

    Each rank computes its rows of every micro-batch. Each loss term is normalised by its weight over the whole
    step, so the update does not depend on how rows are spread over ranks and micro-batches, up to rounding.
    Raises BadStep on every rank, with the parameters as they were, when `judge` refuses the step. `use` is told the
    experts' assignments of a step that was taken; `witness` sees it from within.
    """
    spread = Replicated(ranks) if isinstance(ranks, World) else ranks
    mine = [spread.share(batch) for batch in batches]
    normalisers = weights_of([batch for batch in mine if batch is not None], spread.data)
    balance = None
    if model.config.num_experts and model.training:
        balance = spread.balance(model, sum(batch.num_tokens for batch in batches), mine, loss_config)
    num_groups = max((batch.num_groups for batch in batches), default=0)
    work = Work(normalisers, loss_config, teacher, balance, witness, num_groups)
    with witness.looking(model, spread) if witness else nullcontext():
        sums = spread.backward(model, mine, work)
    spread.reduce_gradients(optimizer)
    if witness:
        witness.gradients(model)
    largest = Totals.of(sums).mismatch_max
    totals = Totals.of(spread.tokens.all_reduce_(sums))
    if any(batch.pg is not None for batch in batches):
        totals.mismatch_max = max(spread.tokens.gather(largest))
    metrics = _means(totals) | (balance.metrics() if balance else {})
    metrics["gradient_norm"] = optimizer.clip()
    try:
        judge(metrics)
    except BadStep:
        optimizer.clear()
        raise
    optimizer.update(scale, spread.data)
    if use is not None and balance is not None:
        use.add(balance.counts_LE)
    if witness:
        witness.updated(model, totals)
    metrics["tokens"] = float(totals.tokens)
    return metrics


@contextmanager
def learning(model: Qwen3) -> Iterator[None]:
    """Training mode within, evaluation mode after: routers of experts note where tokens go, which balances them."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def one_by_one(spread: Spread, model: Qwen3, batches: Sequence[Batch | None], work: Work) -> Tensor:
    """Each micro-batch forward and backward before the next; returns their `Totals` as a tensor."""
    sums = Totals.zeros(work.num_groups)
    for batch in batches:
        if batch is not None:
            inputs = spread.inputs(batch)
            if work.witness:
                inputs = work.witness.inputs(inputs, torch.from_numpy(batch.segments))
            loss, totals = batch_loss(
                model, batch, work.normalisers, work.loss, work.teacher, work.balance, inputs
            )
            loss.backward()
            sums = Totals.joined(sums, totals.tensor())
        elif work.balance is not None:
            work.balance.absent()
    return sums


def share(batch: Batch, world: World) -> Batch | None:
    """This rank's rows of a batch; None where there are fewer rows than ranks and none is left for it."""
    if world.size == 1:
        return batch
    if world.rank >= len(batch.tokens):
        return None
    return batch.rows(slice(world.rank, None, world.size))


def reduce_gradients(optimizer: Updates, world: World) -> None:
    """Sums the gradients of all ranks in one flat buffer; a rank without rows contributes zeros."""
    if world.size == 1:
        return
    gradients = []
    for parameter in optimizer.parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    world.all_reduce_(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def counted(
    spread: Spread, model: Qwen3, num_tokens: int, batches: Sequence[Batch | None], config: LossConfig
) -> Balance:
    """A balance whose assignments are those of the whole step, where that takes a pass beforehand and is asked for."""
    device = model.model.embed_tokens.weight.device
    balance = Balance(model.config, num_tokens, spread.routed, device)
    if config.exact_balance and len(batches) > 1 and model.config.router_balance_weight:
        counts_LE = torch.zeros_like(balance.counts_LE)
        with torch.no_grad():
            for batch in batches:
                if batch is not None:
                    inputs = spread.inputs(batch)
                    inputs.hidden(model)
                    counts_LE += expert_counts(routings(model), inputs.routed)
        balance.settle(counts_LE)
    return balance


def _means(totals: Totals) -> dict[str, float]:
    metrics: dict[str, float] = {}
    if totals.ce_weight:
        metrics["loss"] = totals.ce / totals.ce_weight
    if totals.pg_weight:
        metrics["policy_loss"] = totals.pg / totals.pg_weight
        metrics["entropy"] = totals.entropy / totals.pg_weight
        metrics["clipped"] = totals.clipped / totals.pg_weight
        metrics["mismatch"] = totals.mismatch / totals.pg_weight
        metrics["mismatch_kl"] = totals.mismatch_kl / totals.pg_weight
        metrics["mismatch_max"] = totals.mismatch_max
    if totals.kl_weight:
        metrics["divergence"] = totals.kl / totals.kl_weight
    if totals.z:
        metrics["z_loss"] = totals.z / totals.ce_weight
    if totals.balance:
        metrics["balance"] = totals.balance
    if totals.router_z:
        metrics["router_z_loss"] = totals.router_z
    return metrics
