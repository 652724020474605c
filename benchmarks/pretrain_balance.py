"""The router's gradient by the balance loss of a batch that is spread over ranks and micro-batches, in three ways.

The whole batch in one piece is the truth. Ours takes the experts' shares of the whole step; the micro-batch form, those
of each piece alone; the running form, those of the step so far over all ranks.
"""

import numpy as np
import torch
from torch import Tensor

from pensar.base.ranks import Crew, World
from pensar.model.config import ModelConfig
from pensar.model.moe import balance_loss, expert_counts, routings
from pensar.model.qwen3 import Qwen3, initialize
from pensar.text.packing import Batch
from pensar.train.loss import LossConfig, inputs_of
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.step import Replicated, Work

RANKS, MICRO_BATCHES, TOKENS = 2, 4, 64
CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    tied=True,
    initializer_range=0.1,
    num_experts=16,
    experts_per_token=2,
    moe_intermediate_size=32,
    router_balance_weight=1.0,
)


def errors() -> dict[str, float]:
    """|gradient - whole batch's| / |whole batch's| over the routers of all layers, for each form."""
    pieces = micro_batches()
    everything = np.concatenate([piece.tokens for piece in pieces])
    whole = router_gradient(World(), [_batch(everything)])
    with Crew(ranks=RANKS, threads=1) as crew:
        ours = crew.call(router_gradient, pieces)
    found = {"ours": ours, "micro-batch": _with_shares(pieces, running=False)}
    found["running average"] = _with_shares(pieces, running=True)
    return {name: float((gradient - whole).norm() / whole.norm()) for name, gradient in found.items()}


def micro_batches() -> list[Batch]:
    """Of a row for each rank; every row draws from words of its own, so that routing differs from piece to piece."""
    rng = np.random.default_rng(0)
    rows = RANKS * MICRO_BATCHES
    tokens = np.stack([rng.integers(0, 8, TOKENS) + row * CONFIG.vocab_size // rows for row in range(rows)])
    parts = np.split(tokens.astype(np.int32), MICRO_BATCHES)
    return [_batch(part) for part in parts]


def _batch(tokens: np.ndarray) -> Batch:
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    nothing = np.zeros(tokens.shape, np.float32)
    return Batch(tokens=tokens, positions=positions, segments=np.ones_like(tokens), ce=nothing)


def router_gradient(world: World, batches: list[Batch]) -> Tensor:
    """That of the training step's balance loss, summed over ranks and micro-batches."""
    model, config = _model(), LossConfig()
    spread = Replicated(world)
    mine = [spread.share(batch) for batch in batches]
    balance = spread.balance(model, sum(batch.num_tokens for batch in batches), mine, config)
    spread.backward(model, mine, Work((1.0, 1.0, 1.0), config, None, balance))
    spread.reduce_gradients(Optimizer(model, OptimizerConfig(muon=False)))
    return _routers(model)


def _with_shares(pieces: list[Batch], *, running: bool) -> Tensor:
    """Piece by piece and rank by rank, with the shares of the piece on its rank, or of the step so far."""
    model = _model()
    seen_LE = torch.zeros(CONFIG.num_layers, CONFIG.num_experts)
    for piece in pieces:
        layers = []
        for rank in range(RANKS):
            inputs_of(_row(piece, rank)).hidden(model)
            layers.append(routings(model))
        seen_LE = seen_LE + sum(expert_counts(layer) for layer in layers)
        for layer in layers:
            counts_LE = seen_LE if running else expert_counts(layer)
            balance_loss(layer, counts_LE, num_tokens=float(RANKS * MICRO_BATCHES * TOKENS)).backward()
    return _routers(model)


def _row(piece: Batch, rank: int) -> Batch:
    return piece.rows(slice(rank, rank + 1))


def _model() -> Qwen3:
    model = Qwen3(CONFIG)
    initialize(model, 0)
    return model.train()


def _routers(model: Qwen3) -> Tensor:
    gates = [p.grad for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    return torch.cat([gate.flatten() for gate in gates if gate is not None])
