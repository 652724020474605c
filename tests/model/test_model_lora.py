"""LoRA and DoRA: the formulas, exact unmerging, and PEFT's files in both directions."""

import json
import math
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from pensar.base.errors import ConfigError, ModelError
from pensar.model.adapter import load_adapter, save_adapter
from pensar.model.lora import (
    LoraConfig,
    Strength,
    adapt,
    adapted_weights,
    begin_step,
    chosen,
    merge,
    merged,
    unmerge,
)
from pensar.model.moe import Experts
from pensar.model.weights import load_model, save_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
TOKENS = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(5))
VARIANTS = {
    "all linear layers": (False, LoraConfig(rank=4, alpha=8)),
    "two kinds, scaled by the root": (
        False,
        LoraConfig(rank=3, targets=("q_proj", "down_proj"), rslora=True),
    ),
    "dora": (False, LoraConfig(rank=4, alpha=6, dora=True)),
    "a single layer": (False, LoraConfig(rank=2, targets=("layers.1.self_attn.v_proj",))),
    "mixture": (True, LoraConfig(rank=4)),
    "mixture, attention by dora": (True, LoraConfig(rank=4, targets=ATTENTION, dora=True)),
    "mixture, experts down": (True, LoraConfig(rank=2, targets=("k_proj", "mlp.experts.down_proj"))),
    "mixture, experts up": (True, LoraConfig(rank=2, targets=("gate_up_proj",), rslora=True)),
}
peft_of_an_older_transformers = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))


