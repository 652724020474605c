"""Layers: what one step does in every layer: norms of gradients, weights and updates, size of the stream, scores.

All are those of the whole step and model, however both are spread over ranks.
Shape legend: B batch, T tokens, H query heads, K key-value heads, g query heads of a key-value head, h head_dim.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pensar.base.ranks import World
from pensar.model.attention import Attend
from pensar.model.qwen3 import Qwen3
from pensar.train.loss import Inputs
from pensar.train.step import Spread

if TYPE_CHECKING:
    from pensar.train.parallel.mesh import Mesh

ENDS = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "final_norm", "lm_head.weight": "head"}
KINDS = ("attention", "mlp", "router", "norm")
"""Of the parameters of a layer."""
QUERIES = 256
"""Queries whose attention scores are held at once."""


class Layers:
    """One observed step of training, from within."""

    def __init__(self, model: Qwen3, world: World, mesh: "Mesh | None", *, scores: bool = True) -> None:
        """Without `scores` attention is not looked at."""
        self._with_scores = scores
        self._config, self._mesh = model.config, mesh
        self._world = world if mesh is None else mesh.world
        self._whole = mesh is None or mesh.layout.pp == 1
        """Whether every rank has all layers: where it has not, stream and scores are not looked at."""
        places = [(name, -1) for name in ENDS.values()]
        places += [(kind, layer) for kind in KINDS for layer in range(model.config.num_layers)]
        self._place = {place: index for index, place in enumerate(places)}
        self._gradients = self._weights = torch.zeros(len(places), dtype=torch.float64)
        self._before: dict[str, Tensor] = {}
        self._squares = torch.zeros(model.config.num_layers + 1, dtype=torch.float64)
        self._tokens = torch.zeros((), dtype=torch.float64)
        self._real = torch.zeros(0, dtype=torch.bool)
        self._scores: dict[int, float] = {}
        self._routed: World | None = None

    @contextmanager
    def looking(self, model: Qwen3, spread: Spread) -> Iterator[None]:
        """Within it every forward pass adds its tokens."""
        with ExitStack() as stack:
            if self._whole:
                self._routed = spread.routed
                for index, module in enumerate((model.model.embed_tokens, *model.model.layers)):
                    stack.callback(module.register_forward_hook(self._adding(index)).remove)
            yield

    def inputs(self, inputs: Inputs, segments: Tensor) -> Inputs:
        """The same inputs, their attention looked at."""
        self._real = inputs.routed
        self._tokens += int(inputs.routed.sum())
        if inputs.columns is not None or not self._with_scores:
            return inputs
        return inputs._replace(attend=_Scores(inputs.attend, segments.to(inputs.tokens.device), self._scores))

    def gradients(self, model: Qwen3) -> None:
        """Takes the gradients' norms, and remembers the weights before the update, in the processor's memory."""
        named = dict(_trained(model))
        self._gradients = self._sum(
            {name: p.grad.detach() for name, p in named.items() if p.grad is not None}
        )
        self._weights = self._sum({name: p.detach() for name, p in named.items()})
        self._before = {name: _local(p.detach()).to("cpu", copy=True) for name, p in named.items()}

    def row(self, model: Qwen3) -> dict[str, Any]:
        """After the update; every rank must come here."""
        updates = {}
        for name, parameter in _trained(model):
            now = _local(parameter.detach()).cpu()
            updates[name] = _like(parameter, now - self._before[name])
        found = torch.stack([self._gradients, self._weights, self._sum(updates)])
        if self._mesh is not None:
            self._world.all_reduce_(found)
        gradients, weights, changes = found.sqrt()
        row = {
            "gradient_norm": self._by_kind(gradients, weights),
            "weight_norm": self._by_kind(weights, weights),
            "update_ratio": self._by_kind(changes / weights.clamp(min=1e-300), weights),
        }
        return row | self._of_activations()

    def _of_activations(self) -> dict[str, Any]:
        if not self._whole or self._routed is None:
            return {}
        sums = torch.cat((self._squares, self._tokens[None]))
        self._routed.all_reduce_(sums)
        row: dict[str, Any] = {"stream_rms": (sums[:-1] / sums[-1].clamp(min=1)).sqrt().tolist()}
        every = self._world.gather(self._scores)
        if any(every):
            layers = range(self._config.num_layers)
            row["attention_logit"] = [max(scores.get(n, -math.inf) for scores in every) for n in layers]
        return row

    def _by_kind(self, values: Tensor, weights: Tensor) -> dict[str, Any]:
        """A number for each end of the model and a list over layers for each kind, those that there are."""
        row: dict[str, Any] = {}
        for (kind, layer), index in self._place.items():
            if float(weights[index]):
                if layer < 0:
                    row[kind] = float(values[index])
                else:
                    row.setdefault(kind, []).append(float(values[index]))
        return row

    def _sum(self, tensors: dict[str, Tensor]) -> Tensor:
        """Sums of squares by place; of a spread model this rank's part of them."""
        sums = torch.zeros(len(self._place), dtype=torch.float64)
        norms = {name: torch.linalg.vector_norm(_local(tensor).float()) for name, tensor in tensors.items()}
        if not norms:
            return sums
        squares = torch.stack(list(norms.values())).double().cpu().square()
        for (name, tensor), square in zip(tensors.items(), squares, strict=True):
            sums[self._place[_place_of(name)]] += square / self._copies(name, tensor)
        return sums

    def _copies(self, name: str, tensor: Tensor) -> float:
        """How many ranks hold the same part; infinitely many for what another one counts."""
        if self._mesh is None:
            return 1
        from pensar.train.parallel.optimizer import EMBEDDING
        from pensar.train.parallel.parts import copies_of

        if name == EMBEDDING and self._mesh.depth.rank > 0:
            return math.inf
        return copies_of(tensor, self._mesh.stage.size)

    def _adding(self, index: int) -> Any:
        def add(module: nn.Module, arguments: Any, out: Tensor) -> None:
            with torch.no_grad():
                squares_N = out.detach().float().square().mean(-1).flatten()
                self._squares[index] += squares_N[self._real].double().sum().cpu()

        return add


