"""What test_infer_cuda_kernels.py runs in processes of its own: Triton decides at import whether it interprets.

Arguments: kernels TYPE, runner SHAPE, greedy SHAPE, float8 SHAPE, compile CAPABILITY, launch DEVICE or host SHAPE.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import engine_gpu_checks
from benchmarks.gpu_checks import Finding, small
from pensar.infer.cuda.cache import SlabCache
from pensar.infer.cuda.graphs import Outputs
from pensar.infer.cuda.runner import CudaRunner, _fault
from pensar.infer.cuda.work import TILE_ROWS, Work
from pensar.infer.step import StepBatch
from pensar.model.config import ModelConfig, replace
from pensar.model.qwen3 import Qwen3
from pensar.model.sizes import size

CPU = torch.device("cpu")
H100 = 132
"""Multiprocessors."""
WAITING = {"_local_scalar_dense", "bincount", "equal", "is_nonzero", "item", "masked_select", "nonzero"}
"""Operators whose result, or its size, Python has to wait for."""


def findings(what: str, which: str) -> Iterator[Finding]:
    from pensar.infer.cuda import kernels

    if what == "kernels":
        # No size is a power of two, nor a multiple of what a program takes.
        return engine_gpu_checks.kernels(CPU, getattr(torch, which), kernels, width=80, size=24)
    config = _shape(which)
    runner_of = functools.partial(CudaRunner, kernels=kernels, capture=taped)
    if what == "runner":
        return engine_gpu_checks.runners(CPU, config, torch.float32, runner_of, prompt=40)
    if what == "float8":
        small_runner = functools.partial(runner_of, weights="float8")
        return engine_gpu_checks.float8(CPU, config, torch.float32, small_runner)
    return iter([engine_gpu_checks.greedy(CPU, config, runner_of, prompt=20, new=6)])


def _shape(which: str) -> ModelConfig:
    config = replace(
        small(vocab_size=96),
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=96,
    )
    if which == "dense":
        return config
    return replace(config, num_experts=8, experts_per_token=2, moe_intermediate_size=32, intermediate_size=0)


# ---------------------------------------------------------------- what a CUDA graph would do


class Tape(TorchDispatchMode):
    """Keeps the calls of a function, kernels and torch's operators, with the tensors that they had.

    As on a GPU, what Python decided while it was recorded stays decided, and what it would have to wait for the device
    for is refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITING:
            raise _waits(func.name())
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._schema.is_mutable:
            self.calls.append(lambda: func(*args, **kwargs))
        elif not _storages(out) & _storages((args, kwargs)):  # views follow by themselves
            self.calls.append(lambda: _copied(out, func(*args, **kwargs)))
        return out


def taped(function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], object]]:
    """Records as a CUDA graph does; running it again knows nothing of the function."""
    from triton.runtime.interpreter import InterpretedFunction

    tape, launch = Tape(), InterpretedFunction.run

    def recorded(kernel: Any, *arguments: Any, **options: Any) -> None:
        """The interpreter's own work with a kernel's tensors is no part of the recording."""
        with torch._C._DisableTorchDispatch():
            launch(kernel, *arguments, **options)
        tape.calls.append(lambda: launch(kernel, *arguments, **options))

    def tolist(tensor: torch.Tensor) -> None:
        raise _waits("tolist")

    with (
        mock.patch.object(InterpretedFunction, "run", recorded),
        mock.patch.object(torch.Tensor, "tolist", tolist),
        tape,
    ):
        outputs = function()

    def replay() -> None:
        for call in tape.calls:
            call()

    return outputs, replay


def _waits(what: str) -> RuntimeError:
    return RuntimeError(f"{what} within a recording: a GPU would be waited for")


def _storages(values: Any) -> set[int]:
    tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor) and value.numel())
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _copied(kept: Any, new: Any) -> None:
    for into, values in zip(tree_leaves(kept), tree_leaves(new), strict=True):
        into.copy_(values)


def refused(which: str) -> str:
    """What a recording says of a pass that waits for its router's counts."""
    from types import SimpleNamespace

    from pensar.infer.cuda import kernels, twins

    waiting = SimpleNamespace(**{**vars(kernels), "grouped_product": twins.grouped_product})
    runner = CudaRunner(Qwen3(_shape(which)).eval(), kernels=waiting, capture=taped)  # type: ignore[arg-type]
    try:
        runner.run(StepBatch.of([([1], 0, [1]), ([2], 0, [2])]))
    except RuntimeError as error:
        return str(error)
    return ""


