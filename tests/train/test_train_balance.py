"""The load-balancing loss of sparse models: over the global batch, whatever its spread over ranks and micro-batches."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import train_work

from pensar.base.progress import Progress
from pensar.base.ranks import Crew, World
from pensar.model.attention import Packed
from pensar.model.moe import routings
from pensar.model.qwen3 import Qwen3
from pensar.text.packing import Batch, collate
from pensar.text.sample import Sample
from pensar.train.balance import Balance, ExpertUse
from pensar.train.loop import LoopConfig, Place, fit
from pensar.train.loss import LossConfig, batch_loss
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.step import learning, train_step
from tiny import SPARSE, tiny_model

HEAVY = SPARSE | {"router_balance_weight": 0.5}
CONFIG = LossConfig()


def rows(*lengths: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    samples = [
        Sample(tokens=rng.integers(0, 300, n).astype(np.int32), ce=np.ones(n, np.float32)) for n in lengths
    ]
    return collate([[sample] for sample in samples], length=max(lengths) + 2)


def evenness(model: Qwen3, batch: Batch) -> torch.Tensor:
    """E sum_e f_e P_e, mean over layers, by one pass over the whole batch (arXiv 2501.11873, equation 2)."""
    tokens, positions = torch.from_numpy(batch.tokens).long(), torch.from_numpy(batch.positions).long()
    model(tokens, positions, Packed(torch.from_numpy(batch.segments)))
    real = batch.segments.flatten() != 0
    layers = []
    for layer in routings(model):
        share = np.zeros(4)
        for experts in layer.chosen.numpy()[real]:
            share[experts] += 1
        share /= share.sum()
        mean = layer.probabilities[torch.from_numpy(real)].mean(0)
        layers.append(4 * (torch.tensor(share, dtype=torch.float32) * mean).sum())
    return torch.stack(layers).mean()


def gradients(loss: torch.Tensor, model: Qwen3) -> torch.Tensor:
    parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(model.parameters(), parts, strict=True)
        ]
    )


def test_value_and_gradient_are_those_of_the_formula() -> None:
    model, batch = tiny_model(**HEAVY), rows(6, 9, 4)
    balance = Balance(model.config, batch.num_tokens, World())
    plain, _ = batch_loss(model, batch, (1.0, 1.0, 1.0), CONFIG)
    whole, totals = batch_loss(model, batch, (1.0, 1.0, 1.0), CONFIG, balance=balance)
    expected = evenness(model, batch)
    assert totals.balance == pytest.approx(expected.item(), rel=1e-5)
    assert whole.item() == pytest.approx(plain.item() + 0.5 * expected.item(), rel=1e-5)
    torch.testing.assert_close(
        gradients(whole, model),
        gradients(plain, model) + 0.5 * gradients(expected, model),
        rtol=1e-3,
        atol=2e-5,
    )
    routers = [g for (name, _), g in zip(model.named_parameters(), torch.autograd.grad(
        expected, list(model.parameters()), allow_unused=True), strict=True) if "mlp.gate" in name]  # fmt: skip
    assert routers
    assert all(gradient is not None and gradient.any() for gradient in routers)


def test_the_metric_is_logged_and_one_where_all_experts_share_alike() -> None:
    model, batch = tiny_model(**HEAVY), rows(6, 9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp.gate.weight" in name:
                parameter.zero_()
    metrics = train_step(model, Optimizer(model, OptimizerConfig()), [batch], 1.0, World(), CONFIG)
    assert metrics["balance"] == pytest.approx(1.0, rel=1e-5)


def test_two_ranks_of_one_row_are_one_rank_of_two_rows(pair: Crew) -> None:
    work = [[rows(6, 9)], [rows(3, 8, seed=1)], [rows(7, seed=2)]]
    arguments = (HEAVY, work, CONFIG, OptimizerConfig(muon=False, adamw_lr=0.001), False)
    metrics, parameters = Crew().call(train_work.steps, *arguments)
    shared_metrics, shared = pair.call(train_work.steps, *arguments)
    torch.testing.assert_close(shared, parameters, rtol=0, atol=1e-5)
    for mine, theirs in zip(metrics, shared_metrics, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
        assert mine["balance"] > 0


def test_shares_of_later_micro_batches_are_those_of_the_step_so_far(pair: Crew) -> None:
    """Two micro-batches: the first sees its own shares, the second those of both; the parts add up."""
    model = tiny_model(**HEAVY)
    first, second = rows(6, 9), rows(5, 3, seed=1)
    total = first.num_tokens + second.num_tokens
    balance = Balance(model.config, total, World())
    values = [
        batch_loss(model, b, (1.0, 1.0, 1.0), CONFIG, balance=balance)[1].balance for b in (first, second)
    ]
    own = evenness(model, first).item() * first.num_tokens / total
    assert values[0] == pytest.approx(own, rel=1e-5)
    layers = []
    counts, probabilities = [np.zeros((2, 4)) for _ in range(2)], np.zeros((2, 4))
    for index, batch in enumerate((first, second)):
        evenness(model, batch)
        real = batch.segments.flatten() != 0
        for number, layer in enumerate(routings(model)):
            for experts in layer.chosen.numpy()[real]:
                counts[index][number, experts] += 1
            if index == 1:
                probabilities[number] = layer.probabilities.detach().numpy()[real].sum(0) / total
    together = counts[0] + counts[1]
    shares = together / together.sum(1, keepdims=True)
    layers = 4 * (shares * probabilities).sum(1)
    assert values[1] == pytest.approx(layers.mean(), rel=1e-5)

    work = [[first, second, rows(4, seed=3)]]
    arguments = (HEAVY, work, CONFIG, OptimizerConfig(muon=False, adamw_lr=0.001), False)
    alone = Crew().call(train_work.steps, *arguments)
    shared = pair.call(train_work.steps, *arguments)
    torch.testing.assert_close(shared[1], alone[1], rtol=0, atol=1e-5)
    assert shared[0][0]["balance"] == pytest.approx(alone[0][0]["balance"], rel=1e-5)


@pytest.fixture(scope="module")
def four() -> Iterator[Crew]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        with Crew(ranks=4, threads=1) as crew:
            yield crew


def unlike(num: int = 4) -> Batch:
    """Rows that each speak of other tokens, so that they prefer other experts; nothing to predict but the balance."""
    rng = np.random.default_rng(5)
    samples = [
        Sample(tokens=rng.integers(75 * n, 75 * n + 9, 24 - 3 * n).astype(np.int32)) for n in range(num)
    ]
    return collate([[sample] for sample in samples], length=26)


def parts_of(whole: Batch, size: int) -> list[Batch]:
    return [whole.rows(slice(start, start + size)) for start in range(0, len(whole.tokens), size)]


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_step_s_gradient_is_the_whole_batch_s_however_it_is_spread(
    pair: Crew, four: Crew, dtype: torch.dtype
) -> None:
    """Four micro-batches on one rank, one on four ranks, two on two; other forms of the loss have other gradients."""
    whole, config = unlike(), LossConfig(router_z_loss=0.01)
    metrics, expected = train_work.gradient(World(), HEAVY, [whole], config, dtype)
    for crew, batches in ((Crew(), parts_of(whole, 1)), (four, [whole]), (pair, parts_of(whole, 2))):
        found, gradient = crew.call(train_work.gradient, HEAVY, batches, config, dtype)
        assert off(gradient, expected) < 1e-6
        assert found == pytest.approx(metrics, rel=1e-6)


def test_running_shares_and_those_of_micro_batches_have_other_gradients() -> None:
    whole, config = unlike(), LossConfig()
    parts = parts_of(whole, 1)
    _, expected = train_work.gradient(World(), HEAVY, [whole], config, torch.float32)
    running, found = train_work.gradient(
        World(), HEAVY, parts, LossConfig(exact_balance=False), torch.float32
    )
    assert off(found, expected) > 0.1
    exact, found = train_work.gradient(World(), HEAVY, parts, config, torch.float32)
    assert off(found, expected) < 1e-6
    for name in ("expert_overload", "expert_entropy", "dead_experts"):
        assert running[name] == exact[name], "the step's counts are whole at its end in either form"
    model = tiny_model(**HEAVY)
    alone = torch.zeros_like(expected)
    for part in parts:
        alone += 0.5 * gradients(evenness(model, part), model) * part.num_tokens / whole.num_tokens
    assert off(alone, expected) > 0.1


def test_counting_beforehand_changes_nothing_but_the_balance_loss() -> None:
    batch = rows(6, 9, 4)
    light = SPARSE | {"router_balance_weight": 0.0}
    arguments = (light, parts_of(batch, 1), LossConfig(), torch.float32)
    _, whole = train_work.gradient(World(), light, [batch], LossConfig(), torch.float32)
    metrics, found = train_work.gradient(World(), *arguments)
    assert off(found, whole) < 1e-6
    assert metrics["expert_entropy"] > 0


def test_metrics_of_the_experts_are_the_formulas_over_the_step_s_counts() -> None:
    """Overload: the largest share over the mean share, less one (arXiv 2408.15664); entropy over its maximum."""
    config = tiny_model(**SPARSE).config
    balance = Balance(config, 12, World())
    balance.settle(torch.tensor([[6.0, 6.0, 12.0, 0.0], [6.0, 6.0, 6.0, 6.0]]))
    entropy = -(0.25 * np.log(0.25) * 2 + 0.5 * np.log(0.5)) / np.log(4)
    assert balance.metrics() == pytest.approx(
        {"expert_overload": 1.0, "expert_entropy": (entropy + 1) / 2, "dead_experts": 1.0}
    )
    model, parts = tiny_model(**HEAVY), parts_of(unlike(), 2)
    use = ExpertUse(steps=1)
    metrics = train_step(model, Optimizer(model, OptimizerConfig()), parts, 1.0, World(), CONFIG, use=use)
    counts = use.state_dict()["counts"].numpy()
    model = tiny_model(**HEAVY)
    by_hand = np.zeros((2, 4))
    for part in parts:
        evenness(model, part)
        for number, layer in enumerate(routings(model)):
            for experts in layer.chosen.numpy()[part.segments.flatten() != 0]:
                by_hand[number, experts] += 1
    assert (counts == by_hand).all()
    shares = by_hand / by_hand.sum(1, keepdims=True)
    assert metrics["expert_overload"] == pytest.approx((shares * 4 - 1).max())
    assert metrics["dead_experts"] == (by_hand == 0).sum()


def test_the_artifact_tells_each_layer_s_shares_over_the_last_steps(tmp_path: Path) -> None:
    seen: list[np.ndarray] = []
    model = tiny_model(**HEAVY)
    config = LoopConfig(steps=20, checkpoint_every=7, optimizer=OptimizerConfig(lr=0.02))

    def batches_of(step: int) -> list[Batch]:
        if step >= 18:
            batch = rows(6, 9, seed=step)
            evenness(model, batch)
            real = batch.segments.flatten() != 0
            chosen = [layer.chosen.numpy()[real].ravel() for layer in routings(model)]
            seen.append(np.stack([np.bincount(experts, minlength=4) for experts in chosen]))
        return [rows(6, 9, seed=step)]

    place = Place(tmp_path, tmp_path / "logs", World(), Progress())
    fit(model, batches_of, config, place, name="sparse")
    content = json.loads((tmp_path / "experts.json").read_bytes())
    counts = sum(seen)
    assert content["steps"] == [18, 20]
    np.testing.assert_allclose(content["shares"], counts / counts.sum(1, keepdims=True), atol=1e-6)


def test_dense_models_and_evaluation_mode_have_no_balance_term() -> None:
    batch = rows(4, 5)
    dense = train_step(
        tiny_model(), Optimizer(tiny_model(), OptimizerConfig()), [batch], 1.0, World(), CONFIG
    )
    assert not {"balance", "expert_overload"} & set(dense)
    frozen = tiny_model(**HEAVY).eval()
    metrics = train_step(frozen, Optimizer(frozen, OptimizerConfig()), [batch], 1.0, World(), CONFIG)
    assert "balance" not in metrics
    with learning(frozen):
        metrics = train_step(frozen, Optimizer(frozen, OptimizerConfig()), [batch], 1.0, World(), CONFIG)
    assert "balance" in metrics
    assert not frozen.training
