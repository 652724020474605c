"""The one loss: each term against its formula, whole and in chunks."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pensar.base.ranks import World
from pensar.model.attention import Packed
from pensar.model.qwen3 import Qwen3
from pensar.text.packing import Batch, collate
from pensar.text.sample import Sample
from pensar.train.loss import LossConfig, batch_loss, weights_of
from tiny import tiny_model

CONFIG = LossConfig()


def sample(rng: np.random.Generator, length: int, **streams: np.ndarray) -> Sample:
    tokens = rng.integers(0, 300, length).astype(np.int32)
    return Sample(tokens=tokens, **{name: values.astype(np.float32) for name, values in streams.items()})


def batch(*streams: str, seed: int = 0) -> Batch:
    """Two packed rows of two samples and one, with padding; weights zero at about a third of the tokens."""
    rng = np.random.default_rng(seed)
    samples = []
    for length in (7, 5, 9):
        values = {name: rng.normal(size=length) * (rng.random(length) > 0.3) for name in streams}
        positive = {name: np.abs(value) if name in ("ce", "kl") else value for name, value in values.items()}
        samples.append(sample(rng, length, **positive))
    return collate([samples[:2], samples[2:]], length=14)


def logprobs_of(model: Qwen3, rows: Batch) -> torch.Tensor:
    """Log-probabilities [B, T, V] of every token's successor, by one plain pass."""
    tokens = torch.from_numpy(rows.tokens).long()
    positions = torch.from_numpy(rows.positions).long()
    hidden = model(tokens, positions, Packed(torch.from_numpy(rows.segments)))
    return model.logits(hidden).log_softmax(-1)


def chosen(logprobs: torch.Tensor, rows: Batch) -> torch.Tensor:
    """Log-probability [B, T] of each token given those before it; column 0 is 0."""
    tokens = torch.from_numpy(rows.tokens).long()
    values = logprobs[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
    return F.pad(values, (1, 0))


def gradients(loss: torch.Tensor, model: Qwen3) -> torch.Tensor:
    parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6)


