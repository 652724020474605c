"""Footprint: the memory that one rank needs for a training step, part by part, by formula from shape and layout.

Symbols: D hidden, H query heads, K key-value heads, h head_dim, I width of the MLP or of one expert, E experts,
k experts of a token, V vocabulary, c bytes of a value in forward and backward, t tokens of one rank's forward pass.

What the backward pass keeps of a layer, in bytes a token, on one rank, counted over the operations of the model (norms
work in float32 and keep a float32 copy of their input):

    none, dense      2 (4 + 2c) D + (4 + 3c) (H + K) h + 8H + 4K + 8 + 4c I
    none, experts    as dense without the last term, + (4 - c) D + 3c k D + 4c k I + 32k + 4E + 20
    selective        c (D + D + 2 (H + K) h) + 4H, and c (D + 2I) if dense, c k (D + 2I) + 8k + 8E + 4 if not
    full             c D, and 8k + 4E + 4 of the routing

Experts that are one operator (float32 on a CPU, `model/routed.py`) keep 2 c k I in place of 3c k D + 4c k I, and with
selective recomputation c (D + 2 k I) in place of c k (D + 2I).

Tensor ranks hold D / tp of the stream and 1 / tp of heads and widths; context ranks keep the gathered keys and values;
expert ranks also what came over the network. Experts are taken to be loaded evenly, and packed documents to be attended
to without a mask. At the same time as a layer's backward pass, its gradients take some 2c I of a token, 3c k I where
whole sparse layers are computed again.
"""

from typing import NamedTuple

from pensar.base.config import Config
from pensar.model.config import ROWS_OF_ONE_OPERATOR, ModelConfig
from pensar.train.layout import Layout

STORED = 4
"""Bytes of a stored value: weights, sums of gradients and the optimiser's state are float32."""
MUON_COPIES = 5
"""Matrices alive at once in orthogonalising a stack of them: gradients, iterate, and three products."""
PARTS = ("weights", "gathered", "gradients", "optimizer", "activations", "logits", "buffers", "overhead")


class Step(Config, frozen=True, kw_only=True):
    """What one rank does in a step."""

    context: int
    rows: int = 1
    """Rows of a forward pass."""
    accumulate: int = 1
    """Forward passes one after the other, beside those of a pipeline."""
    chunk_tokens: int = 2_048
    """Tokens whose logits are held at once (`loss.chunk_tokens`)."""
    compute_bytes: int = 2
    """Of a value in forward and backward: 2 is bfloat16, 4 float32."""
    on_cpu: bool = False
    """Where softmax and gradient are written over the logits."""
    muon: bool = False
    exact_balance: bool = True
    """Count the experts' shares in a pass beforehand where there are several forward passes (`loss.exact_balance`)."""

    def tokens(self, layout: Layout) -> int:
        """Of one forward pass on one rank."""
        return self.rows * self.context // layout.cp


class Share(NamedTuple):
    """Parameters of one part of the depth, on one tensor and expert rank, before they are cut into shards."""

    layers: int
    block: int
    """Of a layer, without experts."""
    experts: int
    """Of those of a layer's experts that one expert rank has."""
    embedding: int
    head: int
    """Output projection and last norm; a tied one counts as embedding."""

    @property
    def ends(self) -> int:
        return self.embedding + self.head


