"""The loss through the output projection by chunks: value and gradients are those of all logits at once."""

import gc
import weakref

import pytest
import torch
import torch.utils.checkpoint
from torch.nn import functional as F

from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3
from pensar.train.head import CACHED_LOGITS, chosen, chunk_tokens, head_loss, plain_head

TOKENS, WIDTH, WORDS = 23, 6, 17


def drawn():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(WORDS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    return states, head, torch.randint(WORDS, (TOKENS,), generator=generator)


def by_chunks(states, head, ids, chunk):
    def loss_of(logits, start, stop):
        loss = F.cross_entropy(logits, ids[start:stop], reduction="sum")
        return loss, torch.stack([loss.detach(), torch.tensor(float(stop - start))])

    return head_loss(states, head, loss_of, chunk)


@pytest.mark.parametrize("chunk", [1, 4, 22, 23, 100])
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_any_chunk_gives_the_value_and_gradients_of_whole_logits(chunk, scale):
    (states, head, ids), (states_, head_, _) = drawn(), drawn()
    loss, sums = by_chunks(states, head, ids, chunk)
    expected = F.cross_entropy(states_ @ head_.T, ids, reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert sums.tolist() == pytest.approx([expected.item(), TOKENS])
    (loss * scale).backward()
    (expected * scale).backward()
    torch.testing.assert_close(states.grad, states_.grad)
    torch.testing.assert_close(head.grad, head_.grad)


def test_a_head_used_twice_adds_up_both_gradients():
    (states, head, ids), (states_, head_, _) = drawn(), drawn()
    (by_chunks(states, head, ids, 7)[0] + head[ids].sum()).backward()
    (F.cross_entropy(states_ @ head_.T, ids, reduction="sum") + head_[ids].sum()).backward()
    torch.testing.assert_close(head.grad, head_.grad)


def test_what_is_frozen_gets_no_gradient():
    states, head, ids = drawn()
    by_chunks(states, head.detach(), ids, 7)[0].backward()
    states_, head_, _ = drawn()
    F.cross_entropy(states_ @ head_.T, ids, reduction="sum").backward()
    torch.testing.assert_close(states.grad, states_.grad)
    by_chunks(states_.detach(), head, ids, 7)[0].backward()
    torch.testing.assert_close(head.grad, head_.grad)


def test_without_gradients_the_value_is_the_same():
    states, head, ids = drawn()
    with torch.no_grad():
        loss, _ = by_chunks(states, head, ids, 5)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, by_chunks(states, head, ids, 5)[0].detach())
    empty, sums = by_chunks(states[:0], head, ids[:0], 5)
    assert empty.item() == 0.0
    assert sums is None


def test_a_chunk_fits_the_cache_but_is_never_narrow():
    assert chunk_tokens(4096, "cpu") * 4096 == CACHED_LOGITS
    assert chunk_tokens(151_936, "cpu") == 256
    assert chunk_tokens(151_936, "cuda") == 2_048


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_of_a_model_is_its_projection_or_its_embedding(tied):
    shape = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8}
    model = Qwen3(ModelConfig(vocab_size=11, intermediate_size=8, tied=tied, **shape))
    assert plain_head(model) is (model.model.embed_tokens if tied else model.lm_head).weight
    vars(model)["logits"] = model.logits
    assert plain_head(model) is None


@pytest.mark.parametrize("overwrite", [False, True])
def test_chosen_is_the_log_softmax_and_its_denominator_with_their_gradients(overwrite):
    generator = torch.Generator().manual_seed(1)
    logits = 20 * torch.randn(TOKENS, WORDS, generator=generator, dtype=torch.float64)
    logits[0, 3] += 2_000.0  # the others' probabilities are zero, their logarithms are not
    ids = torch.randint(WORDS, (TOKENS,), generator=generator)
    ids[0] = 5
    theirs = logits.clone().requires_grad_()
    log_z_ = theirs.logsumexp(-1)
    expected = theirs.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    (expected * torch.arange(TOKENS) + log_z_.square()).sum().backward()
    ours = logits.clone().requires_grad_()
    logprob, log_z = chosen(ours, ids, overwrite=overwrite)
    torch.testing.assert_close((logprob, log_z), (expected.detach(), log_z_.detach()))
    (logprob * torch.arange(TOKENS) + log_z.square()).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(ours.detach(), logits) == (not overwrite)


@pytest.mark.parametrize("chunk", [4, 23])
def test_chunks_of_logits_share_one_memory(chunk):
    states, head, ids = drawn()
    places = set()

    def loss_of(logits, start, stop):
        places.add(logits.data_ptr())
        logprob, _ = chosen(logits, ids[start:stop], overwrite=True)
        return -logprob.sum(), torch.zeros(1)

    loss, _ = head_loss(states, head, loss_of, chunk)
    loss.backward()
    assert len(places) == 1
    states_, head_, _ = drawn()
    expected = F.cross_entropy(states_ @ head_.T, ids, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close((states.grad, head.grad), (states_.grad, head_.grad))


def test_recomputation_frees_the_softmax_and_gives_the_same_gradients():
    """Under activation checkpointing nothing of [tokens, vocabulary] may outlive the forward pass."""
    states, head, ids = drawn()
    kept = []

    def loss_of(states, head):
        logits = states @ head.T
        kept.append(weakref.ref(logits.untyped_storage()))
        logprob, _ = chosen(logits, ids, overwrite=True)
        return -logprob.sum()

    loss = torch.utils.checkpoint.checkpoint(loss_of, states, head, use_reentrant=False)
    gc.collect()
    assert [place() for place in kept] == [None]
    loss.backward()
    states_, head_, _ = drawn()
    F.cross_entropy(states_ @ head_.T, ids, reduction="sum").backward()
    torch.testing.assert_close((states.grad, head.grad), (states_.grad, head_.grad))


def test_a_head_in_half_precision_sums_its_gradient_in_float32():
    """Each of 512 chunks adds a 512th of the gradient: in bfloat16 the sum would stop growing at a half of it."""
    states = torch.ones(512, 2, dtype=torch.bfloat16, requires_grad=True)
    head = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)

    def loss_of(logits, start, stop):
        return logits.float()[:, 0].sum(), torch.zeros(1)

    head_loss(states, head, loss_of, 1)[0].backward()
    assert head.grad.dtype == torch.bfloat16
    assert head.grad.tolist() == [[512.0, 512.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("chunk", [4, 23])
def test_under_autocast_chunks_share_memory_and_err_by_no_more_than_rounding(chunk):
    states, head, ids = drawn()
    states, head = (x.detach().float().requires_grad_() for x in (states, head))
    places = set()

    def loss_of(logits, start, stop):
        places.add((logits.data_ptr(), logits.dtype))
        logprob, _ = chosen(logits, ids[start:stop], overwrite=True)
        return -logprob.sum(), torch.zeros(1)

    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head_loss(states, head, loss_of, chunk)
    loss.backward()
    assert [dtype for _, dtype in places] == [torch.float32]
    states_, head_, _ = drawn()
    expected = F.cross_entropy(states_ @ head_.T, ids, reduction="sum")
    expected.backward()
    assert abs(loss.item() - expected.item()) < 0.01 * expected.item()
    for mine, other in zip((states.grad, head.grad), (states_.grad, head_.grad), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - other).norm() <= 0.02 * other.norm()
