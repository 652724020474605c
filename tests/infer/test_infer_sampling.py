import numpy as np
import pytest
import torch

from pensar.infer import sampling
from pensar.infer.native.runner import NativeRunner
from pensar.infer.rows import FIELDS
from pensar.infer.sampling import logprobs, rules_of, sample, top_logprobs, uniforms
from tests.infer.native_work import build

DRAWS = 40_000


def rows(*styles):
    array = np.zeros(len(styles), FIELDS)
    for row, style in zip(array, styles, strict=True):
        for field, value in {"temperature": 1.0, "top_p": 1.0, **style}.items():
            row[field] = value
    return array


def frequencies(logits, style, seed=0, draws=DRAWS):
    """Share of each token among draws from one row of logits."""
    values = torch.from_numpy(uniforms(np.full(draws, seed, np.uint64), np.arange(draws)))
    rules = rules_of(np.repeat(rows(style), draws), torch.device("cpu"))
    ids = sample(logits.expand(draws, -1).clone(), rules, values).ids
    return np.bincount(ids.numpy(), minlength=logits.shape[-1]) / draws


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


def test_logprobs_equal_log_softmax():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)) * 8 + 100
    draw = sample(logits, rules_of(rows(*[{}] * 5), torch.device("cpu")), torch.full((5,), 0.5))
    wanted = logits.double().log_softmax(-1).gather(-1, draw.ids[:, None])[:, 0]
    assert logprobs(logits, draw.ids).tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


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


def chi_squared(share, wanted, draws):
    """Pearson's statistic over tokens expected at least 10 times, the others together, and its degrees."""
    counts, means = share * draws, wanted * draws
    rare = means < 10
    counts, means = np.append(counts[~rare], counts[rare].sum()), np.append(means[~rare], means[rare].sum())
    counts, means = counts[means > 0], means[means > 0]
    return ((counts - means) ** 2 / means).sum(), len(means) - 1


@pytest.mark.parametrize(
    "style",
    [
        {},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"top_p": 0.9},
        {"temperature": 1.5, "top_p": 0.97},
        {"min_p": 0.01},
        {"top_p": 0.9, "min_p": 0.02},
        {"top_k": 500, "top_p": 0.99},
    ],
)
@pytest.mark.parametrize("vocabulary", [600, 640])
def test_draws_from_a_large_vocabulary_pass_a_chi_squared_test(style, vocabulary):
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(5)) * 2
    share, wanted = frequencies(logits, style, seed=11, draws=6_000), expected(logits, **style)
    assert not share[wanted == 0].any()
    statistic, degrees = chi_squared(share, wanted, 6_000)
    # Wilson and Hilferty's normal approximation; one in ten thousand.
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / np.sqrt(2 / (9 * degrees))
    assert z < 3.7


