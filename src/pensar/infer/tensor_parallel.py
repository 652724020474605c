"""TensorParallelRunner: a model that several ranks compute together, each with its part of the weights and the cache.

Rank 0 has the engine. What the engine asks of its runner is told to the other ranks, which do the same with their
parts until they are let go. All that they exchange is a sum after each attention and MLP, and the scores at the end.
Shape legend: S wanted tokens, V vocabulary, v rows of it on one rank, P pages, B bytes of a page.
"""

import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from pensar.base.errors import ConfigError, ModelError, RunError
from pensar.base.ranks import World
from pensar.infer.adapters import Adapter
from pensar.infer.request import Ints
from pensar.infer.sampling import weigh
from pensar.infer.split import Shares, Sums, opened, part_of, vocabulary_of
from pensar.infer.step import StepBatch, StepOutput, module_bytes
from pensar.infer.torch_runner import TorchRunner
from pensar.model.qwen3 import Qwen3

T = TypeVar("T")
SHORT = 2**14
"""Bytes of what is told in one message; longer words take a second one."""


def on_ranks(
    world: World,
    source: Path | Qwen3,
    lead: Callable[["TensorParallelRunner"], T],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> T | None:
    """`lead(runner)` on rank 0, whose steps the other ranks compute with it until it returns; None on those.

    Every rank makes the call. Each reads its part of a directory alone, or takes it from the model that it was given.
    On GPUs every rank takes that of its number (torchrun's LOCAL_RANK). Raises ConfigError for a number of ranks that
    cannot share the model, and RunError within seconds when a rank dies.
    """
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", world.rank)) % torch.cuda.device_count()
        )
        torch.cuda.set_device(place)
        world = _over_gpus(world)
    rank = _Rank(world, source, place, dtype)
    if world.rank:
        rank.follow()
        return None
    runner = TensorParallelRunner(rank)
    try:
        found = lead(runner)
    finally:
        runner.close()
    # Others that wait within a step can only be ended, which is for whoever started them to do.
    runner.check()
    return found


class TensorParallelRunner:
    """What rank 0's engine computes with. After a fault within a step the ranks do not fit together any more: whatever
    is asked for then raises RunError."""

    weigh = staticmethod(weigh)
    lazy_room = False

    def __init__(self, rank: "_Rank") -> None:
        self._rank, self.config, self.device = rank, rank.shares.config, rank.runner.device
        self.model = rank.runner.model
        """Rank 0's part, of which only `config` is the whole model's."""
        self._fault: str | None = None
        self._closed = False

    def reserve(self, num_pages: int) -> None:
        self._all("reserve", num_pages)

    def run(self, batch: StepBatch) -> StepOutput:
        output: StepOutput = self._all("run", batch)
        return output

    def copy_pages(self, sources: Ints, targets: Ints) -> None:
        self._all("copy_pages", sources, targets)

    def wipe_pages(self, pages: Ints) -> None:
        self._all("wipe_pages", pages)

    def read_pages(self, pages: Ints) -> Tensor:
        """The parts of all ranks, one behind the other in each page."""
        bytes_PB: Tensor = self._all("read_pages", pages)
        return bytes_PB

    def write_pages(self, pages: Ints, bytes_PB: Tensor) -> None:
        self._all("write_pages", pages, bytes_PB)

    def load(self, weights: Mapping[str, Tensor] | Qwen3) -> None:
        """Whole weights, one of which is on the way at a time; every rank takes its part of each."""
        if weights is self.model:  # what every rank has already
            return
        new = dict(weights.named_parameters()) if isinstance(weights, Qwen3) else weights
        self._rank.check(new)
        self._rank.offered = new
        try:
            self._all("load")
        finally:
            self._rank.offered = {}

    def set_adapter(self, number: int, adapter: Adapter | None) -> None:
        raise ConfigError(
            f"adapter number {number} for a model on {self._rank.world.size} ranks: tensor parallel takes no adapters; "
            "merge it into the weights, or serve the model with one rank"
        )

    def page_bytes(self) -> int:
        """On the ranks that share a memory: all of them on CPUs, one on GPUs."""
        return self._rank.runner.page_bytes() * self._rank.num_sharing

    def weight_bytes(self) -> int:
        return self._rank.weight_bytes

    def step_bytes(self, tokens: int, texts: int) -> int:
        return self._rank.runner.step_bytes(tokens, texts) * self._rank.num_sharing

    def close(self) -> None:
        """Lets the other ranks go, unless they do not hear any more."""
        if self._fault is None and not self._closed:
            self._all("stop")
            self._closed = True

    def check(self) -> None:
        """Raises RunError where the ranks do not fit together any more."""
        if self._fault is not None:
            raise RunError(f"the ranks of this engine have ended ({self._fault}); start it again")

    def _all(self, name: str, *arguments: Any) -> Any:
        """The same call on every rank; what rank 0's gives."""
        self.check()
        assert not self._closed, "a runner that was closed is asked for something"
        try:
            return self._rank.tell(name, *arguments)
        except Exception as error:
            # Others may be in the middle of a sum that this rank has left: no word would be understood.
            self._fault = str(error).split("\n", 1)[0] or type(error).__name__
            raise RunError(
                f"a step on {self._rank.world.size} ranks failed on rank 0, as it does when another rank has died: "
                f"{self._fault}; start the engine again"
            ) from error
        except BaseException:
            self._fault = "it was interrupted within a step"
            raise


