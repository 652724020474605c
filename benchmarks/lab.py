"""The lab: what the model's and the stages' design is worth, each question one recipe of small runs over several seeds.

    python -m benchmarks.lab [moe] [qk-norm] [mixture] [long-context] [--seeds 1 2 3] [--root runs/lab] [--quick]
    python -m benchmarks.lab --draw

An experiment is `recipes/lab/NAME.yaml`: parts of training, and arms that take some of them in order. The corpus is the
tiny recipe's, training is the package's own loop on one core; parts that are done are read, not made again. Lines go to
standard output and, without --quick, to `benchmarks/results/lab-NAME.jsonl`: one figure of one arm each, with its value
for every seed, their mean and their range. --draw makes `docs/lab/*.svg` of these files.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from benchmarks.lab_charts import draw
from benchmarks.lab_measures import MEASURES
from pensar import recipe as recipes
from pensar.base import pipeline
from pensar.base.config import Config, canonical, convert, load
from pensar.base.files import seed_of
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.base.stage import Runtime
from pensar.data.order import PretrainData
from pensar.model.config import replace
from pensar.model.qwen3 import Qwen3, initialize
from pensar.tasks.ruler import KINDS, Kind, ruler_text
from pensar.text.packing import Batch
from pensar.text.tokenizer import Tokenizer
from pensar.train.guard import BadStep
from pensar.train.loop import Place, fit
from pensar.train.pretrain import PretrainConfig, row_batches

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
RESULTS = HERE / "results"
EXPERIMENTS = ("moe", "qk-norm", "mixture", "long-context")
LEAST_TEXT = 96
"""Tokens of the shortest retrieval text that is trained on."""


class Part(Config, frozen=True, kw_only=True):
    """One stage of training."""

    train: PretrainConfig
    ruler: float = 0.0
    """Share of the rows that are retrieval texts in place of the mixture's."""
    kinds: dict[Kind, float] = msgspec.field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))
    """How often the retrieval texts are of each kind, as weights."""
    qk_norm: bool = True
    """Whether queries and keys are normalised, as they always are outside the lab."""


class Lab(Config, frozen=True, kw_only=True):
    """One experiment."""

    question: str
    arms: dict[str, tuple[str, ...]]
    """Arm -> its parts, in order; each goes on from the model of the one before."""
    parts: dict[str, dict[str, Any]]
    """Part -> what it has besides `base`."""
    base: dict[str, Any] = msgspec.field(default_factory=dict)
    corpus: str = "tiny.yaml"
    overrides: tuple[str, ...] = ()
    """Changes of the corpus's recipe, as after `--set`."""
    measure: dict[str, Any] = msgspec.field(default_factory=dict)
    """How much is measured."""


@dataclass(frozen=True)
class Corpus:
    shards: Path
    tasks: Path
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Trained:
    """A model at the end of an arm."""

    model: Qwen3
    part: Part
    losses: list[tuple[float, float]]
    """(tokens read, training loss) over the last part."""
    diverged: bool
    """Whether the loss or the gradient stopped being finite before the end."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", default=EXPERIMENTS, metavar="experiment")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--root", type=Path, default=Path("runs/lab"), help="folder of what is trained")
    parser.add_argument("--quick", action="store_true", help="the first seed only; the files of results stay")
    parser.add_argument("--draw", action="store_true", help="only draw what the files of results hold")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.experiments:
        path = RESULTS / f"lab-{name}.jsonl"
        if not options.draw:
            lines = experiment(name, options.seeds[:1] if options.quick else options.seeds, options.root)
            text = "".join(json.dumps(line) + "\n" for line in lines)
            sys.stdout.write(text)
            if options.quick:
                continue
            path.write_text(text)
        draw(name, [json.loads(line) for line in path.read_text().splitlines()])


def experiment(name: str, seeds: Sequence[int], root: Path) -> list[dict[str, Any]]:
    """Trains and measures every arm for every seed; one line for each figure of each arm."""
    lab = load(RECIPES / "lab" / f"{name}.yaml", Lab)
    corpus = corpus_of(lab, root)
    values: dict[tuple[str, str, float | None, str], dict[str, float]] = {}
    for seed in seeds:
        for arm, parts in lab.arms.items():
            started = time.process_time()
            found = trained(lab, parts, seed, corpus, root / name)
            for metric, at, value, unit in MEASURES[name](found, corpus, lab.measure):
                values.setdefault((arm, metric, at, unit), {})[str(seed)] = round(value, 4)
            print(f"{name} {arm} seed {seed}: {time.process_time() - started:.0f} s", file=sys.stderr)
    machine = f"{torch.get_num_threads()} thread, torch {torch.__version__}"
    return [
        {
            "experiment": name,
            "arm": arm,
            "metric": metric,
            "at": at,
            "unit": unit,
            "mean": round(statistics.mean(by_seed.values()), 4),
            "low": min(by_seed.values()),
            "high": max(by_seed.values()),
            "values": by_seed,
            "machine": machine,
        }
        for (arm, metric, at, unit), by_seed in values.items()
    ]


def corpus_of(lab: Lab, root: Path) -> Corpus:
    """The shards, problems and tokenizer of the corpus's recipe, made where they are not there yet."""
    recipe = recipes.load(RECIPES / lab.corpus, lab.overrides)
    folder = root / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    chosen = pipeline.Choice(until="shards")
    done = pipeline.run(recipes.stages(recipe), folder, Runtime(logs=folder), chosen)
    at = {outcome.planned.name: outcome.planned.folder for outcome in done}
    return Corpus(at["shards"], at["tasks"], Tokenizer.load(at["tokenizer"]))


