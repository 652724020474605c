"""A row's scores have the same bits alone and in any batch, whole and in chunks, by one thread and by several."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pensar.infer.native.runner import NativeRunner
from tests.infer.native_work import MIXTURE, batch_of, build, logits_of, pages_for, text

SHAPES = {
    "dense": {"hidden_size": 72, "head_dim": 24, "intermediate_size": 136, "num_layers": 2},
    "grouped": {"num_heads": 10, "num_kv_heads": 1, "num_layers": 2},
    "mixture": {**MIXTURE, "num_layers": 2},
}
ROWS = 17
LENGTHS = np.random.default_rng(5).integers(1, 130, ROWS).tolist()


def in_a_crowd(runner: NativeRunner, seed: int) -> list[torch.Tensor]:
    """Scores of every text, computed together: steps of random rows, each with a random chunk."""
    random = np.random.default_rng(seed)
    runner.reserve(ROWS * 9 + 1)
    texts = [text(length, row) for row, length in enumerate(LENGTHS)]
    pages = [pages_for(130, 1 + 9 * row) for row in range(ROWS)]
    done, found = [0] * ROWS, [[] for _ in range(ROWS)]
    while any(done[row] < LENGTHS[row] for row in range(ROWS)):
        left = [row for row in random.permutation(ROWS).tolist() if done[row] < LENGTHS[row]]
        rows = left[: int(random.integers(1, len(left) + 1))]
        sizes = [int(random.choice([1, 2, 7, 40, LENGTHS[row]])) for row in rows]
        chunks = [texts[row][done[row] : done[row] + size] for row, size in zip(rows, sizes, strict=True)]
        batch = [(chunk, done[row], pages[row]) for row, chunk in zip(rows, chunks, strict=True)]
        scores = runner.run(batch_of(batch)).logits_SV.split([len(chunk) for chunk in chunks])
        for row, chunk, part in zip(rows, chunks, scores, strict=True):
            done[row] += len(chunk)
            found[row].append(part)
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("weights", "cache"),
    [
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("int8", "float32"),
        ("int8", "int8"),
        ("int4", "float32"),
    ],
)
def test_scores_have_the_same_bits_in_any_company(shape, weights, cache):
    model = build(**SHAPES[shape])
    alone = NativeRunner(model, weights, cache=cache, threads=1)
    expected = [logits_of(alone, text(length, row)) for row, length in enumerate(LENGTHS)]
    for seed, threads in enumerate((1, 2, 3)):
        crowd = in_a_crowd(NativeRunner(model, weights, cache=cache, threads=threads), seed)
        for row in range(ROWS):
            assert torch.equal(crowd[row], expected[row]), (row, threads)


def test_only_what_is_wanted_changes_nothing():
    model, tokens = build(), text(90)
    runner = NativeRunner(model, "int8")
    whole = logits_of(runner, tokens)
    part = runner.run(batch_of([(tokens, 0, pages_for(90))], wanted=[0, 44, 89])).logits_SV
    assert torch.equal(part, whole[[0, 44, 89]])


def test_torchs_linear_layers_do_not_have_this():
    """What the kernels are for: if torch's products came to keep their bits, this test would say so."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 512, generator=generator), torch.randn(512, 512, generator=generator)
    together = x @ weight.T
    assert not all(torch.equal(x[row : row + 1] @ weight.T, together[row : row + 1]) for row in range(64))


def test_an_engine_with_several_threads_goes_on_and_says_the_same() -> None:
    """Threads that disagreed for a moment on how many rows go on would wait for each other for ever."""
    code = (
        "import numpy as np, torch\n"
        "from tests.infer.native_work import build\n"
        "from pensar.infer.engine import Engine, Request, SamplingParams\n"
        "from pensar.infer.native.runner import NativeRunner\n"
        "torch.set_num_threads(2)\n"
        "model, rng = build(), np.random.default_rng(0)\n"
        "asked = [Request(str(i), rng.integers(0, 90, 5 + 7 * (i % 9)).tolist(), SamplingParams(max_tokens=12))"
        " for i in range(18)]\n"
        "def said(threads):\n"
        "    engine = Engine(NativeRunner(model, threads=threads), slots=4, step_tokens=30)\n"
        "    return [completion.tokens for completion in engine.run(asked)]\n"
        "assert [said(2) for _ in range(5)] == 5 * [said(1)]\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=root)
