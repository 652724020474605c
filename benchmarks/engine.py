"""Rollout speed of the engine against transformers' generate, on one thread.

    python -m benchmarks.engine [--quick]

The work is that of one reinforcement-learning step of a small model (4 layers, width 128, vocabulary 2,048): groups
of sampled completions of 128 tokens after prompts of 32, with the log-probability of every token on our side. Speeds
are tokens per CPU-second, medians of interleaved runs. The limit is what the matrix products alone would allow at the
rate at which this machine multiplies large matrices.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3, initialize
from pensar.model.weights import save_model

CONFIG = ModelConfig(
    vocab_size=2_048,
    hidden_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=384,
    tied=True,
)
PROMPT_TOKENS = 32
NEW_TOKENS = 128
GROUP = 8
PEER = "transformers"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one size and fewer runs")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    model = Qwen3(CONFIG).eval()
    initialize(model, 0)
    limit = _multiplications_per_second() / _multiplications_per_token(model)
    for num_prompts in (8,) if quick else (8, 32):
        prompts = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (num_prompts, PROMPT_TOKENS))
        contenders = {"ours": _engine(model, prompts)}
        if importlib.util.find_spec(PEER) is not None:
            contenders[PEER] = _transformers(model, prompts)
        seconds = _interleaved(contenders, rounds=3 if quick else 7)
        num_tokens = num_prompts * GROUP * NEW_TOKENS
        ours = num_tokens / seconds["ours"]
        peer = num_tokens / seconds[PEER] if PEER in seconds else None
        line = {
            "metric": f"rollout_tokens_per_cpu_second_batch_{num_prompts * GROUP}",
            "ours": round(ours),
            "peer": peer and round(peer),
            "peer_name": f"{PEER} {_version()} generate" if peer else f"{PEER} (not installed)",
            "unit": "tokens per CPU-second",
            "ratio": peer and round(ours / peer, 2),
            "limit": round(limit),
            "percent_of_limit": round(100 * ours / limit, 1),
            "machine": _machine(),
        }
        print(json.dumps(line), flush=True)


def _engine(model: Qwen3, prompts: np.ndarray) -> Callable[[], None]:
    engine = Engine(model, slots=len(prompts) * GROUP)
    requests = [
        Request(
            f"{number}-{copy}",
            prompt.tolist(),
            SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, seed=number * GROUP + copy, logprobs=True),
        )
        for number, prompt in enumerate(prompts)
        for copy in range(GROUP)
    ]

    def run() -> None:
        completions = engine.run(requests)
        assert sum(len(completion.tokens) for completion in completions) == len(requests) * NEW_TOKENS

    return run


def _transformers(model: Qwen3, prompts: np.ndarray) -> Callable[[], None]:
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(prompts).repeat_interleave(GROUP, 0)
    config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS, pad_token_id=0
    )
    mask = torch.ones_like(ids)

    def run() -> None:
        with torch.inference_mode():
            out = peer.generate(ids, attention_mask=mask, generation_config=config)
        assert out.shape == (len(ids), PROMPT_TOKENS + NEW_TOKENS)

    return run


def _interleaved(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median CPU-seconds of each, after one run to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            if number:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _multiplications_per_token(model: Qwen3) -> int:
    """One multiply-add per weight, the tied embedding counted once, as the output projection."""
    return sum(parameter.numel() for parameter in model.parameters())


def _multiplications_per_second(size: int = 1_024) -> float:
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        torch.mm(left, right)
        best = min(best, time.process_time() - start)
    return size**3 / best


def _version() -> str:
    from importlib.metadata import version

    return version(PEER)


def _machine() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    return f"{name}, 1 thread, torch {torch.__version__}"


if __name__ == "__main__":
    main()