def part_of(lab: Lab, name: str, seed: int) -> Part:
    """The part's configuration: its own values laid over `base`."""
    part = convert(_over(lab.base, lab.parts[name]), Part)
    return msgspec.structs.replace(part, train=msgspec.structs.replace(part.train, seed=seed))


def trained(lab: Lab, names: Sequence[str], seed: int, corpus: Corpus, root: Path) -> Trained:
    """The model after the parts in order; the last one is trained where its folder does not hold it yet."""
    parts = [part_of(lab, name, seed) for name in names]
    identity = json.dumps([str(corpus.shards.name), *map(canonical, parts)], sort_keys=True)
    folder = root / f"{'-'.join(names)}-{seed}-{seed_of(identity):016x}"
    before = trained(lab, names[:-1], seed, corpus, root).model if len(names) > 1 else None
    model = _begun(parts[-1], before, corpus)
    weights, ended = folder / "weights.pt", folder / "ended.json"
    if not ended.exists():
        _train(model, parts[-1], corpus, folder)
    else:
        model.load_state_dict(torch.load(weights))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    step_tokens = parts[-1].train.batch_tokens
    losses = [((row["step"] + 1.0) * step_tokens, row["loss"]) for row in rows]
    return Trained(model.eval(), parts[-1], losses, json.loads(ended.read_text())["diverged"])


def _begun(part: Part, before: Qwen3 | None, corpus: Corpus) -> Qwen3:
    """The model at the part's first step."""
    train = part.train
    changes = {"rope_theta": train.rope_theta, "max_positions": train.max_positions or train.context}
    if before is None:
        assert train.shape is not None
        model = Qwen3(train.shape.model(corpus.tokenizer.vocab_size, **changes))
        initialize(model, train.seed, previous_token_heads=train.shape.previous_token_heads)
    else:
        model = Qwen3(replace(before.config, **changes))
        model.load_state_dict(before.state_dict())
    if not part.qk_norm:
        for attention in (module for module in model.modules() if hasattr(module, "q_norm")):
            attention.q_norm = attention.k_norm = nn.Identity()
    return model


def _train(model: Qwen3, part: Part, corpus: Corpus, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train, diverged = part.train, False
    data = PretrainData(corpus.shards, mixture=train.mixture, context=train.context, seed=train.seed)
    batches_of = with_retrieval(row_batches(data, train), part, corpus.tokenizer)
    place = Place(folder, folder / "logs", World(), Progress())
    try:
        fit(model, batches_of, train.loop(), place, name=folder.name)
    except BadStep:
        diverged = True
    torch.save(model.state_dict(), folder / "weights.pt")
    (folder / "ended.json").write_text(json.dumps({"diverged": diverged}))


def with_retrieval(
    batches_of: Callable[[int], list[Batch]], part: Part, tokenizer: Tokenizer
) -> Callable[[int], list[Batch]]:
    """The mixture's rows, some of them replaced by retrieval texts, which differ in every row of every step."""
    if not part.ruler:
        return batches_of
    length = lru_cache(maxsize=100_000)(lambda text: len(tokenizer.encode(text)))

    def mixed(step: int) -> list[Batch]:
        (batch,) = batches_of(step)
        num = round(part.ruler * len(batch.tokens))
        rows = [
            _retrieval_row(
                random.Random(seed_of(part.train.seed, "ruler", step, row)), part, tokenizer, length
            )
            for row in range(num)
        ]
        tokens, positions, segments = batch.tokens.copy(), batch.positions.copy(), batch.segments.copy()
        tokens[:num], positions[:num], segments[:num] = (np.stack(kind) for kind in zip(*rows, strict=True))
        ce = ((segments != 0) & (positions != 0)).astype(np.float32)
        return [Batch(tokens=tokens, positions=positions, segments=segments, ce=ce)]

    return mixed


def _retrieval_row(
    rng: random.Random, part: Part, tokenizer: Tokenizer, length: Callable[[str], int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions and segments of one row, filled with whole texts; the rest is padding."""
    context = part.train.context
    tokens, positions, segments = (np.zeros(context, np.int32) for _ in range(3))
    start = segment = 0
    while context - start >= LEAST_TEXT:
        asked = rng.randint(LEAST_TEXT, context - start)
        (kind,) = rng.choices(list(part.kinds), list(part.kinds.values()))
        ids = tokenizer.encode(ruler_text(kind, rng, asked, length))[: context - start]
        end, segment = start + len(ids), segment + 1
        tokens[start:end], positions[start:end], segments[start:end] = ids, np.arange(len(ids)), segment
        start = end
    return tokens, positions, segments


def _over(under: Any, tree: Any) -> Any:
    """Mappings key by key, everything else replaced."""
    if isinstance(under, Mapping) and isinstance(tree, Mapping):
        return {**under, **{key: _over(under.get(key), value) for key, value in tree.items()}}
    return tree


if __name__ == "__main__":
    main()
