"""Speed: floating-point operations of a step, and the share of what the ranks' processors could do (MFU).

Model FLOPs utilisation is that of PaLM (arXiv 2204.02311, appendix B): the operations that the model needs, without
those repeated to save memory, over those that the hardware could have done in the time.
"""

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pensar.base.ranks import World
from pensar.model.config import ModelConfig
from pensar.model.count import flops_per_token
from pensar.text.packing import Batch
from pensar.train.accelerators import ACCELERATORS

if TYPE_CHECKING:
    from pensar.train.parallel.mesh import Mesh

LOG = logging.getLogger(__name__)
PROBE_SECONDS = 0.05
PROBE_SIZE = {"cpu": 512, "cuda": 8192}
"""Rows of the square matrices of the probe: as fast as larger ones, and several products within its time."""


class Speed:
    """What all ranks together could do, by table or by probe when a stage begins; times are no part of an artifact."""

    def __init__(self, world: World, precision: str, device: torch.device) -> None:
        found = world.gather(peak_flops(precision, device))
        self.peak = sum(flops for flops, _ in found)
        self.source = ", ".join(dict.fromkeys(source for _, source in found))
        LOG.info("peak of %d ranks: %.4g FLOP/s in %s (%s)", world.size, self.peak, precision, self.source)

    def of(self, flops: float, seconds: float) -> dict[str, float]:
        """Rate of a step and its share of the peak."""
        rate = flops / max(seconds, 1e-9)
        return {"flops_per_second": rate, "mfu": rate / self.peak}

    def about(self) -> dict[str, Any]:
        return {"peak_flops_per_second": self.peak, "peak_source": self.source}


def speed_of(world: World, mesh: "Mesh | None", precision: str) -> Speed:
    """Of whole models on processors, or of one spread over the devices of a mesh."""
    return Speed(world, precision, mesh.device if mesh is not None else torch.device("cpu"))


def step_flops(config: ModelConfig, batches: Sequence[Batch]) -> float:
    """Operations of training on the batches' documents: attention reaches half of its own document, not of the row."""
    total = 0.0
    for batch in batches:
        longest = int(batch.segments.max(initial=0)) + 1
        rows = np.arange(len(batch.segments))[:, None] * longest
        lengths = np.bincount((batch.segments + rows).ravel(), minlength=rows.size * longest)
        lengths = lengths.reshape(-1, longest)[:, 1:]
        tokens = int(lengths.sum())
        if tokens:
            # Linear in the context: the mean over tokens of their document's length counts all of them.
            context = float(np.square(lengths, dtype=np.float64).sum()) / tokens
            total += tokens * (flops_per_token(config, 0) + _per_context(config) * context)
    return total


def peak_flops(precision: str, device: torch.device) -> tuple[float, str]:
    """Operations a second of one rank's processor, and how that is known."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        row = table_row(name)
        if row is not None and precision in ("bfloat16", "float8"):
            known = ACCELERATORS[row]
            eight_bit = known.fp8_flops if precision == "float8" else None
            return eight_bit or known.bf16_flops, f"table: {row}"
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    return probed_flops(dtype, device), f"probe: {PROBE_SIZE[device.type]}-wide products"


def table_row(name: str) -> str | None:
    """The row of the accelerator table that a device's name means, such as h100 of `NVIDIA H100 80GB HBM3`."""
    plain = name.lower().replace(" ", "")
    return next((row for row in ACCELERATORS if row.split("-")[0] in plain), None)


def probed_flops(dtype: torch.dtype, device: torch.device) -> float:
    """The best rate of square products within a twentieth of a second, on this process's threads."""
    size = PROBE_SIZE[device.type]
    x, y = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def seconds() -> float:
        start = time.perf_counter()
        x @ y
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds()
    until = time.perf_counter() + PROBE_SECONDS
    best = seconds()
    while time.perf_counter() < until:
        best = min(best, seconds())
    return 2 * size**3 / best


def _per_context(config: ModelConfig) -> float:
    """What a token costs for each token of its context."""
    return flops_per_token(config, 1) - flops_per_token(config, 0)
