"""One optimiser step over all ranks: share the rows, sum the gradients, refuse what is not finite, update."""

import math

import torch

from pensar.base.errors import RunError
from pensar.base.ranks import World
from pensar.model.qwen3 import Qwen3
from pensar.text.packing import Batch
from pensar.train.balance import Balance
from pensar.train.loss import LossConfig, Totals, batch_loss, weights_of
from pensar.train.optimizer import Optimizer


def train_step(
    model: Qwen3,
    optimizer: Optimizer,
    batches: list[Batch],
    scale: float,
    world: World,
    loss_config: LossConfig,
    teacher: Qwen3 | None = None,
) -> dict[str, float]:
    """Updates the model by the micro-batches of one step, the same list on every rank; returns its metrics.

    Each rank computes its rows of every micro-batch. Each loss term is normalised by its weight over the whole
    step, so the update does not depend on how rows are spread over ranks and micro-batches, up to rounding.
    """
    mine = [share(batch, world) for batch in batches]
    normalisers = weights_of([batch for batch in mine if batch is not None], world)
    balance = None
    if model.config.num_experts and model.training:
        balance = Balance(model.config, sum(batch.num_tokens for batch in batches), world)
    sums = Totals().tensor()
    for batch in mine:
        if batch is not None:
            loss, totals = batch_loss(model, batch, normalisers, loss_config, teacher, balance)
            loss.backward()
            sums += totals.tensor()
        elif balance is not None:
            balance.absent()
    reduce_gradients(optimizer, world)
    world.all_reduce_(sums)
    totals = Totals.of(sums)
    metrics = _means(totals)
    if not all(math.isfinite(value) for value in metrics.values()):
        raise RunError(
            f"the loss is not finite ({metrics}); lower the learning rate or look at the batch's data"
        )
    metrics["gradient_norm"] = optimizer.step(scale, world)
    metrics["tokens"] = float(totals.tokens)
    return metrics


def share(batch: Batch, world: World) -> Batch | None:
    """This rank's rows of a batch; None where there are fewer rows than ranks and none is left for it."""
    if world.size == 1:
        return batch
    if world.rank >= len(batch.tokens):
        return None
    return batch.rows(slice(world.rank, None, world.size))


def reduce_gradients(optimizer: Optimizer, world: World) -> None:
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


def _means(totals: Totals) -> dict[str, float]:
    metrics: dict[str, float] = {}
    if totals.ce_weight:
        metrics["loss"] = totals.ce / totals.ce_weight
    if totals.pg_weight:
        metrics["policy_loss"] = totals.pg / totals.pg_weight
        metrics["entropy"] = totals.entropy / totals.pg_weight
        metrics["clipped"] = totals.clipped / totals.pg_weight
        metrics["mismatch"] = totals.mismatch / totals.pg_weight
    if totals.kl_weight:
        metrics["divergence"] = totals.kl / totals.kl_weight
    if totals.balance:
        metrics["balance"] = totals.balance
    return metrics
