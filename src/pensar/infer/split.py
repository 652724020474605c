"""Split: one rank's part of a model that several compute together: its heads, MLP columns, experts and vocabulary.

Every rank has the whole stream: attention and MLP of each layer are sums over the ranks (arXiv 1909.08053, section 3),
and so is the embedding. Norms and routers are on all of them. The ranks of more than one to a key-value head all keep
that head. Shape legend: N tokens, D hidden, M rows (a token once for each of its experts), E experts, v rows of the
vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pensar.base.errors import ConfigError, ModelError
from pensar.base.ranks import World
from pensar.model.config import ModelConfig, replace
from pensar.model.moe import Experts, SparseMLP, swiglu
from pensar.model.qwen3 import Block, Qwen3
from pensar.model.weights import opened_weights, read_config

Window = tuple[slice, ...]
Source = Callable[[str, Window], Tensor]
"""Parameter's name and a slice of each of its dimensions -> its values there."""


class Shares:
    """What of a model is rank `rank`'s, of `size` ranks. Raises ConfigError for more ranks than parts."""

    def __init__(self, config: ModelConfig, rank: int, size: int) -> None:
        heads, kv_heads = config.num_heads, config.num_kv_heads
        parts = config.num_experts or config.intermediate_size
        if heads % size or (kv_heads % size and size % kv_heads) or parts < size:
            raise ConfigError(
                f"{size} ranks cannot share this model: {heads} query heads have to be divisible by them, {kv_heads} "
                f"key-value heads by them or they by those, and there are {parts} experts or MLP columns; "
                f"possible: {', '.join(map(str, possible_sizes(config)))}"
            )
        self.config = config
        self.heads = _span(heads, rank, size)
        self.kv_heads = _span(kv_heads, rank, size)
        if size > kv_heads:
            self.kv_heads = slice(rank * kv_heads // size, rank * kv_heads // size + 1)
        self.columns = _span(config.intermediate_size, rank, size)
        self.experts = _span(config.num_experts, rank, size)
        self.vocabulary = _span(config.vocab_size, rank, size)
        with torch.device("meta"):
            self._shapes = {name: parameter.shape for name, parameter in Qwen3(config).named_parameters()}

    def part_config(self) -> ModelConfig:
        """The shape of the part, but for its experts, which are counted as they are in the model."""
        return replace(
            self.config,
            num_heads=_len(self.heads),
            num_kv_heads=_len(self.kv_heads),
            intermediate_size=_len(self.columns),
            vocab_size=_len(self.vocabulary),
        )

    def window(self, name: str) -> Window:
        """Where the rank's part of a parameter lies in the whole."""
        whole = [slice(0, size) for size in self._shapes[name]]
        dimension, span = self._cut(name)
        if span is not None:
            whole[dimension] = span
        return tuple(whole)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole parameter."""
        return tuple(self._shapes[name])

    def _cut(self, name: str) -> tuple[int, slice | None]:
        owner, _, last = name.removesuffix(".weight").rpartition(".")
        if owner.endswith("experts"):
            return 0, self.experts
        heads, kv_heads = (_scaled(span, self.config.head_dim) for span in (self.heads, self.kv_heads))
        cuts: dict[str, tuple[int, slice]] = {
            "embed_tokens": (0, self.vocabulary),
            "lm_head": (0, self.vocabulary),
            "q_proj": (0, heads),
            "k_proj": (0, kv_heads),
            "v_proj": (0, kv_heads),
            "o_proj": (1, heads),
            "gate_proj": (0, self.columns),
            "up_proj": (0, self.columns),
            "down_proj": (1, self.columns),
        }
        return cuts.get(last, (0, None))


def possible_sizes(config: ModelConfig) -> list[int]:
    """Numbers of ranks that can share a model."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    most = min(heads, config.num_experts or config.intermediate_size)
    return [
        size
        for size in range(1, most + 1)
        if heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
    ]


def vocabulary_of(config: ModelConfig, size: int) -> list[int]:
    """Rows of the vocabulary of each rank."""
    return [_len(_span(config.vocab_size, rank, size)) for rank in range(size)]


class Sums:
    """Sums over the ranks, in the steps that all of them compute."""

    def __init__(self, world: World) -> None:
        self._world, self._together = world, world.size == 1

    def __call__(self, part: Tensor) -> Tensor:
        if not self._together:
            raise ModelError(
                "a part of a model was asked to compute alone, as a draft head does; what its ranks share they "
                "compute in the steps of their engine only"
            )
        return self._world.all_reduce_(part.contiguous())

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks are in this block, or on their way to it."""
        before, self._together = self._together, True
        try:
            yield
        finally:
            self._together = before


def part_of(
    shares: Shares, sums: Sums, source: Source, device: torch.device, dtype: torch.dtype | None
) -> Qwen3:
    """The rank's part in evaluation mode; `dtype` None keeps that of the embedding. `logits` are of its vocabulary.

    No more than the part is ever read: a source gives windows.
    """
    with torch.device("meta"):
        part = Qwen3(shares.part_config())
        if shares.config.num_experts:
            experts = Experts(replace(shares.config, num_experts=_len(shares.experts), experts_per_token=1))
            for block in _blocks(part):
                sparse = block.mlp
                assert isinstance(sparse, SparseMLP)
                sparse.experts.gate_up_proj = nn.Parameter(torch.empty_like(experts.gate_up_proj))
                sparse.experts.down_proj = nn.Parameter(torch.empty_like(experts.down_proj))
    for name, parameter in list(part.named_parameters()):
        values = source(name, shares.window(name))
        assert values.shape == parameter.shape, name
        dtype = dtype or values.dtype
        own = torch.empty(parameter.shape, dtype=dtype, device=device).copy_(values)
        owner, _, attribute = name.rpartition(".")
        setattr(part.get_submodule(owner), attribute, nn.Parameter(own))
    _join(part, shares, sums)
    return part.eval()


@contextmanager
def opened(source: Path | Qwen3) -> Iterator[tuple[ModelConfig, Source]]:
    """Shape and weights of a model, or of a directory, of which only what is asked for is read."""
    if isinstance(source, Qwen3):
        held = dict(source.named_parameters())
        yield source.config, lambda name, window: held[name].detach()[window]
        return
    with opened_weights(source) as read:
        yield read_config(source), read


def _join(part: Qwen3, shares: Shares, sums: Sums) -> None:
    """Makes sums over the ranks of what the part computes."""
    part.model.embed_tokens.forward = _Embedding(part, shares.vocabulary, sums)

    def summed(_: nn.Module, __: tuple[object, ...], output: Tensor) -> Tensor:
        return sums(output)

    for block in _blocks(part):
        if isinstance(block.mlp, SparseMLP):
            experts = block.mlp.experts
            experts.forward = _Experts(experts, shares.experts)  # type: ignore[method-assign]
        block.self_attn.register_forward_hook(summed)
        block.mlp.register_forward_hook(summed)


class _Embedding:
    """`Embedding.forward` where a rank has some rows of the table."""

    def __init__(self, part: Qwen3, rows: slice, sums: Sums) -> None:
        self._table, self._rows, self._sums = part.model.embed_tokens, rows, sums

    def __call__(self, tokens: Tensor) -> Tensor:
        own = (tokens >= self._rows.start) & (tokens < self._rows.stop)
        rows = torch.where(own, tokens - self._rows.start, 0)
        return self._sums(F.embedding(rows, self._table.weight) * own[..., None])


class _Experts:
    """`Experts.forward` where a rank has some of the experts: zeros for the rows of the others."""

    def __init__(self, experts: Experts, own: slice) -> None:
        self._experts, self._own = experts, own

    def __call__(self, sorted_x_MD: Tensor, counts_E: Tensor) -> Tensor:
        out_MD = torch.zeros_like(sorted_x_MD)
        ends = [0, *counts_E.cumsum(0).tolist()]
        first, last = ends[self._own.start], ends[self._own.stop]
        if first < last:
            weights = self._experts.gate_up_proj, self._experts.down_proj
            out_MD[first:last] = swiglu(sorted_x_MD[first:last], counts_E[self._own], *weights)
        return out_MD


def _blocks(model: Qwen3) -> Iterator[Block]:
    for block in model.model.layers:
        assert isinstance(block, Block)
        yield block


def _span(count: int, rank: int, size: int) -> slice:
    return slice(count * rank // size, count * (rank + 1) // size)


def _scaled(span: slice, factor: int) -> slice:
    return slice(span.start * factor, span.stop * factor)


def _len(span: slice) -> int:
    return int(span.stop - span.start)
