import numpy as np
import pytest
import torch

from pensar.infer.cache import Paged
from pensar.model.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=10, hidden_size=16, num_layers=1, num_heads=6, num_kv_heads=2, head_dim=4, intermediate_size=8
)


def attention(q, keys, values):
    """One query [H, h] over keys and values [L, K, h], by the formula."""
    out = np.zeros_like(q)
    for head in range(len(q)):
        shared = head // (len(q) // keys.shape[1])
        scores = keys[:, shared] @ q[head] / np.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        out[head] = weights / weights.sum() @ values[:, shared]
    return out


def test_decoding_attends_over_exactly_what_each_row_has_stored():
    rng = np.random.default_rng(0)
    cache = Paged(CONFIG, slots=8, max_positions=300, device=torch.device("cpu"), dtype=torch.float32)
    lengths = [3, 70, 1, 40]
    kept = []
    for row, length in enumerate(lengths):
        k, v = rng.normal(size=(2, length, 2, 4)).astype(np.float32)
        cache.begin_prefill(row, length, None, 1)
        cache(0, torch.zeros(1, length, 6, 4), torch.from_numpy(k)[None], torch.from_numpy(v)[None])
        kept.append((k, v))
    for _ in range(100):  # beyond the first capacity
        q = rng.normal(size=(4, 6, 4)).astype(np.float32)
        k, v = rng.normal(size=(2, 4, 2, 4)).astype(np.float32)
        cache.begin_decode(np.asarray([len(keys) for keys, _ in kept]))
        out = cache(0, *(torch.from_numpy(x)[:, None] for x in (q, k, v)))
        for row in range(4):
            keys, values = (
                np.concatenate((old, new[row : row + 1])) for old, new in zip(kept[row], (k, v), strict=True)
            )
            kept[row] = (keys, values)
            assert out[row, 0].numpy() == pytest.approx(attention(q[row], keys, values), abs=1e-5)
    assert cache.rows == 4
    assert cache.capacity == 208


def test_capacity_ends_at_the_limits():
    cache = Paged(CONFIG, slots=3, max_positions=100, device=torch.device("cpu"), dtype=torch.float32)
    cache.reserve(2, 90)
    assert (cache.rows, cache.capacity) == (2, 144)
    cache.reserve(3, 100)
    assert (cache.rows, cache.capacity) == (3, 144)


def test_a_moved_row_keeps_its_content_and_a_wiped_one_nothing():
    cache = Paged(CONFIG, slots=4, max_positions=64, device=torch.device("cpu"), dtype=torch.float32)
    k = torch.randn(2, 5, 2, 4)
    cache.begin_prefill(0, 5, None, 2)
    cache(0, torch.zeros(2, 5, 6, 4), k, k)
    cache.move(1, 0, 5)
    assert torch.equal(cache.keys[0][0, :, :, :5], k[1].permute(1, 2, 0))
    cache.wipe(1)
    assert not cache.values[0][1].any()
