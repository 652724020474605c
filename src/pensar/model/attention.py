"""Attend: the seam through which a model asks for attention; the caller decides over what.

Training passes `Packed`, the engine its cache: one model definition lives both lives.
Shape legend: B batch, T tokens, H query heads, K key-value heads, h head_dim, N tokens of all rows.
"""

from typing import Protocol

import torch
from torch import Tensor

from pensar.model.causal import causal_attention, natively
from pensar.model.flash import HALF, Documents, dense_mask, masked


class Attend(Protocol):
    """Causal attention of one layer, however keys and values are kept."""

    def __call__(self, layer: int, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor) -> Tensor:
        """Attention output [B, T, H, h]; q and k are already rotated."""
        ...


class Packed:
    """Attention within the documents packed into each row.

    `segments_BT` numbers the documents of a row from 1, each in one piece; 0 is padding, whose output is
    finite and means nothing. None means that every row is one document.

    On a CPU the documents are attended to one by one: 13.6 ms against 23.2 ms with a mask for 16 rows of 256
    tokens, 4 documents each, 4 heads of 32, forward and backward on one core; 15.5 ms against 92.3 ms for 4
    rows of 1,024 tokens, 16 documents each. The mask is kept for crowds of very short documents, where the
    calls themselves would cost more. On CUDA one kernel takes all documents (`model/flash.py`).
    """

    CALL_COST = 2_800
    """Fixed cost of one attention call on a CPU, in query-key pairs of 4 heads of 32 (60 microseconds)."""

    def __init__(self, segments_BT: Tensor | None = None) -> None:
        self.mask: Tensor | None = None
        self.runs: list[tuple[int, bool]] = []
        """(tokens, whether a document or padding) over all rows in order; empty when they are not taken one by one."""
        self.documents: Documents | None = None
        """On CUDA, unless every row is one document."""
        self._whole: tuple[torch.Size, Documents] | None = None
        if segments_BT is None:
            return
        runs = _runs(segments_BT.cpu())
        if len(runs) == len(segments_BT) and all(real for _, real in runs):
            return  # whole rows: plain causal attention
        if segments_BT.device.type == "cuda":
            self.documents = Documents(segments_BT, [length for length, _ in runs])
        elif segments_BT.device.type == "cpu" and self._worth_splitting(runs, segments_BT):
            self.runs = runs
        else:
            self.mask = dense_mask(segments_BT)

    def __call__(self, layer: int, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor) -> Tensor:
        if self.documents is not None:
            return self.documents(q_BTHh, k_BTKh, v_BTKh)
        if self.mask is None and _lacks_kernel(q_BTHh, k_BTKh):
            return self._rows(q_BTHh.shape[:2], q_BTHh.device)(q_BTHh, k_BTKh, v_BTKh)
        if not self.runs:
            return _attention(q_BTHh, k_BTKh, v_BTKh, self.mask)
        lengths = [length for length, _ in self.runs]
        pieces = [x.flatten(0, 1).split(lengths) for x in (q_BTHh, k_BTKh, v_BTKh)]
        out_NHh = [
            _attention(q[None], k[None], v[None])[0] if real else torch.zeros_like(q)
            for q, k, v, (_, real) in zip(*pieces, self.runs, strict=True)
        ]
        return torch.cat(out_NHh).view(q_BTHh.shape)

    def _rows(self, shape: torch.Size, device: torch.device) -> Documents:
        """Whole rows as documents."""
        if self._whole is None or self._whole[0] != shape:
            ones_BT = torch.ones(*shape, dtype=torch.int32, device=device)
            self._whole = shape, Documents(ones_BT, [shape[1]] * shape[0])
        return self._whole[1]

    def _worth_splitting(self, runs: list[tuple[int, bool]], segments_BT: Tensor) -> bool:
        documents = [length for length, real in runs if real]
        one_by_one = sum(length * length + self.CALL_COST for length in documents)
        return one_by_one < segments_BT.numel() * segments_BT.shape[1]


def _attention(q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is None and _by_blocks(q_BTHh, v_BTKh):
        blocked: Tensor = causal_attention(q_BTHh, k_BTKh, v_BTKh)
        return blocked
    return masked(q_BTHh, k_BTKh, v_BTKh, mask)


def _lacks_kernel(q_BTHh: Tensor, k_BTKh: Tensor) -> bool:
    """Whether the library would hold all pairs of a row in training: grouped heads in float32 on CUDA."""
    return (
        q_BTHh.device.type == "cuda"
        and q_BTHh.dtype not in HALF
        and q_BTHh.shape[2] != k_BTKh.shape[2]
        and torch.is_grad_enabled()
        and q_BTHh.requires_grad
    )


NATIVE_FROM = 64
"""Tokens from which our own kernels in float32 beat the library's: by 1.2 to 1.4 times from 128 on."""


def _by_blocks(q_BTHh: Tensor, v_BTKh: Tensor) -> bool:
    """Where products of blocks beat the fused kernel. Our own do in bfloat16, three times at 16 to 512 tokens and twice
    at 2,048, and in training in float32; the library's in training, 1.4 times at 512 tokens of 64, less than a tenth
    beyond these bounds."""
    num_tokens, learns = q_BTHh.shape[1], torch.is_grad_enabled() and q_BTHh.requires_grad
    if not torch.compiler.is_compiling() and natively(q_BTHh, v_BTKh):
        return v_BTKh.dtype == torch.bfloat16 or (learns and num_tokens >= NATIVE_FROM)
    return (
        learns
        and q_BTHh.device.type == "cpu"
        and q_BTHh.dtype in (torch.float32, torch.float64)
        and v_BTKh.dtype in (q_BTHh.dtype, torch.bfloat16)
        and q_BTHh.shape[-1] >= 64
        and 256 <= num_tokens <= 1024
    )


def _runs(segments_BT: Tensor) -> list[tuple[int, bool]]:
    """Lengths of the runs of equal numbers over the flattened rows, and whether each is a document."""
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    begins = begins_BT.flatten().nonzero().flatten()
    ends = torch.cat((begins[1:], begins.new_tensor([segments_BT.numel()])))
    real = segments_BT.flatten()[begins] != 0
    return list(zip((ends - begins).tolist(), real.tolist(), strict=True))
