"""Tensor parallel engines, as the tests run them on ranks."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pensar.base.errors import RunError
from pensar.base.ranks import World
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.spill import SpillConfig
from pensar.infer.step import PAGE, StepBatch
from pensar.infer.tensor_parallel import TensorParallelRunner, _Rank, on_ranks
from pensar.infer.torch_runner import _Paged
from pensar.model.qwen3 import Qwen3
from tiny import tiny_model

PROMPTS = [list(range(5, 45)), list(range(60, 67)), list(range(5, 30)), [9]]


def texts(engine: Engine, max_tokens: int = 20, **more: Any) -> list[list[int]]:
    params = SamplingParams(max_tokens=max_tokens, **more)
    done = engine.run([Request(str(n), prompt, params) for n, prompt in enumerate(PROMPTS)])
    assert [completion.error for completion in done] == [None] * len(PROMPTS)
    return [completion.tokens for completion in done]


def batch_of(prompt: list[int]) -> StepBatch:
    """All tokens of one text at once, from its beginning."""
    return StepBatch.of([(prompt, 0, range(1, -(-len(prompt) // PAGE) + 1))])


def served(world: World, source: Path | dict[str, Any], options: dict[str, Any]) -> Any:
    """Greedy and drawn tokens, logits, and what is known of the cache; None on other ranks than the first."""
    model = source if isinstance(source, Path) else tiny_model(**source).eval()

    def lead(runner: TensorParallelRunner) -> Any:
        engine = Engine(runner, **options)
        found = texts(engine), texts(engine, temperature=1.0, seed=3)
        engine.pool.check()
        runner.reserve(8)
        logits_SV = runner.run(batch_of(PROMPTS[0])).logits_SV
        part = runner._rank.runner
        heads = {pool.shape[0] for pool in (*part.keys, *part.values)}
        return *found, logits_SV, heads, runner.page_bytes(), runner.weight_bytes()

    return on_ranks(world, model, lead)


def held(world: World, source: Path) -> list[tuple[int, bool]]:
    """Of every rank the numbers in its part, and whether its states are the first rank's bit for bit."""
    kept: list[_Rank] = []
    init = _Rank.__init__

    def kept_init(self: _Rank, *arguments: Any) -> None:
        init(self, *arguments)
        kept.append(self)

    states: list[Tensor] = []
    run = _Rank._run

    def kept_run(self: _Rank, batch: StepBatch) -> Any:
        output = run(self, batch)
        states.append(output.hidden_SD)
        return output

    _Rank.__init__, _Rank._run = kept_init, kept_run  # type: ignore[method-assign]
    try:
        on_ranks(world, source, lambda runner: texts(Engine(runner)))
    finally:
        _Rank.__init__, _Rank._run = init, run  # type: ignore[method-assign]
    count = sum(parameter.numel() for parameter in kept[0].runner.model.parameters())
    first = world.broadcast(states)
    same = len(first) == len(states) and all(torch.equal(*pair) for pair in zip(states, first, strict=True))
    return world.gather((count, same))


def spilled(world: World, source: dict[str, Any]) -> Any:
    """Tokens of three rounds with a cache that holds one text, and how many pages came back."""

    def lead(runner: TensorParallelRunner) -> Any:
        engine = Engine(runner, slots=2, cache_tokens=5 * PAGE, spill=SpillConfig(max_bytes=2**20))
        found = [texts(engine) for _ in range(3)]
        engine.pool.check()
        assert engine.pool.spill is not None
        return found, engine.pool.spill.num_restored, engine.scheduler.num_preempted

    return on_ranks(world, tiny_model(**source).eval(), lead)


def reloaded(world: World, shape: dict[str, Any]) -> Any:
    """Tokens before and after new weights, which rank 0 alone has; and what it says to others."""

    def lead(runner: TensorParallelRunner) -> Any:
        engine = Engine(runner)
        before = texts(engine)
        said = []
        for wrong in (tiny_model(hidden_size=16, **shape), {"odd": torch.zeros(1)}):
            try:
                engine.load(wrong)
            except Exception as error:  # noqa: BLE001 - the test looks at what it is
                said.append(repr(error))
        engine.load(tiny_model(seed=1, **shape))
        after = texts(engine)
        for ask in (
            lambda: engine.runner.set_adapter(0, None),
            lambda: engine.model.logits and _alone(engine.model),
        ):
            try:
                ask()
            except Exception as error:  # noqa: BLE001 - the test looks at what it is
                said.append(repr(error))
        return before, after, engine.version, said, texts(engine)

    return on_ranks(world, tiny_model(**shape).eval(), lead)


def _alone(model: Qwen3) -> Tensor:
    from pensar.model.attention import Packed

    return model(torch.tensor([[1, 2]]), torch.arange(2)[None], Packed())  # type: ignore[no-any-return]


def dies(world: World, number: int, kind: str) -> Any:
    """The last rank is killed, or fails, in its `number`th step, between the sums of two layers."""
    steps = [0]
    attend = _Paged.__call__

    def fatal(self: _Paged, layer: int, *heads: Tensor) -> Tensor:
        steps[0] += layer == 0
        if steps[0] == number and layer == 1 and world.rank == world.size - 1:
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("this rank has a fault")
        return attend(self, layer, *heads)

    _Paged.__call__ = fatal  # type: ignore[method-assign, assignment]
    try:
        return on_ranks(world, tiny_model().eval(), lambda runner: texts(Engine(runner)))
    finally:
        _Paged.__call__ = attend  # type: ignore[method-assign]


def fails_alone(world: World) -> Any:
    """Rank 0 runs out of memory within a step: the others wait for its part of a sum."""

    def lead(runner: TensorParallelRunner) -> Any:
        engine = Engine(runner)
        texts(engine, 2)

        def full(batch: StepBatch) -> Any:
            raise MemoryError("no room")

        runner._rank.runner.run = full  # type: ignore[method-assign]
        for says in ("a step on 2 ranks failed on rank 0", "the ranks of this engine have ended"):
            with pytest.raises(RunError, match=says):
                engine.run([Request("x", [1, 2], SamplingParams(max_tokens=2))])
        return "a caller who takes no notice"

    return on_ranks(world, tiny_model().eval(), lead)
