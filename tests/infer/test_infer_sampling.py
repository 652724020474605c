import numpy as np
import pytest
import torch

from pensar.infer.rows import FIELDS
from pensar.infer.sampling import logprobs, rules_of, sample, uniforms

DRAWS = 40_000


def rows(*styles):
    array = np.zeros(len(styles), FIELDS)
    for row, style in zip(array, styles, strict=True):
        for field, value in {"temperature": 1.0, "top_p": 1.0, **style}.items():
            row[field] = value
    return array


def frequencies(logits, style, seed=0):
    """Share of each token among DRAWS draws from one row of logits."""
    values = torch.from_numpy(uniforms(np.full(DRAWS, seed, np.uint64), np.arange(DRAWS)))
    rules = rules_of(np.repeat(rows(style), DRAWS), torch.device("cpu"))
    ids = sample(logits.expand(DRAWS, -1).clone(), rules, values).ids
    return np.bincount(ids.numpy(), minlength=logits.shape[-1]) / DRAWS


def expected(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The filtered distribution by the definition, one token at a time."""
    scaled = logits.double().numpy() / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    mass, kept = 0.0, []
    for token in order:
        if mass < top_p or not kept:
            kept.append(token)
        mass += p[token]
    allowed = np.isin(np.arange(len(p)), kept) & (p >= min_p * p.max())
    p = np.where(allowed, p, 0)
    return p / p.sum()


@pytest.mark.parametrize(
    "style",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_k": 100},
        {"top_p": 0.7},
        {"top_p": 0.0},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.15, "temperature": 0.6},
    ],
)
def test_draws_follow_the_filtered_distribution(style):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    share, wanted = frequencies(logits, style), expected(logits, **style)
    assert share == pytest.approx(wanted, abs=4 * np.sqrt(0.25 / DRAWS))
    assert not share[wanted == 0].any()


def test_rules_of_many_kinds_in_one_batch_are_those_of_each_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 50, generator=generator)
    styles = [
        {},
        {"temperature": 0.0},
        {"top_k": 2},
        {"top_p": 0.5},
        {"temperature": 0.4},
        {"min_p": 0.3},
        {},
    ]
    values = torch.rand(7, generator=generator)
    together = sample(logits, rules_of(rows(*styles), torch.device("cpu")), values).ids.tolist()
    alone = [
        int(sample(logits[i : i + 1], rules_of(rows(style), torch.device("cpu")), values[i : i + 1]).ids)
        for i, style in enumerate(styles)
    ]
    assert together == alone
    assert together[1] == int(logits[1].argmax())


def test_logprobs_equal_log_softmax_also_as_a_by_product_of_the_draw():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)) * 8 + 100
    draw = sample(logits, rules_of(rows(*[{}] * 5), torch.device("cpu")), torch.full((5,), 0.5))
    wanted = logits.double().log_softmax(-1).gather(-1, draw.ids[:, None])[:, 0]
    for log_total in (draw.log_total, None):
        assert logprobs(logits, draw.ids, log_total).tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def test_nan_and_infinity_are_noticed_and_minus_infinity_alone_is_fine():
    logits = torch.zeros(5, 4)
    logits[1, 2] = torch.nan
    logits[2, 0] = torch.inf
    logits[3] = -torch.inf
    logits[4, 1:] = -torch.inf
    for style in ({}, {"temperature": 0.0}, {"top_k": 2}):
        draw = sample(logits, rules_of(rows(*[style] * 5), torch.device("cpu")), torch.full((5,), 0.9))
        assert draw.sound.tolist() == [True, False, False, False, True]
        assert draw.ids[4] == 0
        assert ((draw.ids >= 0) & (draw.ids < 4)).all()


def test_the_extremes_of_the_uniform_number_hit_only_tokens_with_weight():
    logits = torch.full((2, 1000), -torch.inf)
    logits[:, 300:700] = 0.1
    largest = 1 - 2**-23
    draw = sample(logits, rules_of(rows({}, {}), torch.device("cpu")), torch.tensor([0.0, largest]))
    assert draw.ids.tolist() == [300, 699]


def test_uniform_numbers_depend_on_seed_and_index_and_spread_evenly():
    seeds, indices = np.meshgrid(np.arange(100, dtype=np.uint64), np.arange(200))
    values = uniforms(seeds.ravel(), indices.ravel())
    assert values.min() >= 0
    assert values.max() < 1
    assert len(np.unique(values)) > 19_900
    counts, _ = np.histogram(values, 20, (0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-squared, 19 degrees of freedom, one in a thousand
    grid = values.reshape(200, 100)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.03
    assert uniforms(seeds[:1, 7], indices[:1, 7]) == values[7]
