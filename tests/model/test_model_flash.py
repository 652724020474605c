"""Documents on an accelerator: what each kernel is told, against hand cases, the library and one document at a time."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

from pensar.model import flash, hardware
from pensar.model.attention import Packed
from pensar.model.flash import BLOCK, Documents, block_mask, dense_mask, offsets, varlen
from pretend import Pretend, flash_by_hand

CUDA = torch.device("cuda")


def segments_of(rows: list[list[int]], num_tokens: int) -> Tensor:
    """Documents of the given lengths in each row, then padding."""
    out = torch.zeros(len(rows), num_tokens, dtype=torch.int32)
    for row, lengths in enumerate(rows):
        out[row, : sum(lengths)] = torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))
    return out


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, num, 16, generator=generator).to(dtype) for num in (4, 2, 2)]


def naive(q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, segments_BT: Tensor) -> Tensor:
    """Softmax over the pairs of a dense mask, in float64."""
    group = q_BTHh.shape[2] // k_BTKh.shape[2]
    q, k, v = q_BTHh.double(), *(x.double().repeat_interleave(group, 2) for x in (k_BTKh, v_BTKh))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    num_tokens = segments_BT.shape[1]
    same = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    past = torch.arange(num_tokens)[:, None] >= torch.arange(num_tokens)
    scores = scores.masked_fill(~(same & past), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def test_offsets_are_where_documents_begin_and_the_last_one_ends() -> None:
    found = offsets([3, 1, 4, 2])
    assert found.tolist() == [0, 3, 4, 8, 10]
    assert found.dtype == torch.int32


def test_a_batch_is_its_documents_and_its_padding_row_after_row() -> None:
    with Pretend():
        packed = Packed(segments_of([[3, 1], [5], [2, 2]], 5).to(CUDA))
        documents = packed.documents
        assert documents is not None
        assert documents.starts.device.type == "cuda"
        assert documents.starts.tolist() == [0, 3, 4, 5, 10, 12, 14, 15]
        assert documents.longest == 5
        assert packed.mask is None
        assert packed.runs == []


def test_whole_rows_on_an_accelerator_are_plain_causal_attention() -> None:
    with Pretend():
        assert Packed(torch.ones(2, 8, dtype=torch.int32).to(CUDA)).documents is None


ROWS = [
    ([[300], [128, 128, 44]], 300),
    ([[1, 127, 128, 44], [299, 1]], 300),
    ([[64, 200], [5, 5, 5]], 290),  # padding
    ([[128] * 4, [512]], 512),
    ([[7] * 60, [400, 112]], 512),
    ([[40], [20, 20]], 40),  # less than a block
]


@pytest.mark.parametrize(("rows", "num_tokens"), ROWS)
def test_blocks_are_those_that_the_library_finds_by_looking_at_all_pairs(
    rows: list[list[int]], num_tokens: int
) -> None:
    segments = segments_of(rows, num_tokens)
    mask = dense_mask(segments)
    found = block_mask(segments)
    expected = create_block_mask(
        lambda b, h, q, k: mask[b, 0, q.clamp(max=num_tokens - 1), k.clamp(max=num_tokens - 1)],
        len(rows),
        None,
        num_tokens,
        num_tokens,
        device="cpu",
    )
    assert found.shape == expected.shape == (len(rows), 1, num_tokens, num_tokens)
    for kind in ("kv", "full_kv", "q", "full_q"):
        num, mine = getattr(found, f"{kind}_num_blocks"), getattr(found, f"{kind}_indices")
        theirs = getattr(expected, f"{kind}_indices")
        assert torch.equal(num, getattr(expected, f"{kind}_num_blocks")), kind
        listed = torch.arange(mine.shape[-1]) < num[..., None]
        assert torch.equal(mine[listed], theirs[listed]), kind


@pytest.mark.parametrize(("rows", "num_tokens"), ROWS)
def test_the_block_masks_rule_is_the_dense_mask(rows: list[list[int]], num_tokens: int) -> None:
    segments = segments_of(rows, num_tokens)
    at = torch.arange(num_tokens)
    row = torch.arange(len(rows))[:, None, None]
    assert torch.equal(
        block_mask(segments).mask_mod(row, None, at[None, :, None], at[None, None, :]),
        dense_mask(segments)[:, 0],
    )


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method`:DeprecationWarning"
)  # of the compiler's own imports
@pytest.mark.parametrize("num_tokens", [300, 384])
def test_flex_attention_over_the_blocks_is_attention_within_documents(num_tokens: int) -> None:
    """Forward only: it has no gradients on processors."""
    segments = segments_of([[100, 150, 30], [num_tokens]], num_tokens)
    q, k, v = heads(2, num_tokens)
    with torch.no_grad():
        found = flash.flex(q, k, v, block_mask(segments))
    torch.testing.assert_close(found.double(), naive(q, k, v, segments), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method`:DeprecationWarning"
)  # of the compiler's own imports
def test_other_documents_in_rows_of_the_same_shape_compile_nothing_again() -> None:
    """Also where compilers are told not to look, as within compiled blocks of the model."""
    call = torch.compiler.disable(flash.flex)
    q, k, v = heads(2, 256)
    graphs = []
    for cut in (100, 50, 130):
        segments = segments_of([[cut, 256 - cut], [256]], 256)
        with torch.no_grad():
            found = call(q, k, v, block_mask(segments))
        torch.testing.assert_close(found.double(), naive(q, k, v, segments), atol=1e-5, rtol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_flash_kernel_gets_documents_and_gives_back_rows(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """By the kernel's contract, computed by hand on the processor; the offsets and the way back are ours."""
    monkeypatch.setattr(flash, "HALF", (dtype,))
    segments = segments_of([[60, 40, 28], [100, 28], [128], [90]], 128)
    weight = (
        torch.randn(4, 128, 4, 16, generator=torch.Generator().manual_seed(1))
        * (segments != 0)[..., None, None]
    )
    near = [x.requires_grad_() for x in heads(4, 128, dtype=dtype)]
    expected = naive(*near, segments)
    wanted = torch.autograd.grad(expected, near, weight.double())
    with Pretend() as pretend, flash_by_hand(pretend):
        far = [x.detach().to(CUDA).requires_grad_() for x in near]
        packed = Packed(segments.to(CUDA))
        found = packed(0, *far)
        assert (found.dtype, found.shape, found.device.type) == (dtype, far[0].shape, "cuda")
        gradients = torch.autograd.grad(found, far, weight.to(CUDA, dtype))
    assert pretend.called["torch_attn::_varlen_attn"] == 1
    rough = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    real = segments != 0
    torch.testing.assert_close(found.cpu()[real].double(), expected[real], **rough)
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine.cpu()[real].double(), theirs[real].double(), **rough)


