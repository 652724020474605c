"""ACCELERATORS: what the GPUs of a cluster can do, by name, one row a kind."""

from collections.abc import Mapping
from types import MappingProxyType

from pensar.base.config import Config, nearest
from pensar.base.errors import ConfigError

GIB = 1 << 30


class Accelerator(Config, frozen=True, kw_only=True):
    """One GPU in its usual server: the vendor's figures, without sparsity, a direction of each link."""

    memory_bytes: int
    """What a framework finds free on an idle board, a little less than the vendor's gigabytes."""
    bf16_flops: float
    """Per second, dense bfloat16 with float32 sums."""
    fp8_flops: float | None
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """To the other GPUs of its node, together."""
    network_bytes_per_second: float
    """Its share of the node's network; an assumption: vendors sell servers with several."""
    watts: float
    """Of the board at full load."""
    gpus_per_node: int = 8
    dollars_per_hour: float
    """An assumption about renting: prices differ by a factor of two and change within months."""


def _row(
    gib: float,
    bf16: float,
    fp8: float | None,
    memory: float,
    link: float,
    network: float,
    watts: float,
    price: float,
) -> Accelerator:
    """Memory in GiB, operations in 10^12, rates in 10^9 bytes a second."""
    return Accelerator(
        memory_bytes=round(gib * GIB),
        bf16_flops=bf16 * 1e12,
        fp8_flops=None if fp8 is None else fp8 * 1e12,
        memory_bytes_per_second=memory * 1e9,
        link_bytes_per_second=link * 1e9,
        network_bytes_per_second=network * 1e9,
        watts=watts,
        dollars_per_hour=price,
    )


ACCELERATORS: Mapping[str, Accelerator] = MappingProxyType(
    {
        "h100": _row(79, 989, 1979, 3350, 450, 50, 700, 2.5),
        "h200": _row(139, 989, 1979, 4800, 450, 50, 700, 3.0),
        "b200": _row(178, 2250, 4500, 8000, 900, 50, 1000, 5.0),
        "a100-80g": _row(79, 312, None, 2039, 300, 25, 400, 1.6),
        "mi300x": _row(191, 1307, 2615, 5300, 448, 50, 750, 2.5),
        "l40s": _row(44, 362, 733, 864, 32, 25, 350, 1.0),
        "rtx4090": _row(23.5, 165, 330, 1008, 32, 12.5, 450, 0.4),
    }
)


def accelerator(name: str) -> Accelerator:
    """A row of the table; ConfigError names the nearest and all there are."""
    if name not in ACCELERATORS:
        hint = nearest(name, list(ACCELERATORS))
        known = "" if hint.startswith("valid") else f" valid: {', '.join(sorted(ACCELERATORS))}"
        raise ConfigError(f"GPU {name!r} is not in the table; {hint}{known}")
    return ACCELERATORS[name]
