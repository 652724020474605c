"""The recipe: the values of a whole run as one typed tree, and the pipeline that they drive, on one page."""

import platform
from pathlib import Path
from typing import Any

import msgspec

from pensar.base.config import Config
from pensar.base.config import load as load_config
from pensar.base.errors import ConfigError
from pensar.base.stage import Stage
from pensar.base.trackers import require
from pensar.data import (
    annotate,
    decontaminate,
    dedup,
    demo,
    extract,
    filters,
    language,
    mixture,
    shards,
    sources,
    vocabulary,
)
from pensar.data.annotate import AnnotateConfig
from pensar.data.decontaminate import DecontaminateConfig
from pensar.data.dedup import DedupConfig
from pensar.data.demo import SOURCES, DemoConfig
from pensar.data.extract import ExtractConfig
from pensar.data.filters import FiltersConfig
from pensar.data.language import LanguageConfig
from pensar.data.mixture import MixtureConfig
from pensar.data.sources import Source, SourcesConfig
from pensar.data.vocabulary import VocabularyConfig
from pensar.estimates import Machine, StageCost, estimate
from pensar.evaluate import suite
from pensar.posttrain import coldstart, distill, draft, fusion, grpo, thinking_budget
from pensar.posttrain.coldstart import ColdStartConfig
from pensar.posttrain.distill import OffPolicyConfig, OnPolicyConfig
from pensar.posttrain.draft import DraftHeadConfig
from pensar.posttrain.fusion import FusionConfig
from pensar.posttrain.grpo import GrpoConfig
from pensar.posttrain.thinking_budget import ThinkingBudgetConfig
from pensar.tasks import problems
from pensar.train import pretrain, scaling
from pensar.train.scaling import ScalingConfig

GROUPS: dict[str, tuple[str, ...]] = {
    "data": (
        "demo", "sources", "extract", "language", "filter", "dedup", "tasks", "decontaminate", "annotate", "mixture",
    ),
    "tokenizer": ("tokenizer", "shards"),
    "train": (
        "scaling", "pretrain-general", "pretrain-reasoning", "pretrain-long", "cold-start", "reasoning-rl", "fusion",
        "general-rl", "thinking-budget", "draft-head", "student-pretrain", "student", "student-rl",
        "student-distilled",
    ),
}  # fmt: skip
"""The stages that `pensar data`, `pensar tokenizer` and `pensar train` run alone."""


class RuntimeConfig(Config, frozen=True, kw_only=True):
    """Where and how the run is computed; never part of an artifact's identity."""

    ranks: int = 2
    """Processes that share the work of a stage."""
    threads: int = 1
    """Threads of each; two one-thread processes beat one of two threads on small models."""
    gpu: str = ""
    """What each process computes on, such as `h200`, for the estimates of `pensar plan`; empty: a processor's core."""
    layout: str = ""
    """How pre-training spreads the model over the processes, as in `shard=4,tp=2`; empty: each has all of it."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where training is shown beside its record: tensorboard, wandb, mlflow, trackio."""
    profile_steps: tuple[int, int] = (0, 0)
    """First step of each training stage to profile, and how many; `--profile 100:3` asks for the same."""

    def __post_init__(self) -> None:
        require(self.trackers)
        if min(self.profile_steps) < 0:
            raise ConfigError(
                f"runtime.profile_steps {list(self.profile_steps)}: a first step and a number of them, from 0"
            )


class Data(Config, frozen=True, kw_only=True):
    """From sources to annotated documents."""

    sources: tuple[Source, ...] = ()
    """Where documents come from; without any the demonstration packs what every machine has."""
    max_document_bytes: int = 16 << 20
    extract: ExtractConfig = ExtractConfig()
    language: LanguageConfig = LanguageConfig()
    filters: FiltersConfig = FiltersConfig()
    dedup: DedupConfig = DedupConfig()
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    annotate: AnnotateConfig = AnnotateConfig()
    mixture: MixtureConfig = MixtureConfig()


class Pretraining(Config, frozen=True, kw_only=True):
    """The three stages of pre-training."""

    general: pretrain.PretrainConfig
    reasoning: pretrain.PretrainConfig
    long: pretrain.PretrainConfig


