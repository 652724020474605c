"""Optimizer: Muon for the matrices inside the blocks, AdamW for everything else.

Muon (Jordan et al., 2024; arXiv 2502.16982 for the update's scale) orthogonalises the momentum of each matrix with
five Newton-Schulz steps. Matrices of one shape go through them as one batch, in float32 on processors without
bfloat16 units.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pensar.base.config import Config
from pensar.base.errors import RunError
from pensar.base.ranks import World
from pensar.model import hardware


class OptimizerConfig(Config, frozen=True, kw_only=True):
    lr: float = 0.005
    """Peak learning rate of Muon; the root-mean-square of its update is 0.2 times this."""
    adamw_lr: float = 0.001
    """Peak learning rate of embeddings, norms, routers and the output projection; of everything if `muon` is off."""
    muon: bool = True
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    """Decoupled, on matrices only."""
    clip_norm: float = 1.0


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of each matrix [n, rows, columns] by the quintic Newton-Schulz iteration.

    In bfloat16 on GPUs that have it, ten times as fast there, to which the iteration is as indifferent as to its own
    singular values between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if hardware.capability(x.device) >= hardware.AMPERE:
        x = x.bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = x.mT if tall else x
    return result.to(matrices.dtype)


class Optimizer:
    """The state of both optimisers.

    A step is `clip`, then `update` with both learning rates scaled; in between the caller may still refuse it.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        inside = [p for name, p in named if config.muon and p.dim() >= 2 and is_block_matrix(name)]
        chosen = {id(p) for p in inside}
        rest = [p for _, p in named if id(p) not in chosen]
        self.parameters = [p for _, p in named]
        self._names = {id(p): name for name, p in named}
        self.groups = _by_shape(inside)
        self.momenta = [torch.zeros_like(torch.stack([p.detach() for p in group])) for group in self.groups]
        decay = [p for p in rest if p.dim() >= 2]
        plain = [p for p in rest if p.dim() < 2]
        self.adamw = torch.optim.AdamW(
            [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.adamw_lr,
            betas=(config.beta1, config.beta2),
            fused=True,
        )

    def step(self, scale: float, world: World) -> float:
        """`clip` and `update` in one; returns the gradient's norm before clipping.

        Raises RunError, with the parameters as they were, when the gradient is not finite.
        """
        norm = self.clip()
        if not math.isfinite(norm):
            raise RunError(
                f"the gradient's norm is {norm}; lower the learning rate or look at the batch's data"
            )
        self.update(scale, world)
        return norm

    def clip(self) -> float:
        """Scales the gradients down to the norm that the configuration allows; returns their norm before that."""
        return float(nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm))

    def update(self, scale: float, world: World) -> None:
        """Applies the gradients and clears them.

        They are the same on every rank of `world`; each rank orthogonalises its share of the matrices.
        """
        for group in self.adamw.param_groups:
            group["lr"] = self.config.adamw_lr * scale
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            self.adamw.step()
            # Fused kernels leave the versions as they are, by which others see that weights have changed.
            torch.autograd.graph.increment_version(
                [p for group in self.adamw.param_groups for p in group["params"]]
            )
            for matrices, momentum in zip(self.groups, self.momenta, strict=True):
                self._muon(matrices, momentum, self.config.lr * scale, world)
        self.clear()

    def clear(self) -> None:
        """Forgets the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def _muon(self, group: list[nn.Parameter], momentum: Tensor, lr: float, world: World) -> None:
        gradients = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in group])
        momentum.mul_(self.config.momentum).add_(gradients)
        nesterov = gradients.add_(momentum, alpha=self.config.momentum)
        rows, columns = nesterov.shape[-2:]
        matrices = nesterov.reshape(-1, rows, columns)
        if world.size == 1:
            update = orthogonalize(matrices).view_as(nesterov)
        else:
            # A sum with zeros is a gather that every collective library has.
            update = torch.zeros_like(matrices)
            update[world.rank :: world.size] = orthogonalize(matrices[world.rank :: world.size])
            update = world.all_reduce_(update).view_as(nesterov)
        scale = lr * 0.2 * math.sqrt(max(rows, columns))
        for parameter, change in zip(group, update, strict=True):
            parameter.mul_(1 - lr * self.config.weight_decay).add_(change, alpha=-scale)

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the state by kind and parameter, sharing memory with the optimiser."""
        named: dict[str, Tensor] = {}
        for matrices, momentum in zip(self.groups, self.momenta, strict=True):
            named |= {f"momentum.{self._names[id(p)]}": m for p, m in zip(matrices, momentum, strict=True)}
        for group in self.adamw.param_groups:
            for parameter in group["params"]:
                state, name = self.adamw.state[parameter], self._names[id(parameter)]
                if not state:  # as AdamW itself begins at its first step
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                named[f"first.{name}"], named[f"second.{name}"] = state["exp_avg"], state["exp_avg_sq"]
                named[f"steps.{name}"] = state["step"]
        return named

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the values of a `state_dict`."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


def is_block_matrix(name: str) -> bool:
    """Whether a parameter of two or more dimensions is Muon's: a matrix inside a block, routers apart."""
    return ".layers." in name and not name.endswith("mlp.gate.weight")


def _by_shape(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    groups: dict[torch.Size, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.shape, []).append(parameter)
    return list(groups.values())
