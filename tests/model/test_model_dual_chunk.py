"""Dual Chunk Attention against a twin that writes down every relative position."""

import math

import pytest
import torch
from torch.nn import functional as F

from pensar.base.errors import ConfigError, ModelError
from pensar.model import dual_chunk, rope
from pensar.model.config import Chunks, Yarn, replace
from pensar.model.dual_chunk import DualChunk, chunks_for
from pensar.model.hf import from_hf, to_hf
from pensar.model.sizes import SIZES

CHUNKS = Chunks(chunk_size=12, local_size=3)
WARM = Chunks(chunk_size=12, local_size=3, original_max_positions=16)
BOUNDS = [
    CHUNKS,
    WARM,
    Chunks(chunk_size=12, local_size=0),
    Chunks(chunk_size=12, local_size=8, original_max_positions=5),
    Chunks(chunk_size=12, local_size=11),
]
LENGTHS = [1, 2, 8, 9, 10, 17, 18, 19, 27, 36, 50, 90]


def relative_positions(num_tokens, chunks):
    """The matrix [T, T] of distances, cell by cell from the definition; cells of later keys mean nothing."""
    c, size = chunks.chunk_len, chunks.chunk_size
    matrix = torch.zeros(num_tokens, num_tokens, dtype=torch.float64)
    for i in range(num_tokens):
        for j in range(i + 1):
            if i // c == j // c:
                query = i % c
            elif i // c == j // c + 1:
                query = min(i % c + c, size)
            else:
                query = min(2 * c - 1, size)
            matrix[i, j] = query - j % c
    return matrix


def naive(q_BTHh, k_BTKh, v_BTKh, inverse, chunks):
    """Attention over unrotated queries and keys, every query turned anew for every key: [B, T, H, h]."""
    num_tokens, group = q_BTHh.shape[1], q_BTHh.shape[2] // k_BTKh.shape[2]
    angles_TTh = relative_positions(num_tokens, chunks)[..., None] * inverse.double()
    angles_TTh = torch.cat((angles_TTh, angles_TTh), -1).to(q_BTHh)
    left, right = q_BTHh.chunk(2, -1)
    crossed_BTHh = torch.cat((-right, left), -1)
    k_BTHh, v_BTHh = (x.repeat_interleave(group, 2) for x in (k_BTKh, v_BTKh))
    scores_BHTS = torch.einsum("bthd,tsd,bshd->bhts", q_BTHh, angles_TTh.cos(), k_BTHh)
    scores_BHTS = scores_BHTS + torch.einsum("bthd,tsd,bshd->bhts", crossed_BTHh, angles_TTh.sin(), k_BTHh)
    for i in range(num_tokens):
        if chunks.original_max_positions and i + 1 > chunks.original_max_positions:
            scores_BHTS[:, :, i] *= (0.1 * math.log((i + 1) / chunks.original_max_positions) + 1) ** 2
        scores_BHTS[:, :, i, i + 1 :] = -math.inf
    return torch.einsum("bhts,bshd->bthd", (scores_BHTS / q_BTHh.shape[-1] ** 0.5).softmax(-1), v_BTHh)


def drawn(num_tokens, dtype, heads=4, kv_heads=2, size=16, batch=2):
    generator = torch.Generator().manual_seed(num_tokens)
    return [
        torch.randn(batch, num_tokens, n, size, generator=generator, dtype=torch.float64).to(dtype)
        for n in (heads, kv_heads, kv_heads)
    ]


def rotated(x_BTHh, positions_BT, inverse):
    angles_BTh = positions_BT[..., None].double() * inverse.double()
    angles_BT1h = torch.cat((angles_BTh, angles_BTh), -1)[:, :, None]
    return rope.rotate(x_BTHh, angles_BT1h.cos().to(x_BTHh), angles_BT1h.sin().to(x_BTHh))


def efficient(config, q, k, v, positions_BT=None):
    if positions_BT is None:
        positions_BT = torch.arange(q.shape[1]).expand(q.shape[:2])
    attend = DualChunk(config, positions_BT)
    inverse, places_BT = rope.frequencies(config)[0], attend.rotary_positions_BT
    return attend(0, rotated(q, places_BT, inverse), rotated(k, places_BT, inverse), v)


@pytest.mark.parametrize("chunks", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["32", "64"]
)
@pytest.mark.parametrize("tile", [4, 512])
def test_the_tiled_form_equals_the_twin_at_every_length(shape, monkeypatch, chunks, dtype, error, tile):
    monkeypatch.setattr(dual_chunk, "TILE", tile)
    config = shape(dual_chunk=chunks, rope_theta=100.0)
    inverse, _ = rope.frequencies(config)
    for num_tokens in LENGTHS:
        q, k, v = drawn(num_tokens, dtype)
        expected = naive(q.double(), k.double(), v.double(), inverse, chunks)
        found = efficient(config, q, k, v)
        assert found.dtype == dtype
        worst = float((found - expected).abs().max())
        assert worst < error, (num_tokens, worst)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_query_heads_share_key_value_heads_as_elsewhere(shape, heads, kv_heads):
    config = shape(dual_chunk=WARM, num_heads=heads, num_kv_heads=kv_heads)
    q, k, v = drawn(41, torch.float64, heads, kv_heads)
    expected = naive(q, k, v, rope.frequencies(config)[0], WARM)
    torch.testing.assert_close(efficient(config, q, k, v), expected, rtol=0, atol=1e-12)


