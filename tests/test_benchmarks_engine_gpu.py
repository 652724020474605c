"""The engine's benchmark for a GPU on a processor with a tiny shape: it runs to its end, and finds what is wrong."""

import dataclasses
import json
import types
from typing import Any

import pytest
import torch

from benchmarks import engine_gpu, engine_gpu_checks
from benchmarks.engine_gpu_work import Load, gpu_work, served, small_work, step_seconds
from pensar.infer.cuda import twins
from pensar.infer.engine import Engine
from pensar.infer.torch_runner import TorchRunner
from pensar.model.config import replace
from pensar.model.qwen3 import Qwen3, initialize
from pensar.model.sizes import size

CPU = torch.device("cpu")
WORK = small_work()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def changed(**functions: Any) -> Any:
    """The twins with some of them replaced."""
    return types.SimpleNamespace(**{**vars(twins), **functions})


def wrong(kernels: Any) -> set[str]:
    found = engine_gpu_checks.kernels(CPU, torch.float32, kernels, width=48, size=16)
    return {finding.name for finding in found if not finding.error <= finding.allowed}


def test_without_a_gpu_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["engine_gpu"])
    assert engine_gpu.main() == 0
    [line] = lines(capsys)
    assert "no CUDA device" in line["reason"]
    assert {"metric", "machine", "date", "triton"} <= line.keys()


def test_every_part_runs_to_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["engine_gpu", "--device", "cpu"])
    assert engine_gpu.main() == 0
    found = {line["metric"]: line for line in lines(capsys)}
    assert not [line for line in found.values() if "broke" in line.get("reason", "")]
    measured = {
        *(f"{name}batch_{batch}_tokens_per_second" for name in ("", "float8_") for batch in (1, 2)),
        "load_tokens_per_second",
        "load_time_to_first_token",
        "load_inter_token_latency_p99",
        "speculation_batch_1",
    }
    assert all(found[name]["ours"] > 0 for name in measured)
    assert all(line["reached"] for name, line in found.items() if name not in measured)
    assert {
        "attention_float16_error",
        "sparse_runner_guesses_float32_error",
        "greedy_tokens_error",
    } <= found.keys()
    assert found["batch_1_tokens_per_second"]["target"] == {"tokens_per_second": 1_000, "ratio": 20.0}


def test_twins_pass_and_kernels_that_are_wrong_are_found() -> None:
    assert wrong(twins) == set()

    def late(*arguments: Any) -> torch.Tensor:
        """Looks a token too far."""
        q, cache, layer, work = arguments
        further = types.SimpleNamespace(
            positions_N=work.positions_N + (work.positions_N > 0), row_N=work.row_N, pages_RP=work.pages_RP
        )
        return twins.attention(q, cache, layer, further)

    def in_order(x: Any, source: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        """Takes rows as they lie."""
        ordered = None if source is None else torch.arange(len(source)) // 2
        return twins.grouped_product(x, ordered, *arguments, **options)

    assert wrong(changed(attention=late)) == {"attention_float32"}
    assert wrong(changed(swiglu=lambda x: twins.swiglu(x.flip(-1)))) == {"swiglu_float32"}
    assert {name.split("_")[0] for name in wrong(changed(grouped_product=in_order))} == {"experts"}
    eps = changed(add_norm=lambda x, stream, gain, eps: twins.add_norm(x, stream, gain, 1e-2))
    assert wrong(eps) == {"norm_float32", "add_norm_float32"}


def test_a_load_is_served_to_its_end() -> None:
    model = Qwen3(WORK.config).eval()
    initialize(model, 0)
    engine = Engine(TorchRunner(model), slots=2)
    found = served(engine, Load(num=5, least=2, most=6, slots=2), WORK.config)
    assert 10 <= found.tokens <= 30
    assert 0 < found.first_p50 <= found.first_p99 <= found.seconds
    assert 0 < found.gap_p50 <= found.gap_p99
    assert step_seconds(engine.runner, 2, 17, 3) > 0


def test_the_limit_is_the_bandwidth_over_what_a_step_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    work = gpu_work(size("0.6b"), quick=True)
    assert engine_gpu._limit(work, "as_is", 1, 0) == pytest.approx(4_030, rel=0.002)
    head = 151_936 * 1_024
    blocks = 28 * (1_024 * (4_096 + 2_048 + 3 * 3_072) + 2 * 1_024 + 2 * 128) + 1_024
    cached = 64 * 1_000 * 114_688
    assert engine_gpu._limit(work, "float8", 64, 1_000) == pytest.approx(
        64 * 4.8e12 / (blocks + 2 * head + cached), rel=1e-6
    )
    untied = dataclasses.replace(work, config=replace(size("0.6b"), tied=False))
    assert engine_gpu._limit(untied, "as_is", 1, 0) == engine_gpu._limit(work, "as_is", 1, 0)
    assert engine_gpu._limit(WORK, "as_is", 1, 0) is None
