"""Layout: how the ranks of a training run share the work; written `shard=8,tp=2,pp=4` and never hashed."""

from typing import Any, Literal

from pensar.base.config import Config, nearest
from pensar.base.errors import ConfigError
from pensar.model.config import ModelConfig

ALIASES = {"dp": "dp_replicate", "fsdp": "dp_shard", "shard": "dp_shard", "replicate": "dp_replicate"}


class Layout(Config, frozen=True, kw_only=True):
    """Ranks of each kind; their product is the number of ranks.

    `ep` spreads experts over ranks that are shards, context and tensor ranks for everything else, so it does not count.
    """

    dp_replicate: int = 1
    """Copies of the weights, each spread over the other ranks (HSDP)."""
    dp_shard: int = 1
    """Ranks over which weights, gradients and optimiser state are spread (FSDP2)."""
    cp: int = 1
    """Ranks that split every row's tokens."""
    tp: int = 1
    """Ranks that split heads, MLP columns and vocabulary."""
    ep: int = 1
    """Ranks that split a layer's experts."""
    pp: int = 1
    """Ranks that split the depth."""
    virtual: int = 1
    """Parts of the depth that each of those ranks holds, dealt out in turn: the way through a pipeline is shorter."""
    micro_batches: int = 1
    """Parts of each rank's rows that go through a pipeline one after the other."""
    accumulate: int = 1
    """Parts of a step's rows that are taken one after the other, their gradients summed: it trades time for memory."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again to save memory."""

    def __post_init__(self) -> None:
        for name in (
            "dp_replicate",
            "dp_shard",
            "cp",
            "tp",
            "ep",
            "pp",
            "virtual",
            "micro_batches",
            "accumulate",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"layout: {name} is {getattr(self, name)}; it counts ranks and is at least 1"
                )
        if self.virtual > 1 and self.pp == 1:
            raise ConfigError(
                f"layout: virtual {self.virtual} without a pipeline; give pp, the ranks that split the depth"
            )
        rounds = max(1, self.micro_batches // self.pp)
        if self.virtual > 1 and self.micro_batches % rounds:
            raise ConfigError(
                f"layout: {self.micro_batches} micro_batches do not go through pp {self.pp} with virtual "
                f"{self.virtual} in equal rounds; use a multiple of {self.pp}"
            )
        within = self.dp_shard * self.cp * self.tp
        if within % self.ep:
            raise ConfigError(
                f"layout: ep {self.ep} does not divide dp_shard x cp x tp = {within}; "
                "experts are spread over those ranks"
            )

    @property
    def ranks(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def data(self) -> int:
        """Ranks over which rows are dealt out."""
        return self.dp_replicate * self.dp_shard

    def check(self, model: ModelConfig, context: int, rows: int) -> None:
        """ConfigError for what this model, rows of `context` tokens and `rows` of them a step cannot be cut into."""
        for name, count, parts in (
            ("num_heads", model.num_heads, self.tp),
            ("num_kv_heads", model.num_kv_heads, self.tp),
            ("intermediate_size", 0 if model.num_experts else model.intermediate_size, self.tp),
            ("num_experts", model.num_experts, self.ep),
        ):
            kind = "ep" if name == "num_experts" else "tp"
            if count % parts:
                raise ConfigError(
                    f"layout: {kind} {parts} does not divide {name} {count}; use a divisor of it"
                )
        if self.ep > 1 and not model.num_experts:
            raise ConfigError(f"layout: ep {self.ep} with a dense model, which has no experts; use dp_shard")
        if self.pp * self.virtual > model.num_layers:
            given = f"pp {self.pp}" + (f" x virtual {self.virtual}" if self.virtual > 1 else "")
            raise ConfigError(
                f"layout: {given} is more than the {model.num_layers} layers; use at most as many"
            )
        if self.cp > 1 and context % (2 * self.cp):
            raise ConfigError(
                f"layout: rows of {context} tokens do not split over cp {self.cp}; "
                f"use a context that is a multiple of {2 * self.cp}"
            )
        if self.tp > 1 and (context // self.cp) % self.tp:
            raise ConfigError(
                f"layout: {context // self.cp} tokens of a row do not split over tp {self.tp}; "
                f"use a context that is a multiple of {self.cp * self.tp}"
            )
        if self.accumulate > rows:
            raise ConfigError(
                f"layout: accumulate {self.accumulate} is more than the {rows} rows of a step; use at most as many"
            )
        if self.pp > 1 and rows % (self.accumulate * self.data * self.micro_batches):
            raise ConfigError(
                f"layout: {rows} rows a step do not split over {self.data} data ranks in "
                f"{self.accumulate * self.micro_batches} micro-batches each; a pipeline needs equal ones"
            )

    def check_recompute(self, model: ModelConfig, recompute: str) -> None:
        """ConfigError where torch cannot replay a block: experts with shards of their own gather them otherwise."""
        if recompute == "selective" and model.num_experts and self.ep * self.tp > 1:
            raise ConfigError(
                f"layout: recompute selective with ep {self.ep} and tp {self.tp} for a mixture of experts; "
                "use full or none"
            )

    def __str__(self) -> str:
        return format_layout(self)


def parse_layout(text: str) -> Layout:
    """Layout of a text like `shard=8,tp=2`; ConfigError names the nearest key."""
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = part.partition("=")
        name = ALIASES.get(key.strip(), key.strip())
        if name not in Layout.__struct_fields__:
            known = sorted({*Layout.__struct_fields__, *ALIASES})
            raise ConfigError(f"layout: {key!r} is not a kind of ranks; {nearest(key, known)}")
        if name in values:
            raise ConfigError(f"layout: {key} is given twice; a kind of ranks has one size")
        if name == "recompute" and value.strip() in ("none", "selective", "full"):
            values[name] = value.strip()
        elif equals and value.strip().isdecimal():
            values[name] = int(value)
        else:
            raise ConfigError(f"layout: {part!r} is not of the form name=number, as in shard=8,tp=2")
    return Layout(**values)


def format_layout(layout: Layout) -> str:
    """The text that `parse_layout` reads back; `1 rank` where nothing is split."""
    parts = [
        f"{name.removeprefix('dp_')}={value}"
        for name in Layout.__struct_fields__
        if (value := getattr(layout, name)) not in (1, "none")
    ]
    return ",".join(parts)
