"""AdaptiveBudget: how much thinking a question deserves, told from the model's own state at the end of the prompt.

A ridge regression from the last hidden state to the logarithm of the reasoning tokens that right answers took. Its
errors on questions that it has not seen say how much to add, so that a given share of questions can finish their
thinking. Shape legend: n questions, D hidden.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pensar.base.errors import DataError, ModelError
from pensar.model import tensorfile

NAME = "thinking_budget.safetensors"
"""In a model's folder."""
FEWEST = 16
"""Questions to learn from."""
LONGEST, MOST = 40.0, 2**62
"""Logarithm from which a length is no limit any more, and the budget that says so."""
PENALTIES = 10.0 ** np.arange(-3, 5)
"""Of which the one with the smallest error on left-out questions is taken."""

Floats = npt.NDArray[np.float64]


class AdaptiveBudget:
    """`budget(hidden, share)`: reasoning tokens that suffice for this share of questions like this one."""

    def __init__(self, mean_D: Tensor, weight_D: Tensor, offset: float, errors_n: Tensor) -> None:
        self.mean_D, self.weight_D = mean_D, weight_D
        self.offset = offset
        self.errors_n = errors_n
        """Errors on left-out questions in log(1 + tokens), ascending."""

    @classmethod
    def fit(cls, hidden_nD: Tensor, reasoning: Sequence[Sequence[int]]) -> "AdaptiveBudget":
        """Learns from the reasoning tokens of each question's right replies, one at least, that ended by themselves.

        What is expected of a question is learned from all its replies. The errors are those of its first, so that as
        many questions count as there are. Raises DataError for fewer than FEWEST of them, as from fewer nothing can be
        said about a new one.
        """
        if len(reasoning) < FEWEST:
            raise DataError(
                f"{len(reasoning)} answered questions to learn thinking budgets from; give at least {FEWEST}"
            )
        x_nD = hidden_nD.detach().double().cpu().numpy()
        y_n = np.asarray([np.log1p(np.asarray(lengths, np.float64)).mean() for lengths in reasoning])
        first_n = np.log1p(np.asarray([lengths[0] for lengths in reasoning], np.float64))
        mean_D, offset = x_nD.mean(0), float(y_n.mean())
        left, sizes, right = np.linalg.svd(x_nD - mean_D, full_matrices=False)
        found = [
            _left_out(left, sizes, y_n - offset, penalty * float(np.square(sizes).mean()) / len(y_n))
            for penalty in PENALTIES
        ]
        errors_n, shrunk = min(found, key=lambda fit: float(np.square(fit[0]).mean()))
        weight_D = right.T @ (shrunk * (left.T @ (y_n - offset)))
        return cls(
            torch.from_numpy(mean_D).float(),
            torch.from_numpy(weight_D).float(),
            offset,
            torch.from_numpy(np.sort(errors_n + first_n - y_n)).float(),
        )

    def budget(self, hidden: Tensor, share: float) -> int:
        """`hidden` [D] is the state after the final norm that the reply's first token is drawn from."""
        centred = hidden.float().cpu() - self.mean_D
        expected = float(centred @ self.weight_D) + self.offset
        # The errors of n questions and the next one are equally likely to rank anywhere.
        rank = min(len(self.errors_n) - 1, math.ceil(share * (len(self.errors_n) + 1)) - 1)
        length = expected + float(self.errors_n[max(0, rank)])
        # Also NaN, of a state that no token can be drawn from: whoever draws says so.
        return max(0, math.ceil(math.expm1(length))) if length < LONGEST else MOST

    def save(self, folder: Path) -> None:
        tensors = {"mean": self.mean_D, "weight": self.weight_D, "errors": self.errors_n}
        tensorfile.write(tensors, folder / NAME, {"offset": repr(self.offset)})

    @classmethod
    def load(cls, folder: Path, hidden_size: int) -> "AdaptiveBudget | None":
        """None where the folder has none; ModelError where it is of another model."""
        path = folder / NAME
        if not path.is_file():
            return None
        with tensorfile.opened(path) as file:
            tensors = {name: file.get_tensor(name) for name in ("mean", "weight", "errors")}
            offset = float((file.metadata() or {})["offset"])
        if tensors["weight"].shape != (hidden_size,):
            raise ModelError(
                f"{path} was learned from states of {len(tensors['weight'])} values, the model's have {hidden_size}; "
                "remove the file or learn it anew"
            )
        return cls(tensors["mean"], tensors["weight"], offset, tensors["errors"])


def _left_out(left: Floats, sizes: Floats, y_n: Floats, penalty: float) -> tuple[Floats, Floats]:
    """Each question's error when it is left out, in closed form, and the factors that the penalty shrinks by."""
    kept = np.square(sizes) / (np.square(sizes) + penalty)
    fitted_n = left @ (kept * (left.T @ y_n))
    leverage_n = np.square(left) @ kept + 1 / len(y_n)
    shrunk = sizes / (np.square(sizes) + penalty)
    return (y_n - fitted_n) / np.maximum(1 - leverage_n, 1e-6), shrunk
