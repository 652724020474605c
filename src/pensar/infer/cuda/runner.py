"""CudaRunner: a model on an NVIDIA GPU by fused kernels, small batches by CUDA graphs.

Rows of a few tokens each, which is what decoding and verifying guesses take, run as a recorded graph; batches with
chunks of prompts, and rows with adapters, launch the same kernels one by one. Sums have one order for a size of batch;
products of the library may round otherwise at another size.
"""

import importlib.util
import subprocess
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pensar.base.errors import ConfigError
from pensar.infer.adapters import Adapter
from pensar.infer.cuda import graphs
from pensar.infer.cuda.cache import SlabCache
from pensar.infer.cuda.changes import Changes
from pensar.infer.cuda.forward import Forward
from pensar.infer.cuda.graphs import BUCKETS, Capture, CudaCapture, Graphs
from pensar.infer.cuda.weights import Kind, Weights
from pensar.infer.cuda.work import TILE_ROWS, on_device, work_of
from pensar.infer.request import Ints
from pensar.infer.sampling import weigh
from pensar.infer.step import PAGE, StepBatch, StepOutput, module_bytes, run_apart
from pensar.infer.sync import replace_weights
from pensar.model import hardware
from pensar.model.qwen3 import Qwen3

TYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST_HEAD = 256
"""What a program's share of fast memory holds of keys and values."""


