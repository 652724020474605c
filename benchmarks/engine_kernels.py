"""The native kernels one by one, each with its share of what one core can do: `python -m benchmarks.engine_kernels`.

Products of 512 inputs and 3,072 outputs, the weights in the last cache or beyond; a line per type and number of rows.
The limits are measured in the same run by loops that do nothing else: weights read, and products in registers.
"""

import json
import time
from collections.abc import Callable

import torch

from pensar.infer.native.library import describe, library
from pensar.infer.native.pack import KINDS, Matrix, Room, Team, in_order

INPUTS, OUTPUTS = 512, 3_072
ROWS = (1, 4, 16, 128)
COPIES = 8
"""Matrices that are multiplied in turn, so that one row meets no weight that is near."""


def seconds(work: Callable[[], object], repeats: int = 7) -> float:
    """CPU-seconds of the fastest run."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def matrices(kind: str, team: Team, outputs: int = OUTPUTS, num: int = COPIES) -> list[Matrix]:
    room = Room()
    made = [Matrix(kind, in_order(outputs), outputs, INPUTS, room.take) for _ in range(num)]
    for matrix in made:
        matrix.fill(torch.randn(outputs, INPUTS), team)
    return made


def rate(some: list[Matrix], rows: int, team: Team) -> float:
    """Operations a second, a multiply-add counted as two."""
    x = torch.randn(rows, INPUTS)
    rounds = max(1, 256 // rows)

    def work() -> None:
        for _ in range(rounds):
            for matrix in some:
                matrix.product(x, team)

    outputs = some[0].struct.outputs
    return 2 * rows * INPUTS * outputs * len(some) * rounds / seconds(work)


def bandwidth(some: list[Matrix]) -> float:
    """Bytes a second at which the weights could be read."""

    def read() -> None:
        for matrix in some:
            library().pensar_read(matrix.data.data_ptr(), matrix.data.nbytes)

    return sum(matrix.data.nbytes for matrix in some) / seconds(read, 31)


def peak(kind: str) -> float:
    """Operations a second of products in registers."""
    rounds = 10**6
    return float(library().pensar_peak(KINDS[kind], rounds)) / seconds(
        lambda: library().pensar_peak(KINDS[kind], rounds)
    )


def main() -> None:
    torch.set_num_threads(1)
    team = Team(1)
    print(json.dumps({"units": describe()}))
    for kind in ("float32", "bfloat16", "int8", "int4"):
        some = matrices(kind, team)
        size, top, reading = some[0].data.nbytes, peak(kind), bandwidth(some)
        for rows in ROWS:
            found = rate(some, rows, team)
            limit = min(top, reading / size * 2 * rows * INPUTS * OUTPUTS)
            line = {
                "kind": kind,
                "rows": rows,
                "gop_s": round(found / 1e9, 1),
                "percent_of_limit": round(100 * found / limit),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