class Student(Config, frozen=True, kw_only=True):
    """The smaller model, and the two ways on from its off-policy distillation."""

    pretrain: pretrain.PretrainConfig
    off_policy: OffPolicyConfig = OffPolicyConfig()
    reinforcement: GrpoConfig = GrpoConfig()
    on_policy: OnPolicyConfig = OnPolicyConfig()


class Recipe(Config, frozen=True, kw_only=True):
    """Everything that decides what a run produces, and `runtime`, which does not."""

    name: str
    pretraining: Pretraining
    student: Student
    seed: int = 1
    """Seed of every training stage; the data and the problem sets do not depend on it."""
    runtime: RuntimeConfig = RuntimeConfig()
    adopt: dict[str, str] = msgspec.field(default_factory=dict)
    """Stage -> a folder that takes the place of its artifact, such as a downloaded model directory."""
    demo: DemoConfig = DemoConfig()
    data: Data = Data()
    tasks: problems.ProblemsConfig = problems.ProblemsConfig()
    tokenizer: VocabularyConfig = VocabularyConfig()
    scaling: ScalingConfig | None = None
    """A sweep of small runs, whose laws a stage that begins a model takes its learning rate and batch from with
    `predicted`; without it there is no such stage."""
    cold_start: ColdStartConfig = ColdStartConfig()
    reasoning_rl: GrpoConfig = GrpoConfig()
    fusion: FusionConfig = FusionConfig()
    general_rl: GrpoConfig = GrpoConfig(queries="general", thinking=None)
    thinking_budget: ThinkingBudgetConfig | None = None
    """Budgets that the general model tells from questions; without it there is no such stage."""
    draft_head: DraftHeadConfig | None = None
    """A head for speculative decoding of the general model; without it there is no such stage."""
    evaluate: suite.EvaluateConfig = suite.EvaluateConfig()


