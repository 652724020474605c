"""ShardedOptimizer: Muon and AdamW over the parts of a spread model; every rank updates the part that it holds.

AdamW and Muon's momentum work element by element, so they need no exchange. Muon's orthogonalisation needs whole
matrices: each has an owner among the ranks that share it (`owners`).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from pensar.base.ranks import World
from pensar.model.qwen3 import Qwen3
from pensar.train.optimizer import OptimizerConfig, is_block_matrix, orthogonalize
from pensar.train.parallel.mesh import Mesh
from pensar.train.parallel.owners import Owners
from pensar.train.parallel.parts import copies_of, like, local_of

EMBEDDING = "model.embed_tokens.weight"


class ShardedOptimizer:
    """The same updates as `train.optimizer.Optimizer` makes on one rank, up to rounding."""

    def __init__(self, model: Qwen3, config: OptimizerConfig, mesh: Mesh) -> None:
        self.config, self._mesh = config, mesh
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.muon = [
            name for name, p in self.named.items() if config.muon and p.dim() >= 2 and is_block_matrix(name)
        ]
        self.rest = [name for name in self.named if name not in set(self.muon)]
        self._alone = [name for name in self.muon if _whole_matrices(self.named[name])]
        shared: dict[str, Any] = {name: self.named[name] for name in self.muon if name not in self._alone}
        self._owners = Owners(shared, mesh.stage, mesh.device)
        self.momentum = {name: self._zeros(name) for name in self.muon}
        self.first = {name: self._zeros(name) for name in self.rest}
        self.second = {name: self._zeros(name) for name in self.rest}
        self.steps = {name: torch.zeros((), device=mesh.device) for name in self.rest}

    def clip(self) -> float:
        """Scales the gradients down to the norm that the configuration allows; returns their norm before that."""
        norm = self.gradient_norm()
        factor = self.config.clip_norm / (norm + 1e-6)
        if factor < 1:
            for name in self.named:
                self._gradient(name).mul_(factor)
        return norm

    @torch.no_grad()
    def update(self, scale: float, world: World) -> None:
        """Applies the gradients and clears them; `world` is not needed, each part knows its ranks."""
        self._adamw(scale)
        self._muon(self.config.lr * scale)
        self.clear()

    def clear(self) -> None:
        """Forgets the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def gradient_norm(self) -> float:
        """Of all parameters of all ranks, each value once."""
        squares = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        ranks = self._mesh.stage.size
        for name, parameter in self.named.items():
            # A tied embedding is at both ends of a pipeline and counts at the first.
            twice = name == EMBEDDING and self._mesh.depth.rank > 0
            if parameter.grad is not None and not twice:
                local = local_of(parameter.grad)
                squares += local.float().pow(2).sum().double() / copies_of(parameter, ranks)
        return math.sqrt(float(self._mesh.world.all_reduce_(squares.cpu())))  # one wait for the device

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the state by name, spread like the parameter that it belongs to."""
        named: dict[str, Tensor] = {}
        for kind, tensors in (("momentum", self.momentum), ("first", self.first), ("second", self.second)):
            named |= {f"{kind}.{name}": like(self.named[name], value) for name, value in tensors.items()}
        return named | {f"steps.{name}": value for name, value in self.steps.items()}

    def _zeros(self, name: str) -> Tensor:
        return torch.zeros_like(local_of(self.named[name]).detach())

    def _gradient(self, name: str) -> Tensor:
        parameter = self.named[name]
        if parameter.grad is None:  # experts that no token met
            parameter.grad = torch.zeros_like(parameter)
        return local_of(parameter.grad)

    def _adamw(self, scale: float) -> None:
        for decayed in (True, False):
            names = [name for name in self.rest if (self.named[name].dim() >= 2) is decayed]
            names = [name for name in names if local_of(self.named[name]).numel()]
            if not names:
                continue
            adamw(
                [local_of(self.named[name]).detach() for name in names],
                [self._gradient(name) for name in names],
                [self.first[name] for name in names],
                [self.second[name] for name in names],
                [],
                [self.steps[name] for name in names],
                fused=True,
                amsgrad=False,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                lr=self.config.adamw_lr * scale,
                weight_decay=self.config.weight_decay if decayed else 0.0,
                eps=1e-8,
                maximize=False,
            )

    def _muon(self, lr: float) -> None:
        for name in self.muon:
            self.momentum[name].mul_(self.config.momentum).add_(self._gradient(name))
        for name in self._alone:
            self._apply(name, local_of(self.named[name]), orthogonalize(self._nesterov(name)), lr)
        for matrix, update in self._owners.work(self._nesterov, orthogonalize):
            piece = self._owners.piece_of(matrix, local_of(self.named[matrix.name]))
            self._apply(matrix.name, piece, update, lr)

    def _nesterov(self, name: str) -> Tensor:
        return self._gradient(name).add(self.momentum[name], alpha=self.config.momentum)

    def _apply(self, name: str, weights: Tensor, update: Tensor, lr: float) -> None:
        scale = lr * 0.2 * math.sqrt(max(self.named[name].shape[-2:]))
        weights.detach().mul_(1 - lr * self.config.weight_decay).add_(update, alpha=-scale)


def _whole_matrices(parameter: Any) -> bool:
    """Whether this rank's part of a stack of matrices is a stack of whole ones."""
    if parameter.dim() < 3 or not isinstance(parameter, DTensor):
        return not isinstance(parameter, DTensor)
    # torch has two classes for parts along a dimension, and one for what is not cut
    return all(getattr(placement, "dim", 0) == 0 for placement in parameter.placements)
