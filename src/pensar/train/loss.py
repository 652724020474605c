"""The one loss: cross-entropy, policy gradient and divergence from a teacher, each with per-token weights.

    loss = sum_t ce_t * -log p(x_t) / W_ce
         + sum_t (pg_t-surrogate(ratio_t) - entropy_bonus * H_t) / W_pg
         + sum_t kl_t * KL(teacher || model)_t / W_kl
         + router_balance_weight * balance

where a stream is absent its term is; the last term is that of a mixture of experts in training mode.
Logits are computed in chunks of tokens that carry weight, with the chunk's graph recomputed in the backward pass, so
that a full [tokens, vocabulary] matrix is never held.
Shape legend: N tokens that carry weight, D hidden, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pensar.base.config import Config
from pensar.base.ranks import World
from pensar.model.attention import Packed
from pensar.model.moe import routings
from pensar.model.qwen3 import Qwen3
from pensar.text.packing import Batch
from pensar.train.balance import Balance


class LossConfig(Config, frozen=True, kw_only=True):
    """How the policy-gradient term clips and which way the divergence runs."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    """Upper clip of the probability ratio, wider than the lower one to keep entropy (DAPO, arXiv 2503.14476)."""
    entropy_bonus: float = 0.0
    """Weight of the mean entropy over policy-gradient tokens: it keeps replies varied while they improve."""
    reverse_kl: bool = False
    """KL(model || teacher) in place of KL(teacher || model)."""
    chunk_tokens: int = 8_192


@dataclass
class Totals:
    """Sums over the tokens of a batch; divide by the weights for means."""

    ce: float = 0.0
    ce_weight: float = 0.0
    pg: float = 0.0
    pg_weight: float = 0.0
    kl: float = 0.0
    kl_weight: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    mismatch: float = 0.0
    """Sum of |log p - behaviour log p| over policy-gradient tokens: zero up to rounding when on policy."""
    balance: float = 0.0
    """Load-balancing loss of the experts before its weight: 1 where all share the tokens evenly."""
    tokens: int = 0

    def tensor(self) -> Tensor:
        return torch.tensor(list(vars(self).values()), dtype=torch.float64)

    @classmethod
    def of(cls, values: Tensor) -> "Totals":
        return cls(*values.tolist())


@dataclass(frozen=True)
class Targets:
    """The rows of a batch at which something is predicted, aligned with the states that predict it."""

    states: Tensor
    teacher: Tensor | None
    ids: Tensor
    ce: Tensor
    pg: Tensor
    kl: Tensor
    behaviour: Tensor

    def chunk(self, start: int, stop: int) -> "Targets":
        parts = {name: None if value is None else value[start:stop] for name, value in vars(self).items()}
        return Targets(**parts)  # type: ignore[arg-type]  # None only for the teacher


def weights_of(batches: list[Batch], world: World) -> tuple[float, float, float]:
    """Normalisers (W_ce, W_pg, W_kl) of a step over all its micro-batches and ranks; W_pg counts tokens."""
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        for index, stream in enumerate((batch.ce, batch.pg, batch.kl)):
            if stream is not None:
                values = stream[:, 1:]
                sums[index] += float((values != 0).sum() if index == 1 else values.sum())
    world.all_reduce_(sums)
    ce, pg, kl = (max(float(value), 1e-9) for value in sums)
    return ce, pg, kl


def batch_loss(
    model: Qwen3,
    batch: Batch,
    normalisers: tuple[float, float, float],
    config: LossConfig,
    teacher: Qwen3 | None = None,
    balance: Balance | None = None,
) -> tuple[Tensor, Totals]:
    """This batch's share of the step's loss, and the sums behind it; `balance` is for sparse models in training."""
    tokens, positions = torch.from_numpy(batch.tokens).long(), torch.from_numpy(batch.positions).long()
    attend = Packed(torch.from_numpy(batch.segments))
    hidden = model(tokens, positions, attend)
    taught = None
    if teacher is not None and batch.kl is not None:
        with torch.no_grad():
            taught = teacher(tokens, positions, attend)
    targets = _targets(batch, hidden, taught)
    loss = hidden.sum() * 0.0
    totals = Totals(tokens=int((batch.segments != 0).sum()))
    num = len(targets.ids)
    for start in range(0, num, config.chunk_tokens):
        chunk = targets.chunk(start, start + config.chunk_tokens)
        if num <= config.chunk_tokens:
            part, sums = _chunk_loss(model, chunk, normalisers, config, teacher)
        else:
            part, sums = checkpoint(
                _chunk_loss, model, chunk, normalisers, config, teacher, use_reentrant=False
            )
        loss = loss + part
        _add(totals, sums)
    if balance is not None:
        evenness = balance.loss(routings(model), torch.from_numpy(batch.segments != 0).flatten())
        loss = loss + model.config.router_balance_weight * evenness
        totals.balance = float(evenness.detach())
    return loss, totals


def _targets(batch: Batch, hidden: Tensor, taught: Tensor | None) -> Targets:
    shape = batch.tokens.shape
    streams = []
    for stream in (batch.ce, batch.pg, batch.kl, batch.behaviour):
        streams.append(torch.zeros(shape) if stream is None else torch.from_numpy(stream))
    ce, pg, kl, behaviour = (stream[:, 1:] for stream in streams)
    rows, columns = ((ce != 0) | (pg != 0) | (kl != 0)).nonzero(as_tuple=True)
    return Targets(
        states=hidden[rows, columns],
        teacher=None if taught is None else taught[rows, columns],
        ids=torch.from_numpy(batch.tokens).long()[rows, columns + 1],
        ce=ce[rows, columns],
        pg=pg[rows, columns],
        kl=kl[rows, columns],
        behaviour=behaviour[rows, columns],
    )


def _chunk_loss(
    model: Qwen3,
    at: Targets,
    normalisers: tuple[float, float, float],
    config: LossConfig,
    teacher: Qwen3 | None,
) -> tuple[Tensor, Tensor]:
    w_ce, w_pg, w_kl = normalisers
    logits_NV = model.logits(at.states).float()
    log_z = logits_NV.logsumexp(-1)
    logprob = logits_NV.gather(1, at.ids[:, None]).squeeze(1) - log_z
    ce = -(at.ce * logprob).sum()
    loss = ce / w_ce
    sampled = at.pg != 0
    pg, clipped, mismatch, entropy = (logits_NV.new_zeros(()) for _ in range(4))
    if bool(sampled.any()):
        gap = (logprob - at.behaviour)[sampled]
        ratio, advantage = gap.exp(), at.pg[sampled]
        bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        pg = -torch.minimum(ratio * advantage, bounded * advantage).sum()
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.entropy_bonus > 0):
            chosen = logits_NV[sampled]
            entropy = (log_z[sampled] - (chosen.softmax(-1) * chosen).sum(-1)).sum()
        loss = loss + (pg - config.entropy_bonus * entropy) / w_pg
        with torch.no_grad():
            clipped = (ratio != bounded).sum()
            mismatch = gap.abs().sum()
    kl = logits_NV.new_zeros(())
    if teacher is not None and at.teacher is not None:
        with torch.no_grad():
            teacher_NV = teacher.logits(at.teacher).float()
        kl = (at.kl * _divergence(logits_NV, log_z, teacher_NV, config.reverse_kl)).sum()
        loss = loss + kl / w_kl
    sums = [ce, at.ce.sum(), pg, sampled.sum(), kl, at.kl.sum(), entropy, clipped, mismatch]
    return loss, torch.stack([value.detach().double() for value in sums])


def _divergence(logits_NV: Tensor, log_z: Tensor, teacher_NV: Tensor, reverse: bool) -> Tensor:
    """KL(teacher || model) of each token, or KL(model || teacher), over the whole vocabulary."""
    model_log = logits_NV - log_z[:, None]
    teacher_log = teacher_NV.log_softmax(-1)
    if reverse:
        return (model_log.exp() * (model_log - teacher_log)).sum(-1)
    return (teacher_log.exp() * (teacher_log - model_log)).sum(-1)


def _add(totals: Totals, sums: Tensor) -> None:
    names = ("ce", "ce_weight", "pg", "pg_weight", "kl", "kl_weight", "entropy", "clipped", "mismatch")
    for name, value in zip(names, sums.tolist(), strict=True):
        setattr(totals, name, getattr(totals, name) + value)
