"""Our Qwen3 against transformers': logits, gradients, greedy tokens, and each other's files."""

import pytest
import torch
from torch.nn import functional as F

from pensar.model.config import Yarn
from pensar.model.weights import load_model, save_model

transformers = pytest.importorskip("transformers")

VARIANTS = {
    "dense, untied": {},
    "dense, tied": {"tied": True},
    "one key-value head": {"num_kv_heads": 1},
    "as many key-value heads as query heads": {"num_kv_heads": 4},
    "heads wider than the stream": {"head_dim": 32},
    "YaRN": {"rope_scaling": Yarn(factor=4.0, original_max_positions=64), "max_positions": 256},
    "mixture of experts": {"sparse": True},
    "mixture of experts, tied, not renormalised": {"sparse": True, "tied": True, "norm_topk_prob": False},
    "mixture of experts that the fused kernel cannot take": {"sparse": True, "moe_intermediate_size": 22},
}


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.disable_progress_bar()


@pytest.fixture(params=VARIANTS, ids=lambda name: name.replace(",", "").replace(" ", "-"))
def pair(request, build, tmp_path):
    """Our model and the same folder opened by transformers."""
    model = build(**VARIANTS[request.param])
    save_model(model, tmp_path)
    return model, _theirs(tmp_path)


def _theirs(folder, **options):
    """Its plain implementations, which share no kernel with ours."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", **options
    ).eval()


def _tokens(rows, length, seed=1):
    return torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_logits_are_those_of_transformers(pair, logits_of):
    ours, theirs = pair
    tokens = _tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ours, tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


def test_gradients_are_those_of_transformers(pair, logits_of):
    ours, theirs = pair
    tokens = _tokens(2, 24)
    for logits in (logits_of(ours, tokens), theirs(tokens).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, expected[name], atol=1e-5, rtol=0, msg=lambda text, n=name: n + text
        )


def test_greedy_tokens_are_those_of_transformers(pair, logits_of):
    ours, theirs = pair
    prompt = _tokens(2, 5)
    # Called as a plain module: sampling settings and caches of `generate` have no part in this.
    written = []
    for score in (lambda tokens: logits_of(ours, tokens), lambda tokens: theirs(tokens).logits):
        tokens = prompt
        with torch.no_grad():
            for _ in range(16):
                tokens = torch.cat((tokens, score(tokens)[:, -1:].argmax(-1)), dim=1)
        written.append(tokens)
    assert written[0].tolist() == written[1].tolist()


@pytest.mark.parametrize("theta", [1e6, 5e6, 1e7])
def test_far_positions_with_a_large_base_are_those_of_transformers(build, logits_of, tmp_path, theta):
    model = build(rope_theta=theta, head_dim=64, max_positions=262_144)
    save_model(model, tmp_path)
    theirs, tokens, start = _theirs(tmp_path), _tokens(1, 32), 262_144 - 32
    with torch.no_grad():
        expected = theirs(tokens, position_ids=torch.arange(start, start + 32)[None]).logits
        torch.testing.assert_close(logits_of(model, tokens, start=start), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sparse", [False, True])
def test_bfloat16_prefers_the_same_tokens_as_transformers(build, logits_of, tmp_path, sparse):
    save_model(build(sparse=sparse), tmp_path)
    ours, theirs = load_model(tmp_path, dtype=torch.bfloat16), _theirs(tmp_path, dtype=torch.bfloat16)
    tokens = _tokens(4, 32)
    with torch.no_grad():
        found, expected = logits_of(ours, tokens), theirs(tokens).logits
    assert found.dtype == torch.bfloat16
    best = expected.float().topk(2, dim=-1).values
    clear = best[..., 0] - best[..., 1] > 0.05 * expected.float().std()
    assert clear.float().mean() > 0.8
    assert (found.argmax(-1) == expected.argmax(-1))[clear].float().mean() >= 0.98


@pytest.mark.parametrize("limit", ["1GB", "40KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("variant", ["dense, tied", "mixture of experts", "YaRN"])
def test_a_folder_saved_by_transformers_is_opened_by_us(pair_folder, logits_of, variant, limit):
    ours, folder = pair_folder(variant, limit)
    assert (folder / "model.safetensors.index.json").exists() == (limit == "40KB")
    again = load_model(folder)
    assert again.config == ours.config
    tokens = _tokens(1, 16)
    with torch.no_grad():
        assert torch.equal(logits_of(again, tokens), logits_of(ours, tokens))


@pytest.fixture
def pair_folder(build, tmp_path):
    def make(variant, limit):
        ours = build(**VARIANTS[variant])
        save_model(ours, tmp_path / "ours")
        _theirs(tmp_path / "ours").save_pretrained(tmp_path / "theirs", max_shard_size=limit)
        return ours, tmp_path / "theirs"

    return make
