"""Rows sent to experts and back: sums and gradients of the plain form, and products that a GPU's kernel takes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pensar.model.dispatch import inverse_of, returned, sent
from pensar.model.moe import grouped

N, K, D = 7, 3, 5


def order() -> Tensor:
    """Of the [N, k] assignments to 4 experts."""
    return torch.randint(4, (N * K,), generator=torch.Generator().manual_seed(0)).argsort(stable=True)


def test_the_inverse_leads_back() -> None:
    assert torch.equal(order()[inverse_of(order())], torch.arange(N * K))


def test_rows_are_sent_and_summed_as_by_plain_indices() -> None:
    """In float64 by the library's gather and scatter, which the gradients are checked against too."""
    x, weight = torch.randn(N, D, dtype=torch.float64), torch.randn(N * K, D, dtype=torch.float64)
    results = []
    for plain in (True, False):
        leaf, factor = x.clone().requires_grad_(), weight.clone().requires_grad_()
        token = order() // K
        rows = (leaf[token] if plain else sent(leaf, order(), K)) * factor
        out = torch.zeros_like(leaf).index_add(0, token, rows) if plain else returned(rows, order(), K)
        results.append((out, *torch.autograd.grad(out.square().sum(), (leaf, factor))))
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(lambda x: sent(x, order(), K), x.requires_grad_())
    assert torch.autograd.gradcheck(lambda y: returned(y, order(), K), weight.requires_grad_())


def test_the_sum_of_bfloat16_rows_is_rounded_once() -> None:
    rows = torch.randn(N * K, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = torch.zeros(N, D).index_add(0, order() // K, rows.float())
    assert torch.equal(returned(rows, order(), K), exact.bfloat16())


class Products(TorchDispatchMode):
    """Keeps what the grouped products of forward and backward are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._grouped_mm.default:
            self.seen.append(tuple(args[:3]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("counts", [[3, 0, 9, 1], [13, 0, 0, 0], [0, 5, 5, 3]])
def test_a_gpu_takes_the_products_of_groups_of_any_size(counts: list[int]) -> None:
    """All three of a layer, by the library's checks for CUDA: sizes of groups are free, rows are of whole 16 bytes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(13, 24, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(4, 32, 24, generator=generator).bfloat16().requires_grad_()
    with Products() as products:
        out = grouped(x, weight, torch.tensor(counts))
        out.square().sum().backward()
    rows = [F.linear(r.float(), w.float()) for r, w in zip(x.split(counts), weight, strict=True)]
    torch.testing.assert_close(out.float(), torch.cat(rows), atol=5e-2, rtol=2e-2)
    given = [[(y.shape, y.stride(), y.dtype) for y in seen] for seen in products.seen]
    with FakeTensorMode():
        shapes = [
            torch._grouped_mm(
                *(
                    torch.empty_strided(shape, stride, dtype=dtype, device="cuda")
                    for shape, stride, dtype in sides[:2]
                ),
                offs=torch.empty(4, dtype=torch.int32, device="cuda"),
            ).shape
            for sides in given
        ]
    # The output, the gradient of the rows, and that of the matrices, whose products sum over each group's rows.
    assert {tuple(shape) for shape in shapes} == {(13, 32), (13, 24), (4, 32, 24)}
    assert {offs.dtype for _, _, offs in products.seen} == {torch.int32}
