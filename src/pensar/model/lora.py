"""LoRA: a frozen model with small trainable changes of its linear layers, W + s B A (arXiv 2106.09685).

DoRA (arXiv 2402.09353) also trains the length m of each row: m (W + s B A) / |W + s B A|. Stacked experts have a pair
of factors each. What stands on disk is `adapter.py`'s business.
Shape legend: O outputs, I inputs, E experts, r rank.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pensar.base.config import Config, nearest
from pensar.base.errors import ConfigError
from pensar.base.files import seed_of
from pensar.model.moe import Experts
from pensar.model.quantized import OpenExperts, Quantized, is_router, multiplied, product, quantize
from pensar.model.qwen3 import Qwen3

SAMPLED = 64
"""Values of a weight that go into the mark of a base model."""


class LoraConfig(Config, frozen=True, kw_only=True):
    """Train small changes of a frozen model in place of the model."""

    rank: int = 8
    alpha: float = 16.0
    """The change is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Which weights change: ends of their names, as in PEFT's `target_modules` (`q_proj`, `layers.0.mlp.up_proj`), and
    `gate_up_proj` and `down_proj` for stacked experts; empty for all linear layers of the blocks, routers apart."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732)."""
    dora: bool = False
    """Train the length of each row of the weights apart from its direction (arXiv 2402.09353)."""
    dropout: float = 0.0
    """Share of a layer's inputs that its change does not see in a step: the same for all tokens of the step, so that
    the result does not depend on how they are spread over ranks."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Keep the frozen blocks in few bits (QLoRA, arXiv 2305.14314); the finished model is whole again."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ConfigError(f"lora: rank {self.rank} is at least 1, alpha {self.alpha} above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora: dropout {self.dropout} is in [0, 1); 0 switches it off")


class Strength(NamedTuple):
    """Rank and alpha of one weight's change."""

    rank: int
    alpha: float


class LoraWeight(nn.Module):
    """A frozen weight [O, I] or [E, O, I] and its change, called as the layer that it stands for."""

    weight: nn.Parameter | Quantized
    mask: Tensor | None
    """[I]: by what dropout multiplies each input in this step."""
    folded: Tensor | None
    """The changed weight, while merged."""

    def __init__(
        self, weight: nn.Parameter | Quantized, config: LoraConfig, strength: Strength, mark: str, seed: int
    ) -> None:
        super().__init__()
        self.weight, self.config, self.strength, self.mark = weight, config, strength, mark
        self.seed = seed
        dtype = torch.promote_types(weight.dtype, torch.float32)
        *experts, outputs, inputs = weight.shape
        rank = strength.rank
        generator = torch.Generator().manual_seed(seed)
        # As a linear layer begins; b is zero, so that training starts from the model as it is.
        a = torch.empty(*experts, rank, inputs).uniform_(-1, 1, generator=generator) / math.sqrt(inputs)
        self.lora_a = nn.Parameter(a.to(weight.device, dtype))
        self.lora_b = nn.Parameter(torch.zeros(*experts, outputs, rank, dtype=dtype, device=weight.device))
        self.magnitude: nn.Parameter | None = None
        if config.dora:
            self.magnitude = nn.Parameter(torch.linalg.vector_norm(self.base(dtype), dim=-1))
        self.register_buffer("mask", None, persistent=False)
        self.register_buffer("folded", None, persistent=False)

    @property
    def scale(self) -> float:
        rank, alpha = self.strength
        return alpha / (math.sqrt(rank) if self.config.rslora else rank)

    def base(self, dtype: torch.dtype | None = None) -> Tensor:
        """The frozen weight, without its gradient."""
        if isinstance(self.weight, Quantized):
            return self.weight.whole(dtype)
        return self.weight.detach().to(dtype or self.weight.dtype)

    def forward(self, x: Tensor, counts_E: Tensor | None = None) -> Tensor:
        if self.folded is not None:
            return multiplied(x, self.folded, counts_E)
        y = product(x, self.weight, counts_E)
        a = self.lora_a if self.mask is None or not self.training else self.lora_a * self.mask
        change = multiplied(multiplied(x.to(a.dtype), a, counts_E), self.lora_b, counts_E) * self.scale
        if self.magnitude is None:
            return y + change.to(y.dtype)
        out: Tensor = (y + change) * (self.magnitude / self._lengths(a))
        return out.to(y.dtype)

    @torch.no_grad()
    def whole(self) -> Tensor:
        """The changed weight, in the type of the frozen one."""
        changed = self._changed(self.lora_a)
        if self.magnitude is not None:
            changed *= (self.magnitude / self._lengths(self.lora_a))[:, None]
        return changed.to(self.weight.dtype)

    def begin_step(self, step: int) -> None:
        """Draws what the step's dropout hides; every rank and every repetition draws the same."""
        if self.config.dropout:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "dropout", step))
            kept = torch.rand(self.lora_a.shape[-1], generator=generator) >= self.config.dropout
            self.mask = (kept / (1 - self.config.dropout)).to(self.lora_a)

    def merge(self) -> None:
        """Multiplies by one weight from now on; it is kept beside the frozen one."""
        self.folded = self.whole()

    def unmerge(self) -> None:
        """Lets the merged weight go; the frozen one was never touched."""
        self.folded = None

    @torch.no_grad()
    def _lengths(self, a: Tensor) -> Tensor:
        """|W + s B A| of each row, a constant to the gradient (section 4.3)."""
        lengths: Tensor = torch.linalg.vector_norm(self._changed(a), dim=-1)
        return lengths

    def _changed(self, a: Tensor) -> Tensor:
        """W + s B A; not by add's `alpha`, which torch 2.13 loses when it compiles the sum into the product."""
        return self.base(a.dtype) + self.scale * (self.lora_b @ a)