def disturb(model, seed=3, size=0.3):
    """Gives every change values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + size * torch.rand(parameter.shape, generator=generator))
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def adapted(build):
    """A model with changes of some size."""

    def make(config, *, seed=7, strengths=None, **changes):
        model = build(**changes)
        adapt(model, config, seed, strengths)
        disturb(model)
        return model

    return make


def plain_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


# ---------------------------------------------------------------- the formulas


@every_variant
def test_a_new_change_leaves_the_model_as_it_is(build, logits_of, variant):
    sparse, config = VARIANTS[variant]
    model = build(sparse=sparse)
    before = logits_of(model, TOKENS)
    adapt(model, config, seed=1)
    torch.testing.assert_close(logits_of(model, TOKENS), before, rtol=0, atol=1e-6 if config.dora else 0)


def test_the_formula_of_lora_and_dora(adapted):
    for config, scale in (
        (LoraConfig(rank=4, alpha=6), 6 / 4),
        (LoraConfig(rank=4, alpha=6, rslora=True), 6 / 2),
        (LoraConfig(rank=4, alpha=6, dora=True), 6 / 4),
    ):
        model = adapted(config)
        layer = model.model.layers[1].mlp.down_proj
        x = torch.randn(5, 80, generator=torch.Generator().manual_seed(0))
        w, a, b = (t.detach().double() for t in (layer.weight, layer.lora_a, layer.lora_b))
        changed = w + scale * b @ a
        if config.dora:
            changed = layer.magnitude.double()[:, None] * changed / changed.norm(dim=1, keepdim=True)
        torch.testing.assert_close(layer(x), (x.double() @ changed.T).float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.whole(), changed.detach().float(), rtol=1e-5, atol=1e-5)


def test_each_expert_has_a_pair_of_factors(adapted):
    model = adapted(LoraConfig(rank=4, alpha=8), sparse=True)
    plain = merged(model)
    for block, other in zip(model.model.layers, plain.model.layers, strict=True):
        experts, whole = block.mlp.experts, other.mlp.experts
        assert isinstance(whole, Experts)
        for part in ("gate_up_proj", "down_proj"):
            layer = getattr(experts, part)
            for expert in range(8):
                change = 2.0 * layer.lora_b[expert] @ layer.lora_a[expert]
                torch.testing.assert_close(
                    getattr(whole, part)[expert], layer.weight[expert] + change, rtol=1e-6, atol=1e-6
                )


def test_only_the_changes_learn_and_dora_s_length_is_a_constant_to_the_gradient(adapted, logits_of):
    """Against automatic differentiation of m (W + s B A) / |W + s B A| with the denominator detached."""
    model = adapted(LoraConfig(rank=3, alpha=6, dora=True, targets=("o_proj",)))
    logits_of(model, TOKENS).square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in with_gradient} == {"lora_a", "lora_b", "magnitude"}
    layer = model.model.layers[0].self_attn.o_proj
    w = layer.weight.detach()
    a, b, m = (p.detach().clone().requires_grad_() for p in (layer.lora_a, layer.lora_b, layer.magnitude))
    x = torch.randn(6, w.shape[1], generator=torch.Generator().manual_seed(0))
    changed = w + 2.0 * b @ a
    expected = F.linear(x, m[:, None] * changed / changed.detach().norm(dim=1, keepdim=True))
    expected.square().sum().backward()
    layer.zero_grad()
    layer(x).square().sum().backward()
    for ours, theirs in ((layer.lora_a, a), (layer.lora_b, b), (layer.magnitude, m)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_a_change_begins_by_its_seed_and_name_alone(build):
    found = {}
    for targets in (("q_proj",), DENSE):
        model = build()
        adapt(model, LoraConfig(rank=2, targets=targets), seed=4)
        found[targets] = {name: weight.lora_a.detach() for name, weight in adapted_weights(model)}
    few, many = found.values()
    assert all(torch.equal(values, many[name]) for name, values in few.items())
    assert len({values.sum().item() for values in many.values()}) == len(many)
    for name, values in many.items():
        bound = 1 / math.sqrt(values.shape[1])
        assert 0.8 * bound < values.abs().max() <= bound, name
    other = build()
    adapt(other, LoraConfig(rank=2, targets=("q_proj",)), seed=5)
    assert all(not torch.equal(weight.lora_a, few[name]) for name, weight in adapted_weights(other))


def test_dropout_hides_the_same_inputs_from_all_rows_of_a_step(adapted):
    model = adapted(LoraConfig(rank=4, dropout=0.5, targets=("q_proj",)))
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    model.eval()
    whole = layer(x)
    begin_step(model, 3)
    assert torch.equal(layer(x), whole), "dropout is for training"
    model.train()
    third = layer(x)
    kept = layer.mask != 0
    assert 10 < kept.sum() < 38
    assert set(layer.mask.tolist()) == {0.0, 2.0}
    expected = F.linear(x, layer.weight) + layer.scale * F.linear(
        F.linear(x * layer.mask, layer.lora_a), layer.lora_b
    )
    torch.testing.assert_close(third, expected)
    torch.testing.assert_close(torch.cat([layer(x[:2]), layer(x[2:])]), third)
    begin_step(model, 4)
    assert not torch.equal(layer(x), third)
    begin_step(model, 3)
    assert torch.equal(layer(x), third)
    many = []
    for step in range(400):
        begin_step(model, step)
        many.append(layer.mask)
    assert (torch.stack(many).mean(0) - 1).abs().max() < 0.25, "scaled so that the mean stays"


# ---------------------------------------------------------------- which weights


def test_targets_are_ends_of_names_and_routers_are_never_among_them(build):
    dense, sparse = build(), build(sparse=True)
    assert len(chosen(dense, ())) == 3 * 7 == len(plain_names(dense)) - 1, "all but the output projection"
    assert chosen(dense, ("self_attn.q_proj", "layers.2.mlp.up_proj")) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.2.self_attn.q_proj",
        "model.layers.2.mlp.up_proj",
    ]
    assert len(chosen(sparse, ())) == 3 * 6
    assert not any(name.endswith("gate") for name in chosen(sparse, ()))


@pytest.mark.parametrize(
    ("sparse", "target", "remedy"),
    [
        (False, "q_prj", "did you mean `q_proj`?"),
        (False, "lm_head", "valid: down_proj, gate_proj, k_proj"),
        (False, "layers.7.self_attn.q_proj", "did you mean `q_proj`?"),
        (True, "mlp.gate", "routers are never changed"),
        (True, "up_proj", "experts have both in gate_up_proj"),
    ],
)
def test_an_unknown_target_is_told_with_the_nearest(build, sparse, target, remedy):
    model = build(sparse=sparse)
    with pytest.raises(ConfigError, match=re.escape(f"no weights '{target}'") + ".*" + re.escape(remedy)):
        adapt(model, LoraConfig(targets=("k_proj", target)), seed=0)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_is_told(build, adapted):
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            LoraConfig(**wrong)
    with pytest.raises(ConfigError, match=r"dora with model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        adapt(build(sparse=True), LoraConfig(dora=True), seed=0)
    with pytest.raises(ConfigError, match="has LoRA weights already"):
        adapt(adapted(LoraConfig()), LoraConfig(), seed=0)
    with pytest.raises(ModelError, match="no LoRA weights to save"):
        save_adapter(build(), None)


# ---------------------------------------------------------------- merging


@every_variant
def test_merging_computes_the_same_and_unmerging_restores_every_bit(adapted, logits_of, variant):
    sparse, config = VARIANTS[variant]
    model = adapted(config, sparse=sparse)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    plain, unmerged = merged(model), logits_of(model, TOKENS)
    merge(model)
    torch.testing.assert_close(logits_of(model, TOKENS), unmerged, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(model, TOKENS), logits_of(plain, TOKENS))
    unmerge(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert torch.equal(logits_of(model, TOKENS), unmerged)


def test_the_merged_model_is_a_plain_model_directory(adapted, logits_of, tmp_path):
    for sparse in (False, True):
        model = adapted(LoraConfig(rank=4), sparse=sparse)
        save_model(merged(model), tmp_path / str(sparse))
        opened = load_model(tmp_path / str(sparse))
        torch.testing.assert_close(logits_of(opened, TOKENS), logits_of(model, TOKENS), rtol=1e-4, atol=1e-4)


def test_changes_of_a_bfloat16_model_are_float32_and_what_is_merged_is_bfloat16(build, logits_of):
    model = build().bfloat16()
    adapt(model, LoraConfig(rank=4), seed=0)
    disturb(model, size=0.05)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    plain = merged(model)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert logits_of(model, TOKENS).dtype == torch.bfloat16
    torch.testing.assert_close(logits_of(plain, TOKENS), logits_of(model, TOKENS), rtol=0, atol=0.25)


def test_an_adapted_model_can_be_sent_to_another_process(adapted, logits_of):
    for sparse in (False, True):
        model = adapted(LoraConfig(rank=2), sparse=sparse)
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(logits_of(again, TOKENS), logits_of(model, TOKENS))


# ---------------------------------------------------------------- PEFT's files


def theirs(folder):
    """The folder opened by transformers, by its plain implementations."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@peft_of_an_older_transformers