def test_cross_entropy_is_torch_s_own_with_weights() -> None:
    model, rows = tiny_model(), batch("ce")
    normalisers = weights_of([rows], World())
    loss, totals = batch_loss(model, rows, normalisers, CONFIG)
    logprobs = logprobs_of(model, rows)
    tokens, weights = torch.from_numpy(rows.tokens).long(), torch.from_numpy(rows.ce)
    each = F.cross_entropy(logprobs[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    expected = (each * weights[:, 1:]).sum() / weights[:, 1:].sum()
    close(loss, expected)
    close(gradients(loss, model), gradients(expected, model))
    assert totals.ce / totals.ce_weight == pytest.approx(expected.item(), rel=1e-5)
    assert totals.tokens == 21


def test_the_z_loss_is_the_weighted_mean_of_the_squared_log_denominators() -> None:
    """PaLM, section 5, in float64; its gradient in a logit is 2 log Z p."""
    model, rows = tiny_model().double(), batch("ce", "pg", "behaviour")
    normalisers = weights_of([rows], World())
    plain, none = batch_loss(model, rows, normalisers, CONFIG)
    tokens, positions = torch.from_numpy(rows.tokens).long(), torch.from_numpy(rows.positions).long()
    logits = model.logits(model(tokens, positions, Packed(torch.from_numpy(rows.segments))))[:, :-1]
    weights = rows.ce[:, 1:]
    log_z = np.log(np.exp(logits.detach().numpy()).sum(-1))
    expected = (weights * log_z**2).sum() / weights.sum()
    for chunk_tokens in (8_192, 3):
        loss, totals = batch_loss(model, rows, normalisers, LossConfig(z_loss=0.2, chunk_tokens=chunk_tokens))
        assert loss.item() - plain.item() == pytest.approx(0.2 * expected, rel=1e-6)
        assert totals.z / totals.ce_weight == pytest.approx(expected, rel=1e-6)
        by_hand = 2 * log_z[..., None] * np.exp(logits.detach().numpy() - log_z[..., None])
        by_hand *= (0.2 * weights / weights.sum())[..., None]
        term = (logits * torch.from_numpy(by_hand)).sum()
        whole = gradients(plain, model) + gradients(term, model)
        # The norms divide in float32 whatever the model's type.
        assert (gradients(loss, model) - whole).norm() < 1e-6 * whole.norm()
    assert none.z == 0


def test_padding_and_first_tokens_have_no_say() -> None:
    model, rows = tiny_model(), batch("ce")
    before, _ = batch_loss(model, rows, (1.0, 1.0, 1.0), CONFIG)
    tokens = rows.tokens.copy()
    tokens[rows.segments == 0] = 17
    swapped = Batch(tokens=tokens, positions=rows.positions, segments=rows.segments, ce=rows.ce)
    after, _ = batch_loss(model, swapped, (1.0, 1.0, 1.0), CONFIG)
    assert before.item() == after.item()
    assert not rows.ce[:, 0].any()


def test_the_policy_gradient_on_policy_is_the_advantage_times_the_gradient_of_the_log_probability() -> None:
    model, rows = tiny_model(), batch("pg")
    with torch.no_grad():
        behaviour = chosen(logprobs_of(model, rows), rows).numpy()
    rows = Batch(
        tokens=rows.tokens, positions=rows.positions, segments=rows.segments, pg=rows.pg, behaviour=behaviour
    )
    normalisers = weights_of([rows], World())
    assert normalisers[1] == float((rows.pg[:, 1:] != 0).sum())
    loss, totals = batch_loss(model, rows, normalisers, CONFIG)
    surrogate = -(torch.from_numpy(rows.pg) * chosen(logprobs_of(model, rows), rows)).sum() / normalisers[1]
    close(gradients(loss, model), gradients(surrogate, model))
    assert loss.item() == pytest.approx(-rows.pg[:, 1:].sum() / normalisers[1], abs=1e-5)
    assert totals.mismatch < 1e-4
    assert totals.clipped == 0
    probabilities = logprobs_of(model, rows).detach().exp()
    entropy = (
        -(probabilities * probabilities.log()).sum(-1)[:, :-1][torch.from_numpy(rows.pg)[:, 1:] != 0].sum()
    )
    assert totals.entropy == pytest.approx(float(entropy), rel=1e-4)


def test_the_entropy_bonus_adds_the_gradient_of_the_mean_entropy() -> None:
    model, rows = tiny_model(), batch("pg")
    normalisers = weights_of([rows], World())
    plain, _ = batch_loss(model, rows, normalisers, CONFIG)
    for chunk_tokens in (8_192, 3):
        config = LossConfig(entropy_bonus=0.3, chunk_tokens=chunk_tokens)
        loss, totals = batch_loss(model, rows, normalisers, config)
        logprobs = logprobs_of(model, rows)[:, :-1][torch.from_numpy(rows.pg)[:, 1:] != 0]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        close(gradients(loss, model), gradients(plain - 0.3 * entropy.mean(), model))
        assert totals.entropy == pytest.approx(entropy.sum().item(), rel=1e-4)


def test_the_mismatch_is_told_of_every_token_that_the_policy_learns_from() -> None:
    model, rows = tiny_model(), batch("ce", "pg", "behaviour")
    with torch.no_grad():
        gap = (chosen(logprobs_of(model, rows), rows) - torch.from_numpy(rows.behaviour))[:, 1:]
    gap = gap[torch.from_numpy(rows.pg)[:, 1:] != 0].double().numpy()
    for chunk_tokens in (8_192, 3):
        _, totals = batch_loss(model, rows, (1.0, 1.0, 1.0), LossConfig(chunk_tokens=chunk_tokens))
        assert totals.mismatch == pytest.approx(np.abs(gap).sum(), rel=1e-5)
        assert totals.mismatch_max == pytest.approx(np.abs(gap).max(), rel=1e-5)
        assert totals.mismatch_kl == pytest.approx((np.exp(gap) - 1 - gap).sum(), rel=1e-4)
    assert batch_loss(model, batch("ce"), (1.0, 1.0, 1.0), CONFIG)[1].mismatch_max == 0


@pytest.mark.parametrize(
    ("advantage", "ratio", "flows"),
    [
        (1.0, 1.5, False),
        (1.0, 1.27, True),
        (1.0, 0.5, True),
        (-1.0, 0.5, False),
        (-1.0, 0.81, True),
        (-1.0, 1.5, True),
    ],
)
def test_a_ratio_beyond_the_clip_stops_the_gradient_only_where_it_goes_the_good_way(
    advantage: float, ratio: float, flows: bool
) -> None:
    model = tiny_model()
    tokens = np.array([[3, 5, 8]], np.int32)
    pg = np.array([[0, 0, advantage]], np.float32)
    plain = {
        "tokens": tokens,
        "positions": np.array([[0, 1, 2]], np.int32),
        "segments": np.ones((1, 3), np.int32),
    }
    with torch.no_grad():
        own = float(chosen(logprobs_of(model, Batch(**plain)), Batch(**plain))[0, 2])
    behaviour = np.array([[0, 0, own - np.log(ratio)]], np.float32)
    loss, totals = batch_loss(model, Batch(**plain, pg=pg, behaviour=behaviour), (1.0, 1.0, 1.0), CONFIG)
    bounded = min(max(ratio, 0.8), 1.28)
    assert loss.item() == pytest.approx(-min(ratio * advantage, bounded * advantage), rel=1e-4)
    assert totals.clipped == float(ratio != bounded)
    assert totals.mismatch == totals.mismatch_max == pytest.approx(abs(np.log(ratio)), rel=1e-3)
    assert totals.mismatch_kl == pytest.approx(ratio - 1 - np.log(ratio), rel=1e-3)
    found = gradients(loss, model)
    if flows:
        expected = gradients(
            -advantage * ratio * chosen(logprobs_of(model, Batch(**plain)), Batch(**plain))[0, 2], model
        )
        close(found, expected)
    else:
        assert not found.any()


@pytest.mark.parametrize("reverse", [False, True])
def test_the_divergence_is_the_formula_over_the_whole_vocabulary(reverse: bool) -> None:
    model, teacher, rows = tiny_model(), tiny_model(seed=1), batch("kl")
    normalisers = weights_of([rows], World())
    loss, totals = batch_loss(model, rows, normalisers, LossConfig(reverse_kl=reverse), teacher)
    p, q = (logprobs_of(m, rows).detach().double().numpy()[:, :-1] for m in (teacher, model))
    first, second = (q, p) if reverse else (p, q)
    each = (np.exp(first) * (first - second)).sum(-1)
    expected = (each * rows.kl[:, 1:]).sum() / rows.kl[:, 1:].sum()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert totals.kl / totals.kl_weight == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_divergence_has_no_gradient_at_the_teacher_and_never_reaches_it(reverse: bool) -> None:
    model, teacher, rows = tiny_model(), tiny_model(), batch("kl")
    loss, _ = batch_loss(model, rows, (1.0, 1.0, 1.0), LossConfig(reverse_kl=reverse), teacher)
    assert abs(loss.item()) < 1e-5
    assert gradients(loss, model).abs().max() < 1e-5
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_terms_add_up_each_with_its_own_normaliser() -> None:
    model, teacher, rows = tiny_model(), tiny_model(seed=1), batch("ce", "pg", "kl", "behaviour")
    whole, totals = batch_loss(model, rows, (2.0, 3.0, 5.0), CONFIG, teacher)
    assert whole.item() == pytest.approx(totals.ce / 2 + totals.pg / 3 + totals.kl / 5, rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_give_what_the_whole_gives(chunk: int) -> None:
    model, teacher, rows = tiny_model(), tiny_model(seed=1), batch("ce", "pg", "kl", "behaviour")
    normalisers = weights_of([rows], World())
    whole, totals = batch_loss(model, rows, normalisers, CONFIG, teacher)
    parts, sums = batch_loss(model, rows, normalisers, LossConfig(chunk_tokens=chunk), teacher)
    close(whole, parts)
    torch.testing.assert_close(totals.tensor(), sums.tensor(), rtol=1e-4, atol=1e-4)
    expected = gradients(whole, model)
    model.zero_grad()
    parts.backward()
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]
    close(found, expected)


def test_a_batch_without_any_weight_costs_nothing_and_changes_nothing() -> None:
    model = tiny_model()
    rows = collate([[Sample(tokens=np.arange(4, dtype=np.int32), ce=np.zeros(4, np.float32))]], length=4)
    loss, totals = batch_loss(model, rows, weights_of([rows], World()), CONFIG)
    assert loss.item() == 0
    assert not gradients(loss, model).any()
    assert totals.ce_weight == 0