def adapt(
    model: Qwen3, config: LoraConfig, seed: int, strengths: Mapping[str, Strength] | None = None
) -> None:
    """Freezes the model and gives its targets trainable changes, each drawn from a generator seeded by its name.

    `strengths` are for weights, by name, whose rank and alpha are not the configuration's. Raises ConfigError for a
    target that the model does not have.
    """
    if next(adapted_weights(model), None) is not None:
        raise ConfigError("the model has LoRA weights already; merge them first")
    names = chosen(model, config.targets)
    if config.dora and (stacked := [name for name in names if is_stacked(name)]):
        raise ConfigError(
            f"lora: dora with {stacked[0]}: it changes plain matrices only; set targets to "
            "[q_proj, k_proj, v_proj, o_proj], or dora to false"
        )
    marks = {name: _mark(weight_of(model, name)) for name in names}
    model.requires_grad_(False)
    if config.quantize != "none":
        quantize(model, config.quantize)
    for name in names:
        weight = weight_of(model, name)
        strength = (strengths or {}).get(name, Strength(config.rank, config.alpha))
        _replace(model, name, LoraWeight(weight, config, strength, marks[name], seed_of(seed, name)))
    model.train(model.training)


def adapted_weights(model: nn.Module) -> Iterator[tuple[str, LoraWeight]]:
    """The weights that change, by name; none for a model without LoRA."""
    for name, module in model.named_modules():
        if isinstance(module, LoraWeight):
            yield name, module


def begin_step(model: nn.Module, step: int) -> None:
    """To be called before each step of training."""
    for _, weight in adapted_weights(model):
        weight.begin_step(step)


def merge(model: nn.Module) -> None:
    """Makes the model as fast as one without LoRA, at the memory of a second copy of the changed weights."""
    for _, weight in adapted_weights(model):
        weight.merge()


def unmerge(model: nn.Module) -> None:
    """Takes `merge` back: the frozen weights are the same bits as before."""
    for _, weight in adapted_weights(model):
        weight.unmerge()


def merged(model: Qwen3) -> Qwen3:
    """A plain model with the changes in its weights, no longer in few bits; what did not change is shared."""
    with torch.device("meta"):
        plain = Qwen3(model.config)
    for name, _ in list(plain.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        held = module if isinstance(module, LoraWeight | Quantized) else getattr(module, attribute)
        values = held.whole() if isinstance(held, LoraWeight | Quantized) else held.detach()
        setattr(plain.get_submodule(owner), attribute, nn.Parameter(values))
    return plain.train(model.training)


def chosen(model: Qwen3, targets: tuple[str, ...]) -> list[str]:
    """Names of the weights that the targets mean, in the model's order; each target must mean at least one."""
    names = list(_adaptable(model))
    for target in targets:
        if not any(_means(target, name) for name in names):
            raise ConfigError(f"lora: the model has no weights {target!r}{_instead(model, target, names)}")
    return [name for name in names if not targets or any(_means(target, name) for target in targets)]


def weight_of(model: Qwen3, name: str) -> nn.Parameter | Quantized:
    """The weight of a linear layer, or of stacked experts, that `chosen` calls by this name."""
    owner, _, attribute = name.rpartition(".")
    held = getattr(model.get_submodule(owner), attribute)
    weight = held.weight if isinstance(held, nn.Linear) else held
    assert isinstance(weight, nn.Parameter | Quantized)
    return weight


def base_mark(model: Qwen3, names: Iterable[str]) -> str:
    """A hash that tells a base model from others by some values of each of these weights, changed or not.

    The values are rounded to bfloat16 first, so that a model opened in another type is the same base.
    """
    known = {name: weight.mark for name, weight in adapted_weights(model)}
    marks = [known.get(name) or _mark(weight_of(model, name)) for name in sorted(names)]
    return hashlib.sha256(" ".join(marks).encode()).hexdigest()


def is_stacked(name: str) -> bool:
    """Whether a weight of this name is that of all experts of a layer."""
    return name.rpartition(".")[0].endswith("mlp.experts")


def _adaptable(model: Qwen3) -> Iterator[str]:
    for name, module in model.named_modules():
        if ".layers." not in name or is_router(name):
            continue
        if isinstance(module, nn.Linear):
            yield name
        elif isinstance(module, Experts):
            yield from (f"{name}.{part}" for part in ("gate_up_proj", "down_proj"))


def _means(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _instead(model: Qwen3, target: str, names: list[str]) -> str:
    if target.endswith("gate") and model.config.num_experts:
        return "; routers are never changed"
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    if model.config.num_experts and target.endswith(("gate_proj", "up_proj")):
        return "; experts have both in gate_up_proj"
    return f"; {nearest(target.rpartition('.')[2], kinds)}"


def _replace(model: Qwen3, name: str, changed: LoraWeight) -> None:
    owner, _, attribute = name.rpartition(".")
    experts = model.get_submodule(owner)
    if isinstance(experts, Experts):
        model.set_submodule(owner, OpenExperts(experts.gate_up_proj, experts.down_proj))
    holder = model.get_submodule(owner)
    if isinstance(getattr(holder, attribute), nn.Parameter):
        delattr(holder, attribute)  # torch lets a module take a module's name, not a parameter's
    setattr(holder, attribute, changed)


def _mark(weight: nn.Parameter | Quantized) -> str:
    assert isinstance(weight, Tensor)
    values = weight.detach().flatten()
    picked = torch.linspace(0, len(values) - 1, min(SAMPLED, len(values)), dtype=torch.float64).round().long()
    return values[picked.to(values.device)].bfloat16().view(torch.int16).cpu().numpy().tobytes().hex()
