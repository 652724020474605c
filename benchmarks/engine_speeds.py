"""Decoding and prompts: our engine, transformers, llama.cpp and OpenVINO GenAI on the same weights, turn by turn."""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import engine_ours
from benchmarks.engine_work import (
    BATCHES,
    DECODED,
    GGUF_KINDS,
    PROMPT,
    Contender,
    Peer,
    decode_limit,
    directory,
    gguf_files,
    llama_cpp_peer,
    median_ratio,
    openvino_peer,
    our_contender,
    prefill_limit,
    prompts_of,
    running,
    transformers_peer,
)
from benchmarks.pretrain_steps import line

Line = dict[str, Any]
UNIT = "tokens per CPU-second"
REPEATS = {1: 3, 16: 1}
"""How often a round asks at each batch size; a single text is soon done."""

Seconds = dict[tuple[str, str], list[float]]
"""(contender, what) -> CPU-seconds in every round; what is prefill, decode_1 or decode_16."""


class Row(NamedTuple):
    """A line of output: which of our types against which peers, the fastest of them counting."""

    metric: str
    kind: str
    peers: tuple[str, ...]
    what: str
    target: float | None


ROWS = (
    Row("decode_batch_1_vs_transformers", "int8", ("transformers",), "decode_1", 4.0),
    Row("decode_batch_1_vs_llama_cpp_q8", "int8", ("llama.cpp q8_0",), "decode_1", 1.0),
    Row("decode_batch_1_vs_llama_cpp_q4", "int4", ("llama.cpp q4_0",), "decode_1", 1.0),
    Row("decode_batch_1_vs_llama_cpp_f16", "bfloat16", ("llama.cpp f16",), "decode_1", 1.0),
    Row("decode_batch_1_vs_openvino_q8", "int8", ("openvino q8_0",), "decode_1", None),
    Row("decode_batch_1_vs_openvino_q4", "int4", ("openvino q4_0",), "decode_1", None),
    Row("decode_batch_1_float32_vs_transformers", "float32", ("transformers",), "decode_1", None),
    Row("decode_batch_16_vs_transformers", "int8", ("transformers",), "decode_16", 4.0),
    Row(
        "decode_batch_16_vs_openvino",
        "int8",
        tuple(f"openvino {kind}" for kind in GGUF_KINDS),
        "decode_16",
        1.0,
    ),
    Row(
        "decode_batch_16_vs_llama_cpp",
        "int8",
        tuple(f"llama.cpp {kind}" for kind in GGUF_KINDS),
        "decode_16",
        None,
    ),
    Row("decode_batch_16_float32_vs_transformers", "float32", ("transformers",), "decode_16", None),
    Row("prefill_vs_transformers", "int8", ("transformers",), "prefill", 2.0),
    Row("prefill_vs_openvino", "int8", tuple(f"openvino {kind}" for kind in GGUF_KINDS), "prefill", None),
    Row("prefill_vs_llama_cpp", "int8", tuple(f"llama.cpp {kind}" for kind in GGUF_KINDS), "prefill", None),
    Row("prefill_float32_vs_transformers", "float32", ("transformers",), "prefill", None),
)


def speeds(quick: bool, openvino: str) -> Iterator[Line]:
    """All of ROWS from the same rounds; `openvino` is the interpreter that may have OpenVINO GenAI."""
    with tempfile.TemporaryDirectory() as folder:
        source = directory(Path(folder) / "model")
        files = gguf_files(source, Path(folder))
        peers = {"transformers": transformers_peer(source)}
        peers |= {f"llama.cpp {kind}": llama_cpp_peer(path, kind) for kind, path in files.items()}
        peers |= {f"openvino {kind}": openvino_peer(path, kind, openvino) for kind, path in files.items()}
        kinds = engine_ours.kinds()
        if len(kinds) > 1:
            kinds += ("bfloat16",)
        starts: dict[str, Callable[[], Contender]] = {
            kind: partial(our_contender, source, kind) for kind in kinds
        }
        starts |= {name: peer.start for name, peer in peers.items() if peer.start is not None}
        with running(starts) as contenders:
            seconds = measured(contenders, rounds=2 if quick else 7)
            threads = {name: contender.threads for name, contender in contenders.items()}
    for row in ROWS:
        if row.kind in kinds or row.target is not None:
            yield from _line(row, kinds, peers, seconds, threads)


def measured(contenders: Mapping[str, Contender], rounds: int) -> Seconds:
    """Every contender in every round, after one that does not count."""
    seconds: Seconds = {}
    for number in range(rounds + 1):
        for batch in BATCHES:
            for name, contender in contenders.items():
                first, whole = (
                    sum(
                        contender.ask(prompts_of(100 * number + 10 * repeat + new, batch), new)
                        for repeat in range(REPEATS[batch])
                    )
                    for new in (1, 1 + DECODED)
                )
                if not number:
                    continue
                seconds.setdefault((name, f"decode_{batch}"), []).append((whole - first) / REPEATS[batch])
                if batch == 1:
                    seconds.setdefault((name, "prefill"), []).append(first / REPEATS[batch])
    return seconds


def _line(
    row: Row, kinds: tuple[str, ...], peers: Mapping[str, Peer], seconds: Seconds, threads: Mapping[str, int]
) -> Iterator[Line]:
    kind = row.kind if row.kind in kinds else kinds[0]
    tokens = {"prefill": PROMPT, "decode_1": DECODED, "decode_16": 16 * DECODED}[row.what]
    ours = seconds[kind, row.what]
    there = [name for name in row.peers if (name, row.what) in seconds]
    best = min(there, key=lambda name: statistics.median(seconds[name, row.what]), default=row.peers[0])
    theirs = seconds.get((best, row.what))
    limit = prefill_limit(kind) if row.what == "prefill" else decode_limit(kind, tokens // DECODED)
    yield line(
        row.metric,
        tokens / statistics.median(ours),
        None if theirs is None else tokens / statistics.median(theirs),
        peers[best].name,
        UNIT,
        ratio=None if theirs is None else median_ratio(ours, theirs),
        target=None if theirs is None else row.target,
        limit=limit,
        ours_kind=kind,
        rounds=len(ours),
        threads={"ours": threads[kind]} | ({} if theirs is None else {"peer": threads[best]}),
        all={
            name: round(tokens / statistics.median(values))
            for (name, what), values in seconds.items()
            if what == row.what
        },
    )
