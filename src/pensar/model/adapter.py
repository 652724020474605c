"""Adapters on disk in PEFT's format: adapter_config.json and adapter_model.safetensors, written and opened.

A name is `base_model.model.`, the layer's name in the Hugging Face model, then lora_A.weight [r, I], lora_B.weight
[O, r] or lora_magnitude_vector [O]. Of stacked experts PEFT has lora_A [E r, I] and lora_B [O, r E]; where both weights
of a layer's experts change, `base_layer` tells the first from the second.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pensar.base.errors import ConfigError, ModelError
from pensar.base.files import write_atomic
from pensar.model import tensorfile
from pensar.model.lora import (
    LoraConfig,
    LoraWeight,
    Strength,
    adapt,
    adapted_weights,
    base_mark,
    chosen,
    is_stacked,
    weight_of,
)
from pensar.model.qwen3 import Qwen3
from pensar.model.tensorfile import OpenFile

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE_MARK = "base_mark"
"""In the weights' metadata: which base model the adapter belongs to. PEFT pays no heed to it."""

_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "use_dora",
    "use_rslora", "init_lora_weights",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip
"""Keys that say nothing of what a trained adapter computes."""
_PLAIN_BEGINNINGS = (True, False, None, "default", "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base model as it was."""


def save_adapter(model: Qwen3, folder: Path, *, base: str | None = None) -> None:
    """Writes the changes of an adapted model; equal changes give equal bytes. The config is written last.

    `base` is where PEFT will look for the base model if it is not told: a folder or a name.
    """
    weights = dict(adapted_weights(model))
    if not weights:
        raise ModelError("the model has no LoRA weights to save; save_model writes the model itself")
    tensors: dict[str, Tensor] = {}
    prefixes = _prefixes(list(weights))
    for name, weight in weights.items():
        tensors |= _to_peft(prefixes[name], weight)
    folder.mkdir(parents=True, exist_ok=True)
    tensorfile.write(tensors, folder / WEIGHTS, {BASE_MARK: base_mark(model, weights)})
    content = _config_of(weights, base)
    write_atomic(folder / CONFIG, json.dumps(content, indent=2, sort_keys=True) + "\n")


def load_adapter(
    model: Qwen3, folder: Path, *, quantize: Literal["none", "int8", "nf4"] = "none", any_base: bool = False
) -> None:
    """Adapts the model as the folder says; with `quantize` its blocks are put into few bits first.

    ModelError names what does not fit, and leaves the model as it was: an adapter of another base (unless `any_base`
    and it has the same shape), a target that the model has not, a feature of PEFT that Pensar has not.
    """
    folder = Path(folder)
    source = str(folder / CONFIG)
    content = _read_config(folder)
    _refuse_unsupported(content, source)
    try:
        config = _lora_config(content, model, quantize)
        names = chosen(model, config.targets)
    except ConfigError as error:
        raise ModelError(f"{source}: {error}") from error
    strengths = {name: _strength(content, name) for name in names}
    with tensorfile.opened(folder / WEIGHTS) as file:
        _check(file, model, config, strengths, folder / WEIGHTS)
        mark = (file.metadata() or {}).get(BASE_MARK)
        if mark and not any_base and mark != base_mark(model, names):
            raise ModelError(
                f"{folder / WEIGHTS} was trained on another base model of the same shape: the weights that it changes "
                "are not those of this model; open the base that it was trained on"
            )
        adapt(model, config, 0, strengths)
        prefixes = _prefixes(names)
        for name, weight in adapted_weights(model):
            _from_peft(prefixes[name], weight, file)


def _prefixes(names: Sequence[str]) -> dict[str, str]:
    """Name of a weight -> what its tensors' names begin with."""
    prefixes = {}
    for name in names:
        owner, _, part = name.rpartition(".")
        place = owner if is_stacked(name) else name
        if is_stacked(name) and part == "gate_up_proj" and f"{owner}.down_proj" in names:
            place = f"{owner}.base_layer"
        prefixes[name] = f"base_model.model.{place}"
    return prefixes


def _shapes(prefix: str, shape: Sequence[int], strength: Strength, dora: bool) -> dict[str, list[int]]:
    """Name -> shape of the tensors of one weight."""
    *experts, outputs, inputs = shape
    rank = strength.rank * (experts[0] if experts else 1)
    shapes = {f"{prefix}.lora_A.weight": [rank, inputs], f"{prefix}.lora_B.weight": [outputs, rank]}
    return shapes | ({f"{prefix}.lora_magnitude_vector": [outputs]} if dora else {})


def _to_peft(prefix: str, weight: LoraWeight) -> dict[str, Tensor]:
    a, b = weight.lora_a.detach(), weight.lora_b.detach()
    if a.dim() == 3:
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    tensors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    if weight.magnitude is not None:
        tensors[f"{prefix}.lora_magnitude_vector"] = weight.magnitude.detach()
    return tensors


@torch.no_grad()
def _from_peft(prefix: str, weight: LoraWeight, file: OpenFile) -> None:
    a, b = file.get_tensor(f"{prefix}.lora_A.weight"), file.get_tensor(f"{prefix}.lora_B.weight")
    if weight.lora_a.dim() == 3:
        num_experts, rank, _ = weight.lora_a.shape
        a, b = a.view(weight.lora_a.shape), b.view(-1, rank, num_experts).permute(2, 0, 1)
    weight.lora_a.copy_(a)
    weight.lora_b.copy_(b)
    if weight.magnitude is not None:
        weight.magnitude.copy_(file.get_tensor(f"{prefix}.lora_magnitude_vector"))


def _config_of(weights: Mapping[str, LoraWeight], base: str | None) -> dict[str, Any]:
    config = next(iter(weights.values())).config
    strengths = {name: weight.strength for name, weight in weights.items()}
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _number(config.alpha),
        "lora_dropout": 0.0,  # Pensar's hides inputs from whole steps, and neither matters any more
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "rank_pattern": {name: s.rank for name, s in strengths.items() if s.rank != config.rank},
        "alpha_pattern": {name: _number(s.alpha) for name, s in strengths.items() if s.alpha != config.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": _targets(weights, config.targets, stacked=False),
    }
    parameters = _targets(weights, config.targets, stacked=True)
    return content | ({"target_parameters": parameters} if parameters else {})


def _targets(weights: Mapping[str, LoraWeight], targets: tuple[str, ...], *, stacked: bool) -> list[str]:
    """The targets that mean these weights; without any, the ends of the weights' names."""
    names = [name for name in weights if is_stacked(name) == stacked]
    if targets:
        return [t for t in targets if any(name == t or name.endswith(f".{t}") for name in names)]
    ends = [re.sub(r".*\.layers\.\d+\.", "", name) for name in names]
    return sorted({end if stacked else end.rpartition(".")[2] for end in ends})


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{path} does not exist; an adapter's folder has one beside {WEIGHTS}")
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise ModelError(f"{folder} holds adapter_model.bin, a pickle; convert it to {WEIGHTS}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _refuse_unsupported(content: Mapping[str, Any], source: str) -> None:
    if content.get("peft_type") != "LORA":
        raise ModelError(f"{source}: peft_type is {content.get('peft_type')!r}; Pensar opens 'LORA'")
    beginning = content.get("init_lora_weights", True)
    if beginning not in _PLAIN_BEGINNINGS:
        raise ModelError(
            f"{source}: init_lora_weights is {beginning!r}, which also changes the base model; "
            "convert the adapter to one of the unchanged base with PEFT"
        )
    for key, value in content.items():
        if key not in _READ | _WITHOUT_EFFECT and value not in (None, False, "none", {}, []):
            raise ModelError(
                f"{source} sets {key} to {value!r}, which Pensar's LoRA has not; train without it"
            )
    for key in ("r", "lora_alpha", "target_modules"):
        if content.get(key) is None and not (key == "target_modules" and content.get("target_parameters")):
            raise ModelError(f"{source} has no {key}; PEFT's adapters state it")


def _lora_config(
    content: Mapping[str, Any], model: Qwen3, quantize: Literal["none", "int8", "nf4"]
) -> LoraConfig:
    modules = content.get("target_modules") or []
    if isinstance(modules, str):
        plain = [name for name in chosen(model, ()) if not is_stacked(name)]
        pattern = modules
        modules = [name for name in plain if pattern == "all-linear" or re.fullmatch(pattern, name)]
        if not modules:
            raise ConfigError(f"target_modules {pattern!r} matches no layer of the model")
    targets = (*modules, *(content.get("target_parameters") or []))
    return LoraConfig(
        rank=content["r"],
        alpha=content["lora_alpha"],
        targets=targets,
        rslora=content.get("use_rslora") or False,
        dora=content.get("use_dora") or False,
        quantize=quantize,
    )


def _strength(content: Mapping[str, Any], name: str) -> Strength:
    """Rank and alpha of a weight: those of the first pattern that matches the end of its name, or the general ones."""

    def found(patterns: Mapping[str, Any] | None, otherwise: Any) -> Any:
        fits = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
        return next(fits, otherwise)

    rank = found(content.get("rank_pattern"), content["r"])
    return Strength(rank, float(found(content.get("alpha_pattern"), content["lora_alpha"])))


def _check(
    file: OpenFile, model: Qwen3, config: LoraConfig, strengths: Mapping[str, Strength], path: Path
) -> None:
    """Every tensor that the config asks for is there with its shape, and no other."""
    prefixes = _prefixes(list(strengths))
    expected: dict[str, list[int]] = {}
    for name, strength in strengths.items():
        expected |= _shapes(prefixes[name], weight_of(model, name).shape, strength, config.dora)
    held = set(file.keys())
    if surplus := sorted(held - expected.keys()):
        raise ModelError(
            f"{path} holds {surplus[0]} and {len(surplus) - 1} more that this model has no place for; "
            f"the adapter is for another base model, or {CONFIG} for another adapter"
        )
    if missing := sorted(expected.keys() - held):
        raise ModelError(
            f"{path} lacks {missing[0]} and {len(missing) - 1} more that {CONFIG} and the model ask for; "
            "the adapter is for another base model, or the file is not whole"
        )
    for name, shape in expected.items():
        found = list(file.get_slice(name).get_shape())
        side = 0 if ".lora_A." in name else -1
        if found == shape:
            continue
        if len(found) == len(shape) == 2 and found[side] != shape[side]:
            raise ModelError(
                f"{path}: {name} has rank {found[side]}, {CONFIG} asks for {shape[side]}; the two files come from "
                "different adapters"
            )
        raise ModelError(
            f"{path}: {name} has shape {found}, this model asks for {shape}; the adapter is for another base model"
        )