@every_variant
def test_peft_opens_our_adapter_and_computes_the_same(build, adapted, logits_of, tmp_path, variant):
    peft = pytest.importorskip("peft")
    sparse, config = VARIANTS[variant]
    save_model(build(sparse=sparse), tmp_path / "base")
    model = adapted(config, sparse=sparse)
    save_adapter(model, tmp_path / "adapter")
    their = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = their(TOKENS).logits
        torch.testing.assert_close(logits_of(model, TOKENS), logits, rtol=1e-5, atol=5e-5)
        assert (logits - theirs(tmp_path / "base")(TOKENS).logits).abs().max() > 0.05
        together = their.merge_and_unload()(TOKENS).logits
        torch.testing.assert_close(logits_of(merged(model), TOKENS), together, rtol=1e-5, atol=5e-5)


PEFTS = {
    "lora": (False, {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 3, "lora_alpha": 7}),
    "all linear layers": (False, {"target_modules": "all-linear", "r": 4, "use_rslora": True}),
    "a pattern": (False, {"target_modules": r".*layers\.[02]\.mlp\.(up|gate)_proj", "r": 2}),
    "dora": (False, {"target_modules": ["k_proj", "o_proj", "gate_proj"], "r": 5, "use_dora": True}),
    "ranks by layer": (
        False,
        {
            "target_modules": ["q_proj", "k_proj"],
            "r": 4,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "k_proj": 6},
            "alpha_pattern": {"k_proj": 3},
        },
    ),
    "stacked experts": (
        True,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "experts by their old names": (
        True,
        {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"], "r": 2},
    ),
    "experts down": (True, {"target_modules": [], "target_parameters": ["experts.down_proj"], "r": 4}),
}


@peft_of_an_older_transformers
@pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize("kind", PEFTS, ids=lambda name: name.replace(" ", "-"))
def test_an_adapter_of_peft_opens_here_and_computes_the_same(build, logits_of, tmp_path, kind):
    peft = pytest.importorskip("peft")
    sparse, values = PEFTS[kind]
    model = build(sparse=sparse)
    save_model(model, tmp_path / "base")
    their = peft.get_peft_model(theirs(tmp_path / "base"), peft.LoraConfig(**values)).eval()
    disturb(their)
    their.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, TOKENS), their(TOKENS).logits, rtol=1e-5, atol=5e-5)
    save_adapter(model, tmp_path / "again")
    before, after = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(values, after[name]) for name, values in before.items())
    again = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, their(TOKENS).logits, rtol=0, atol=1e-5)