class _Scores:
    """An attention whose largest scores, of a query and a key that it sees, are kept by layer."""

    def __init__(self, attend: Attend, segments_BT: Tensor, largest: dict[int, float]) -> None:
        self._attend, self._segments_BT, self._largest = attend, segments_BT, largest

    def __call__(self, layer: int, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(q_BTHh.device.type, enabled=False):
            found = largest_score(q_BTHh, k_BTKh, self._segments_BT)
        self._largest[layer] = max(found, self._largest.get(layer, -math.inf))
        return self._attend(layer, q_BTHh, k_BTKh, v_BTKh)


def largest_score(q_BTHh: Tensor, k_BTKh: Tensor, segments_BT: Tensor) -> float:
    """The largest q.k / sqrt(h) over heads, queries and the keys before them in their document; padding aside."""
    num_tokens, heads, h = q_BTHh.shape[1:]
    groups = heads // k_BTKh.shape[2]
    columns = torch.arange(num_tokens, device=segments_BT.device)
    largest = -math.inf
    for start in range(0, num_tokens, QUERIES):
        stop = min(start + QUERIES, num_tokens)
        q_BtKgh = q_BTHh[:, start:stop].float().unflatten(2, (-1, groups))
        scores_BKgts = torch.einsum("btkgh,bskh->bkgts", q_BtKgh, k_BTKh[:, :stop].float())
        mine_Bt, keys_Bs = segments_BT[:, start:stop], segments_BT[:, :stop]
        seen_Bts = (mine_Bt[:, :, None] == keys_Bs[:, None, :]) & (mine_Bt[:, :, None] != 0)
        seen_Bts &= columns[None, :stop] <= columns[start:stop, None]
        scores_BKgts = scores_BKgts.masked_fill(~seen_Bts[:, None, None], -math.inf)
        largest = max(largest, float(scores_BKgts.max()) / math.sqrt(h))
    return largest


def _trained(model: Qwen3) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _place_of(name: str) -> tuple[str, int]:
    """Kind and layer of a parameter; -1 for the ends of the model."""
    if name in ENDS:
        return ENDS[name], -1
    layer, part = name.split(".layers.")[1].split(".", 1)
    if "norm" in part:
        return "norm", int(layer)
    if part.startswith("mlp.gate."):
        return "router", int(layer)
    return ("attention" if part.startswith("self_attn.") else "mlp"), int(layer)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a spread tensor; a whole one as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    """`local` as a part spread like the parameter."""
    if not hasattr(parameter, "to_local"):
        return local
    from pensar.train.parallel.parts import like

    return like(parameter, local.to(parameter.device))