# ---------------------------------------------------------------- machine code for a GPU that is not there


def compiled(capability: int) -> Iterator[dict[str, Any]]:
    """Every launch of official shapes as it would be on such a GPU: what its machine code takes."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class Absent:
        """As much of a driver as compiling asks for."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

    found: list[tuple[str, Any]] = []
    launch = jit.JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = launch(kernel, *arguments, grid=grid, warmup=True, **options)
        found.append((kernel.__name__, made))
        return made

    driver.set_active(Absent())
    jit.JITFunction.run = compile_only
    from pensar.infer.cuda import attention

    attention._processors = lambda device: H100
    for name, dtype, num, float8 in (
        ("0.6b", torch.bfloat16, 1, False),
        ("0.6b", torch.bfloat16, 16, False),
        ("8b", torch.float16, 1, False),
        ("0.6b", torch.float32, 1, False),
        ("30b-a3b", torch.bfloat16, 1, False),
        ("30b-a3b", torch.bfloat16, 128, False),
        *(
            ((name, torch.bfloat16, num, True) for name, num in (("0.6b", 1), ("30b-a3b", 16)))
            if capability >= 89
            else ()
        ),
    ):
        _launch(replace(size(name), num_layers=1), dtype, num, float8)
        for kernel, made in found:
            yield {"kernel": kernel, "shape": f"{name} {dtype} x {num}", **_taken(made)}
        found.clear()


def _launch(config: ModelConfig, dtype: torch.dtype, num: int, float8: bool) -> None:
    """Each kernel once, over tensors that nothing reads."""
    from pensar.infer.cuda import kernels

    D, H, K, h = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    x, ints = torch.zeros(num, D, dtype=dtype), torch.zeros(num, dtype=torch.int32)
    kind = torch.float8_e4m3fn if float8 else dtype

    def matrix(*shape: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return torch.zeros(*shape, dtype=kind), torch.zeros(shape[:-1]) if float8 else None

    kernels.add_norm(x, x.clone(), x[0].clone(), 1e-6)
    cache = SlabCache(config, CPU, dtype)
    tile = max(1, TILE_ROWS[dtype.itemsize] * K // H)
    work = Work(
        ints, ints.clone(), torch.zeros(256, 2_560, dtype=torch.int32), ints.clone(), ints.clone(), tile
    )
    qkv = torch.zeros(num, (H + 2 * K) * h, dtype=dtype)
    kernels.heads(
        qkv, torch.zeros(2, h, dtype=dtype), torch.zeros(40_960, h, dtype=dtype), 1e-6, cache, 0, work
    )
    kernels.attention(torch.zeros(num, H, h, dtype=dtype), cache, 0, work)
    if float8:
        kernels.quantize(x)
    if config.num_experts:
        width, k = config.moe_intermediate_size, config.experts_per_token
        counts, source = torch.full((8,), num * k // 8), torch.zeros(num * k, dtype=torch.int64)
        kernels.grouped_product(x, source, counts, *matrix(8, 2 * width, D), gated=True)
        kernels.grouped_product(torch.zeros(num * k, width, dtype=dtype), None, counts, *matrix(8, D, width))
        return
    width = config.intermediate_size
    kernels.swiglu(torch.zeros(num, 2 * width, dtype=dtype))
    if num == 1:
        gain = x[0].clone()
        kernels.row_product(x, *matrix(qkv.shape[1], D), gain_D=gain, eps=1e-6)
        kernels.row_product(x, *matrix(2 * width, D), gain_D=gain, eps=1e-6, gated=True)
        kernels.row_product(torch.zeros(1, width, dtype=dtype), *matrix(D, width), stream_1O=x)


def _taken(made: Any) -> dict[str, Any]:
    """Bytes of memory beyond registers, of shared memory, and the widest loads from global memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert usage is not None
    ptx = made.asm["ptx"]
    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "shared": made.metadata.shared,
        "wide_copies": len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*0x10", ptx)),
        "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)),
        "tensor_units": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", ptx)),
    }


def main() -> None:
    torch.set_num_threads(1)
    what, which = sys.argv[1:]
    if what == "compile":
        rows = compiled(int(which))
    elif what == "launch":
        rows = iter([{"fault": _fault(torch.device(which))}])
    elif what == "host":
        rows = iter([{"refused": refused(which)}])
    else:
        rows = (one._asdict() for one in findings(what, which))
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
