"""SparseMLP: the mixture of experts of Qwen3-MoE, and the router's losses over the global batch.

The router is a softmax in float32 over all experts; the k best are renormalised and no token is dropped.
Shape legend: N tokens, D hidden, E experts, I expert width, k experts per token, M = N k, L layers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pensar.model import hardware
from pensar.model.config import ROWS_OF_ONE_OPERATOR, ModelConfig
from pensar.model.dispatch import returned, sent
from pensar.model.routed import routed_swiglu


class Routing(NamedTuple):
    """What the router of one layer did with the tokens of a forward pass."""

    probabilities: Tensor
    """[N, E]: softmax over all experts, float32, with its gradient."""
    counts: Tensor
    """[E]: tokens sent to each expert, padding included."""
    chosen: Tensor
    """[N, k]: the experts of each token."""
    log_z: Tensor
    """[N]: log of the softmax's denominator, float32, with its gradient."""


class Experts(nn.Module):
    """The SwiGLU weights of all experts of a layer, stacked."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num, hidden, width))

    def forward(self, sorted_x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """SwiGLU of rows that are sorted by expert."""
        x_MD, *matrices = map(cast, (sorted_x_MD, self.gate_up_proj, self.down_proj))
        return swiglu(x_MD, counts_E, *matrices).to(sorted_x_MD.dtype)

    def routed(self, x_ND: Tensor, weights_Nk: Tensor, order_M: Tensor, counts_E: Tensor) -> Tensor:
        """Each token's sum of its experts' SwiGLU times their weights, by one operator for training on a CPU."""
        weights = self.gate_up_proj, self.down_proj
        out_ND: Tensor = routed_swiglu(cast(x_ND), weights_Nk, order_M, counts_E, *weights)[0]
        return out_ND


def cast(x: Tensor) -> Tensor:
    """A float32 tensor on a CPU in autocast's type, where that is on: torch casts for its own products only."""
    on = x.device.type == "cpu" and x.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
    return x.to(torch.get_autocast_dtype("cpu")) if on else x


def swiglu(sorted_x_MD: Tensor, counts_E: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor) -> Tensor:
    """SwiGLU of rows that are sorted by expert, each with its expert's weights: [M, D] -> [M, D]."""
    gate, up = grouped(sorted_x_MD, gate_up_E2ID, counts_E).chunk(2, dim=-1)
    return grouped(F.silu(gate) * up, down_EDI, counts_E)


