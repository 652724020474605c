"""GRPO: group-relative policy optimisation on verifiable tasks (arXiv 2402.03300; Qwen3 report, section 4.2).

Each step draws a group of replies for each of many prompts; a reply's advantage is its score less the group's mean,
over the group's deviation. Groups that all succeed or all fail teach nothing and are left out.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from pensar.base.errors import ConfigError, DataError
from pensar.base.files import seed_of, whole_lines, write_atomic
from pensar.base.metrics import Recording
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.base.stage import Counts, Runtime
from pensar.infer.engine import Engine
from pensar.infer.native.exact import exact_as
from pensar.infer.rollout import Rollout, RolloutConfig, roll_shared
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import load_model
from pensar.posttrain.examples import queries_of
from pensar.tasks.task import Task
from pensar.text.packing import Batch, one_per_row
from pensar.text.sample import Sample
from pensar.text.tokenizer import Tokenizer
from pensar.train.loop import LoopConfig, Place, finish, loop
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.schedule import ScheduleConfig, rate
from pensar.train.step import learning, train_step


class GrpoConfig(LoopConfig, frozen=True, kw_only=True):
    """Reinforcement learning with verifiable rewards."""

    steps: int = 40
    seed: int = 1
    prompts: int = 32
    """Prompts per step."""
    group: int = 8
    """Replies per prompt."""
    minibatches: int = 2
    """Optimiser steps per set of rollouts; more than one is off-policy and saves samples."""
    rollout: RolloutConfig = RolloutConfig()
    optimizer: OptimizerConfig = OptimizerConfig(muon=False, adamw_lr=5e-4)
    schedule: ScheduleConfig = ScheduleConfig(kind="constant", warmup=0.0)
    checkpoint_every: int = 10
    queries: str = "reinforcement"
    """Name of the problem set within the train split."""
    probe: int = 0
    """Replies per query by which learnable queries are chosen beforehand; 0 takes all queries. Where a query has few
    possible answers, a start model's guesses decide what seems learnable, and the choice tilts the answers."""
    probe_queries: int = 512
    easiest: float = 0.9
    """Queries whose pass rate is above this are left out: they have nothing left to teach."""
    thinking: bool | None = True
    """Mode in which queries without a mode of their own are put."""
    forward: Literal["auto", "engine", "torch"] = "auto"
    """What computes the values of the trainer's forward pass. By the `engine`'s own kernels, on a CPU with a compiler,
    log-probabilities are those that tokens were drawn with, bit for bit, and a step begins exactly on policy; a step of
    the tiny recipe takes 3 to 8% longer, and the weights' memory once more. `auto`: wherever there are kernels."""


MISMATCH = ("mismatch", "mismatch_kl", "mismatch_max")
"""How far the trainer's log-probabilities of sampled tokens are from the engine's by the same weights: mean and largest
absolute difference, and the KL divergence. Of a step's first minibatch; later ones are off policy by intention."""


