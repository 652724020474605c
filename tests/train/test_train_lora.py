"""LoRA in a stage: only adapters learn, a kill leaves no trace, what is written opens whole and as an adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from lora_work import counting, merged_weights, place_of

from pensar.base.config import canonical
from pensar.base.errors import ConfigError
from pensar.base.files import files_under, read_jsonl
from pensar.base.ranks import Crew, World
from pensar.base.stage import Runtime
from pensar.model.adapter import load_adapter
from pensar.model.attention import Packed
from pensar.model.lora import LoraConfig, merged
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import load_model
from pensar.posttrain import coldstart
from pensar.recipe import load
from pensar.text.tokenizer import Tokenizer
from pensar.train import checkpoint, loop
from pensar.train.average import AverageConfig
from pensar.train.loop import LoopConfig, Place, finish, fit
from pensar.train.optimizer import Optimizer, OptimizerConfig
from tiny import SPARSE, parameters_of, save, tiny_model, tiny_tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny.yaml"
STEPS = 9
CONFIGS = {
    "lora": (LoraConfig(rank=4), {}),
    "dora": (LoraConfig(rank=4, dora=True, dropout=0.1), {}),
    "int8": (LoraConfig(rank=4, quantize="int8", rslora=True), {}),
    "nf4": (LoraConfig(rank=4, quantize="nf4", dropout=0.2), {}),
    "mixture": (LoraConfig(rank=4), SPARSE),
    "mixture, nf4": (LoraConfig(rank=4, quantize="nf4"), SPARSE),
}
every_config = pytest.mark.parametrize("kind", CONFIGS, ids=lambda name: name.replace(", ", "-"))


class Killed(Exception):
    """Stands for whatever ends a process."""


def configured(lora: LoraConfig | None, **changes: Any) -> LoopConfig:
    values: dict[str, Any] = {
        "steps": STEPS,
        "optimizer": OptimizerConfig(adamw_lr=0.02),
        "checkpoint_every": 3,
    }
    return LoopConfig(lora=lora, **(values | changes))


def stage(out: Path, model: Qwen3, config: LoopConfig, *, seed: int = 5) -> Path:
    place = place_of(out)
    fit(model, counting, config, place, name="counting", seed=seed)
    finish(model, tiny_tokenizer(), place)
    return out


def bytes_under(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files_under(folder).items()}


def killed_at(patch: pytest.MonkeyPatch, call: int) -> None:
    whole, calls = loop.train_step, iter(range(call + 1))

    def train_step(*arguments: Any, **named: Any) -> dict[str, float]:
        if next(calls) == call:
            raise Killed
        values: dict[str, float] = whole(*arguments, **named)
        return values

    patch.setattr(loop, "train_step", train_step)


def hidden(model: Qwen3) -> torch.Tensor:
    tokens = torch.from_numpy(counting(99)[0].tokens).long()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model.logits(model(tokens, positions, Packed()))


# ---------------------------------------------------------------- what is trained


@every_config
def test_the_loss_falls_and_what_is_frozen_keeps_its_bits(tmp_path: Path, kind: str) -> None:
    lora, changes = CONFIGS[kind]
    model = tiny_model(**changes)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = configured(lora, steps=40)
    fit(model, counting, config, place_of(tmp_path / "out"), name="counting")
    losses = [row["loss"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl", dict)]
    assert losses[-1] < 0.8 * losses[0]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} <= {"lora_a", "lora_b", "magnitude"}
    frozen = {name: p for name, p in model.named_parameters() if name not in trained}
    for name, values in frozen.items():
        plain = name.replace("_proj.weight", "_proj") if "experts" in name else name
        assert torch.equal(values, before[plain]), name
    if lora.quantize == "none":
        assert len(frozen) == len(before)
    else:
        assert not any("_proj" in name for name in frozen)


def test_only_adapters_have_gradients_optimiser_state_and_a_place_in_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(LoraConfig(rank=2, targets=("q_proj",)), average=AverageConfig(ema=0.5))
    killed_at(monkeypatch, 4)
    model = tiny_model()
    with pytest.raises(Killed):
        stage(tmp_path / "out", model, config)
    held = checkpoint.read(tmp_path / "out" / checkpoint.NAME)
    names = {f"model.layers.{layer}.self_attn.q_proj.lora_{part}" for layer in range(2) for part in "ab"}
    assert held["model"].keys() == names
    assert held["extra"]["average"]["mean"].keys() == names
    assert held["optimizer"].keys() == {
        f"{kind}.{name}" for kind in ("first", "second", "steps") for name in names
    }, "AdamW's alone"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names


@every_config
def test_a_killed_stage_that_is_taken_up_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    lora, changes = CONFIGS[kind]
    config = configured(lora)
    stage(tmp_path / "whole", tiny_model(**changes), config)
    with monkeypatch.context() as patch:
        killed_at(patch, 7)
        with pytest.raises(Killed):
            stage(tmp_path / "cut", tiny_model(**changes), config)
    assert (tmp_path / "cut" / checkpoint.NAME).exists()
    stage(tmp_path / "cut", tiny_model(**changes), config)
    whole, cut = bytes_under(tmp_path / "whole"), bytes_under(tmp_path / "cut")
    assert whole == cut
    assert {"model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= set(
        whole
    )
    assert checkpoint.NAME not in whole


def test_another_seed_begins_elsewhere(tmp_path: Path) -> None:
    config = configured(LoraConfig(rank=4), steps=2)
    first, second = (stage(tmp_path / str(seed), tiny_model(), config, seed=seed) for seed in (1, 2))
    name = "adapter/adapter_model.safetensors"
    assert (first / name).read_bytes() != (second / name).read_bytes()


def test_two_ranks_end_where_one_does(tmp_path: Path, pair: Crew) -> None:
    """With dropout: what a step hides does not depend on how its rows are spread."""
    config = configured(LoraConfig(rank=4, dropout=0.3))
    alone = merged_weights(World(), config, tmp_path / "alone")
    both = pair.call(merged_weights, config, tmp_path / "both")
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_blocks_train_the_same(tmp_path: Path, mode: str) -> None:
    lora = LoraConfig(rank=4, dropout=0.3, quantize="nf4")
    found = []
    for how in ("none", mode):
        out = stage(tmp_path / how, tiny_model(), configured(lora, recompute=how))
        found.append([row["loss"] for row in read_jsonl(out / "metrics.jsonl", dict)])
    assert np.allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of what it does itself
@pytest.mark.parametrize("kind", ["dora", "mixture, nf4"], ids=lambda name: name.replace(", ", "-"))
def test_compiled_blocks_train_the_same(tmp_path: Path, kind: str) -> None:
    lora, changes = CONFIGS[kind]
    found = []
    for how in (False, True):
        out = stage(tmp_path / str(how), tiny_model(**changes), configured(lora, compile=how))
        found.append([row["loss"] for row in read_jsonl(out / "metrics.jsonl", dict)])
    assert np.allclose(found[0], found[1], rtol=1e-4)


# ---------------------------------------------------------------- what is written


@every_config
def test_the_artifact_is_a_plain_model_and_its_adapter_gives_the_same_on_the_base(
    tmp_path: Path, kind: str
) -> None:
    lora, changes = CONFIGS[kind]
    tokenizer = tiny_tokenizer()
    base = save(tiny_model(**changes), tokenizer, tmp_path / "base")
    out = stage(tmp_path / "out", load_model(base), configured(lora))
    whole = load_model(out)
    assert Tokenizer.load(out).vocab_size == tokenizer.vocab_size
    assert not torch.allclose(hidden(whole), hidden(load_model(base)), atol=0.01)
    again = load_model(base)
    load_adapter(again, out / "adapter", quantize=lora.quantize)
    torch.testing.assert_close(hidden(again), hidden(whole), rtol=1e-4, atol=1e-4)
    assert torch.equal(hidden(merged(again)), hidden(whole))
    again.train()
    assert torch.equal(hidden(merged(again)), hidden(whole)), "dropout has no part in it"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_puts_the_adapter_of_a_stage_on_its_base(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    tokenizer = tiny_tokenizer()
    base = save(tiny_model(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "base")
    out = stage(tmp_path / "out", load_model(base), configured(LoraConfig(rank=4, dora=True)))
    their = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), out / "adapter"
    ).eval()
    tokens = torch.from_numpy(counting(99)[0].tokens).long()
    with torch.no_grad():
        torch.testing.assert_close(their(tokens).logits, hidden(load_model(out)), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- configuration


def test_a_stage_without_lora_is_the_stage_that_it_was() -> None:
    assert canonical(configured(None)) == canonical(
        LoopConfig(steps=STEPS, optimizer=OptimizerConfig(adamw_lr=0.02), checkpoint_every=3)
    )
    assert canonical(configured(LoraConfig(rank=16)))["lora"] == {"rank": 16}


def test_a_recipe_turns_it_on_by_one_value_and_the_stage_s_counts_and_files_are_as_ever(
    school: Path, make_sets: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = load(RECIPE, ["cold_start.lora.rank=8", "pretraining.long.lora.quantize=nf4"])
    assert recipe.cold_start.lora == LoraConfig(rank=8)
    assert recipe.pretraining.long.loop().lora == LoraConfig(quantize="nf4")
    config = msgspec.structs.replace(recipe.cold_start, steps=2, batch_size=4)
    sets = make_sets(cold_start=30, validation=4)
    (tmp_path / "cold").mkdir()
    runtime = Runtime(logs=tmp_path / "logs")
    counts = coldstart.run(config, {"model": school, "tasks": sets}, tmp_path / "cold", runtime)
    assert counts["steps"] == 2
    before, after = load_model(school), load_model(tmp_path / "cold")
    for name, values in after.named_parameters():
        assert torch.equal(values, before.get_parameter(name)) == ("_proj" not in name), name
    load_adapter(before, tmp_path / "cold" / "adapter")
    assert torch.equal(parameters_of(merged(before)), parameters_of(after))


def test_a_new_model_is_not_frozen_at_its_beginning() -> None:
    with pytest.raises(ConfigError, match=r"pretraining\.general: lora beside a shape"):
        load(RECIPE, ["pretraining.general.lora.rank=8"])


def test_adapters_learn_at_adamw_s_rate(tmp_path: Path) -> None:
    config = configured(LoraConfig(), optimizer=OptimizerConfig(lr=5.0, adamw_lr=0.001))
    out = stage(tmp_path / "out", tiny_model(), config)
    rates = [row["lr"] for row in read_jsonl(out / "metrics.jsonl", dict)]
    assert max(rates) == pytest.approx(0.001)


def test_what_lora_does_not_go_with_is_told(tmp_path: Path) -> None:
    config, model = configured(LoraConfig()), tiny_model()
    with pytest.raises(ConfigError, match="rollouts: lora is set, and this stage makes its data"):
        loop.loop(
            model,
            Optimizer(model, config.optimizer),
            config,
            place_of(tmp_path / "out"),
            lambda step: {},
            name="rollouts",
            shown=(),
        )
    place = place_of(tmp_path / "out")
    spread = Place(place.out, place.logs, place.world, place.progress, mesh=object())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="counting: lora in a layout of ranks"):
        fit(tiny_model(), counting, config, spread, name="counting")
    small = msgspec.structs.replace(config, precision="float8")
    with pytest.raises(ConfigError, match="counting: lora with precision=float8"):
        fit(tiny_model(), counting, small, place, name="counting")
