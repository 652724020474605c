"""Owners: each matrix of a spread model is orthogonalised by one rank, to which its pieces go and from which they come.

Matrices of one shape are dealt out in turn. Each way a rank moves no more than what it holds of them and its share of
their number, however many ranks there are.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from pensar.base.ranks import World
from pensar.train.parallel.parts import Window, windows_of

AT_ONCE = 1 << 22
"""Values of the matrices that a rank works on at once, unless a single one has more."""
T = TypeVar("T")


class Matrix(NamedTuple):
    """A parameter of two dimensions, or one matrix of a stack."""

    name: str
    number: int
    """In the whole stack."""


class Piece(NamedTuple):
    """What a rank holds of a matrix that another owns."""

    slot: int
    """Of the matrix among those that its owner works on at once."""
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


@dataclass(frozen=True)
class _Round:
    """Matrices of one shape that are worked on at once, as one rank sees them; all lists are by rank."""

    shape: tuple[int, int]
    owned: int
    """How many of them are this rank's."""
    given: list[list[Matrix]]
    """Whose pieces this rank sends to each owner: of those who hold the same, its neighbour does."""
    taken: list[list[Piece]]
    """What this rank gets of its own from each."""
    returned: list[list[Piece]]
    """What this rank sends back of its own to each: whatever they hold."""
    gained: list[list[Matrix]]
    """Whose pieces this rank gets back from each owner."""


class Owners:
    """Who orthogonalises what of the parameters that some ranks share."""

    def __init__(self, parameters: Mapping[str, DTensor], ranks: World, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self._windows = _windows(parameters, dist.get_process_group_ranks(ranks.group))
        self._rounds: list[_Round] = []
        turn = count()
        for shape, matrices in _by_shape(parameters).items():
            size = ranks.size * max(1, AT_ONCE // (shape[0] * shape[1]))
            for first in range(0, len(matrices), size):
                some = matrices[first : first + size]
                owners = [next(turn) % ranks.size for _ in some]
                self._rounds.append(self._round(shape, some, owners))

    def work(
        self, held: Callable[[str], Tensor], orthogonalize: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Matrix, Tensor]]:
        """Every matrix of which this rank holds a piece, and that piece of it orthogonalised.

        `held(name)` is this rank's part of a parameter's matrices. All ranks must go through to the end.
        """
        for each in self._rounds:
            parts = {name: held(name) for name in dict.fromkeys(matrix.name for matrix in _all(each.gained))}
            mine = {matrix: self.piece_of(matrix, parts[matrix.name]) for matrix in _all(each.gained)}
            taken = self._exchange(
                [[mine[matrix] for matrix in group] for group in each.given],
                [[piece.shape for piece in group] for group in each.taken],
            )
            whole = torch.empty((each.owned, *each.shape), device=self._device)
            for piece, values in zip(_all(each.taken), taken, strict=True):
                whole[piece.slot, piece.rows, piece.columns] = values
            if each.owned:
                whole = orthogonalize(whole)
            gained = self._exchange(
                [[whole[slot, rows, columns] for slot, rows, columns in group] for group in each.returned],
                [[mine[matrix].shape for matrix in group] for group in each.gained],
            )
            yield from zip(_all(each.gained), gained, strict=True)

    def piece_of(self, matrix: Matrix, local: Tensor) -> Tensor:
        """What this rank holds of a matrix, within its part of the parameter."""
        if local.dim() == 2:
            return local
        return local[matrix.number - self._windows[matrix.name][self._ranks.rank][0].start]

    def _round(self, shape: tuple[int, int], matrices: Sequence[Matrix], owners: Sequence[int]) -> _Round:
        me, every = self._ranks.rank, range(self._ranks.size)
        given: list[list[Matrix]] = [[] for _ in every]
        gained: list[list[Matrix]] = [[] for _ in every]
        taken: list[list[Piece]] = [[] for _ in every]
        returned: list[list[Piece]] = [[] for _ in every]
        owned = 0
        for matrix, owner in zip(matrices, owners, strict=True):
            holders: dict[tuple[int, int, int, int], list[int]] = {}
            for rank, window in enumerate(self._windows[matrix.name]):
                if (place := _place(window, matrix.number)) is not None:
                    holders.setdefault(place, []).append(rank)
            for (top, bottom, left, right), ranks in holders.items():
                giver = min(ranks, key=lambda rank: abs(rank - owner))
                if giver == me:
                    given[owner].append(matrix)
                if me in ranks:
                    gained[owner].append(matrix)
                if owner == me:
                    piece = Piece(owned, slice(top, bottom), slice(left, right))
                    taken[giver].append(piece)
                    for rank in ranks:
                        returned[rank].append(piece)
            owned += owner == me
        return _Round(shape, owned, given, taken, returned, gained)

    def _exchange(self, sent: list[list[Tensor]], shapes: list[list[Sequence[int]]]) -> Iterator[Tensor]:
        """Sends each rank its tensors; what they sent here, of these shapes, in order of rank."""
        outgoing = torch.cat([torch.empty(0, device=self._device), *(one.reshape(-1) for one in _all(sent))])
        incoming = outgoing
        if self._ranks.size > 1:
            sizes = [sum(rows * columns for rows, columns in group) for group in shapes]
            incoming = torch.empty(sum(sizes), device=self._device)
            given = [sum(one.numel() for one in group) for group in sent]
            dist.all_to_all_single(incoming, outgoing, sizes, given, group=self._ranks.group)
        pieces = [(rows, columns) for rows, columns in _all(shapes)]
        parts = incoming.split([rows * columns for rows, columns in pieces])
        return (part.view(shape) for part, shape in zip(parts, pieces, strict=True))


def _windows(parameters: Mapping[str, DTensor], numbers: Sequence[int]) -> dict[str, list[Window]]:
    """What each of the ranks of these numbers holds of each parameter."""
    known: dict[object, list[Window]] = {}
    found = {}
    for name, parameter in parameters.items():
        key = parameter.shape, parameter.device_mesh, parameter.placements
        if key not in known:
            windows = windows_of(parameter)
            known[key] = [windows[number] for number in numbers]
        found[name] = known[key]
    return found


def _by_shape(parameters: Mapping[str, Tensor]) -> dict[tuple[int, int], list[Matrix]]:
    groups: dict[tuple[int, int], list[Matrix]] = {}
    for name, parameter in parameters.items():
        *stack, rows, columns = parameter.shape
        matrices = [Matrix(name, index) for index in range(stack[0] if stack else 1)]
        groups.setdefault((rows, columns), []).extend(matrices)
    return groups


def _place(window: Window, index: int) -> tuple[int, int, int, int] | None:
    """Where in a matrix a window lies: top, bottom, left, right; None where it holds nothing of it."""
    *stack, rows, columns = window
    inside = not stack or stack[0].start <= index < stack[0].stop
    if not inside or rows.start == rows.stop or columns.start == columns.stop:
        return None
    return rows.start, rows.stop, columns.start, columns.stop


def _all(groups: Iterable[Iterable[T]]) -> Iterator[T]:
    return chain.from_iterable(groups)
