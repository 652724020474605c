"""Recorder: the bytes that tensors hold and that ranks exchange while a training step runs, operation by operation.

It works on real tensors and on fake ones alike. What kernels take inside an operation is not seen.
"""
# ruff: noqa: SLF001 - storages and operators are known by nothing else, nor the memory that FSDP keeps

import itertools
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from pensar.train.parallel.parts import local_of

GATHERED = ("fsdp::all_gather_copy_in", "fsdp::split_with_sizes_copy")
"""How FSDP fills the buffer of a gather and cuts the weights out of it."""
UNSUMMED = "fsdp::chunk_cat"
"""How FSDP takes the gradients of a block into the buffer that is summed and scattered."""
SCATTERED = "c10d::_reduce_scatter_base_"
COLLECTIVES = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "all_to_all_single": "all-to-all",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "send": "send",
    "recv_": "receive",
}
"""Operators of c10d and of its functional form; waiting and barriers move nothing."""


class Exchange(NamedTuple):
    """The collectives of one kind over one dimension of the mesh."""

    kind: str
    dimension: str
    ranks: int
    calls: float
    num_bytes: float
    """All calls together: results of gathers, inputs of scatters, sums and exchanges."""


class Recorder(TorchDispatchMode):
    """Records while it is entered; tensors that were there before must be claimed.

    `moment` is what the caller says a step is doing: the most memory is known for each. `vocab_sizes` are the widths of
    logits, `dimensions` the names of process groups.
    """

    def __init__(self, vocab_sizes: Iterable[int] = (), dimensions: dict[str, str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moment = "start"
        self._vocab_sizes = frozenset(vocab_sizes)
        self._dimensions = dimensions or {}
        self._numbers = itertools.count()
        self._alive: dict[int, int] = {}
        """Storages by their address -> number."""
        self._bytes: dict[int, int] = {}
        """Of each storage alive, by number."""
        self._gathered: dict[int, weakref.ref[Any]] = {}
        self._part: dict[int, str] = {}
        self._events: list[tuple[str, int, int]] = []
        """In which moment which storage grew or shrank, and by how much."""
        self._calls: Counter[tuple[str, str, int]] = Counter()
        self._moved: Counter[tuple[str, str, int]] = Counter()

    def claim(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """Says what tensors are, whatever they were taken for before."""
        for tensor in tensors:
            if tensor is not None:
                self._part[self._see(local_of(tensor))] = part

    def watch(self, model: nn.Module) -> None:
        """Follows the memory of gathered weights, which FSDP makes in a first pass and then empties and fills again."""
        for module in model.modules():
            state = module._get_fsdp_state() if isinstance(module, FSDPModule) else None
            for group in state._fsdp_param_groups if state is not None else ():
                for tensor in itertools.chain(*(part.all_gather_outputs for part in group.fsdp_params)):
                    self.claim([tensor], "gathered")
                    self._gathered[self._see(tensor)] = weakref.ref(tensor.untyped_storage())

    def begin(self) -> None:
        """Forgets all but what is in memory now."""
        self._resize()
        self._events = [("start", number, size) for number, size in self._bytes.items()]
        self._calls.clear()
        self._moved.clear()

    def peaks(self) -> dict[str, dict[str, int]]:
        """The bytes of each part when they were most together, for each moment."""
        found: dict[str, tuple[int, dict[str, int]]] = {}
        now: Counter[str] = Counter()
        total = 0
        for moment, number, change in self._events:
            now[self._part.get(number, "activations")] += change
            total += change
            if total >= found.get(moment, (0, {}))[0]:
                found[moment] = total, dict(+now)
        return {moment: parts for moment, (_, parts) in found.items()}

    def exchanges(self) -> list[Exchange]:
        return [Exchange(*key, self._calls[key], moved) for key, moved in sorted(self._moved.items())]

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = _tensors((args, kwargs))
        if any(is_traceable_wrapper_subclass(tensor) for tensor in given):
            return NotImplemented  # it comes again with the tensors inside
        out = op(*args, **kwargs or {})
        results = _tensors(out)
        self._resize()
        for tensor in results:
            new = tensor.untyped_storage()._cdata not in self._alive
            number = self._see(tensor)
            if new and tensor.dim() == 2 and tensor.shape[1] in self._vocab_sizes:
                self._part.setdefault(number, "logits")
        self._name(op.name(), given, results)
        if op.namespace in ("c10d", "_c10d_functional"):
            self._count(op, args, given, results)
        return out

    def _name(self, name: str, given: list[Tensor], results: list[Tensor]) -> None:
        if name in GATHERED:
            for tensor in (*given, *results):
                self._part.setdefault(self._see(tensor), "gathered")
        elif name == UNSUMMED:
            self.claim(given[:-1], "gradients")
            self.claim(given[-1:], "buffers")
        elif name == SCATTERED:
            self.claim(given[:1], "gradients")

    def _count(self, op: Any, args: tuple[Any, ...], given: list[Tensor], results: list[Tensor]) -> None:
        kind = COLLECTIVES.get(op._opname)
        if kind is None:
            return
        name, ranks = _group(args)
        if ranks == 1:
            return
        if op.namespace == "_c10d_functional":
            moved = results if kind == "all-gather" else given[:1]
        elif kind in ("reduce-scatter", "all-to-all"):
            moved = given[1:]
        else:
            moved = given[:-1] if kind == "all-gather" else given
        key = kind, self._dimensions.get(name, name), ranks
        self._calls[key] += 1
        self._moved[key] += sum(tensor.numel() * tensor.element_size() for tensor in moved)

    def _see(self, tensor: Tensor) -> int:
        """The number of its storage."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        number = self._alive.get(key)
        if number is None:
            number = self._alive[key] = next(self._numbers)
            weakref.finalize(storage, self._gone, key)
            self._change(number, storage.nbytes())
        return number

    def _resize(self) -> None:
        """FSDP keeps the storages of gathered weights and empties them."""
        for number, held in self._gathered.items():
            storage = held()
            if storage is not None:
                self._change(number, storage.nbytes())

    def _gone(self, key: int) -> None:
        number = self._alive.pop(key)
        self._change(number, 0)
        del self._bytes[number]
        self._gathered.pop(number, None)

    def _change(self, number: int, size: int) -> None:
        change = size - self._bytes.get(number, 0)
        self._bytes[number] = size
        if change:
            self._events.append((self.moment, number, change))


def _group(args: tuple[Any, ...]) -> tuple[str, int]:
    """Name and size of the group that a collective's arguments name or hold."""
    for arg in reversed(args):
        if isinstance(arg, str):
            return arg, c10d._resolve_process_group(arg).size()  # type: ignore[attr-defined, arg-type]
    held = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
    group = ProcessGroup.unbox(held)
    return str(group.group_name), group.size()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
