"""Forward: one pass of the model over fused weights and paged texts, by kernels or by their twins.

Shape legend: N tokens, S wanted tokens, V vocabulary, D hidden, O outputs, I width, E experts, k experts per token,
M = N k rows.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from pensar.infer.cuda.cache import SlabCache
from pensar.infer.cuda.changes import DOWN, GATE_UP, OUT, QKV, Changed
from pensar.infer.cuda.weights import LayerWeights, Matrix, Weights
from pensar.infer.cuda.work import Work
from pensar.model.config import ModelConfig
from pensar.model.dispatch import inverse_of


class Forward:
    """`kernels` is what has the functions of `twins.py`."""

    def __init__(
        self, config: ModelConfig, weights: Weights, cache: SlabCache, angles_Lh: Tensor, kernels: ModuleType
    ) -> None:
        self._config, self._weights, self._cache, self._angles = config, weights, cache, angles_Lh
        self._kernels = kernels

    def __call__(
        self, tokens_N: Tensor, work: Work, wanted_S: Tensor | None, changed: Changed | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores [S, V] and the states [S, D] that they come from, in the type of the weights."""
        x_ND = F.embedding(tokens_N, self._weights.embedding)
        one = len(tokens_N) == 1
        hidden_SD = self._one(x_ND, work) if one and changed is None else self._many(x_ND, work, changed)
        if wanted_S is not None and not (one and len(wanted_S) == 1):
            hidden_SD = hidden_SD.index_select(0, wanted_S)
        return F.linear(hidden_SD, self._weights.head), hidden_SD

    def _many(self, x_ND: Tensor, work: Work, changed: Changed | None) -> Tensor:
        kernels, eps = self._kernels, self._config.rms_norm_eps
        stream_ND: Tensor | None = None
        for number, layer in enumerate(self._weights.layers):
            normed_ND, stream_ND = kernels.add_norm(x_ND, stream_ND, layer.attention_norm, eps)
            qkv_NO = self._product(normed_ND, layer.qkv, number, QKV, changed)
            attended_NO = self._attended(qkv_NO, number, layer, work)
            x_ND = self._product(attended_NO, layer.out, number, OUT, changed)
            normed_ND, stream_ND = kernels.add_norm(x_ND, stream_ND, layer.mlp_norm, eps)
            if layer.router is None:
                gate_up_N2I = self._product(normed_ND, layer.gate_up, number, GATE_UP, changed)
                x_ND = self._product(kernels.swiglu(gate_up_N2I), layer.down, number, DOWN, changed)
            else:
                x_ND = self._experts(normed_ND, layer, number, layer.router, changed)
        hidden_ND, _ = kernels.add_norm(x_ND, stream_ND, self._weights.final_norm, eps)
        return hidden_ND  # type: ignore[no-any-return]

    def _one(self, x_1D: Tensor, work: Work) -> Tensor:
        """A single token: four products a dense layer, each with the norm before it and the sum after it."""
        kernels, eps = self._kernels, self._config.rms_norm_eps
        for number, layer in enumerate(self._weights.layers):
            gain = layer.attention_norm
            qkv_1O = kernels.row_product(x_1D, layer.qkv.weight, layer.qkv.scales, gain_D=gain, eps=eps)
            attended_1O = self._attended(qkv_1O, number, layer, work)
            x_1D = kernels.row_product(attended_1O, layer.out.weight, layer.out.scales, stream_1O=x_1D)
            if layer.router is None:
                gate_up, down = layer.gate_up, layer.down
                inner_1I = kernels.row_product(
                    x_1D, gate_up.weight, gate_up.scales, gain_D=layer.mlp_norm, eps=eps, gated=True
                )
                x_1D = kernels.row_product(inner_1I, down.weight, down.scales, stream_1O=x_1D)
            else:
                normed_1D, x_1D = kernels.add_norm(x_1D, None, layer.mlp_norm, eps)
                x_1D = x_1D + self._experts(normed_1D, layer, number, layer.router, None)
        hidden_1D, _ = kernels.add_norm(x_1D, None, self._weights.final_norm, eps)
        return hidden_1D  # type: ignore[no-any-return]

    def _attended(self, qkv_NO: Tensor, number: int, layer: LayerWeights, work: Work) -> Tensor:
        eps = self._config.rms_norm_eps
        q_NHh = self._kernels.heads(qkv_NO, layer.head_norms_2h, self._angles, eps, self._cache, number, work)
        return self._kernels.attention(q_NHh, self._cache, number, work).flatten(1)  # type: ignore[no-any-return]

    def _product(
        self, x_ND: Tensor, matrix: Matrix, number: int, place: int, changed: Changed | None
    ) -> Tensor:
        if matrix.scales is None:
            y_NO = F.linear(x_ND, matrix.weight)
        else:
            y_NO = self._float8(x_ND, matrix.weight, matrix.scales)
        if changed is not None:
            changed.add(number, place, x_ND, y_NO)
        return y_NO

    def _float8(self, x_ND: Tensor, weight_OD: Tensor, scales_O: Tensor) -> Tensor:
        """Both sides in float8, each row of either with its scale."""
        small_ND, scales_N1 = self._kernels.quantize(x_ND)
        product: Tensor = torch._scaled_mm(  # noqa: SLF001 - torch has no other name for it
            small_ND,
            weight_OD.T,
            scale_a=scales_N1,
            scale_b=scales_O[None],
            out_dtype=torch.bfloat16 if x_ND.is_cuda else x_ND.dtype,
        )
        return product.to(x_ND.dtype)

    def _experts(
        self, x_ND: Tensor, layer: LayerWeights, number: int, router_ED: Tensor, changed: Changed | None
    ) -> Tensor:
        config, kernels = self._config, self._kernels
        k = config.experts_per_token
        gate_up, down = layer.gate_up, layer.down
        if changed is not None:
            gate_up, down = changed.experts(number, gate_up, down)
        logits_NE = F.linear(x_ND.float(), router_ED)
        weights_Nk, chosen_Nk = logits_NE.softmax(-1).topk(k, dim=-1)
        if config.norm_topk_prob:
            weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdim=True)
        order_M = chosen_Nk.flatten().argsort(stable=True)
        counts_E = torch.zeros(config.num_experts, dtype=torch.int64, device=x_ND.device)
        counts_E.scatter_add_(0, chosen_Nk.flatten(), torch.ones_like(order_M))
        inner_MI = kernels.grouped_product(
            x_ND, order_M // k, counts_E, gate_up.weight, gate_up.scales, gated=True
        )
        rows_MD = kernels.grouped_product(inner_MI, None, counts_E, down.weight, down.scales)
        rows_NkD = rows_MD.index_select(0, inverse_of(order_M)).view(len(x_ND), k, -1)
        sum_N1D: Tensor = weights_Nk.to(x_ND.dtype)[:, None] @ rows_NkD
        return sum_N1D[:, 0]
