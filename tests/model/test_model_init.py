"""Initial weights: a function of seed, name and shape, and of nothing else."""

import numpy as np
import pytest
import torch

from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3, initialize


def _initialized(config, seed=0):
    model = Qwen3(config)
    initialize(model, seed)
    return dict(model.named_parameters())


@pytest.mark.parametrize("sparse", [False, True])
def test_initial_weights_have_the_stated_width_and_norms_are_one(shape, sparse):
    for name, parameter in _initialized(shape(sparse=sparse, hidden_size=64, initializer_range=0.05)).items():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.05, rel=0.15), name
            assert abs(float(parameter.detach().mean())) < 0.05 * 5 / parameter.numel() ** 0.5, name


def test_neither_global_randomness_nor_threads_nor_other_parameters_matter(shape):
    first = _initialized(shape())
    torch.manual_seed(1234)
    torch.randn(7)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = _initialized(shape())
    finally:
        torch.set_num_threads(threads)
    # A deeper, untied model has other parameters before and after; those that share name and shape are equal.
    deeper = _initialized(shape(num_layers=5, tied=True))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        if name in deeper:
            assert torch.equal(parameter, deeper[name])
    assert len(first.keys() & deeper.keys()) == len(first) - 1


def test_each_process_can_draw_its_own_part(shape, monkeypatch):
    whole = _initialized(shape())
    model = Qwen3(shape())
    mine = [(name, p) for name, p in model.named_parameters() if ".layers.1." in name]
    monkeypatch.setattr(model, "named_parameters", lambda: reversed(mine))
    initialize(model, 0)
    for name, parameter in mine:
        assert torch.equal(parameter, whole[name])


def test_parameters_and_seeds_differ_from_each_other(shape):
    first, other = _initialized(shape()), _initialized(shape(), seed=1)
    name = "model.layers.{}.self_attn.q_proj.weight".format
    assert not torch.equal(first[name(0)], first[name(1)])
    assert not torch.equal(first[name(0)], other[name(0)])


def test_heads_that_look_back_put_most_of_their_weight_one_and_two_tokens_before() -> None:
    config = ModelConfig(
        vocab_size=200,
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=96,
        rope_theta=10_000.0,
        max_positions=64,
        initializer_range=0.08,
    )
    tokens = torch.randint(0, 200, (1, 24), generator=torch.Generator().manual_seed(0))

    def before(back: int, previous_token_heads: bool) -> np.ndarray:
        """Mean weight of each head of the first layer so many positions before, by the formula of attention."""
        model = Qwen3(config)
        initialize(model, 3, previous_token_heads=previous_token_heads)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            seen.append((q, k))
            return torch.zeros_like(q)

        with torch.no_grad():
            model(tokens, torch.arange(24)[None], attend)
        q, k = (part[0].double().numpy() for part in seen[0])
        scores = np.einsum("ihd,jhd->hij", q, np.repeat(k, 2, axis=1)) / 32**0.5
        scores = np.where(np.tril(np.ones((24, 24), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.array([np.mean([head[i, i - back] for i in range(back, 24)]) for head in weights])

    for back, heads in ((1, [0, 2]), (2, [1, 3])):
        looking_back = before(back, True)
        assert (looking_back[heads] > 0.35).all()
        assert (np.delete(looking_back, heads) < 0.3).all()
        assert (before(back, False) < 0.3).all()