def load(path: Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Reads a recipe file; raises ConfigError with the exact place of what is wrong."""
    return load_config(path, Recipe, overrides)


def links(recipe: Recipe) -> dict[str, str]:
    """Names in the run's folder -> the stage whose artifact they show."""
    return {"model": "thinking-budget" if recipe.thinking_budget else "general-rl"}


def stages(recipe: Recipe) -> list[Stage]:
    """The pipeline, in order."""
    return [*_data_stages(recipe), *_training_stages(recipe), *_student_stages(recipe), _evaluation(recipe)]


def _data_stages(recipe: Recipe) -> list[Stage]:
    data = recipe.data
    listed = data.sources or SOURCES
    outside = tuple(Path(source.path) for source in data.sources if ":" not in source.path)
    reading = SourcesConfig(sources=listed, max_document_bytes=data.max_document_bytes)
    packed = {} if data.sources else {"demo": "demo"}
    steps = [
        Stage("sources", sources.run, reading, packed, outside),
        Stage("extract", extract.run, data.extract, {"raw": "sources"}, revision=2),
        Stage("language", language.run, data.language, {"documents": "extract"}, revision=2),
        Stage("filter", filters.run, data.filters, {"documents": "language"}),
        Stage("dedup", dedup.run, data.dedup, {"documents": "filter"}),
        Stage("tasks", problems.run, recipe.tasks, revision=9),
        Stage(
            "decontaminate",
            decontaminate.run,
            data.decontaminate,
            {"documents": "dedup", "evaluation": "tasks"},
        ),
        Stage("annotate", annotate.run, data.annotate, {"documents": "decontaminate"}),
        Stage("mixture", mixture.run, data.mixture, {"documents": "annotate"}),
        Stage(
            "tokenizer",
            vocabulary.run,
            recipe.tokenizer,
            {"documents": "annotate", "mixture": "mixture"},
            revision=3,
        ),
        Stage(
            "shards",
            shards.run,
            shards.ShardsConfig(),
            {"documents": "annotate", "mixture": "mixture", "tokenizer": "tokenizer"},
        ),
    ]
    if data.sources:
        return steps
    python = msgspec.structs.replace(recipe.demo, python=platform.python_version())
    return [Stage("demo", demo.run, python, revision=6), *steps]


def _training_stages(recipe: Recipe) -> list[Stage]:
    corpus = {"shards": "shards", "tokenizer": "tokenizer"}
    plan, sweep, head = recipe.pretraining, recipe.scaling, recipe.draft_head
    budget = recipe.thinking_budget
    first = corpus | _predicting(plan.general, recipe)
    return [
        *([Stage("scaling", scaling.run, _seeded(sweep, recipe), corpus)] if sweep else []),
        Stage("pretrain-general", pretrain.run, _seeded(plan.general, recipe), first, revision=3),
        Stage(
            "pretrain-reasoning",
            pretrain.run,
            _seeded(plan.reasoning, recipe),
            corpus | {"model": "pretrain-general"},
            revision=2,
        ),
        Stage(
            "pretrain-long",
            pretrain.run,
            _seeded(plan.long, recipe),
            corpus | {"model": "pretrain-reasoning"},
            revision=2,
        ),
        Stage(
            "cold-start", coldstart.run, _seeded(recipe.cold_start, recipe), _on("pretrain-long"), revision=5
        ),
        Stage("reasoning-rl", grpo.run, _seeded(recipe.reasoning_rl, recipe), _on("cold-start"), revision=3),
        Stage("fusion", fusion.run, _seeded(recipe.fusion, recipe), _on("reasoning-rl"), revision=4),
        Stage("general-rl", grpo.run, _seeded(recipe.general_rl, recipe), _on("fusion"), revision=3),
        *(
            [Stage("thinking-budget", thinking_budget.run, _seeded(budget, recipe), _on("general-rl"))]
            if budget
            else []
        ),
        *([Stage("draft-head", draft.run, _seeded(head, recipe), _on("general-rl"))] if head else []),
    ]


def _student_stages(recipe: Recipe) -> list[Stage]:
    student = recipe.student
    corpus = {"shards": "shards", "tokenizer": "tokenizer"}
    first = corpus | _predicting(student.pretrain, recipe)
    taught = {"teacher": "general-rl"}
    return [
        Stage("student-pretrain", pretrain.run, _seeded(student.pretrain, recipe), first, revision=3),
        Stage(
            "student",
            distill.off_policy,
            _seeded(student.off_policy, recipe),
            _on("student-pretrain") | taught,
        ),
        Stage("student-rl", grpo.run, _seeded(student.reinforcement, recipe), _on("student"), revision=3),
        Stage(
            "student-distilled",
            distill.on_policy,
            _seeded(student.on_policy, recipe),
            _on("student") | taught,
            revision=2,
        ),
    ]


def _evaluation(recipe: Recipe) -> Stage:
    inputs = {
        "tasks": "tasks",
        "shards": "shards",
        "reasoning": "pretrain-reasoning",
        "long": "pretrain-long",
        "cold_start": "cold-start",
        "reasoning_rl": "reasoning-rl",
        "fusion": "fusion",
        "general_rl": "general-rl",
        "student": "student",
        "student_rl": "student-rl",
        "student_distilled": "student-distilled",
    }
    return Stage("evaluate", suite.run, _seeded(recipe.evaluate, recipe), inputs)


def _predicting(config: pretrain.PretrainConfig, recipe: Recipe) -> dict[str, str]:
    """The sweep as an input of a stage that takes values from it."""
    if not config.predicted:
        return {}
    if recipe.scaling is None:
        raise ConfigError(
            f"predicted is {list(config.predicted)}, and the recipe has no `scaling`: describe a sweep there, as "
            "recipes/scaling.yaml does, or give the stage its values"
        )
    return {"scaling": "scaling"}


def _on(model: str) -> dict[str, str]:
    return {"model": model, "tasks": "tasks"}


def _seeded(config: Any, recipe: Recipe) -> Any:
    return msgspec.structs.replace(config, seed=recipe.seed)


def estimates(recipe: Recipe) -> dict[str, StageCost]:
    """Expected cost of each training stage."""
    runtime = recipe.runtime
    machine = Machine(ranks=runtime.ranks, gpu=runtime.gpu, layout=runtime.layout)
    return estimate(stages(recipe), recipe.tokenizer.size, machine)
