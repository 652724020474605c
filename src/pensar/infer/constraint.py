"""Constraint: what a request allows beyond plain sampling rules."""

from typing import Protocol

from torch import Tensor


class Constraint(Protocol):
    """One request's, asked before every token and told every token."""

    def apply(self, logits_V: Tensor) -> None:
        """Changes float32 logits in place for the next place; ModelError where nothing is left to say."""
        ...

    def accept(self, token: int) -> None:
        """`token` comes next."""
        ...

    def rollback(self, count: int) -> None:
        """Takes the last `count` tokens back."""
        ...
