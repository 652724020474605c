"""Weight sync: new weights of the same names and shapes in place of a model's own."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pensar.base.errors import ModelError
from pensar.model.qwen3 import Qwen3


def checked_weights(model: Qwen3, weights: Mapping[str, Tensor] | Qwen3) -> Mapping[str, Tensor]:
    """`weights` by name; ModelError where names or shapes are not those of `model`."""
    new = dict(weights.named_parameters()) if isinstance(weights, Qwen3) else weights
    own = dict(model.named_parameters())
    if new.keys() != own.keys():
        odd = sorted(new.keys() ^ own.keys())
        raise ModelError(f"the new weights differ from the model in {len(odd)} names, such as {odd[0]}")
    for name, parameter in own.items():
        if new[name].shape != parameter.shape:
            raise ModelError(
                f"{name} has shape {list(new[name].shape)} in the new weights and {list(parameter.shape)} in the "
                "model; an engine keeps one shape, make a new one"
            )
    return new


def weights_stamp(model: Qwen3) -> int:
    """A number that changes when any weight is changed in place, by an optimiser's step for instance."""
    return sum(parameter._version for parameter in model.parameters())  # noqa: SLF001 - torch has no public name


@torch.no_grad()
def replace_weights(model: Qwen3, weights: Mapping[str, Tensor] | Qwen3) -> None:
    """Copies `weights` into the model, also from another device or type; ModelError before anything is changed."""
    new = checked_weights(model, weights)
    for name, parameter in model.named_parameters():
        if new[name].data_ptr() != parameter.data_ptr():
            parameter.copy_(new[name])