class SparseMLP(nn.Module):
    """Sends every token to its k best experts and adds their outputs, weighted by the router."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts, self.k = config.num_experts, config.experts_per_token
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        self.routing: Routing | None = None
        """Of the last forward pass in training mode, for the balance loss."""

    def __getstate__(self) -> dict[str, Any]:
        """Without the routing, whose gradient history can neither be copied nor sent to another process."""
        return self.__dict__ | {"routing": None}

    def forward(self, x: Tensor) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.gate.weight.float())
        probabilities_NE = logits_NE.softmax(-1)
        weights_Nk, chosen_Nk = probabilities_NE.topk(self.k, dim=-1)
        if self.norm_topk_prob:
            weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdim=True)
        order_M = chosen_Nk.flatten().argsort(stable=True)
        counts_E = _counts(chosen_Nk.flatten(), self.num_experts)
        self.routing = None
        if self.training:
            log_z_N = _log_z(logits_NE, probabilities_NE, chosen_Nk[:, 0])
            self.routing = Routing(probabilities_NE, counts_E, chosen_Nk, log_z_N)
        if x.device.type == "cuda":
            rows_MD = self.experts(sent(x_ND, order_M, self.k), counts_E)
            rows_MD = rows_MD * weights_Nk.flatten().gather(0, order_M)[:, None].to(x.dtype)
            return returned(rows_MD, order_M, self.k).view_as(x)
        if self._in_one(x_ND):
            return self.experts.routed(x_ND, weights_Nk.to(x.dtype), order_M, counts_E).view(x.shape)
        token_M = order_M // self.k
        out_MD = self.experts(x_ND[token_M], counts_E) * weights_Nk.flatten()[order_M, None].to(x.dtype)
        return torch.zeros_like(x_ND).index_add(0, token_M, out_MD).view_as(x)

    def _in_one(self, x_ND: Tensor) -> bool:
        """Whether one operator takes the tokens to the experts and back: on a CPU, with enough of them, in training
        and wherever its bits must be those of training.

        Experts of any other class (spread over ranks, in few bits, with LoRA) have their own way with rows.
        """
        experts = self.experts
        return (
            type(experts) is Experts
            and x_ND.device.type == "cpu"
            and x_ND.dtype == experts.gate_up_proj.dtype
            and x_ND.dtype in (torch.float32, torch.float64)
            and (self.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
            and experts.gate_up_proj.requires_grad
            and experts.down_proj.requires_grad
            and len(x_ND) * self.k >= ROWS_OF_ONE_OPERATOR * self.num_experts
        )


def grouped(x_MD: Tensor, w_EOD: Tensor, counts_E: Tensor) -> Tensor:
    """Rows sorted by expert, each times its expert's matrix: [M, D] -> [M, O].

    One fused call where the library has a kernel (bfloat16 on CPUs and on GPUs from Ampere on, float32 on a CPU;
    rows of whole 16 bytes; not compiled), else one product per expert. Groups may be of any size, none included:
    it is the rows that must be aligned, in the gradients' products too. On one core, forward and backward, the
    fused call is 3 to 13% faster at 8 experts and 4,096 tokens, 1.2 times at 64 tokens, twice as fast at 128
    experts and 8 tokens.
    """
    whole = all(size * x_MD.element_size() % 16 == 0 for size in w_EOD.shape[1:])
    if whole and _has_kernel(x_MD) and hasattr(F, "grouped_mm") and not torch.compiler.is_compiling():
        return F.grouped_mm(x_MD, w_EOD.transpose(1, 2), offs=counts_E.cumsum(0, dtype=torch.int32))
    rows: Sequence[Tensor] = x_MD.split(counts_E.tolist())
    return torch.cat([F.linear(row, w_OD) for row, w_OD in zip(rows, w_EOD.unbind(), strict=True)])


def _has_kernel(x_MD: Tensor) -> bool:
    if x_MD.device.type == "cpu":
        return x_MD.dtype in (torch.bfloat16, torch.float32)
    return x_MD.dtype == torch.bfloat16 and hardware.capability(x_MD.device) >= hardware.AMPERE


def routings(model: nn.Module) -> list[Routing]:
    """Of every sparse layer, in order, after a forward pass in training mode; empty for a dense model."""
    return [
        module.routing
        for module in model.modules()
        if isinstance(module, SparseMLP) and module.routing is not None
    ]


def take_routings(model: nn.Module) -> list[Routing]:
    """`routings` that the model forgets: the history behind them holds the inputs of blocks that compute again."""
    taken = routings(model)
    for module in model.modules():
        if isinstance(module, SparseMLP):
            module.routing = None
    return taken


def expert_counts(layers: Sequence[Routing], real_N: Tensor | None = None) -> Tensor:
    """Tokens per layer and expert [L, E], float32, to be summed over micro-batches and processes.

    `real_N` is True for tokens that count; None when there is no padding.
    """
    if real_N is None:
        return torch.stack([layer.counts for layer in layers]).float()
    num_experts = layers[0].counts.numel()
    return torch.stack(
        [torch.bincount(layer.chosen[real_N].flatten(), minlength=num_experts) for layer in layers]
    ).float()


def balance_loss(
    layers: Sequence[Routing],
    counts_LE: Tensor,
    *,
    num_tokens: float | None = None,
    real_N: Tensor | None = None,
) -> Tensor:
    """E sum_e f_e P_e, mean over the layers (arXiv 2501.11873): 1 at balance, E / k when k experts get all.

    f is the share of the assignments that each expert received in the *global* batch, without gradient;
    `counts_LE` is `expert_counts` summed over all its micro-batches and processes. P is this micro-batch's
    part of the mean router probability over the global batch, so that the losses of all micro-batches and
    processes add up to the loss of the whole batch, and so do their gradients.
    `num_tokens` is the size of the global batch where the counts are those of another batch, as when the last
    step's counts stand in for those of a step still under way; None takes it from the counts.
    """
    counts_LE = counts_LE.detach()
    assignments_L = counts_LE.sum(-1, keepdim=True)
    frequency_LE = counts_LE / assignments_L
    if num_tokens is None:
        num_tokens = float(assignments_L[0]) / layers[0].chosen.shape[1]
    probability_LE = torch.stack([_kept(layer.probabilities, real_N).sum(0) / num_tokens for layer in layers])
    return counts_LE.shape[-1] * (frequency_LE * probability_LE).sum(-1).mean()


def router_z_loss(
    layers: Sequence[Routing], *, num_tokens: float | None = None, real_N: Tensor | None = None
) -> Tensor:
    """Mean over tokens and layers of (log sum_e exp x_e)^2 of the router's logits x (arXiv 2202.08906, equation 5).

    `num_tokens` is the size of the global batch, so that the parts of micro-batches and processes add up; None for
    that of this forward pass.
    """
    squares_LN = torch.stack([_kept(layer.log_z, real_N).square() for layer in layers])
    return squares_LN.sum() / (len(layers) * (squares_LN.shape[1] if num_tokens is None else num_tokens))


def _counts(chosen_M: Tensor, num_experts: int) -> Tensor:
    """Assignments [E]; on an accelerator without waiting for it, as the library's count does to learn the largest."""
    if chosen_M.device.type == "cpu":
        return torch.bincount(chosen_M, minlength=num_experts)
    zeros_E = torch.zeros(num_experts, dtype=torch.int64, device=chosen_M.device)
    return zeros_E.scatter_add_(0, chosen_M, torch.ones_like(chosen_M))


def _log_z(logits_NE: Tensor, probabilities_NE: Tensor, best_N: Tensor) -> Tensor:
    """x_e - log p_e at the best expert: unlike logsumexp it keeps no [N, E] for the backward pass beyond what
    softmax keeps, and p_e is at least 1 / E."""
    rows_N = torch.arange(len(best_N), device=best_N.device)
    return logits_NE[rows_N, best_N] - probabilities_NE[rows_N, best_N].log()


def _kept(values_N: Tensor, real_N: Tensor | None) -> Tensor:
    """Of the tokens that count; [N, ...]."""
    return values_N if real_N is None else values_N[real_N]