def test_a_text_of_one_chunk_gets_plain_causal_attention(shape):
    config = shape(dual_chunk=CHUNKS)
    inverse, _ = rope.frequencies(config)
    for num_tokens in (1, 5, CHUNKS.chunk_len):
        q, k, v = drawn(num_tokens, torch.float64)
        positions = torch.arange(num_tokens).expand(2, -1)
        plain = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (rotated(q, positions, inverse), rotated(k, positions, inverse), v)),
            is_causal=True,
            enable_gqa=True,
        ).transpose(1, 2)
        torch.testing.assert_close(efficient(config, q, k, v), plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunks", BOUNDS, ids=str)
def test_distances_are_true_nearby_and_never_beyond_the_chunk_size(chunks):
    num_tokens = 90
    matrix = relative_positions(num_tokens, chunks)
    shown = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    assert matrix[shown].min() == 0
    assert matrix[shown].max() <= chunks.chunk_size
    true = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
    near = shown & (true <= min(chunks.local_size, chunks.chunk_len))
    assert torch.equal(matrix[near], true[near].double())
    assert (matrix[shown & (true > 0)] >= 1).all()
    assert (matrix <= true)[shown].all()


def test_the_authors_chunks_stay_within_the_trained_distances():
    for trained in (16, 64, 4_096, 32_768):
        chunks = chunks_for(trained)
        assert chunks.chunk_size < trained
        assert chunks.original_max_positions == trained
    assert chunks_for(4_096) == Chunks(chunk_size=3_072, local_size=256, original_max_positions=4_096)


def test_the_temperature_is_yarns_for_the_tokens_so_far(shape):
    attend = DualChunk(shape(dual_chunk=WARM), torch.arange(64)[None])
    q = torch.ones(1, 64, 1, 16, dtype=torch.float64)
    factors = attend.queries(q, torch.arange(64))[0][0, :, 0, 0]
    assert (factors[:16] == 1).all()
    yarn = rope.frequencies(shape(rope_scaling=Yarn(factor=4.0, original_max_positions=16)))[1]
    assert float(factors[63]) == pytest.approx(yarn**2, rel=1e-12)
    assert (factors[16:] > 1).all()
    assert (factors.diff() >= 0).all()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "mixture"])
def test_a_whole_model_reads_short_texts_as_before_and_long_ones_otherwise(build, logits_of, sparse):
    model = build(dual_chunk=Chunks(chunk_size=24, local_size=4), sparse=sparse)
    tokens = torch.randint(96, (2, 50), generator=torch.Generator().manual_seed(1))
    plain = logits_of(model, tokens)
    attend = DualChunk(model.config, torch.arange(50).expand(2, -1))
    found = model.logits(model(tokens, attend.rotary_positions_BT, attend))
    chunk_len = 20
    torch.testing.assert_close(found[:, :chunk_len], plain[:, :chunk_len], rtol=0, atol=2e-5)
    assert float((found - plain)[:, 30:].detach().abs().mean()) > 0.01


def test_a_whole_model_equals_one_with_the_twin(build):
    model = build(dual_chunk=WARM).double()
    inverse, _ = rope.frequencies(model.config)
    tokens = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
    origin = torch.zeros_like(tokens)  # position 0 everywhere leaves queries and keys unrotated

    def twin(layer, q_BTHh, k_BTKh, v_BTKh):
        return naive(q_BTHh, k_BTKh, v_BTKh, inverse, WARM)

    attend = DualChunk(model.config, torch.arange(40).expand(2, -1))
    found = model(tokens, attend.rotary_positions_BT, attend)
    # The model's own tables are in float32.
    torch.testing.assert_close(found, model(tokens, origin, twin), rtol=0, atol=2e-5)


class Remembered:
    """The keys and values of earlier passes before those of this one."""

    def __init__(self, num_rows, config):
        self.kept = {}
        self.lengths = [0] * num_rows
        self.config = config

    def begin(self, num_new):
        firsts = torch.tensor(self.lengths)
        self.positions_BT = firsts[:, None] + torch.arange(num_new)
        self.attend = DualChunk(self.config, self.positions_BT)
        self.lengths = [length + num_new for length in self.lengths]
        return self.attend.rotary_positions_BT

    def __call__(self, layer, q_BTHh, k_BTKh, v_BTKh):
        stores = []
        for name, new in (("k", k_BTKh), ("v", v_BTKh)):
            store = new.new_zeros(len(new), max(self.lengths), *new.shape[2:])
            if (layer, name) in self.kept:
                old = self.kept[layer, name]
                store[:, : old.shape[1]] = old
            store[torch.arange(len(new))[:, None], self.positions_BT] = new
            self.kept[layer, name] = store
            stores.append(store)
        return self.attend(layer, q_BTHh, *stores)


