"""Speculative decoding at batch 1 and 4: the same replies with guesses and without, by CPU-time of one thread.

The models are trained first, in three minutes, and kept under build/ for the next time. They learn documents of
records that are listed and then listed again with one word changed: an open record is hard to foresee but for its form,
a closed one can be copied. The target has 3.3 million parameters, the student that drafts for it 0.15 million and
learns from its distribution, the draft head learns from the target's own documents. `lookup` copies from the text, on
prompts that end where the second list begins; the others go on from prompts that end within the first list. Every line
is the median over interleaved rounds, on the native runner where it can be built.

Guesses pay where a pass of the target costs much more than they do. So the target is measured as it was trained, and
once more with 24 layers, of which those that were added compute and add nothing: the same replies and the same guesses
at the cost of 17 million parameters.

`limit` is what guesses that cost nothing would give: tokens of a pass over the cost of a pass of as many tokens as it
had on average, in passes of one token. `pass_cost` has these costs: where reading the weights is all that a pass costs
they are near 1, where products are it is the number of tokens, and nothing can be won.
"""

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
from pensar.infer.step import PAGE, Runner, StepBatch
from pensar.infer.torch_runner import TorchRunner
from pensar.model.config import ModelConfig, replace
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
SHAPES: Mapping[str, tuple[int, int]] = {"target": (256, 4), "student": (64, 1)}
QUICK_SHAPES: Mapping[str, tuple[int, int]] = {"target": (128, 2), "student": (64, 1)}
NEW = 96
BATCHES = (1, 4)
DEEP = 24
"""Layers of the target when it is to cost what a larger model does."""
PASSES = (1, 2, 3, 4, 5, 7, 9)
"""Tokens of a row in a pass, the guesses among them."""
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
    for model, temperatures in ((target, (0.0, 0.8)), (deepened(target, DEEP), (0.8,))):
        yield from _lines(model, student, head, tokenizer, 3 if quick else 7, temperatures)


def _lines(
    target: Qwen3,
    student: Qwen3,
    head: DraftHead,
    tokenizer: Tokenizer,
    rounds: int,
    temperatures: Sequence[float],
) -> Iterator[Line]:
    costs = {batch: pass_costs(target, batch, rounds) for batch in BATCHES}
    proposers: dict[str, Callable[[], Proposer]] = {
        "lookup": lambda: Lookup(shortest=3),
        "draft_model": lambda: DraftModel(runner_of(student)),
        "head": lambda: HeadDrafts(head, target),
    }
    for batch in BATCHES:
        for temperature in temperatures:
            for name, proposer in proposers.items():
                ends = 2 if name == "lookup" else 1
                asked = [
                    requests(tokenizer, number, batch, temperature, ends) for number in range(rounds + 1)
                ]
                yield measured(name, target, proposer, asked, batch, temperature, costs[batch])


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
    name: str,
    target: Qwen3,
    proposer: Callable[[], Proposer],
    asked: Sequence[Sequence[Request]],
    batch: int,
    temperature: float,
    costs: Mapping[int, float],
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
    tried, kept = (sum(values) for values in (guesser.acceptance.tried, guesser.acceptance.kept))
    passes = max(1, guesser.acceptance.passes)
    cost = float(np.interp(1 + tried / passes, list(costs), list(costs.values())))
    return line(
        f"speculation_{name}_{target.config.num_layers}_layers_batch_{batch}"
        + ("" if temperature else "_greedy"),
        1 / statistics.median(ours),
        1 / statistics.median(theirs),
        "the same engine without guesses",
        "tokens / CPU-second",
        ratio=median_ratio(ours, theirs),
        limit=guesser.acceptance.tokens_per_pass / cost / statistics.median(theirs),
        temperature=temperature,
        runner=type(guessing.runner).__name__,
        guesses_per_pass=round(tried / passes, 3),
        kept_per_pass=round(kept / passes, 3),
        kept_of_guesses=round(kept / max(1, tried), 3),
        pass_cost={str(tokens): round(value, 3) for tokens, value in costs.items()},
        kept_by_place=[
            round(kept / tried, 3)
            for kept, tried in zip(guesser.acceptance.kept, guesser.acceptance.tried, strict=True)
        ],
        same_replies=f"{same} of {total}",
    )


def pass_costs(target: Qwen3, batch: int, rounds: int, lengths: int = 160) -> dict[int, float]:
    """CPU-time of passes of so many tokens of each of `batch` texts, their logits included, relative to one token."""
    runner = runner_of(target)
    pages = -(-(lengths + max(PASSES)) // PAGE)
    runner.reserve(1 + batch * pages)
    pages_RP = 1 + np.arange(batch * pages).reshape(batch, pages)
    seconds: dict[int, list[float]] = {tokens: [] for tokens in PASSES}
    for number in range(20 * rounds):
        for tokens in (lengths, *PASSES) if not number else PASSES:
            first = 0 if tokens == lengths else lengths
            new = np.random.default_rng(number).integers(0, target.config.vocab_size, (batch, tokens))
            step = StepBatch.of([(row, first, pages) for row, pages in zip(new, pages_RP, strict=True)])
            start = time.process_time()
            runner.run(step)
            if tokens in seconds:
                seconds[tokens].append(time.process_time() - start)
    return {tokens: statistics.median(seconds[tokens]) / statistics.median(seconds[1]) for tokens in PASSES}


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


def deepened(model: Qwen3, num_layers: int) -> Qwen3:
    """The same function by more layers: those behind add nothing, and are computed all the same."""
    deep = Qwen3(replace(model.config, num_layers=num_layers)).eval()
    initialize(deep, 0)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in deep.named_parameters():
            if name in own:
                parameter.copy_(own[name])
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    return deep


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