def run(config: GrpoConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `model` and the sets of `tasks`; fills `out` with the better model and every rollout."""
    place = runtime.logs, runtime.progress, runtime.recording
    return runtime.crew.call(_on_rank, config, dict(inputs), out, *place)


def advantages(scores: Sequence[float]) -> np.ndarray | None:
    """Group-relative advantages; None where all replies of the group score alike."""
    values = np.asarray(scores, np.float64)
    deviation = values.std()
    return None if deviation < 1e-6 else (values - values.mean()) / deviation


def _on_rank(
    world: World,
    config: GrpoConfig,
    inputs: dict[str, Path],
    out: Path,
    logs: Path,
    progress: Progress,
    recording: Recording,
) -> Counts:
    place = Place(out, logs, world, progress, recording=recording)
    model, tokenizer = load_model(inputs["model"]), Tokenizer.load(inputs["model"])
    engine = Engine(model, tokenizer, slots=max(64, config.prompts * config.group // world.size))
    queries = _queries(config, inputs["tasks"], engine, tokenizer, place)
    optimizer = Optimizer(model, config.optimizer)

    def take(step: int) -> dict[str, float]:
        values, rollouts = _step(step, config, queries, model, engine, tokenizer, optimizer, world)
        keep_rollouts(place, step, rollouts)
        return values

    name = out.name.rsplit("-", 1)[0]
    forget = partial(truncate_rollouts, out)
    with forward_by(config.forward, engine):
        loop(model, optimizer, config, place, take, name=name, shown=("reward",), on_start=forget)
    finish(model, tokenizer, place)
    num_rollouts = config.steps * min(config.prompts, len(queries)) * config.group
    return {"queries": len(queries), "rollouts": num_rollouts, "steps": config.steps}


def forward_by(way: Literal["auto", "engine", "torch"], engine: Engine) -> AbstractContextManager[None]:
    """Within it the engine's module computes its forward pass so; ConfigError where there are no kernels to share."""
    within = None if way == "torch" else exact_as(engine.runner)
    if within is None and way == "engine":
        raise ConfigError(
            "forward is engine, and the engine computes with torch here: its own kernels are for models on a CPU and "
            "need a C++ compiler; leave forward at auto"
        )
    return within or nullcontext()


def _step(
    step: int,
    config: GrpoConfig,
    queries: Sequence[Task],
    model: Qwen3,
    engine: Engine,
    tokenizer: Tokenizer,
    optimizer: Optimizer,
    world: World,
) -> tuple[dict[str, float], list[Rollout]]:
    """One set of rollouts and the optimiser steps on it; the same metrics and rollouts on every rank."""
    chosen = np.random.default_rng(seed_of(config.seed, "prompts", step)).permutation(len(queries))
    chosen = chosen[: config.prompts]
    tasks = [queries[query] for query in chosen for _ in range(config.group)]
    seeds = [seed_of(config.seed, step, int(query), n) for query in chosen for n in range(config.group)]
    engine.load(model)
    rollouts = roll_shared(engine, tokenizer, tasks, config.rollout, seeds, world, together=config.group)
    samples: list[Sample] = []
    for start in range(0, len(rollouts), config.group):
        group = rollouts[start : start + config.group]
        advantage = advantages([rollout.score.value for rollout in group])
        if advantage is not None:
            samples.extend(r.sample(float(a)) for r, a in zip(group, advantage, strict=True))
    values = _summary(rollouts, len(samples))
    scale = rate(config.schedule, step, config.steps)
    order = np.random.default_rng(seed_of(config.seed, "minibatches", step)).permutation(len(samples))
    with learning(model):
        for part in np.array_split(order, config.minibatches):
            if len(part):
                rows = sorted((samples[i] for i in part), key=len)
                taken = train_step(model, optimizer, micro_batches(rows), scale, world, config.loss)
                values |= taken | {key: values[key] for key in MISMATCH if key in values}
    values["tokens"] = float(sum(len(rollout.tokens) for rollout in rollouts))
    values["learned_tokens"] = float(sum(len(sample) for sample in samples))
    values["lr"] = scale * config.optimizer.adamw_lr
    return values, rollouts


def micro_batches(samples: Sequence[Sample], rows: int = 64) -> list[Batch]:
    """Batches of at most `rows` samples of similar length."""
    return [one_per_row(samples[start : start + rows]) for start in range(0, len(samples), rows)]


def _summary(rollouts: Sequence[Rollout], num_samples: int) -> dict[str, float]:
    values = {
        "reward": float(np.mean([rollout.score.value for rollout in rollouts])),
        "length": float(np.mean([rollout.num_sampled for rollout in rollouts])),
        "unfinished": float(np.mean([rollout.finish != "stop" for rollout in rollouts])),
        "learned_share": num_samples / len(rollouts),
    }
    for family in sorted({rollout.task.family for rollout in rollouts}):
        scores = [rollout.score.value for rollout in rollouts if rollout.task.family == family]
        values[f"reward/{family}"] = float(np.mean(scores))
    return values


def _queries(
    config: GrpoConfig, tasks: Path, engine: Engine, tokenizer: Tokenizer, place: Place
) -> list[Task]:
    """The queries to learn from: those that the model solves sometimes, but not nearly always."""
    queries = queries_of(tasks, config.queries)
    if not queries:
        raise DataError(
            f"the set {config.queries} of {tasks} is empty; raise its size under `tasks` in the recipe"
        )
    if config.thinking is not None:
        queries = [
            query if query.thinking is not None else msgspec.structs.replace(query, thinking=config.thinking)
            for query in queries
        ]
    if not config.probe:
        return queries
    path = place.out / "pass-rates.json"
    if not path.exists():
        probed = queries[: config.probe_queries]
        repeated = [query for query in probed for _ in range(config.probe)]
        seeds = [seed_of(config.seed, "probe", i, n) for i in range(len(probed)) for n in range(config.probe)]
        rollouts = roll_shared(
            engine, tokenizer, repeated, config.rollout, seeds, place.world, together=config.probe
        )
        rates = [0.0] * len(probed)
        for at, rollout in enumerate(rollouts):
            rates[at // config.probe] += rollout.score.value / config.probe
        if place.world.rank == 0:
            write_atomic(path, msgspec.json.encode([round(rate, 6) for rate in rates]))
        place.world.barrier()
    rates_of = msgspec.json.decode(path.read_bytes(), type=list[float])
    kept = [queries[i] for i, passed in enumerate(rates_of) if 0 < passed <= config.easiest]
    if not kept:
        raise DataError(
            f"none of {len(rates_of)} queries is solved sometimes but not always (pass rates 0 or above "
            f"{config.easiest}); the start model is too weak or too strong for them: change the cold start or the tasks"
        )
    return kept


def keep_rollouts(place: Place, step: int, rollouts: Sequence[Rollout]) -> None:
    """Appends every rollout of a step to rollouts.jsonl, on rank 0."""
    if place.world.rank:
        return
    with (place.out / "rollouts.jsonl").open("ab") as file:
        for rollout in rollouts:
            file.write(msgspec.json.encode({"step": step, **rollout.record()}) + b"\n")


def truncate_rollouts(out: Path, first: int) -> None:
    """Drops the rollouts of steps that a crashed attempt made after its last checkpoint."""
    path = out / "rollouts.jsonl"
    if not path.exists():
        return
    kept = [line for line in whole_lines(path) if msgspec.json.decode(line)["step"] < first]
    write_atomic(path, b"".join(kept))