def test_types_that_were_mixed_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only products are in half precision, norms leave queries and keys in float32."""
    segments = segments_of([[20, 12]], 32)
    q, k, v = heads(1, 32)
    with Pretend() as pretend, flash_by_hand(pretend):
        found = Packed(segments.to(CUDA))(0, q.to(CUDA), k.to(CUDA), v.bfloat16().to(CUDA))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.cpu().double(), naive(q, k, v, segments), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("dtype", "size", "capability", "chosen"),
    [
        (torch.bfloat16, 128, (9, 0), "flash"),
        (torch.float16, 64, (8, 0), "flash"),
        (torch.bfloat16, 128, (7, 5), "flex"),
        (torch.float32, 128, (9, 0), "flex"),
        (torch.bfloat16, 20, (9, 0), "flex"),
        (torch.float32, 8, (9, 0), "mask"),
        (torch.float64, 64, (9, 0), "mask"),
    ],
)
def test_type_size_and_device_choose_the_kernel(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, capability: tuple[int, int], chosen: str
) -> None:
    called: list[str] = []
    monkeypatch.setattr(flash, "flex", lambda *_: called.append("flex"))
    monkeypatch.setattr(flash, "block_mask", lambda _: None)
    monkeypatch.setattr(flash, "masked", lambda *_: called.append("mask"))
    monkeypatch.setattr(Documents, "_flash", lambda *_: called.append("flash"))
    with Pretend():
        monkeypatch.setattr(hardware, "capability", lambda _: capability)
        q = torch.zeros(1, 8, 2, size, dtype=dtype).to(CUDA)
        Packed(segments_of([[5, 3]], 8).to(CUDA))(0, q, q, q)
    assert called == [chosen]


def test_an_old_library_has_no_flash_kernel_for_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """2.10 knows `is_causal` and no window, 2.11 a window and no word for grouped heads, 2.12 both."""
    from torch.nn.attention import varlen as library

    def of_2_10(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, is_causal: bool = False
    ) -> None:
        raise AssertionError

    def of_2_11(
        q: Any,
        k: Any,
        v: Any,
        cu_q: Any,
        cu_k: Any,
        max_q: int,
        max_k: int,
        *,
        scale: Any = None,
        window_size: Any,
    ) -> Any:
        return window_size

    monkeypatch.setattr(library, "varlen_attn", of_2_10)
    assert varlen.__wrapped__() is None
    monkeypatch.setattr(library, "varlen_attn", of_2_11)
    assert varlen.__wrapped__()(1, 2, 3, 4, 5, 6, 7) == (-1, 0)
    monkeypatch.undo()
    assert "enable_gqa" in inspect.signature(library.varlen_attn).parameters or torch.__version__ < "2.12"


def test_the_kernels_shapes_hold_on_a_device_of_the_library_s_own_making() -> None:
    """Shape propagation for CUDA as the library itself defines it."""
    with FakeTensorMode():
        q, k = (torch.empty(96, num, 128, dtype=torch.bfloat16, device="cuda") for num in (16, 8))
        starts = torch.tensor([0, 40, 96], dtype=torch.int32, device="cuda")
        attend = varlen()
        assert attend is not None
        out = attend(q, k, k, starts, starts, 56, 56)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "cuda")


def test_a_block_is_the_librarys() -> None:
    assert create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 256, 256, device="cpu").BLOCK_SIZE == (
        BLOCK,
        BLOCK,
    )