class Memory(NamedTuple):
    """Bytes of one rank at the moment of a step at which it needs most."""

    parts: dict[str, float]
    moment: str
    """loss, backward, end of backward, or update."""
    stage: int
    """The part of the depth that needs it."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def share(model: ModelConfig, layout: Layout, stage: int = 0) -> Share:
    """What a rank in part `stage` of the depth works with."""
    D, h, tp = model.hidden_size, model.head_dim, layout.tp
    experts = 3 * D * model.moe_intermediate_size * model.num_experts // layout.ep
    block = 2 * D + 2 * h + 2 * D * h * (model.num_heads + model.num_kv_heads) // tp
    block += D * model.num_experts if model.num_experts else 3 * D * model.intermediate_size // tp
    layers, more = divmod(model.num_layers, layout.pp)
    last, table = stage == layout.pp - 1, model.vocab_size * D // tp
    return Share(
        layers=layers + (stage < more),
        block=block,
        experts=experts,
        embedding=table if stage == 0 or (last and model.tied) else 0,
        head=(D + (0 if model.tied else table)) if last else 0,
    )


def rank_parameters(model: ModelConfig, layout: Layout, stage: int = 0) -> float:
    """Parameters whose stored values one rank holds: the first one, where they do not come out even."""
    part = share(model, layout, stage)
    experts = part.layers * part.experts * _expert_piece(model, layout)
    return (part.layers * part.block + part.ends) / _shards(layout) + experts


def kept_bytes(model: ModelConfig, layout: Layout, step: Step, recompute: str) -> float:
    """What the backward pass keeps of one layer, over the tokens of one forward pass; the formulas are above."""
    c, tp, h = step.compute_bytes, layout.tp, model.head_dim
    D, H, K = model.hidden_size, model.num_heads / tp, model.num_kv_heads / tp
    E, k = model.num_experts, model.experts_per_token
    scattered = D / tp if tp > 1 else 0.0
    if recompute == "full":
        each = c * D / tp + (8 * k + 4 * E + 4 if E else 0) / tp
    elif recompute == "selective":
        each = c * (D / tp + D + scattered + 2 * (H + K) * h) + 4 * H
        if E:
            sent = 2 * c * k * D if layout.ep > 1 else 0
            routed = c * k * (D + 2 * model.moe_intermediate_size)
            if _in_one(model, layout, step):
                routed = c * (D + 2 * k * model.moe_intermediate_size)
            each += routed + 8 * k + 8 * E + 4 + sent
        else:
            each += c * (D + scattered + 2 * model.intermediate_size / tp)
    else:
        each = 2 * ((4 + c) * D / tp + c * D) + (4 + 3 * c) * (H + K) * h + 8 * H + 4 * K + 8
        each += 2 * c * K * h * (layout.cp - 1)
        if E:
            sent = c * k * D + 8 * k if layout.ep > 1 else 0
            routed = (4 - c) * D + c * k * (3 * D + 4 * model.moe_intermediate_size)
            if _in_one(model, layout, step):
                routed = 2 * c * k * model.moe_intermediate_size
            each += (routed + 32 * k + 4 * E + 20 + sent) / tp
        else:
            each += 4 * c * model.intermediate_size / tp
    return each * step.tokens(layout)


def _in_one(model: ModelConfig, layout: Layout, step: Step) -> bool:
    """Whether experts are one operator in training."""
    rows = step.tokens(layout) * model.experts_per_token
    whole = step.on_cpu and step.compute_bytes == STORED and layout.ep * layout.tp == 1
    return bool(model.num_experts) and whole and rows >= ROWS_OF_ONE_OPERATOR * model.num_experts


def working_bytes(model: ModelConfig, layout: Layout, step: Step) -> float:
    """What the backward pass of one layer needs beside what is kept: what it computes again, and gradients."""
    c = step.compute_bytes
    again = kept_bytes(model, layout, step, "none") - kept_bytes(model, layout, step, layout.recompute)
    if _in_one(model, layout, step):
        # Of one expert's rows at a time.
        width = (
            model.experts_per_token
            * (model.hidden_size + 5 * model.moe_intermediate_size)
            / model.num_experts
        )
    elif model.num_experts:
        width = (
            (3 if layout.recompute == "full" else 2) * model.experts_per_token * model.moe_intermediate_size
        )
    else:
        width = 2 * model.intermediate_size
    return again + (c * width + (4 + c) * model.hidden_size) / layout.tp * step.tokens(layout)


def memory(model: ModelConfig, layout: Layout, step: Step, overhead_bytes: float = 0.0) -> Memory:
    """The largest need of any rank, at its worst moment.

    One rank in float32 trains the plain module; everything else is sharded by FSDP2: stored values in float32 shards,
    blocks gathered in the working type two at a time, embedding and output projection gathered throughout.
    `overhead_bytes` is what a process takes before any tensor.
    """
    found = [
        Memory(parts, moment, stage)
        for stage in sorted({0, layout.pp - 1})
        for moment, parts in moments(model, layout, step, stage, overhead_bytes).items()
    ]
    return max(found, key=lambda one: one.total)


def moments(
    model: ModelConfig, layout: Layout, step: Step, stage: int = 0, overhead_bytes: float = 0.0
) -> dict[str, dict[str, float]]:
    """The bytes of each part at each moment of a step, in the order of the step; the loss is where the depth ends."""
    c, D, t = step.compute_bytes, model.hidden_size, step.tokens(layout)
    part = share(model, layout, stage)
    sharded, last = is_sharded(layout, step), stage == layout.pp - 1
    stored = STORED * rank_parameters(model, layout, stage)
    state = 2 * stored - (STORED * _muon_parameters(model, layout, part) if step.muon else 0)
    always = dict.fromkeys(PARTS, 0.0) | {"weights": stored, "optimizer": state, "overhead": overhead_bytes}
    in_flight = min(layout.pp - stage, layout.micro_batches) if layout.pp > 1 else 1
    summed = stored if step.accumulate > 1 else 0.0
    block = part.block + part.experts
    if layout.pp > 1:
        # Gradients are summed over the ranks after the last micro-batch only.
        summed = STORED * (part.layers * block + part.ends) if layout.micro_batches > 1 else summed
    kept = kept_bytes(model, layout, step, layout.recompute)
    held = in_flight * (part.layers * kept + _edge_bytes(model, layout, step))
    table = model.vocab_size * D // layout.tp
    chunk = min(t, step.chunk_tokens)
    head = c * table if last and layout.tp == 1 else 0.0
    gathered = c * part.ends if sharded else 0.0
    found: dict[str, dict[str, float]] = {}
    if last:
        found["loss"] = always | {
            "gathered": gathered,
            "gradients": summed + head,
            "activations": held + (4 + 4 * c) * D * t,
            "logits": chunk * _logit_bytes(layout, step) * model.vocab_size,
        }
    found |= {
        "backward": always
        | {"gathered": gathered + (2 * c * block if sharded else 0)}
        | _block(model, layout, step, part, held, summed + (c * table if last else 0)),
        "end of backward": always | _end(model, layout, step, part, summed, in_flight),
        "update": always
        | {
            "gradients": stored,
            "buffers": _update_bytes(model, layout, step, part),
        },
    }
    for parts in found.values():
        parts["buffers"] += _received_bytes(model, layout, step, stage)
    return found


def _block(
    model: ModelConfig, layout: Layout, step: Step, part: Share, held: float, gradients: float
) -> dict[str, float]:
    """The larger of two: a block's operations, while the gradients of the one after it are on their way to the
    shards, and the sum over the ranks of its own, once its operations are done. In a pipeline that comes later."""
    c, working = step.compute_bytes, working_bytes(model, layout, step)
    if not is_sharded(layout, step) or layout.pp > 1:
        return {"gradients": gradients, "activations": held + working}
    block = part.block + part.experts
    alone = layout.ep * layout.tp > 1  # experts are summed by themselves, before the rest
    leaving = STORED * (part.block if alone else block)
    summing = STORED * (max(part.block, part.experts) if alone else block)
    own = kept_bytes(model, layout, step, layout.recompute)
    if working + leaving + own >= c * block + summing:
        return {"gradients": gradients, "activations": held + working, "buffers": leaving}
    return {"gradients": gradients + c * block, "activations": held - own, "buffers": summing}


def _end(
    model: ModelConfig, layout: Layout, step: Step, part: Share, summed: float, in_flight: int
) -> dict[str, float]:
    """The most that is needed from the first block's backward pass on.

    That pass, when all other layers' gradients are there; where weights are sharded also the sum over ranks of the
    gradients of both ends, or, of a tied embedding, that of its two uses while the weights are still gathered.
    """
    c, block, table = step.compute_bytes, part.block + part.experts, model.vocab_size * model.hidden_size
    stored = STORED * rank_parameters(model, layout, 0 if part.embedding else layout.pp - 1)
    kept = kept_bytes(model, layout, step, layout.recompute) + _edge_bytes(model, layout, step)
    active = kept + working_bytes(model, layout, step)
    if layout.pp > 1:
        # The other micro-batches under way wait for their own; the blocks stay gathered for the next of them.
        waiting = (in_flight - 1) * (part.layers * kept_bytes(model, layout, step, layout.recompute))
        gathered = c * (part.ends + part.layers * block)
        return {"gathered": gathered, "gradients": max(summed, stored), "activations": waiting + active}
    if not is_sharded(layout, step):
        return {"gradients": stored, "activations": active, "buffers": STORED * part.embedding}
    before = max(summed, stored - STORED * (block + part.ends) / _shards(layout))
    ends = c * part.ends
    head = c * table / layout.tp if part.head else 0.0
    found = [
        {"gathered": ends + c * block} | _block(model, layout, step, part, kept, before + head),
        {"gradients": stored + ends, "buffers": STORED * part.ends},
    ]
    if model.tied and part.head and part.embedding:
        others = stored - STORED * part.ends / _shards(layout)
        found.append({"gathered": ends, "gradients": others + ends, "buffers": 2 * ends})
    return max(found, key=lambda parts: sum(parts.values()))


def _received_bytes(model: ModelConfig, layout: Layout, step: Step, stage: int) -> float:
    """The places of what a part of the depth receives, for every micro-batch: the stream, of sparse models also for
    the pass that counts, and its gradient."""
    if layout.pp == 1:
        return 0.0
    a_pass = step.compute_bytes * model.hidden_size * step.tokens(layout) / layout.tp
    forward = (stage > 0) * (2 if model.num_experts else 1)
    return layout.micro_batches * a_pass * (forward + (stage < layout.pp - 1))


def _edge_bytes(model: ModelConfig, layout: Layout, step: Step) -> float:
    """Token ids, positions, segments, tables of cosine and sine, and the mask of a split context, of one pass."""
    mask = (1 + step.compute_bytes) * step.context if layout.cp > 1 else 0
    return float((24 + 2 * step.compute_bytes * model.head_dim + mask) * step.tokens(layout))


def _logit_bytes(layout: Layout, step: Step) -> float:
    """Of one logit: as computed and in float32, its probability, which its gradient replaces, and that as computed."""
    c = step.compute_bytes
    if layout.tp > 1:  # gathered from the ranks
        # Chunks are computed again one at a time; of the one before, as computed, a copy may wait for the collector.
        return (5 if step.tokens(layout) > step.chunk_tokens else 4) * c
    if step.on_cpu:
        return STORED if c == STORED else 2 * c + STORED
    return 2 * STORED if c == STORED else c + 2 * STORED


def is_sharded(layout: Layout, step: Step) -> bool:
    """Whether the weights are gathered block by block, and not simply there."""
    return layout.ranks > 1 or step.compute_bytes < STORED


def whole_experts(model: ModelConfig, layout: Layout) -> bool:
    """Whether every rank's part of the experts is some of them whole, so that nobody else's part is needed for Muon."""
    return bool(model.num_experts) and (
        layout.ep == 1 or model.num_experts // layout.ep >= _expert_shards(layout)
    )


def _shards(layout: Layout) -> int:
    """Pieces into which the weights of a rank's part are cut; context ranks hold pieces of their own."""
    return layout.dp_shard * layout.cp


