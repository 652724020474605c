"""Compiled passes over logits give the log-probabilities and gradients of the library's own."""

import pytest
import torch
from torch import Tensor

from pensar.train import fused
from pensar.train import loss as loss_page
from pensar.train.fused import chosen_fused
from pensar.train.head import chosen
from pensar.train.loss import LossConfig, Targets


def inputs(
    num: int = 9, vocab: int = 50, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(num, vocab, generator=generator) * 5).to(dtype).requires_grad_()
    ids = torch.randint(vocab, (num,), generator=generator)
    weights = torch.randn(2, num, generator=generator)
    return logits, ids, weights[0], weights[1]


def by_library(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return logits.double().log_softmax(-1).gather(1, ids[:, None]).squeeze(1), logits.double().logsumexp(-1)


def check(logits: Tensor, ids: Tensor, a: Tensor, b: Tensor) -> None:
    found, expected = chosen_fused(logits, ids), by_library(logits, ids)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5)
    (mine,) = torch.autograd.grad((found[0] * a + found[1] * b).sum(), logits)
    (theirs,) = torch.autograd.grad((expected[0] * a + expected[1] * b).sum(), logits)
    rough = 2**-6 if logits.dtype == torch.bfloat16 else 1e-5
    assert mine.dtype == logits.dtype
    torch.testing.assert_close(mine.double(), theirs.double(), atol=rough / 10, rtol=rough)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_the_librarys(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(fused, "_compiled", lambda function: function)
    check(*inputs(dtype=dtype))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # the compiler's own
def test_compiled_they_still_are() -> None:
    for num in (9, 5, 7):  # the last chunk of a step is of any size
        check(*inputs(num, dtype=torch.bfloat16))


def test_the_loss_takes_them_on_a_gpu_where_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of another device stands for the GPU's: only which way is taken is looked at."""
    taken: list[str] = []

    def fused_way(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        taken.append("fused")
        return by_library(logits.as_subclass(Tensor), ids)

    def plain_way(logits: Tensor, ids: Tensor, *, overwrite: bool) -> tuple[Tensor, Tensor]:
        taken.append("plain")
        return chosen(logits.as_subclass(Tensor), ids, overwrite=False)

    class Elsewhere(Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

    monkeypatch.setattr(loss_page, "chosen_fused", fused_way)
    monkeypatch.setattr(loss_page, "chosen", plain_way)
    logits, ids, weights, _ = inputs()
    none = torch.zeros_like(weights)
    at = Targets(
        states=none,
        teacher=None,
        ids=ids,
        ce=weights,
        pg=none,
        kl=none,
        behaviour=none,
        groups=None,
        lost=None,
    )
    far = logits.detach().as_subclass(Elsewhere)
    losses = [
        float(
            loss_page._logits_loss(given, at, (1.0, 1.0, 1.0), LossConfig(z_loss=0.1, compile=on), None)[
                0
            ].detach()
        )
        for given, on in ((far, True), (far, False), (logits, True))
    ]
    assert taken == ["fused", "plain", "plain"]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
