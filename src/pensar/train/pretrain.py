"""The pre-training stages: general, reasoning and long context, one function with three configurations.

A stage goes on from the model of the one before it, with its own mixture, context, learning-rate shape and RoPE base
(Qwen3 report, section 3.2).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace as replace_in
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import numpy as np

from pensar.base.config import Config
from pensar.base.errors import ConfigError
from pensar.base.files import write_atomic
from pensar.base.metrics import Recording
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.base.stage import Counts, Runtime
from pensar.data.order import PretrainData
from pensar.model import sizes
from pensar.model.config import ModelConfig, replace
from pensar.model.count import parameters
from pensar.model.lora import LoraConfig
from pensar.model.qwen3 import Qwen3, initialize
from pensar.model.weights import load_model, opened_weights, read_config
from pensar.text.packing import Batch
from pensar.text.tokenizer import Tokenizer
from pensar.train.arithmetic import Precision
from pensar.train.average import AverageConfig
from pensar.train.groups import Groups
from pensar.train.guard import Guard, GuardConfig
from pensar.train.layout import parse_layout
from pensar.train.loop import LoopConfig, Place, finish, fit
from pensar.train.loss import LossConfig
from pensar.train.optimizer import OptimizerConfig
from pensar.train.prediction import predicted_batch, predicted_rates, read_prediction
from pensar.train.recompute import Recompute
from pensar.train.schedule import ScheduleConfig

if TYPE_CHECKING:
    from pensar.train.parallel.mesh import Mesh


HYPERPARAMETERS = "hyperparameters.json"
"""What a stage with predicted values writes: those it was trained with."""
OF_ANY_SIZE = ("size", "previous_token_heads")
"""What a size of the table leaves open."""


class Shape(Config, frozen=True, kw_only=True):
    """The model to start from scratch; the vocabulary comes from the tokenizer."""

    size: str = ""
    """A row of the table of sizes, such as `0.6b`, in place of all the numbers below, which then count for nothing."""
    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 384
    tied: bool = True
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    router_balance_weight: float = 0.001
    """Of the load-balancing loss; stages of some hundred steps need more than those of 10^5 to spread the tokens."""
    initializer_range: float = 0.02
    previous_token_heads: bool = False
    """Begin with heads in the first layer that look at the two tokens before: a model of two layers learns to copy from
    its context within some 10^5 tokens of examples so, and without them not within 10^6."""

    def __post_init__(self) -> None:
        if self.size:
            sizes.size(self.size)
            for field in msgspec.structs.fields(self):
                if field.name not in OF_ANY_SIZE:
                    msgspec.structs.force_setattr(self, field.name, field.default)

    def model(self, vocab_size: int, **rest: Any) -> ModelConfig:
        """The configuration of a model of this shape; `rest` are its other fields."""
        if self.size:
            return replace(sizes.size(self.size, vocab_size), **rest)
        shape = msgspec.structs.asdict(self)
        del shape["previous_token_heads"], shape["size"]
        return ModelConfig(vocab_size=vocab_size, **shape, **rest)


class PretrainConfig(Config, frozen=True, kw_only=True):
    """One pre-training stage."""

    tokens: int
    """Length of the stage; the number of steps follows from it."""
    mixture: str
    """Which of the corpus's mixtures: general, reasoning or long."""
    context: int
    """Tokens in a row."""
    batch_tokens: int = 4_096
    rope_theta: float = 10_000.0
    """The base of RoPE from this stage on; the long-context stage raises it (ABF, arXiv 2309.16039)."""
    max_positions: int = 0
    """Context that the model's configuration names afterwards; 0 for `context`."""
    seed: int = 1
    shape: Shape | None = None
    """The model to begin with; None to go on from the stage's `model` input."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    checkpoint_every: int = 50
    guard: GuardConfig = GuardConfig()
    average: AverageConfig = AverageConfig()
    recompute: Recompute = "none"
    precision: Precision = "auto"
    compile: bool = False
    deterministic: bool = False
    losses_every: int = 0
    observe_every: int = 0
    lora: LoraConfig | None = None
    """Only for a stage that goes on from a model: LoRA leaves the weights that it begins with as they are."""
    predicted: tuple[Literal["lr", "batch"], ...] = ()
    """What the laws of the stage's `scaling` input say in place of the values here: both learning rates of `optimizer`,
    and `batch_tokens`. For a stage that begins a model anew, as the runs of a sweep do."""

    def __post_init__(self) -> None:
        if self.lora is not None and self.shape is not None:
            raise ConfigError(
                "lora beside a shape: the random weights of a new model would stay as they are; leave lora out here, "
                "and set it where a stage goes on from a model"
            )

    def loop(self) -> LoopConfig:
        """The loop's part, with the number of steps that `tokens` makes."""
        rows = max(1, self.batch_tokens // self.context)
        return LoopConfig(
            steps=max(1, self.tokens // (rows * self.context)),
            optimizer=self.optimizer,
            schedule=self.schedule,
            loss=self.loss,
            checkpoint_every=self.checkpoint_every,
            guard=self.guard,
            average=self.average,
            recompute=self.recompute,
            precision=self.precision,
            compile=self.compile,
            deterministic=self.deterministic,
            losses_every=self.losses_every,
            observe_every=self.observe_every,
            lora=self.lora,
        )


def run(config: PretrainConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `shards`, `tokenizer` and, unless a shape begins anew, `model`."""
    return runtime.crew.call(
        _on_rank,
        config,
        dict(inputs),
        out,
        runtime.logs,
        runtime.progress,
        runtime.layout,
        runtime.recording,
    )


def _on_rank(
    world: World,
    config: PretrainConfig,
    inputs: dict[str, Path],
    out: Path,
    logs: Path,
    progress: Progress,
    layout: str,
    recording: Recording,
) -> Counts:
    if not layout:
        return _train(config, inputs, Place(out, logs, world, progress, recording=recording))
    from pensar.train.parallel.run import opened_mesh

    with opened_mesh(world, parse_layout(layout)) as mesh:
        return _train(config, inputs, Place(out, logs, world, progress, mesh, recording))


def _train(config: PretrainConfig, inputs: dict[str, Path], place: Place) -> Counts:
    tokenizer = Tokenizer.load(inputs["tokenizer"])
    shape = _shape(config, inputs, tokenizer)
    config = _with_predictions(config, inputs, shape, place)
    rows, loop, accumulate = max(1, config.batch_tokens // config.context), config.loop(), 1
    if place.mesh is None:
        model = _start(config, inputs, shape)
    else:
        place.mesh.layout.check(shape, config.context, rows)
        model = _spread(config, inputs, shape, place.mesh)
        if place.mesh.layout.recompute != "none":
            loop = msgspec.structs.replace(loop, recompute=place.mesh.layout.recompute)
        place.mesh.layout.check_recompute(shape, loop.recompute)
        accumulate = place.mesh.layout.accumulate
    data = PretrainData(inputs["shards"], mixture=config.mixture, context=config.context, seed=config.seed)
    groups = Groups(data.shards.docs)
    batches_of = in_parts(row_batches(data, config, groups), accumulate)
    name = f"pre-training, {config.mixture}"
    fit(model, batches_of, loop, place, name=name, groups=groups, seed=config.seed)
    finish(model, tokenizer, place)
    num_tokens = loop.steps * rows * config.context
    counts: Counts = {"steps": loop.steps, "tokens": num_tokens, "parameters": parameters(shape).total}
    return counts | (_chosen(config) if config.predicted else {})


def row_batches(
    data: PretrainData, config: PretrainConfig, groups: Groups | None = None
) -> Callable[[int], list[Batch]]:
    """Step -> its batch of packed rows; row i of the global order is a pure function of (seed, mixture, i).

    With `groups` the batches say which of them each token's document belongs to.
    """
    rows = max(1, config.batch_tokens // config.context)

    def batches_of(step: int) -> list[Batch]:
        pairs = [data.row(step * rows + index) for index in range(rows)]
        tokens = np.stack([row.tokens for row in pairs]).astype(np.int32)
        segments = np.stack([row.segments for row in pairs]).astype(np.int32)
        starts = np.ones_like(segments, dtype=bool)
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
        columns = np.arange(tokens.shape[1])[None, :]
        positions = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
        ce = ((segments != 0) & ~starts).astype(np.float32)
        batch = Batch(tokens=tokens, positions=positions.astype(np.int32), segments=segments, ce=ce)
        if groups is None:
            return [batch]
        documents = [row.documents for row in pairs if row.documents is not None]
        chosen = groups.of_document[np.stack(documents)]
        return [replace_in(batch, groups=chosen, num_groups=len(groups))]

    return batches_of


def in_parts(batches_of: Callable[[int], list[Batch]], parts: int) -> Callable[[int], list[Batch]]:
    """The same rows, each batch cut into `parts` micro-batches whose gradients a step sums."""
    if parts == 1:
        return batches_of
    return lambda step: [
        batch.rows(slice(part, None, parts)) for batch in batches_of(step) for part in range(parts)
    ]


class Shown(NamedTuple):
    """A document that a step learned from."""

    row: int
    """Of the step's batch."""
    document: str
    """Id of the document."""
    source: str


def documents_of_step(config: PretrainConfig, shards: Path, artifact: Path, step: int) -> list[Shown]:
    """What step `step` of a finished stage learned from, row by row; ConfigError for a step that it did not take."""
    if "batch" in config.predicted:
        chosen = msgspec.json.decode((artifact / HYPERPARAMETERS).read_bytes())
        config = msgspec.structs.replace(config, batch_tokens=chosen["batch_tokens"])
    steps = config.loop().steps
    if not 0 <= step < steps:
        raise ConfigError(f"step {step} is not one of the stage's {steps:,}; they are numbered from 0")
    data = PretrainData(shards, mixture=config.mixture, context=config.context, seed=config.seed)
    rows = max(1, config.batch_tokens // config.context)
    first = Guard.of(config.guard, artifact).data_step(step) * rows
    ids, sources = data.shards.docs["doc_id"].to_pylist(), data.shards.docs["source"].to_pylist()
    source_of = dict(zip(ids, sources, strict=True))
    return [
        Shown(row, document, source_of[document])
        for row in range(rows)
        for document in data.documents_of(first + row)
    ]


def _shape(config: PretrainConfig, inputs: dict[str, Path], tokenizer: Tokenizer) -> ModelConfig:
    """The model's configuration, with the stage's RoPE base and context."""
    changes = {"rope_theta": config.rope_theta, "max_positions": config.max_positions or config.context}
    if config.shape is not None:
        return config.shape.model(tokenizer.vocab_size, **changes)
    if "model" not in inputs:
        raise ConfigError(
            "the stage has neither a `shape` to begin with nor a `model` to go on from; give one"
        )
    return replace(read_config(inputs["model"]), **changes)


def _with_predictions(
    config: PretrainConfig, inputs: dict[str, Path], shape: ModelConfig, place: Place
) -> PretrainConfig:
    """With the values that the sweep's laws give for this size and its tokens, which rank 0 writes down."""
    if not config.predicted:
        return config
    if config.shape is None or "scaling" not in inputs:
        raise ConfigError(
            f"predicted is {list(config.predicted)}, which takes a `shape` to begin with and a `scaling` input; "
            "give this stage its learning rates and batch instead"
        )
    prediction, size = read_prediction(inputs["scaling"]), parameters(shape).active_non_embedding
    changes: dict[str, Any] = {}
    if "lr" in config.predicted:
        changes["optimizer"] = predicted_rates(prediction, config.optimizer, size, config.tokens)
    if "batch" in config.predicted:
        changes["batch_tokens"] = predicted_batch(prediction, config.context, size, config.tokens)
    config = msgspec.structs.replace(config, **changes)
    if place.world.rank == 0:
        content = msgspec.json.format(msgspec.json.encode(_chosen(config)))
        write_atomic(place.out / HYPERPARAMETERS, content + b"\n")
    return config


def _chosen(config: PretrainConfig) -> dict[str, float]:
    """The values that a prediction may have set."""
    rates = {"lr": config.optimizer.lr} if config.optimizer.muon else {}
    return rates | {"adamw_lr": config.optimizer.adamw_lr, "batch_tokens": config.batch_tokens}


def _start(config: PretrainConfig, inputs: dict[str, Path], shape: ModelConfig) -> Qwen3:
    """The model at the stage's first step."""
    model = Qwen3(shape)
    if config.shape is None:
        model.load_state_dict(load_model(inputs["model"]).state_dict())
    else:
        initialize(model, config.seed, previous_token_heads=config.shape.previous_token_heads)
    return model


def _spread(config: PretrainConfig, inputs: dict[str, Path], shape: ModelConfig, mesh: "Mesh") -> Qwen3:
    """This rank's part of the same model; no rank ever has the whole, but for the heads that look back."""
    from pensar.train.parallel.run import spread_model
    from pensar.train.parallel.shard import from_seed, from_tensors

    if config.shape is None:
        with opened_weights(inputs["model"]) as read:
            return spread_model(shape, mesh, read, config.precision)
    if config.shape.previous_token_heads:
        whole = _start(config, inputs, shape)
        return spread_model(shape, mesh, from_tensors(whole.state_dict()), config.precision)
    return spread_model(shape, mesh, from_seed(shape, config.seed), config.precision)
