"""The work of the engine's benchmarks: the model, contenders in processes of their own, and what the machine allows.

Shape of the work: prompts of 128 random tokens, of which no two begin alike, and 31 decoded tokens after the first, for
one text and for 16 at once. What is decoded costs the difference between asking for 32 tokens and for one.
"""

import functools
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.engine_kernels import peak
from pensar.infer.native.library import available
from pensar.model.config import ModelConfig
from pensar.model.gguf import export_gguf
from pensar.model.qwen3 import Qwen3, initialize
from pensar.model.weights import save_model
from pensar.text.tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent
CONFIG = ModelConfig(
    vocab_size=16_384,
    hidden_size=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    intermediate_size=1_536,
    max_positions=4_096,
    tied=True,
)
"""33.6 million parameters."""
PROMPT, DECODED = 128, 31
BATCHES = (1, 16)
GGUF_KINDS = ("f16", "q8_0", "q4_0")
BYTES = {"torch float32": 4.0, "float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}
"""Of a weight, its share of scales left out."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def directory(folder: Path, config: ModelConfig = CONFIG) -> Path:
    """A model directory with random weights and a tokenizer that knows few of its tokens."""
    tokenizer = train_tokenizer(["to be or not to be, that is the question"] * 4, 300)
    model = Qwen3(config).eval()
    initialize(model, 0)
    save_model(model, folder, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    tokenizer.save(folder)
    return folder


def gguf_files(source: Path, out: Path) -> dict[str, Path]:
    """The directory as GGUF files, every matrix in the kind that the file is named for."""
    return {kind: export_gguf(source, out / f"{kind}.gguf", kind) for kind in GGUF_KINDS}


def prompts_of(
    number: int, batch: int, config: ModelConfig = CONFIG, length: int = PROMPT
) -> list[list[int]]:
    """Random prompts, others for every number."""
    drawn = np.random.default_rng(number).integers(1, config.vocab_size, (batch, length))
    return drawn.tolist()  # type: ignore[no-any-return]


class Contender:
    """A process that serves `benchmarks.engine_serve`."""

    def __init__(self, module: str, *arguments: object, python: str = sys.executable) -> None:
        self.threads = 1
        """Most threads that were seen to compute."""
        self.log = ROOT / "build" / "benchmarks" / f"{module}-{os.getpid()}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [python, "-m", f"benchmarks.{module}", *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ | ONE_THREAD,
            )
        self._answer()

    def ask(self, prompts: Sequence[Sequence[int]], new: int) -> float:
        """CPU-seconds for so many new tokens after each prompt."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.threads = max(self.threads, int(answer["threads"]))
        return float(answer["seconds"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.unlink(missing_ok=True)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contender has ended; the last lines of {self.log}:\n{_end_of(self.log)}")
        found: dict[str, Any] = json.loads(line)
        return found


class Peer(NamedTuple):
    """Whose figure a line compares with."""

    name: str
    """As printed, with its version."""
    start: Callable[[], Contender] | None
    """None where it is not installed."""


def transformers_peer(source: Path) -> Peer:
    if importlib.util.find_spec("transformers") is None:
        return Peer("transformers (not installed)", None)
    start = functools.partial(Contender, "engine_transformers", source)
    return Peer(f"transformers {version('transformers')} generate, float32", start)


def llama_cpp_peer(path: Path, kind: str) -> Peer:
    if importlib.util.find_spec("xllamacpp") is None:
        return Peer("llama.cpp (xllamacpp is not installed)", None)
    start = functools.partial(Contender, "engine_llama_cpp", path, max(BATCHES))
    return Peer(f"llama.cpp (xllamacpp {version('xllamacpp')}) {kind}", start)


def openvino_peer(path: Path, kind: str, python: str) -> Peer:
    found = openvino_version(python)
    if found is None:
        return Peer("OpenVINO GenAI (not installed)", None)
    start = functools.partial(Contender, "engine_openvino", path, max(BATCHES), python=python)
    return Peer(f"OpenVINO GenAI {found} {kind} GGUF", start)


@functools.cache
def openvino_version(python: str) -> str | None:
    """The version that an interpreter has."""
    program = (
        "from importlib.metadata import version; import openvino_genai; print(version('openvino-genai'))"
    )
    if shutil.which(python) is None:
        return None
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.split()[-1] if done.returncode == 0 else None


def our_contender(source: Path, kind: str) -> Contender:
    return Contender("engine_ours", source, max(BATCHES), kind)


@contextmanager
def running(starts: Mapping[str, Callable[[], Contender]]) -> Iterator[dict[str, Contender]]:
    """All of them, until the end of the block."""
    with ExitStack() as stack:
        found = {}
        for name, start in starts.items():
            found[name] = start()
            stack.callback(found[name].close)
        yield found


# ---------------------------------------------------------------- what the machine allows


def bytes_per_second(num_bytes: float) -> float:
    """The rate at which one thread reads so many bytes over and over, by the fastest of three ways."""
    values = torch.ones(max(int(num_bytes) // 4, 1))
    ways = (values.sum, values.amax, lambda: torch.dot(values, values))
    return values.nbytes / min(_seconds(way) for way in ways)


def operations_per_second(kind: str, size: int = 1_024) -> float:
    """Floating-point or integer operations, a multiply-add counted as two: the better of torch's square products and,
    where our kernels can be built, products that never leave the registers."""
    native = peak(kind.removeprefix("torch ")) if available() else 0.0
    if kind.endswith(("float32", "bfloat16")):  # halves are widened and multiplied as floats
        left, right = torch.randn(size, size), torch.randn(size, size)
        return max(native, 2 * size**3 / _seconds(lambda: torch.mm(left, right)))
    small = torch.randint(-127, 128, (size, size), dtype=torch.int8)
    products = _seconds(lambda: torch._int_mm(small, small))  # noqa: SLF001, torch has no other name for it
    return max(native, 2 * size**3 / products)


def decode_limit(kind: str, batch: int, config: ModelConfig = CONFIG) -> float:
    """Tokens per CPU-second that reading the weights and the cache, and the products alone, would allow."""
    weights = BYTES[kind] * num_weights(config)
    length = PROMPT + DECODED / 2
    cache = batch * length * config.num_layers * 2 * config.num_kv_heads * config.head_dim * 4
    reading = (weights + cache) / bytes_per_second(weights + cache)
    multiplying = batch * 2 * num_weights(config) / operations_per_second(kind)
    return batch / max(reading, multiplying)


def prefill_limit(kind: str, config: ModelConfig = CONFIG) -> float:
    """Tokens per CPU-second that the products alone would allow; the vocabulary is met by the last token only."""
    inner = num_weights(config) - config.vocab_size * config.hidden_size
    attention = (
        config.num_layers * config.num_heads * config.head_dim * PROMPT
    )  # half of the scores are masked
    operations = PROMPT * 2 * (inner + attention) + 2 * config.vocab_size * config.hidden_size
    return PROMPT * operations_per_second(kind) / operations


def num_weights(config: ModelConfig) -> int:
    """Weights that a decoded token meets, a tied embedding counted once."""
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim * config.hidden_size
    dense = 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * (attention + dense) + config.vocab_size * config.hidden_size


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of how often ours goes into theirs."""
    return statistics.median(their / our for our, their in zip(ours, theirs, strict=True))


def _seconds(run: Callable[[], object]) -> float:
    """CPU-seconds of the fastest of seven calls."""
    best = float("inf")
    for _ in range(7):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
