"""What each training stage of a recipe will cost: tokens, operations, memory and time, before anything runs."""

from collections.abc import Sequence

import msgspec

from pensar.base.stage import Stage
from pensar.model.config import ModelConfig
from pensar.model.count import flops_per_token, forward_flops_per_token, kv_bytes_per_token, parameters
from pensar.model.draft_head import dense_block
from pensar.posttrain.coldstart import ColdStartConfig
from pensar.posttrain.distill import OffPolicyConfig, OnPolicyConfig
from pensar.posttrain.draft import DraftHeadConfig
from pensar.posttrain.fusion import FusionConfig
from pensar.posttrain.grpo import GrpoConfig
from pensar.posttrain.thinking_budget import ThinkingBudgetConfig
from pensar.train.accelerators import GIB, accelerator
from pensar.train.footprint import Step, memory
from pensar.train.layout import parse_layout
from pensar.train.planner import DENSE_MFU, SPARSE_MFU
from pensar.train.pretrain import PretrainConfig
from pensar.train.scaling import STEP_FLOPS, ScalingConfig

TRAIN_FLOPS_PER_SECOND = 3.0e10
"""Of each process in training small models, measured on one core of a 2-core x86 server."""
DRAW_TOKENS_PER_SECOND = 8_000.0
"""Of each process: what the engine draws from a model of a million parameters on such a core."""
PROCESS_BYTES = 450 << 20
"""Memory of a process before any model: the interpreter and its libraries."""
REPLY_TOKENS = 60
"""Assumed length of prompt and reply in the tasks of post-training."""
LEARNED_SHARE = 0.3
"""Of the replies of reinforcement learning: groups that are all right or all wrong teach nothing. Measured over the
tiny recipe, where it falls from about a half to a fifth."""
ANSWERED_AT_ONCE = 128
"""Replies that run at once where thinking budgets are learned."""
BYTES_A_PARAMETER = 20
"""Weights, gradients, two moments and the flat buffer of the gradients' sum, in float32."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is computed on."""

    ranks: int = 1
    gpu: str = ""
    """Of each rank, a name of the table of accelerators; empty for a processor's core."""
    layout: str = ""
    """Of pre-training."""

    def train_flops_per_second(self, model: ModelConfig) -> float:
        """Of one rank."""
        if not self.gpu:
            return TRAIN_FLOPS_PER_SECOND
        return accelerator(self.gpu).bf16_flops * (SPARSE_MFU if model.num_experts else DENSE_MFU)

    def pretraining_bytes(self, model: ModelConfig, config: PretrainConfig) -> float | None:
        """Of all ranks, as a layout spreads the model; None without one."""
        if not self.layout:
            return None
        layout = parse_layout(self.layout)
        rows = max(1, config.batch_tokens // config.context)
        step = Step(
            context=config.context,
            rows=-(-rows // (layout.data * layout.accumulate)),
            accumulate=layout.accumulate,
            compute_bytes=2 if self.gpu else 4,
            muon=config.optimizer.muon,
            exact_balance=config.loss.exact_balance,
        )
        overhead = 2.0 * GIB if self.gpu else float(PROCESS_BYTES)
        return self.ranks * memory(model, layout, step, overhead).total


class StageCost(msgspec.Struct, frozen=True, kw_only=True):
    """A stage's expected cost over all processes; seconds by the clock."""

    tokens: float = 0.0
    flops: float = 0.0
    memory_bytes: float = 0.0
    seconds: float = 0.0


def estimate(stages: Sequence[Stage], vocab_size: int, machine: Machine) -> dict[str, StageCost]:
    """The expected cost of each stage that trains, by name; a stage's model is found by following its inputs."""
    models: dict[str, ModelConfig] = {}
    found: dict[str, StageCost] = {}
    for stage in stages:
        config = stage.config
        model = models.get(stage.inputs.get("model", ""))
        if isinstance(config, ScalingConfig):
            found[stage.name] = _sweep(config, vocab_size, machine)
        elif isinstance(config, PretrainConfig):
            if config.shape is not None:
                model = config.shape.model(vocab_size)
            if model is not None:
                cost = _training(model, config.tokens, config.context, config.batch_tokens, 0, machine)
                spread = machine.pretraining_bytes(model, config)
                found[stage.name] = (
                    cost if spread is None else msgspec.structs.replace(cost, memory_bytes=spread)
                )
        elif model is not None and isinstance(config, ColdStartConfig | FusionConfig | OffPolicyConfig):
            tokens = config.steps * config.batch_size * REPLY_TOKENS
            drawn = 0 if isinstance(config, ColdStartConfig) else tokens // 4
            batch = config.batch_size * REPLY_TOKENS
            found[stage.name] = _training(model, tokens, REPLY_TOKENS, batch, drawn, machine)
        elif model is not None and isinstance(config, GrpoConfig | OnPolicyConfig):
            group, learned, probed = 1, 1.0, 0
            if isinstance(config, GrpoConfig):
                group, learned, probed = config.group, LEARNED_SHARE, config.probe * config.probe_queries
            tokens = config.steps * config.prompts * group * REPLY_TOKENS
            batch = min(64, config.prompts * group) * REPLY_TOKENS
            learning = int(tokens * learned)
            drawn = (tokens + probed * REPLY_TOKENS) // 2
            found[stage.name] = _training(model, learning, REPLY_TOKENS, batch, drawn, machine)
        elif model is not None and isinstance(config, DraftHeadConfig):
            found[stage.name] = _draft_head(model, config, machine)
        elif model is not None and isinstance(config, ThinkingBudgetConfig):
            replies = config.num_queries * config.samples + config.held_out * (1 + 2 * len(config.shares))
            batch = ANSWERED_AT_ONCE * REPLY_TOKENS
            found[stage.name] = _training(model, 0, REPLY_TOKENS, batch, replies * REPLY_TOKENS, machine)
        if model is not None:
            models[stage.name] = model
    return found


def _draft_head(model: ModelConfig, config: DraftHeadConfig, machine: Machine) -> StageCost:
    """A block several guesses deep, its output projection twice a depth, and forward passes of the model."""
    tokens, batch = config.steps * config.batch_size * REPLY_TOKENS, config.batch_size * REPLY_TOKENS
    drawn = (config.num_queries + config.held_out) * REPLY_TOKENS
    drawing = _training(model, 0, REPLY_TOKENS, batch, drawn, machine)
    learning = _training(dense_block(model), config.depths * tokens, REPLY_TOKENS, batch, 0, machine)
    forward = tokens * forward_flops_per_token(model, REPLY_TOKENS)
    seconds = forward / machine.train_flops_per_second(model) / machine.ranks
    return StageCost(
        tokens=tokens + drawn,
        flops=drawing.flops + learning.flops + forward,
        memory_bytes=learning.memory_bytes + machine.ranks * 4 * parameters(model).total,
        seconds=drawing.seconds + learning.seconds + seconds,
    )


def _sweep(config: ScalingConfig, vocab_size: int, machine: Machine) -> StageCost:
    """All runs of the grid as it begins; each is one rank's alone."""
    alone = msgspec.structs.replace(machine, ranks=1, layout="")
    costs = [
        _training(shape.model(vocab_size), tokens, config.context, batch, 0, alone)
        for shape in config.shapes
        for tokens in config.tokens
        for batch in config.batch_tokens
    ]
    runs = len(config.learning_rates) * config.repeats
    steps = len(config.shapes) * sum(
        tokens // batch for tokens in config.tokens for batch in config.batch_tokens
    )
    seconds = sum(cost.seconds for cost in costs) + steps * STEP_FLOPS / TRAIN_FLOPS_PER_SECOND
    return StageCost(
        tokens=runs * sum(cost.tokens for cost in costs),
        flops=runs * sum(cost.flops for cost in costs),
        memory_bytes=machine.ranks * max(cost.memory_bytes for cost in costs),
        seconds=runs * seconds / machine.ranks,
    )


def _training(
    model: ModelConfig, tokens: int, context: int, batch_tokens: int, drawn: int, machine: Machine
) -> StageCost:
    total, ranks = parameters(model).total, machine.ranks
    each = machine.train_flops_per_second(model)
    learning = tokens * flops_per_token(model, context)
    drawing = drawn * forward_flops_per_token(model, context)
    share = batch_tokens / ranks
    activations = share * (model.num_layers * 34 * model.hidden_size + 3 * model.vocab_size) * 4
    cache = 256 * 128 * kv_bytes_per_token(model, 4) if drawn else 0
    memory = ranks * (PROCESS_BYTES + BYTES_A_PARAMETER * total + activations + cache)
    drawn_per_second = DRAW_TOKENS_PER_SECOND * (each / TRAIN_FLOPS_PER_SECOND) * 1e6 / total
    seconds = (learning / each + drawn / drawn_per_second) / ranks
    return StageCost(tokens=tokens + drawn, flops=learning + drawing, memory_bytes=memory, seconds=seconds)
