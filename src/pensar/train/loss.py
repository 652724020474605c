"""The one loss: cross-entropy, policy gradient and divergence from a teacher, each with per-token weights.

    loss = sum_t ce_t * (-log p(x_t) + z_loss * log^2 Z_t) / W_ce
         + sum_t (pg_t-surrogate(ratio_t) - entropy_bonus * H_t) / W_pg
         + sum_t kl_t * KL(teacher || model)_t / W_kl
         + router_balance_weight * balance + router_z_loss * router_z

where a stream is absent its term is; Z_t is the softmax's denominator; the last line is that of a mixture of experts
in training mode.
Logits are computed in chunks of tokens that carry weight, each with its gradients (or recomputed in the backward pass
where the output projection is spread over ranks), so that a full [tokens, vocabulary] matrix is never held.
Shape legend: N tokens that carry weight, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pensar.base.config import Config
from pensar.base.ranks import World
from pensar.model.attention import Attend, Packed
from pensar.model.moe import take_routings
from pensar.model.qwen3 import Qwen3
from pensar.text.packing import Batch
from pensar.train.balance import Balance
from pensar.train.fused import chosen_fused
from pensar.train.head import chosen, chunk_tokens, head_loss, plain_head


class LossConfig(Config, frozen=True, kw_only=True):
    """How the policy-gradient term clips and which way the divergence runs."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    """Upper clip of the probability ratio, wider than the lower one to keep entropy (DAPO, arXiv 2503.14476)."""
    entropy_bonus: float = 0.0
    """Weight of the mean entropy over policy-gradient tokens: it keeps replies varied while they improve."""
    reverse_kl: bool = False
    """KL(model || teacher) in place of KL(teacher || model)."""
    chunk_tokens: int = 0
    """Tokens whose logits are held at once; 0 for as many as fit a processor's cache, or 2,048 on an accelerator."""
    compile: bool = False
    """Compile the cross-entropy on a GPU; the loop's `compile` does too."""
    z_loss: float = 0.0
    """Weight of log^2 Z of the output softmax, over the cross-entropy's tokens and weights (PaLM, arXiv 2204.02311,
    section 5: 1e-4)."""
    router_z_loss: float = 0.0
    """Weight of log^2 Z of the routers, mean over tokens and layers (ST-MoE, arXiv 2202.08906, equation 5: 1e-3)."""
    exact_balance: bool = True
    """With several micro-batches a step, count the experts' shares of the whole step in a forward pass beforehand, a
    third more compute. False takes the shares of the step so far, whose gradient is not that of the whole batch."""


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
    mismatch_kl: float = 0.0
    """Sum of r - 1 - log r with r = p / behaviour p, an unbiased estimate of KL(behaviour || model) that is never
    negative (k3 of Schulman, "Approximating KL divergence", 2020)."""
    mismatch_max: float = 0.0
    """The largest |log p - behaviour log p|; the only one that is no sum."""
    balance: float = 0.0
    """Load-balancing loss of the experts before its weight: 1 where all share the tokens evenly."""
    z: float = 0.0
    """Sum of ce_t log^2 Z_t; 0 where z_loss is off."""
    router_z: float = 0.0
    """Router z-loss before its weight; 0 where it is off."""
    tokens: int = 0
    groups: Tensor | None = None
    """[2, K] float64: the parts of `ce` and of `ce_weight` in each group of tokens; None where there are none."""

    @classmethod
    def zeros(cls, num_groups: int) -> Tensor:
        """The tensor of no tokens."""
        groups = torch.zeros(2, num_groups, dtype=torch.float64) if num_groups else None
        return cls(groups=groups).tensor()

    def tensor(self) -> Tensor:
        """The plain sums in their order, then those of the groups."""
        *plain, groups = vars(self).values()
        sums = torch.tensor(plain, dtype=torch.float64)
        return sums if groups is None else torch.cat((sums, groups.flatten()))

    @classmethod
    def joined(cls, first: Tensor, second: Tensor) -> Tensor:
        """The tensor of the tokens of two others."""
        whole = first + second
        at = list(vars(cls())).index("mismatch_max")
        whole[at] = torch.maximum(first[at], second[at])
        return whole

    @classmethod
    def of(cls, values: Tensor) -> "Totals":
        count = len(vars(cls())) - 1
        totals = cls(*values[:count].tolist())
        if len(values) > count:
            totals.groups = values[count:].view(2, -1)
        return totals


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
    groups: Tensor | None
    lost: Tensor | None
    """ce_t (-log p) of each token, filled in chunk by chunk, where there are groups."""
    gap: Tensor | None = None
    """log p - behaviour log p of the policy's tokens, 0 for others; filled in likewise, where there is a policy."""

    def chunk(self, start: int, stop: int) -> "Targets":
        parts = {name: None if value is None else value[start:stop] for name, value in vars(self).items()}
        return Targets(**parts)  # type: ignore[arg-type]  # None only where it was None