def _expert_shards(layout: Layout) -> int:
    """Ranks that share the weights of one expert rank's experts."""
    return layout.dp_shard * layout.cp * layout.tp // layout.ep


def _expert_piece(model: ModelConfig, layout: Layout) -> float:
    """Part of an expert rank's experts that one rank stores: whole experts, or slices where there are too few."""
    if not model.num_experts:
        return 0.0
    own, shards = model.num_experts // layout.ep, _expert_shards(layout)
    if own < shards and layout.ep > 1:
        return 1 / shards
    return -(-own // shards) / own


def _muon_parameters(model: ModelConfig, layout: Layout, part: Share) -> float:
    """Stored values of one rank that have a single momentum: the matrices inside its blocks."""
    aside = 2 * model.hidden_size + 2 * model.head_dim + model.hidden_size * model.num_experts
    return part.layers * (
        (part.block - aside) / _shards(layout) + part.experts * _expert_piece(model, layout)
    )


def _update_bytes(model: ModelConfig, layout: Layout, step: Step, part: Share) -> float:
    """Temporaries of clipping, where each tensor's squares are summed by themselves, and of Muon."""
    sharded = is_sharded(layout, step)
    largest = max(
        model.vocab_size * model.hidden_size / layout.tp / _shards(layout),
        2 * part.experts * _expert_piece(model, layout) / 3,
    )
    muon = _muon_bytes(model, layout, part, sharded) if step.muon else 0.0
    return max(muon, STORED * largest if sharded else 0.0)


def _muon_bytes(model: ModelConfig, layout: Layout, part: Share, sharded: bool) -> float:
    """Temporaries of the orthogonalisation: of all matrices of one shape on one rank, of the largest where gathered."""
    D, E = model.hidden_size, model.num_experts
    width = model.moe_intermediate_size if E else model.intermediate_size
    if not sharded:
        # Queries' and key-values' projections, or gates with ups: two matrices a layer have the commonest shape.
        largest = part.layers * 2 * D * width * max(1, E)
    elif whole_experts(model, layout):
        largest = round(2 * D * width * E / layout.ep * _expert_piece(model, layout))
    else:
        largest = D * width * (2 * E if E else 1)
    return STORED * MUON_COPIES * float(largest)
