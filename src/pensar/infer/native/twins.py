"""Twins: what the library computes, written plainly in torch, in float64 unless said otherwise, for tests to compare.

Shape legend: N rows, O outputs, I inputs, G inputs of a group of a row, P inputs of a part of a column.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP, PART = 64, 32


def product(x_NI: Tensor, weight_OI: Tensor, kind: str) -> Tensor:
    """x W^T as the type of the weights gives it; int8 and int4 also bring the rows to bytes."""
    if kind == "float32":
        return x_NI.double() @ weight_OI.double().T
    if kind == "bfloat16":
        return x_NI.double() @ weight_OI.bfloat16().double().T
    weight = int8_columns(weight_OI) if kind == "int8" else int4_columns(weight_OI)
    out_NO: Tensor = row_bytes(x_NI) @ weight.double().T
    return out_NO


def row_bytes(x_NI: Tensor) -> Tensor:
    """Rows as bytes times a scale for each GROUP inputs: the largest magnitude becomes 127."""
    x_NgG = F.pad(x_NI, (0, -x_NI.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scale = x_NgG.abs().amax(-1, keepdim=True) / 127
    bytes_NgG = (x_NgG * (1 / scale)).nan_to_num(0).round()
    rows_NI: Tensor = (bytes_NgG.double() * scale.double()).flatten(1)[:, : x_NI.shape[1]]
    return rows_NI


def int8_columns(weight_OI: Tensor) -> Tensor:
    """Weights as bytes times a scale for each output."""
    scale = weight_OI.abs().amax(1, keepdim=True) / 127
    return (weight_OI * (1 / scale)).nan_to_num(0).round() * scale


def int4_columns(weight_OI: Tensor) -> Tensor:
    """Weights as least + scale q, q in 0 to 15, for each PART inputs of an output; scale and least in bfloat16.

    Of nine ranges, from that of the values to one a third narrower, the one of the least squared error.
    """
    w_OpP = F.pad(weight_OI, (0, -weight_OI.shape[1] % PART)).unflatten(1, (-1, PART))
    real_OpP = F.pad(torch.ones_like(weight_OI), (0, -weight_OI.shape[1] % PART)).view_as(w_OpP)
    best, error = torch.zeros_like(w_OpP), torch.full((*w_OpP.shape[:2], 1), torch.inf)
    for shrink in range(9):
        part = torch.tensor(1.0) - torch.tensor(0.04) * shrink
        low = w_OpP.amin(-1, keepdim=True).clamp(max=0)
        high = w_OpP.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) * part / 15).bfloat16().float()
        least = (low * part).bfloat16().float()
        q = ((w_OpP - least) * (1 / scale)).nan_to_num(0).round().clamp(0, 15)
        found = least + scale * q
        mistake = ((found - w_OpP) * real_OpP).square().sum(-1, keepdim=True)
        best, error = torch.where(mistake < error, found, best), torch.minimum(error, mistake)
    return best.flatten(1)[:, : weight_OI.shape[1]]