class Inputs(NamedTuple):
    """What one rank's model takes of a batch: all of it, or the columns of each row that are its part of a context."""

    tokens: Tensor
    positions: Tensor
    attend: Attend
    real_N: Tensor
    """[B t], False for padding."""
    columns: Tensor | None = None
    """Which columns [t] of the batch's rows these are; None for all."""
    routed_N: Tensor | None = None
    """Of `real_N` the tokens that this rank's routers see; None for all of them."""

    @property
    def routed(self) -> Tensor:
        return self.real_N if self.routed_N is None else self.routed_N

    def hidden(self, model: Qwen3) -> Tensor:
        """Last hidden states [B, t, D]."""
        states: Tensor = model(self.tokens, self.positions, self.attend)
        return states


def inputs_of(batch: Batch, device: torch.device | None = None) -> Inputs:
    """A whole batch, with attention within its segments."""
    tokens, positions, segments = (
        torch.from_numpy(values).to(device).long()
        for values in (batch.tokens, batch.positions, batch.segments)
    )
    return Inputs(tokens, positions, Packed(segments), (segments != 0).flatten())


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
    inputs: Inputs | None = None,
) -> tuple[Tensor, Totals]:
    """This batch's share of the step's loss, and the sums behind it; `balance` is for sparse models in training.

    `inputs` is what this rank computes of the batch; None for all of it.
    """
    inputs = inputs or inputs_of(batch)
    hidden = inputs.hidden(model)
    taught = None
    if teacher is not None and batch.kl is not None:
        with torch.no_grad():
            taught = inputs.hidden(teacher)
    loss, totals = states_loss(model, hidden, batch, inputs, normalisers, config, teacher, taught)
    if balance is not None:
        layers, real_N = take_routings(model), inputs.routed
        evenness = balance.loss(layers, real_N)
        loss = loss + model.config.router_balance_weight * evenness
        totals.balance = float(evenness.detach())
        if config.router_z_loss:
            router_z = balance.z_loss(layers, real_N)
            loss = loss + config.router_z_loss * router_z
            totals.router_z = float(router_z.detach())
    return loss, totals