def test_an_adapter_comes_back_as_it_was_and_equal_changes_are_equal_bytes(
    build, adapted, logits_of, tmp_path
):
    strengths = {"model.layers.1.self_attn.k_proj": Strength(6, 3.0)}
    model = adapted(LoraConfig(rank=4), strengths=strengths)
    for name in ("first", "second"):
        save_adapter(model, tmp_path / name)
    files = ("adapter_config.json", "adapter_model.safetensors")
    assert all((tmp_path / "first" / f).read_bytes() == (tmp_path / "second" / f).read_bytes() for f in files)
    opened = build()
    load_adapter(opened, tmp_path / "first")
    assert torch.equal(logits_of(opened, TOKENS), logits_of(model, TOKENS))


# ---------------------------------------------------------------- what does not fit


@pytest.fixture
def saved(adapted, tmp_path):
    """An adapter's folder."""
    folder = tmp_path / "adapter"
    save_adapter(adapted(LoraConfig(rank=4, targets=("q_proj", "up_proj"))), folder)
    return folder


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(build, folder, message, **changes):
    model = build(**changes)
    with pytest.raises(ModelError, match=message):
        load_adapter(model, folder)
    assert next(adapted_weights(model), None) is None
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model is as it was"


def test_an_adapter_of_another_base_is_refused(build, saved, logits_of):
    refused(build, saved, "trained on another base model of the same shape", seed=1)
    refused(
        build,
        saved,
        r"lora_B.weight has shape \[80, 4\], this model asks for \[64, 4\]",
        intermediate_size=64,
    )
    refused(build, saved, r"holds .*layers\.2.* that this model has no place for", num_layers=2)
    refused(build, saved, r"lacks .*layers\.3.*the adapter is for another base", num_layers=4)
    refused(build, saved, "no weights 'up_proj'; experts have both", sparse=True)
    model = build(seed=1)
    load_adapter(model, saved, any_base=True)
    narrow = build().bfloat16()
    load_adapter(narrow, saved)


def test_a_rank_that_the_files_disagree_on_is_told(build, saved):
    edit(saved, r=8)
    refused(build, saved, r"q_proj.lora_A.weight has rank 4, adapter_config.json asks for 8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; Pensar opens 'LORA'"),
        ({"modules_to_save": ["lm_head"]}, r"sets modules_to_save to \['lm_head'\]"),
        ({"bias": "lora_only"}, "sets bias to 'lora_only'"),
        ({"layers_to_transform": [1]}, r"sets layers_to_transform to \[1\]"),
        ({"init_lora_weights": "pissa"}, "'pissa', which also changes the base model"),
        ({"target_modules": ["q_prj"]}, "no weights 'q_prj'; did you mean `q_proj`"),
        ({"target_modules": ".*q_prj"}, "'.*q_prj' matches no layer"),
        ({"r": None}, "has no r"),
        ({"target_modules": None}, "has no target_modules"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_pensar_has_not_is_named(build, saved, changes, message):
    edit(saved, **changes)
    refused(build, saved, message)


def test_a_damaged_adapter_is_told(build, saved):
    weights = saved / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(min(tensors))
    save_file(tensors, weights)
    refused(build, saved, r"lacks .*lora_A.*the file is not whole")
    weights.rename(saved / "adapter_model.bin")
    refused(build, saved, "adapter_model.bin, a pickle")
    (saved / "adapter_config.json").write_text("[")
    (saved / "adapter_model.bin").rename(weights)
    refused(build, saved, "not valid JSON")
    (saved / "adapter_config.json").unlink()
    refused(build, saved, "adapter_config.json does not exist")
