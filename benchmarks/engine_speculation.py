"""Speculative decoding at batch 1 and 16: the same replies with guesses and without, by CPU-time of one thread.

    python -m benchmarks.engine_speculation [--quick]

The models are trained first, which takes ten minutes, and kept under build/ for the next time. They learn documents
of records that are listed and then listed again with one word changed: an open record is hard to foresee but for its
form, a closed one can be copied. The target has 11 million parameters, the student that drafts for it 0.4 million and
learns from its distribution, the draft head learns from the target's own documents. `lookup` copies from the text, on
prompts that end where the second list begins; the others go on from prompts that end within the first list. Every line
is the median over interleaved rounds, on the native runner where it can be built.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.engine_work import ROOT, median_ratio
from benchmarks.pretrain_steps import line
from pensar.base.errors import RunError
from pensar.base.ranks import World
from pensar.infer.drafts.draft_model import DraftModel
from pensar.infer.drafts.head import HeadDrafts
from pensar.infer.drafts.lookup import Lookup
from pensar.infer.drafts.proposer import Proposer
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.native.runner import NativeRunner
from pensar.infer.speculate import Speculation
from pensar.infer.step import Runner
from pensar.infer.torch_runner import TorchRunner
from pensar.model.config import ModelConfig
from pensar.model.draft_head import DraftHead, initialize_head
from pensar.model.qwen3 import Qwen3, initialize
from pensar.model.weights import load_model, save_model
from pensar.posttrain import draft
from pensar.posttrain.draft import DraftHeadConfig
from pensar.text.packing import one_per_row
from pensar.text.sample import Sample
from pensar.text.tokenizer import Tokenizer, train_tokenizer
from pensar.train.loss import LossConfig
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.step import train_step

Line = dict[str, Any]
FIRST = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo Joy Kai Lea Max Nia Oto Pia".split()
LAST = "Adams Brown Clark Davis Evans Frank Green Hill Irwin Jones King Lewis Moore Nolan Owens Price".split()
CITIES = "Paris Rome Oslo Lima Cairo Delhi Tokyo Bern Quito Accra Seoul Porto".split()
SHAPES: Mapping[str, tuple[int, int]] = {"target": (384, 6), "student": (128, 2)}
QUICK_SHAPES: Mapping[str, tuple[int, int]] = {"target": (128, 3), "student": (64, 1)}
NEW = 96
BATCHES = (1, 16)
TARGET = 1.8
Text = Callable[[random.Random], str]


def record(rng: random.Random) -> str:
    items = [rng.randrange(1, 10) for _ in range(rng.randrange(2, 4))]
    who = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
    return f'{{"name": "{who}", "city": "{rng.choice(CITIES)}", "items": {items}, "status": "open"}}\n'


def halves(rng: random.Random) -> tuple[str, str]:
    """A list of open records, and the same records closed."""
    records = "".join(record(rng) for _ in range(3))
    return f"Records:\n{records}", f"Closed:\n{records.replace('open', 'closed')}End.\n"


def document(rng: random.Random) -> str:
    return "".join(halves(rng))


def speculation(quick: bool) -> Iterator[Line]:
    torch.set_num_threads(1)
    tokenizer = train_tokenizer([document(random.Random(n)) for n in range(300)], 512)
    shapes, steps = (QUICK_SHAPES, 60) if quick else (SHAPES, 120)
    target, student, head = models(tokenizer, shapes, steps)
    rounds = 3 if quick else 7
    proposers: dict[str, Callable[[], Proposer]] = {
        "lookup": lambda: Lookup(shortest=3),
        "draft_model": lambda: DraftModel(runner_of(student)),
        "head": lambda: HeadDrafts(head, target),
    }
    for batch in BATCHES:
        for temperature in (0.0, 0.8):
            for name, proposer in proposers.items():
                ends = 2 if name == "lookup" else 1
                asked = [
                    requests(tokenizer, number, batch, temperature, ends) for number in range(rounds + 1)
                ]
                yield measured(f"speculation_{name}", target, proposer, asked, batch, temperature)


def requests(tokenizer: Tokenizer, number: int, batch: int, temperature: float, ends: int) -> list[Request]:
    """Prompts that end behind the first record, or where the second list begins."""
    found = []
    for index in range(batch):
        first, _ = halves(random.Random(10_000 + 100 * number + index))
        text = first[: first.index("}\n") + 2] if ends == 1 else f"{first}Closed:\n"
        params = SamplingParams(max_tokens=NEW, temperature=temperature, seed=index, ignore_eos=True)
        found.append(Request(str(index), tokenizer.encode(text), params))
    return found


def measured(
    metric: str,
    target: Qwen3,
    proposer: Callable[[], Proposer],
    asked: Sequence[Sequence[Request]],
    batch: int,
    temperature: float,
) -> Line:
    """The first set warms up; both engines answer each other one, and their replies are compared."""
    plain, guessing = (Engine(runner_of(target), slots=batch) for _ in range(2))
    guessing.speculation = guesser = Speculation(proposer())
    seconds: dict[Engine, list[float]] = {plain: [], guessing: []}
    same = total = 0
    for number, requested in enumerate(asked):
        replies = []
        for engine in (plain, guessing):
            start = time.process_time()
            replies.append([completion.tokens for completion in engine.run(requested)])
            if number:
                seconds[engine].append((time.process_time() - start) / sum(map(len, replies[-1])))
        same += sum(left == right for left, right in zip(*replies, strict=True))
        total += len(requested)
    ours, theirs = seconds[guessing], seconds[plain]
    return line(
        f"{metric}_batch_{batch}" + ("" if temperature else "_greedy"),
        1 / statistics.median(ours),
        1 / statistics.median(theirs),
        "the same engine without guesses",
        "tokens / CPU-second",
        ratio=median_ratio(ours, theirs),
        target=TARGET if batch == 1 else None,
        temperature=temperature,
        runner=type(guessing.runner).__name__,
        tokens_per_pass=round(guesser.acceptance.tokens_per_pass, 3),
        kept_by_place=[
            round(kept / tried, 3)
            for kept, tried in zip(guesser.acceptance.kept, guesser.acceptance.tried, strict=True)
        ],
        same_replies=f"{same} of {total}",
    )


def runner_of(model: Qwen3) -> Runner:
    try:
        return NativeRunner(model)
    except RunError:
        return TorchRunner(model)


# ---------------------------------------------------------------- the models


def models(
    tokenizer: Tokenizer, shapes: Mapping[str, tuple[int, int]], steps: int
) -> tuple[Qwen3, Qwen3, DraftHead]:
    """Target, student and head, those of an earlier run where they were made alike."""
    name = "-".join(map(str, (*shapes["target"], *shapes["student"], steps)))
    folder = ROOT / "build" / "benchmarks" / f"speculation-{name}"
    if not (folder / "head" / "draft_head.json").exists():
        target = trained(tokenizer, shapes["target"], steps)
        save_model(target, folder / "target")
        save_model(trained(tokenizer, shapes["student"], steps, target), folder / "student")
        head_of(target, tokenizer, steps).save(folder / "head")
    target = load_model(folder / "target")
    return target, load_model(folder / "student"), DraftHead.load(folder / "head", target)


def trained(tokenizer: Tokenizer, shape: tuple[int, int], steps: int, teacher: Qwen3 | None = None) -> Qwen3:
    """A model of so much width and so many layers; with a teacher, whose distribution is learned."""
    width, layers = shape
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 32,
        num_kv_heads=width // 64,
        head_dim=32,
        intermediate_size=3 * width,
        max_positions=1_024,
        rope_theta=10_000.0,
        tied=True,
    )
    model = Qwen3(config)
    initialize(model, 0, previous_token_heads=True)
    model.train()
    optimizer = Optimizer(model, OptimizerConfig(lr=0.01, adamw_lr=0.002))
    for step in range(steps):
        rng = random.Random(1_000_000 + step)
        samples = [_sample(tokenizer.encode(document(rng)), taught=teacher is not None) for _ in range(4)]
        scale = min(1.0, (step + 1) / 10, 2 - 2 * step / steps)
        train_step(model, optimizer, [one_per_row(samples)], scale, World(), LossConfig(), teacher)
    return model.eval()


def head_of(model: Qwen3, tokenizer: Tokenizer, steps: int) -> DraftHead:
    """Trained on documents that the model writes itself."""
    model.requires_grad_(requires_grad=False)
    engine = Engine(runner_of(model), slots=64)
    prompt = tokenizer.encode("Records:\n")
    asked = [
        Request(str(n), prompt, SamplingParams(max_tokens=160, temperature=0.8, seed=n, ignore_eos=True))
        for n in range(256)
    ]
    texts = [[*prompt, *completion.tokens] for completion in engine.run(asked)]
    config = DraftHeadConfig(steps=steps)
    head = DraftHead(model.config, config.window)
    initialize_head(head, 0)
    optimizer = Optimizer(head, OptimizerConfig(lr=0.005, adamw_lr=0.001))
    for step in range(steps):
        chosen = random.Random(step).sample(texts, 4)
        batch = one_per_row([_sample(text, taught=False) for text in chosen])
        scale = min(1.0, (step + 1) / 10, 2 - 2 * step / steps)
        draft.train_step(model, head, optimizer, [batch], scale, World(), config)
    return head.eval()


def _sample(tokens: Sequence[int], *, taught: bool) -> Sample:
    ones = np.ones(len(tokens), np.float32)
    ones[0] = 0
    ids = np.asarray(tokens, np.int32)
    return Sample(tokens=ids, kl=ones) if taught else Sample(tokens=ids, ce=ones)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer rounds")
    for row in speculation(parser.parse_args().quick):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