def filtered_by_sorting(logits, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One draw by the definition: the whole vocabulary in order, equal logits by id."""
    values = logits.double().numpy()
    order = np.lexsort((np.arange(len(values)), -values))
    weights = np.exp((values[order] - values.max()) / temperature)
    if top_k:
        weights[top_k:] = 0
    before = np.cumsum(weights) - weights
    kept = (before < top_p * weights.sum()) & (weights >= min_p)
    kept[0] = True
    cumulative = np.cumsum(np.where(kept, weights, 0))
    drawn = int(order[np.searchsorted(cumulative, uniform * cumulative[-1], side="right")])
    return drawn, cumulative, weights[kept][-1]


def test_filtered_draws_are_those_of_a_full_sort_whatever_else_is_in_the_batch():
    generator = torch.Generator().manual_seed(2)
    styles = [
        {"top_k": 20, "top_p": 0.95, "temperature": 0.6},
        {"top_k": 1},
        {"top_k": 3_000},
        {"top_p": 0.8, "temperature": 0.7},
        {"top_p": 0.999, "temperature": 3.0},
        {"min_p": 0.05},
        {"min_p": 1e-4, "top_p": 0.9},
        {"top_k": 7, "min_p": 0.3},
        {"top_k": 100_000, "top_p": 0.9},
    ]
    logits = torch.randn(len(styles), 4_096, generator=generator) * 3
    for kind in ("distinct", "16-bit", "flat"):
        values = logits.bfloat16().float() if kind == "16-bit" else logits
        if kind == "flat":  # thousands of equal ones: no look at a few tokens can be enough
            values = (logits / 4).round()
        uniform = torch.rand(len(styles), generator=generator)
        together = sample(values, rules_of(rows(*styles), torch.device("cpu")), uniform).ids.tolist()
        for i, style in enumerate(styles):
            rules = rules_of(rows(style), torch.device("cpu"))
            assert int(sample(values[i : i + 1], rules, uniform[i : i + 1]).ids) == together[i]
            wanted, cumulative, smallest = filtered_by_sorting(values[i], float(uniform[i]), **style)
            if together[i] != wanted:  # only on a border, up to rounding and the last token of the nucleus
                distance = np.abs(cumulative - float(uniform[i]) * cumulative[-1]).min()
                assert distance < 1e-5 * cumulative[-1] + smallest, (kind, style)


def test_a_small_first_look_gives_the_same_draws_as_one_at_everything(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(200, 2_048, generator=generator) * 2).bfloat16().float()
    uniform = torch.rand(200, generator=generator)
    for style in ({"top_p": 0.9}, {"min_p": 0.01}, {"top_k": 5}, {"top_k": 40, "top_p": 0.5}):
        rules = rules_of(rows(*[style] * 200), torch.device("cpu"))
        drawn = []
        for first, margin in ((2, 0), (2_048, 2_048)):
            monkeypatch.setattr(sampling, "FIRST_LOOK", first)
            monkeypatch.setattr(sampling, "MARGIN", margin)
            drawn.append(sample(logits, rules, uniform).ids.tolist())
        assert drawn[0] == drawn[1]


def test_a_mask_that_leaves_fewer_tokens_than_top_k_needs_no_second_look():
    logits = torch.full((3, 4_096), -torch.inf)
    logits[:, [7, 9]] = torch.tensor([1.0, 1.0])
    rules = rules_of(rows(*[{"top_k": 20, "top_p": 0.95}] * 3), torch.device("cpu"))
    assert sample(logits, rules, torch.tensor([0.0, 0.49, 0.51])).ids.tolist() == [7, 7, 9]


def test_the_most_likely_token_is_the_first_of_equals():
    for vocabulary in (100, 4_096):
        logits = torch.zeros(2, vocabulary)
        logits[0, [90, 40, 99]] = 3.0
        logits[1, 5:] = -torch.inf
        rules = rules_of(rows({"temperature": 0.0}, {"temperature": 0.0}), torch.device("cpu"))
        assert sample(logits, rules, torch.zeros(2)).ids.tolist() == [40, 0]


def test_top_logprobs_are_the_head_of_log_softmax():
    for vocabulary in (37, 4_096):
        logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(9)) * 4
        ids, values = top_logprobs(logits, 20)
        wanted = logits.double().log_softmax(-1).sort(dim=-1, descending=True, stable=True)
        assert ids.tolist() == wanted.indices[:, :20].tolist()
        assert values.flatten().tolist() == pytest.approx(wanted.values[:, :20].flatten().tolist(), abs=1e-5)
    ties = torch.zeros(1, 4_096)
    ties[0, 100] = 1
    assert top_logprobs(ties, 1)[0].tolist() == [[100]]


@pytest.mark.parametrize("style", [{}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.1}])
@pytest.mark.parametrize("temperature", [1e-320, 1e-46, 1e-39, 1e-30])
@pytest.mark.parametrize("native", [False, True])
def test_whatever_is_next_to_no_temperature_takes_the_likeliest_token(style, temperature, native):
    logits = torch.randn(5, 320, generator=torch.Generator().manual_seed(1))
    rules = rules_of(rows(*[style | {"temperature": temperature}] * 5), torch.device("cpu"))
    weigh = NativeRunner(build()).weigh if native else sampling.weigh
    draw = sample(logits, rules, torch.full((5,), 0.9), weigh)
    assert draw.ids.tolist() == logits.argmax(-1).tolist()
    assert draw.sound.all()


@pytest.mark.parametrize("native", [False, True])
def test_at_any_heat_what_is_forbidden_stays_so_and_all_else_is_as_likely(native):
    draws = 4_000
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)).expand(draws, -1).clone()
    logits[:, ::2] = -torch.inf
    rules = rules_of(rows(*[{"temperature": 1e300}] * draws), torch.device("cpu"))
    uniform = torch.from_numpy(uniforms(np.zeros(draws, np.uint64), np.arange(draws)))
    draw = sample(logits, rules, uniform, NativeRunner(build()).weigh if native else sampling.weigh)
    assert draw.sound.all()
    counts = np.bincount(draw.ids.numpy(), minlength=40)
    assert not counts[::2].any()
    assert counts[1::2] == pytest.approx(draws / 20, abs=4 * np.sqrt(draws / 20))


def test_the_library_draws_from_what_lies_apart_in_memory_too():
    generator = torch.Generator().manual_seed(2)
    logits, uniform = (
        torch.randn(64, 640, generator=generator)[:, ::2],
        torch.rand(128, generator=generator)[::2],
    )
    temperature = torch.rand(64, 2, generator=generator)[:, :1] + 0.5
    ids, top, total = NativeRunner(build()).weigh(logits, temperature, uniform)
    plain = sampling.weigh(logits.clone(), temperature, uniform)
    assert ids.tolist() == plain[0].tolist()
    assert torch.equal(top, plain[1])
    torch.testing.assert_close(total, plain[2])