def states_loss(
    model: Qwen3,
    hidden: Tensor,
    batch: Batch,
    inputs: Inputs,
    normalisers: tuple[float, float, float],
    config: LossConfig,
    teacher: Qwen3 | None = None,
    taught: Tensor | None = None,
) -> tuple[Tensor, Totals]:
    """The loss of last hidden states [B, t, D], and of a teacher's for the same inputs; without the router's terms."""
    targets = _targets(batch, hidden, taught, inputs.columns)
    totals = Totals(tokens=int(inputs.real_N.sum()))
    size = config.chunk_tokens or chunk_tokens(model.config.vocab_size, hidden.device.type)
    head = plain_head(model)
    if head is not None:

        def loss_of(logits_CV: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
            chunk = targets.chunk(start, stop)
            return _logits_loss(logits_CV, chunk, normalisers, config, teacher, owned=True)

        loss, sums = head_loss(targets.states, head, loss_of, size)
        if sums is not None:
            _add(totals, sums)
        _add_by_token(totals, targets, batch.num_groups)
        return loss + hidden.sum() * 0.0, totals
    loss = hidden.sum() * 0.0
    num = len(targets.ids)
    for start in range(0, num, size):
        chunk = targets.chunk(start, start + size)
        if num <= size:
            part, sums = _chunk_loss(model, chunk, normalisers, config, teacher)
        else:
            part, sums = checkpoint(
                _chunk_loss, model, chunk, normalisers, config, teacher, use_reentrant=False
            )
        loss = loss + part
        _add(totals, sums)
    _add_by_token(totals, targets, batch.num_groups)
    return loss, totals


def _add_by_token(totals: Totals, targets: Targets, num_groups: int) -> None:
    """What is told from single tokens once all chunks are done."""
    totals.groups = _by_group(targets, num_groups)
    if targets.gap is not None and len(targets.gap):
        gap = targets.gap.double()
        totals.mismatch, totals.mismatch_max = float(gap.abs().sum()), float(gap.abs().max())
        totals.mismatch_kl = float((gap.expm1() - gap).sum())


def _by_group(targets: Targets, num_groups: int) -> Tensor | None:
    """Cross-entropy and weight of each group; on the CPU, where such sums have one order."""
    if targets.groups is None or targets.lost is None:
        return None
    groups = targets.groups.cpu()
    values = (values.double().cpu() for values in (targets.lost, targets.ce))
    return torch.stack([torch.bincount(groups, weights, minlength=num_groups) for weights in values]).double()


def _targets(batch: Batch, hidden: Tensor, taught: Tensor | None, columns: Tensor | None) -> Targets:
    """What the hidden states [B, t, D] of the given columns predict: the token after each and its weights."""
    ids = _after(batch.tokens, hidden.device).long()
    streams = [_after(stream, hidden.device) for stream in (batch.ce, batch.pg, batch.kl, batch.behaviour)]
    ce, pg, kl, behaviour = (torch.zeros_like(ids, dtype=torch.float32) if x is None else x for x in streams)
    if columns is not None:
        ids, ce, pg, kl, behaviour = (x[:, columns] for x in (ids, ce, pg, kl, behaviour))
    groups = _after(batch.groups, hidden.device)
    if groups is not None:
        groups = groups if columns is None else groups[:, columns]
    at = ((ce != 0) | (pg != 0) | (kl != 0)).nonzero(as_tuple=True)
    lost = ids.new_zeros(len(at[0]), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return Targets(
        states=hidden[at],
        teacher=None if taught is None else taught[at],
        ids=ids[at],
        ce=ce[at],
        pg=pg[at],
        kl=kl[at],
        behaviour=behaviour[at],
        groups=None if groups is None else groups[at].long(),
        lost=None if groups is None else lost,
        gap=None if batch.pg is None else torch.zeros_like(lost),
    )


@overload
def _after(values: None, device: torch.device) -> None: ...
@overload
def _after(values: NDArray[Any], device: torch.device) -> Tensor: ...
def _after(values: NDArray[Any] | None, device: torch.device) -> Tensor | None:
    """The values of the next column; zero after the last one."""
    if values is None:
        return None
    return F.pad(torch.from_numpy(values[:, 1:]), (0, 1)).to(device)


def _chunk_loss(
    model: Qwen3,
    at: Targets,
    normalisers: tuple[float, float, float],
    config: LossConfig,
    teacher: Qwen3 | None,
) -> tuple[Tensor, Tensor]:
    return _logits_loss(model.logits(at.states), at, normalisers, config, teacher)


def _logits_loss(
    logits_NV: Tensor,
    at: Targets,
    normalisers: tuple[float, float, float],
    config: LossConfig,
    teacher: Qwen3 | None,
    *,
    owned: bool = False,
) -> tuple[Tensor, Tensor]:
    """`owned` logits may be written over."""
    w_ce, w_pg, w_kl = normalisers
    sampled = at.pg != 0
    learns_by_policy = bool(sampled.any())
    alone = teacher is None and not learns_by_policy
    if alone and config.compile and logits_NV.device.type == "cuda":
        logprob, log_z = chosen_fused(logits_NV, at.ids)
    else:
        logits_NV = _at_least_float32(logits_NV)
        logprob, log_z = chosen(logits_NV, at.ids, overwrite=owned and alone)
    ce = -(at.ce * logprob).sum()
    loss = ce / w_ce
    if at.lost is not None:
        at.lost.copy_(-(at.ce * logprob).detach())
    z = logits_NV.new_zeros(())
    if config.z_loss:
        z = (at.ce * log_z.square()).sum()
        loss = loss + config.z_loss * z / w_ce
    pg, clipped, entropy = (logits_NV.new_zeros(()) for _ in range(3))
    if learns_by_policy:
        gap = (logprob - at.behaviour)[sampled]
        ratio, advantage = gap.exp(), at.pg[sampled]
        bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        pg = -torch.minimum(ratio * advantage, bounded * advantage).sum()
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.entropy_bonus > 0):
            scores = logits_NV[sampled]
            entropy = (log_z[sampled] - (scores.softmax(-1) * scores).sum(-1)).sum()
        loss = loss + (pg - config.entropy_bonus * entropy) / w_pg
        with torch.no_grad():
            clipped = (ratio != bounded).sum()
            if at.gap is not None:
                at.gap[sampled] = gap
    kl = logits_NV.new_zeros(())
    if teacher is not None and at.teacher is not None:
        with torch.no_grad():
            teacher_NV = _at_least_float32(teacher.logits(at.teacher))
        kl = (at.kl * _divergence(logits_NV, log_z, teacher_NV, config.reverse_kl)).sum()
        loss = loss + kl / w_kl
    sums = [ce, at.ce.sum(), pg, sampled.sum(), kl, at.kl.sum(), entropy, clipped, z]
    return loss, torch.stack([value.detach().double() for value in sums])


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _divergence(logits_NV: Tensor, log_z: Tensor, teacher_NV: Tensor, reverse: bool) -> Tensor:
    """KL(teacher || model) of each token, or KL(model || teacher), over the whole vocabulary."""
    model_log = logits_NV - log_z[:, None]
    teacher_log = teacher_NV.log_softmax(-1)
    if reverse:
        return (model_log.exp() * (model_log - teacher_log)).sum(-1)
    return (teacher_log.exp() * (teacher_log - model_log)).sum(-1)


def _add(totals: Totals, sums: Tensor) -> None:
    names = ("ce", "ce_weight", "pg", "pg_weight", "kl", "kl_weight", "entropy", "clipped", "z")
    for name, value in zip(names, sums.tolist(), strict=True):
        setattr(totals, name, getattr(totals, name) + value)
