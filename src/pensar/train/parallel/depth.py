"""Depth: the layers of a model dealt out to the ranks of a pipeline, each of which holds one part of it or several.

Parts are numbered from the embedding on and dealt out in turn, so that with several parts a rank the way through the
pipeline is shorter than the depth of one rank's layers (arXiv 2104.04473, section 2.2.2).
"""

from torch import nn

from pensar.model.qwen3 import Qwen3
from pensar.train.parallel.mesh import Mesh


class Part(nn.Module):
    """Consecutive layers of a model as a module of their own, with whatever stands at its ends; it shares them all."""

    def __init__(self, model: Qwen3, number: int, count: int) -> None:
        super().__init__()
        self.number, self.count = number, count
        self.first, self.stop = layers_of(number, count, model.config.num_layers)
        modules = model.model.layers._modules  # noqa: SLF001 - they are known by their number in the whole model
        self.layers = nn.ModuleList(modules[str(index)] for index in range(self.first, self.stop))
        whole = model.model
        ends: list[nn.Module] = []
        if self.is_first or (self.is_last and model.config.tied):
            ends.append(whole.embed_tokens)
        if self.is_last:
            ends += [whole.norm, *([] if model.lm_head is None else [model.lm_head])]
        self.ends = nn.ModuleList(ends)

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1


def cut_depth(model: Qwen3, mesh: Mesh) -> None:
    """Leaves this rank's layers in the model, under their names; the embedding at the start, norm and head at the end.

    A tied embedding is at both ends.
    """
    depth, layers = mesh.depth, model.model.layers
    count = depth.size * mesh.layout.virtual
    numbers = range(depth.rank, count, depth.size)
    spans = [layers_of(number, count, model.config.num_layers) for number in numbers]
    kept = {index for first, stop in spans for index in range(first, stop)}
    for index in range(model.config.num_layers):
        if index not in kept:
            del layers._modules[str(index)]  # noqa: SLF001 - `del layers[index]` would rename the others
    last = depth.rank == depth.size - 1
    if depth.rank and not (last and model.config.tied):
        model.model.embed_tokens = None
    if not last:
        model.model.norm = None  # type: ignore[assignment]
        model.lm_head = None
    # Beside the model's own modules: each weight has one name.
    vars(model)["parts"] = [Part(model, number, count) for number in numbers]


def parts_of(model: Qwen3) -> list[Part]:
    """This rank's parts of the depth, from the embedding on."""
    parts: list[Part] = vars(model)["parts"]
    return parts


def layers_of(number: int, count: int, num_layers: int) -> tuple[int, int]:
    """First layer of a part and the one after its last: equal shares, the earlier parts one more where they differ."""
    share, more = divmod(num_layers, count)
    first = number * share + min(number, more)
    return first, first + share + (number < more)
