"""Graphs: passes over few tokens, recorded once for each size of batch and run again over static inputs.

A batch takes the next larger bucket. What it lacks is padding at position -1, which no kernel stores or reads anything
for. A recording holds on to addresses: weights, slabs of the cache and inputs stay where they are.
Shape legend: B tokens of a bucket, R rows, P pages, D hidden, V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pensar.infer.cuda.work import FEW, Work
from pensar.infer.step import StepBatch, StepOutput

BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
Outputs = tuple[Tensor, Tensor]
Compute = Callable[[Tensor, Work, Tensor], Outputs]
"""Tokens, work and wanted tokens -> scores and states."""
Capture = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], object]]]
"""Records a function of no arguments: gives the tensors that its results will be in, and what runs it again."""


class CudaCapture:
    """Records CUDA graphs that share one pool of memory: each is read before another runs."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], object]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and workspaces made outside the recording
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = function()
        return outputs, graph.replay


def rerun(function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], object]]:
    """A recording for devices that have none: computes again, into the same tensors."""
    outputs = function()

    def replay() -> None:
        for kept, new in zip(outputs, function(), strict=True):
            kept.copy_(new)

    return outputs, replay


def bucket_of(num_tokens: int) -> int:
    """The smallest bucket with room for so many tokens."""
    return next(size for size in BUCKETS if size >= num_tokens)


def fits(batch: StepBatch) -> bool:
    """Whether a batch may take a recording: few tokens in all, and few of each row."""
    return len(batch.tokens_N) <= BUCKETS[-1] and bool((np.diff(batch.starts) <= FEW).all())


class Inputs:
    """The static inputs of a bucket."""

    def __init__(self, size: int, pages_RP: Tensor) -> None:
        self._ints_4B = torch.zeros(4, size, dtype=torch.int32, device=pages_RP.device)
        self._pages_RP = pages_RP
        self.tokens_B, positions_B, row_B, self.wanted_B = self._ints_4B
        alone_B = torch.arange(size, dtype=torch.int32, device=pages_RP.device)
        self.work = Work(positions_B, row_B, pages_RP, alone_T=alone_B, tiles_T=None)

    def fill(self, batch: StepBatch) -> None:
        counts, num = np.diff(batch.starts), len(batch.tokens_N)
        ints_4B = np.zeros(self._ints_4B.shape, np.int32)
        ints_4B[1] = -1
        ints_4B[:3, :num] = batch.tokens_N, batch.positions_N, np.repeat(np.arange(len(counts)), counts)
        ints_4B[3, : len(batch.wanted_S)] = batch.wanted_S
        self._ints_4B.copy_(torch.from_numpy(ints_4B), non_blocking=True)
        pages_RP = torch.from_numpy(batch.pages_RP[:, : self._pages_RP.shape[1]].astype(np.int32))
        self._pages_RP[: len(counts), : pages_RP.shape[1]].copy_(pages_RP, non_blocking=True)


class Graphs:
    """A recording of `compute` for each bucket, made when the first batch needs it."""

    def __init__(self, compute: Compute, capture: Capture, max_pages: int, device: torch.device) -> None:
        self._compute, self._capture = compute, capture
        self._pages_RP = torch.zeros(BUCKETS[-1], max_pages, dtype=torch.int32, device=device)
        self._recorded: dict[int, tuple[Inputs, Outputs, Callable[[], object]]] = {}

    def run(self, batch: StepBatch) -> StepOutput:
        """The outputs are copies: the next run overwrites the recording's."""
        inputs, (logits_BV, hidden_BD), replay = self._of(bucket_of(len(batch.tokens_N)))
        inputs.fill(batch)
        replay()
        num = len(batch.wanted_S)
        return StepOutput(logits_BV[:num].to(torch.float32, copy=True), hidden_BD[:num].clone())

    def warm_up(self, num_tokens: int) -> None:
        """Records the buckets of all batches up to this size, the largest first: the others fit into its memory."""
        for size in reversed(BUCKETS[: BUCKETS.index(bucket_of(num_tokens)) + 1]):
            self._of(size)

    def forget(self) -> None:
        """Drops all recordings, for addresses that have changed."""
        self._recorded.clear()

    def _of(self, size: int) -> tuple[Inputs, Outputs, Callable[[], object]]:
        if size not in self._recorded:
            inputs = Inputs(size, self._pages_RP)
            inputs.work.positions_N.fill_(-1)
            outputs, replay = self._capture(
                lambda: self._compute(inputs.tokens_B, inputs.work, inputs.wanted_B)
            )
            self._recorded[size] = inputs, outputs, replay
        return self._recorded[size]