class _Rank:
    """One rank's part, and what it does on its own; the same on all ranks."""

    def __init__(
        self, world: World, source: Path | Qwen3, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self.world = world
        self._sums = Sums(world)
        with opened(source) as (config, read):
            self.shares = Shares(config, world.rank, world.size)
            part = part_of(self.shares, self._sums, read, device, dtype)
        self.runner = TorchRunner(part)
        part.config = config  # the runner keeps the part's
        self.num_sharing = world.size if device.type == "cpu" else 1
        parts = world.gather(module_bytes(part))
        self.weight_bytes = sum(parts) if device.type == "cpu" else parts[world.rank]
        self.offered: Mapping[str, Tensor] = {}
        """New weights, on rank 0."""

    # ------------------------------------------------------------ words

    def tell(self, name: str, *arguments: Any) -> Any:
        """Rank 0's: has all ranks do something."""
        # Bytes of pages are not for words: they go as they are.
        self._words((name, arguments[:1] if name == "write_pages" else arguments))
        return self._do(name, arguments)

    def follow(self) -> None:
        """The other ranks': does what is told until it is `stop`."""
        while True:
            name, arguments = self._words(None)
            self._do(name, arguments)
            if name == "stop":
                return

    def _do(self, name: str, arguments: tuple[Any, ...]) -> Any:
        does: dict[str, Callable[..., Any]] = {
            "reserve": self.runner.reserve,
            "run": self._run,
            "copy_pages": self.runner.copy_pages,
            "wipe_pages": self.runner.wipe_pages,
            "read_pages": self._read_pages,
            "write_pages": self._write_pages,
            "load": self._load,
            "stop": lambda: None,
        }
        return does[name](*arguments)

    def _words(self, words: tuple[str, tuple[Any, ...]] | None) -> tuple[str, tuple[Any, ...]]:
        """What rank 0 says, on every rank: a length and what goes beside it into one message of fixed size."""
        if self.world.size == 1:
            assert words is not None
            return words
        first = torch.zeros(8 + SHORT, dtype=torch.uint8)
        rest = torch.zeros(0, dtype=torch.uint8)
        if words is not None:
            data = pickle.dumps(words)
            first[:8] = torch.frombuffer(bytearray(len(data).to_bytes(8, "little")), dtype=torch.uint8)
            said = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            first[8 : 8 + len(data)] = said[:SHORT]
            rest = said[SHORT:]
        self.world.group.broadcast(first, 0).wait()
        if words is None:
            length = int.from_bytes(first[:8].numpy().tobytes(), "little")
            rest = torch.zeros(max(0, length - SHORT), dtype=torch.uint8)
        if len(rest):
            self.world.group.broadcast(rest, 0).wait()
        if words is not None:
            return words
        found: tuple[str, tuple[Any, ...]] = pickle.loads(torch.cat((first[8:], rest)).numpy().tobytes())
        return found

    # ------------------------------------------------------------ deeds

    def _run(self, batch: StepBatch) -> StepOutput:
        with self._sums.together():
            part = self.runner.run(batch)
        logits_SV = self._whole(part.logits_SV)
        if part.logits_SV.is_cuda:
            # A dead rank leaves the others' GPUs waiting; it does not leave a processor waiting.
            if self.world.rank:
                torch.cuda.current_stream().synchronize()
            self.world.all_reduce_(torch.zeros(1))
        return StepOutput(logits_SV, part.hidden_SD)

    def _whole(self, logits_Sv: Tensor) -> Tensor:
        """The scores of all ranks on rank 0; whatever on the others."""
        world = self.world
        sizes = vocabulary_of(self.shares.config, world.size)
        padded = F.pad(logits_Sv, (0, max(sizes) - logits_Sv.shape[1])).contiguous()
        parts = self._gathered(padded)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=False)], 1)

    def _read_pages(self, pages: Ints) -> Tensor:
        return torch.cat(self._gathered(self.runner.read_pages(pages).contiguous()), 1)

    def _write_pages(self, pages: Ints, bytes_PB: Tensor | None = None) -> None:
        own = self.runner.page_bytes()
        if bytes_PB is None:
            bytes_PB = torch.zeros(len(pages), own * self.world.size, dtype=torch.uint8)
        bytes_PB = bytes_PB.contiguous()
        if self.world.size > 1:
            self.world.group.broadcast(bytes_PB, 0).wait()
        first = own * self.world.rank
        self.runner.write_pages(pages, bytes_PB[:, first : first + own].contiguous())

    def _gathered(self, part: Tensor) -> list[Tensor]:
        """The ranks' tensors, of one shape, on rank 0; its own alone on another."""
        if self.world.size == 1:
            return [part]
        parts = [torch.empty_like(part) for _ in range(self.world.size)] if self.world.rank == 0 else []
        self.world.group.gather(parts, part, 0).wait()
        return parts or [part]

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """ModelError where names or shapes are not those of the whole model."""
        own = {name for name, _ in self.runner.model.named_parameters()}
        if weights.keys() != own:
            odd = sorted(weights.keys() ^ own)
            raise ModelError(f"the new weights differ from the model in {len(odd)} names, such as {odd[0]}")
        for name in own:
            if tuple(weights[name].shape) != self.shares.shape(name):
                raise ModelError(
                    f"{name} has shape {list(weights[name].shape)} in the new weights and "
                    f"{list(self.shares.shape(name))} in the model; an engine keeps one shape, make a new one"
                )

    @torch.no_grad()
    def _load(self) -> None:
        for name, parameter in self.runner.model.named_parameters():
            if self.offered:
                whole = self.offered[name].detach().to(parameter.device, parameter.dtype).contiguous()
            else:
                whole = torch.empty(self.shares.shape(name), dtype=parameter.dtype, device=parameter.device)
            if self.world.size > 1:
                self.world.group.broadcast(whole, 0).wait()
            parameter.copy_(whole[self.shares.window(name)])


def _over_gpus(world: World) -> World:
    """The same ranks over NCCL for what is on GPUs; gloo, which copies it to the host, where ranks share one."""
    if dist.is_initialized() or world.size == 1 or torch.cuda.device_count() < world.size:
        return world
    with tempfile.TemporaryDirectory(prefix="pensar-gpus-") as folder:
        path = world.broadcast(f"{folder}/store")
        store = dist.FileStore(path, world.size)  # type: ignore[attr-defined]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=world.rank, world_size=world.size)
        joined = World(world.rank, world.size, dist.group.WORLD)
        joined.all_reduce_(torch.ones(1, device="cuda"))
        torch.cuda.synchronize()
        world.barrier()
    return joined