def whole(model, tokens_BT):
    attend = DualChunk(model.config, torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT))
    return model(tokens_BT, attend.rotary_positions_BT, attend)


@pytest.mark.parametrize("passes", [[1] * 40, [25] + [1] * 15, [7, 11, 2, 20]], ids=str)
def test_reading_in_passes_over_cached_keys_equals_one_pass(build, monkeypatch, passes):
    monkeypatch.setattr(dual_chunk, "TILE", 4)
    model = build(dual_chunk=WARM)
    tokens = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(2))
    cache, pieces = Remembered(2, model.config), []
    for piece in tokens.split(passes, dim=1):
        pieces.append(model(piece, cache.begin(piece.shape[1]), cache))
    torch.testing.assert_close(torch.cat(pieces, 1), whole(model, tokens), rtol=0, atol=2e-5)


def test_rows_of_one_pass_may_stand_at_different_positions(build):
    model = build(dual_chunk=WARM)
    tokens = torch.randint(96, (3, 40), generator=torch.Generator().manual_seed(3))
    cache = Remembered(3, model.config)
    prompts = model(tokens[:, :30], cache.begin(30), cache)
    cache.lengths = [30, 11, 19]  # the shorter prompts were padded at their ends
    steps = [model(tokens[:, 30 + i : 31 + i], cache.begin(1), cache) for i in range(10)]
    found = torch.cat(steps, 1)
    for row, length in enumerate((30, 11, 19)):
        text = torch.cat((tokens[row, :length], tokens[row, 30:]))[None]
        alone = whole(model, text)
        torch.testing.assert_close(prompts[row : row + 1, :length], alone[:, :length], rtol=0, atol=2e-5)
        torch.testing.assert_close(found[row : row + 1], alone[:, length:], rtol=0, atol=2e-5)


def test_bfloat16_stays_near_the_twin(shape):
    config = shape(dual_chunk=WARM)
    q, k, v = drawn(60, torch.bfloat16)
    expected = naive(q.double(), k.double(), v.double(), rope.frequencies(config)[0], WARM)
    found = efficient(config, q, k, v)
    assert found.dtype == torch.bfloat16
    assert float((found - expected).abs().mean()) < 0.01


def test_scores_of_the_whole_text_are_never_held(shape):
    config = shape(dual_chunk=Chunks(chunk_size=2_048, local_size=256))
    num_tokens, largest = 4_100, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    q, k, v = drawn(num_tokens, torch.float32, 1, 1, batch=1)
    with Watch():
        efficient(config, q, k, v)
    assert largest <= dual_chunk.TILE**2 < num_tokens**2 / 50


def test_the_keys_of_hugging_face_are_read_and_written():
    chunks = Chunks(chunk_size=262_144, local_size=8_192, original_max_positions=262_144)
    config = replace(SIZES["30b-a3b"], dual_chunk=chunks)
    keys = {"chunk_size": 262_144, "local_size": 8_192, "original_max_position_embeddings": 262_144}
    assert to_hf(config)["dual_chunk_attention_config"] == keys
    assert from_hf(to_hf(config)) == config
    assert "dual_chunk_attention_config" not in to_hf(SIZES["30b-a3b"])
    without = to_hf(config) | {"dual_chunk_attention_config": {"chunk_size": 64, "local_size": 8}}
    assert from_hf(without).dual_chunk == Chunks(chunk_size=64, local_size=8)
    assert from_hf(to_hf(from_hf(without))) == from_hf(without)


def test_what_cannot_be_is_refused(shape):
    with pytest.raises(ConfigError, match=r"local_size 12 is not in 0\.\.chunk_size - 1 \(11\)"):
        Chunks(chunk_size=12, local_size=12)
    with pytest.raises(ConfigError, match="count twice"):
        shape(dual_chunk=WARM, rope_scaling=Yarn(factor=4.0, original_max_positions=16))
    with pytest.raises(ConfigError, match="dual_chunk is not set"):
        DualChunk(shape(), torch.arange(4)[None])
    with pytest.raises(ModelError, match="do not count up by one"):
        DualChunk(shape(dual_chunk=WARM), torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(ModelError, match="2 keys for queries up to position 6"):
        DualChunk(shape(dual_chunk=WARM), torch.tensor([[5, 6]]))(0, *drawn(2, torch.float32, batch=1))
    missing = to_hf(SIZES["tiny"]) | {"dual_chunk_attention_config": {"chunk_size": 12}}
    with pytest.raises(ModelError, match="dual_chunk_attention_config has no local_size"):
        from_hf(missing)