class CudaRunner:
    """The weights are the module's own: a trainer that changes them in place changes the runner's, float8 apart."""

    weigh = staticmethod(weigh)
    lazy_room = False

    def __init__(
        self,
        model: Qwen3,
        weights: Kind = "as_is",
        *,
        kernels: ModuleType | None = None,
        capture: Capture | None = None,
    ) -> None:
        """`kernels`: what has the functions of `twins.py`, by default Triton's; `capture`: how passes are recorded, by
        default CUDA graphs on a GPU, and not at all elsewhere.

        Raises ConfigError for float8 where the device or the model's sizes do not allow it.
        """
        embedding = model.model.embed_tokens.weight
        self.model, self.config, self.device = model, model.config, embedding.device
        if weights == "float8":
            _check_float8(embedding)
        self._weights = Weights(model, weights)
        self.cache = SlabCache(self.config, self.device, embedding.dtype)
        self._changes = Changes(model)
        with torch.no_grad():
            positions = torch.arange(self.config.max_positions, device=self.device)[None]
            cosine, sine = (table[0, :, 0].chunk(2, -1)[0] for table in model.rope_tables(positions))
        angles_Lh = torch.cat((cosine, sine), -1).to(embedding.dtype)
        self._forward = Forward(
            self.config, self._weights, self.cache, angles_Lh, _triton() if kernels is None else kernels
        )
        if capture is None and self.device.type == "cuda":
            capture = CudaCapture()
        queries = TILE_ROWS[embedding.element_size()] * self.config.num_kv_heads
        self._tile_tokens = max(1, queries // self.config.num_heads)
        self._graphs = None
        if capture is not None:
            pages = -(-self.config.max_positions // PAGE)
            self._graphs = Graphs(self._forward, capture, pages, self.device)

    def reserve(self, num_pages: int) -> None:
        self.cache.reserve(num_pages)

    def run(self, batch: StepBatch) -> StepOutput:
        numbers = batch.adapters_R
        with torch.inference_mode(), _on(self.device):
            if numbers is not None and self._changes.alone(numbers):
                return run_apart(batch, numbers, lambda part, _: self._run(part))
            return self._run(batch)

    def warm_up(self, num_rows: int) -> None:
        """Records the graphs for up to so many tokens at once, which would otherwise hold up the first such batches."""
        if self._graphs is not None:
            with torch.inference_mode(), _on(self.device):
                self._graphs.warm_up(min(num_rows, BUCKETS[-1]))

    def copy_pages(self, sources: Ints, targets: Ints) -> None:
        self.cache.copy_pages(sources, targets)

    def wipe_pages(self, pages: Ints) -> None:
        self.cache.wipe_pages(pages)

    def read_pages(self, pages: Ints) -> Tensor:
        return self.cache.read_pages(pages)

    def write_pages(self, pages: Ints, bytes_PB: Tensor) -> None:
        self.cache.write_pages(pages, bytes_PB)

    def load(self, weights: Mapping[str, Tensor] | Qwen3) -> None:
        replace_weights(self.model, weights)
        if self._weights.refresh() and self._graphs is not None:
            self._graphs.forget()

    def set_adapter(self, number: int, adapter: Adapter | None) -> None:
        self._changes.set(number, adapter)

    def page_bytes(self) -> int:
        return self.cache.page_bytes()

    def weight_bytes(self) -> int:
        return module_bytes(self.model) + self._weights.bytes()

    def step_bytes(self, tokens: int, texts: int) -> int:
        """Of the layer that is being computed, and the scores of all graphs; attention reads the pages where they lie:
        `texts` takes nothing."""
        config, size = self.config, self._weights.embedding.element_size()
        attended = config.num_heads * config.head_dim
        qkv = attended + 2 * config.num_kv_heads * config.head_dim
        width = config.intermediate_size
        if config.num_experts:
            width = (config.moe_intermediate_size + config.hidden_size) * config.experts_per_token
        # The stream, what is added to it and its normalised copy; then the widest products.
        values = 3 * config.hidden_size + max(qkv + 2 * attended, 3 * width)
        recorded = 0 if self._graphs is None else sum(BUCKETS) * config.vocab_size
        return int(size * (tokens * values + recorded))

    def _run(self, batch: StepBatch) -> StepOutput:
        changed = None
        if batch.adapters_R is not None:
            changed = self._changes.over(batch.adapters_R, np.diff(batch.starts), self.device)
        if self._graphs is not None and changed is None and graphs.fits(batch):
            return self._graphs.run(batch)
        tokens_N, work = work_of(batch, self._tile_tokens, self.device)
        whole = len(batch.wanted_S) == len(batch.tokens_N)
        wanted_S = None if whole else on_device(batch.wanted_S, self.device)
        logits_SV, hidden_SD = self._forward(tokens_N, work, wanted_S, changed)
        return StepOutput(logits_SV.float(), hidden_SD)


def unfit(model: Qwen3) -> str:
    """Why a model cannot be computed by these kernels; empty where it can."""
    weight = model.model.embed_tokens.weight
    types = {parameter.dtype for parameter in model.parameters()}
    if weight.device.type != "cuda":
        return f"weights are on {weight.device}, these kernels are for CUDA"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if hardware.capability(weight.device) < hardware.AMPERE:
        return f"{torch.cuda.get_device_name(weight.device)} is older than compute capability 8.0"
    if len(types) > 1 or weight.dtype not in TYPES:
        return f"weights are {sorted(map(str, types))}, these kernels take one of {[str(kind) for kind in TYPES]}"
    if model.config.head_dim > WIDEST_HEAD:
        return f"head_dim is {model.config.head_dim}, these kernels take up to {WIDEST_HEAD}"
    return _fault(weight.device)


def _fault(device: torch.device) -> str:
    """Why Triton launches nothing on a device, the lack of a C compiler for instance; empty where it does."""
    try:
        kernels = _triton()
        with _on(device):
            kernels.swiglu(torch.ones(1, 32, device=device))
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        return f"triton launches no kernel here: {error}"
    return ""


def _check_float8(embedding: Tensor) -> None:
    if embedding.device.type != "cuda":
        return
    if hardware.capability(embedding.device) < hardware.ADA:
        name = torch.cuda.get_device_name(embedding.device)
        raise ConfigError(
            f"weights=float8 needs compute capability 8.9, {name} has less; leave weights at as_is"
        )


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the model's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _triton() -> ModuleType:
    """Needs Triton from here on."""
    from pensar.infer.cuda import kernels

    return kernels
