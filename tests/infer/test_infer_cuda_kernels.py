"""The Triton kernels: interpreted on a CPU against their twins and torch's model, and compiled for GPUs not there."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "triton", minversion="3.7", reason="kernels for GPUs are in Triton; 3.6 cannot interpret with NumPy 2.4"
)

DENSE = {
    "norm", "add_norm", "swiglu", "row_product_plain", "row_product_normed", "row_product_gated", "row_product_added",
    "row_product_float8", "row_product_float8_gated", "quantize", "heads",
}  # fmt: skip
DOTS = {
    "attention",
    *(f"experts_{num}{kind}" for num in ("few", "many") for kind in ("", "_float8", "_back")),
}
"""Kernels with products of matrices; the interpreter has none in bfloat16."""
STACK = 128
"""Bytes of a thread's memory that are no spill worth naming."""
SHARED = 99 * 1_024
"""Bytes that a program may have on the GPUs with the least of it (compute capability 8.6 and 8.9)."""


Lines = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def lines_of(tmp_path: Path) -> Lines:
    return partial(_lines_of, tmp_path)


def _lines_of(cache: Path, *arguments: str, interpret: bool) -> list[dict[str, Any]]:
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_INTERPRET": "1" if interpret else "0",
    }
    command = [sys.executable, "-m", "tests.infer.cuda_kernels_work", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_right(found: list[dict[str, Any]]) -> None:
    wrong = [one for one in found if not one["error"] <= one["allowed"]]
    assert not wrong


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param("float16", marks=pytest.mark.slow),
        pytest.param("bfloat16", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_computes_what_its_twin_computes_in_float64(lines_of, dtype):
    found = lines_of("kernels", dtype, interpret=True)
    expected = DENSE if dtype == "bfloat16" else DENSE | DOTS
    assert {one["name"] for one in found} == {f"{name}_{dtype}" for name in expected}
    assert_right(found)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["dense", "mixture"])
@pytest.mark.parametrize("what", ["runner", "greedy", "float8"])
def test_a_model_by_recorded_kernels_is_the_model(lines_of, what, shape):
    found = lines_of(what, shape, interpret=True)
    assert len(found) == {"runner": 7, "greedy": 1, "float8": 2}[what]
    assert_right(found)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "89", "90"])
def test_kernels_compile_into_wide_loads_without_spills(lines_of, capability):
    found = lines_of("compile", capability, interpret=False)
    kernels = {"_add_norm", "_heads", "_attend", "_merge", "_swiglu", "_row_product", "_grouped"}
    assert {row["kernel"] for row in found} == kernels | ({"_quantize"} if int(capability) >= 89 else set())
    for row in found:
        assert row["stack"] <= STACK, row
        assert row["shared"] <= SHARED, row
        half = "float32" not in row["shape"]
        if row["kernel"] in ("_attend", "_grouped") and half:
            assert row["tensor_units"], row
            assert row["wide_copies"], row
        if row["kernel"] == "_row_product":
            assert row["wide_loads"], row


def test_where_triton_launches_nothing_the_reason_is_said(lines_of):
    [found] = lines_of("launch", "cpu", interpret=False)
    assert found["fault"].startswith("triton launches no kernel here: ")
    [found] = lines_of("launch", "cpu", interpret=True)
    assert found["fault"] == ""


def test_a_recording_that_would_wait_for_the_gpu_is_refused(lines_of):
    """The check that the tests above rest on: their tape keeps calls as a CUDA graph keeps them."""
    [found] = lines_of("host", "mixture", interpret=True)
    assert "a GPU would be waited for" in found["refused"]
    [found] = lines_of("host", "dense", interpret=True)
    assert found["refused"] == ""
