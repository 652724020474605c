"""Spill: what the cache gave away comes back as it was, and no fault of it changes a reply."""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pensar.base.errors import ConfigError
from pensar.infer.engine import Completion, Engine, Request, SamplingParams
from pensar.infer.llm import LLM
from pensar.infer.native.library import available
from pensar.infer.native.runner import NativeRunner
from pensar.infer.pages import PagePool
from pensar.infer.spill import Spill, SpillConfig
from pensar.infer.step import PAGE, Runner
from pensar.infer.torch_runner import TorchRunner
from pensar.model.qwen3 import Qwen3
from tiny import save, tiny_model, tiny_tokenizer

KINDS = ["float32", "bfloat16", "int8"] if available() else []
MIB = 2**20


def prompt_of(seed: int, length: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, 256, length).tolist()
    return tokens


def asks(name: str, tokens: list[int], max_tokens: int = 12, **more: Any) -> Request:
    return Request(name, tokens, SamplingParams(max_tokens=max_tokens, **more))


def runners(model: Qwen3) -> list[Runner]:
    return [TorchRunner(model), *(NativeRunner(model, cache=kind) for kind in KINDS)]


def pool_with(runner: Runner, num_pages: int, config: SpillConfig) -> PagePool:
    pool = PagePool(num_pages)
    runner.reserve(num_pages)
    pool.spill = Spill(runner, config, lambda page: runner.reserve(page + 1))
    return pool


def small(places: int, folder: Path | None = None) -> SpillConfig:
    """A spill of so many pages of the fixture's model in float32."""
    return SpillConfig(max_bytes=places * page_bytes(), folder=folder)


def page_bytes() -> int:
    """By hand: keys and values, 2 layers, 2 heads of 8 numbers of 4 bytes, for every token of a page."""
    return 2 * 2 * 2 * 8 * 4 * PAGE


def fill(runner: Runner, pool: PagePool, first: int, count: int) -> tuple[list[int], list[bytes]]:
    """Known pages of random bytes with one reader each, and their keys."""
    pages, keys = (
        pool.take(count),
        pool.keys(pool.root(), np.arange(first * PAGE, (first + count) * PAGE, dtype=np.int64)),
    )
    generator = torch.Generator().manual_seed(first)
    size = runner.read_pages(np.asarray(pages)).shape
    runner.write_pages(np.asarray(pages), torch.randint(0, 60, size, generator=generator, dtype=torch.uint8))
    for page, key in zip(pages, keys, strict=True):
        pool.publish(page, key)
    return pages, keys


# ---------------------------------------------------------------- pages


def test_every_runner_gives_pages_as_bytes_and_takes_them_back(model: Qwen3) -> None:
    for runner in runners(model):
        engine = Engine(runner, slots=1)
        engine.run([asks("a", prompt_of(0, 60), 1)])
        held = runner.read_pages(np.array([3, 1]))
        assert held.shape == (2, runner.page_bytes())
        assert held.dtype == torch.uint8
        assert held.any(1).all()
        runner.reserve(9)
        runner.write_pages(np.array([8, 2]), held)
        assert torch.equal(runner.read_pages(np.array([2, 8])), held.flip(0))
        assert torch.equal(runner.read_pages(np.array([3, 1])), held), "no other page has changed"


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_given_away_comes_back_as_it_was(model: Qwen3, tmp_path: Path, on_disk: bool) -> None:
    runner = TorchRunner(model)
    pool = pool_with(runner, 5, small(10, tmp_path / "spill" if on_disk else None))
    assert pool.spill is not None
    assert pool.spill.page_bytes == page_bytes()
    pages, keys = fill(runner, pool, 0, 3)
    before = runner.read_pages(np.asarray(pages))
    pool.release(pages)
    others = pool.take(4)
    runner.wipe_pages(np.asarray(others))
    assert len(pool.spill) == 3
    pool.release(others)
    back = pool.match(keys)
    assert torch.equal(runner.read_pages(np.asarray(back)), before)
    assert pool.readers[back].tolist() == [1, 1, 1]
    assert (pool.spill.num_saved, pool.spill.num_restored) == (3, 3)
    pool.release(back)
    pool.take(4)
    assert pool.spill.num_saved == 3, "what is known there is not written twice"
    pool.check()


def test_a_beginning_may_lie_in_both_places_and_comes_back_only_as_a_whole(model: Qwen3) -> None:
    runner = TorchRunner(model)
    pool = pool_with(runner, 6, small(10))
    assert pool.spill is not None
    pages, keys = fill(runner, pool, 0, 3)
    before = runner.read_pages(np.asarray(pages))
    pool.release(pages[1:2])
    pool.take(3)  # two that are free, and the middle of the text
    assert keys[1] in pool.spill
    pool.release(pages[::2])
    back = pool.match(keys)
    # One page is left for what comes back, and it is the middle's, not the end's.
    assert back == pages[:1], "no page is there for the middle but those that the match itself reads"
    assert pool.readers[pages[2]] == 0
    pool.check()
    pool.release(back)
    pool.release([page for page in range(1, 6) if page not in pages][:1])
    back = pool.match(keys)
    assert torch.equal(runner.read_pages(np.asarray(back)), before)
    pool.check()


def test_the_longest_unused_are_forgotten_first_and_of_a_text_its_end(model: Qwen3) -> None:
    runner = TorchRunner(model)
    pool = pool_with(runner, 4, small(4))
    assert pool.spill is not None
    first, first_keys = fill(runner, pool, 0, 3)
    pool.release(first)
    second, second_keys = fill(runner, pool, 50, 3)
    pool.release(second)
    pool.take(3)
    assert [key in pool.spill for key in first_keys] == [True, False, False]
    assert [key in pool.spill for key in second_keys] == [True, True, True]
    pool.spill.read(first_keys[:1])
    pool.release([1, 2, 3])
    third, _ = fill(runner, pool, 80, 3)
    pool.release(third)
    pool.take(3)
    assert first_keys[0] in pool.spill, "what was read is used"
    assert [key in pool.spill for key in second_keys] == [False, False, False]
    pool.check()


def test_what_the_pool_forgets_is_forgotten_in_both_places(model: Qwen3) -> None:
    runner = TorchRunner(model)
    pool = pool_with(runner, 4, small(9))
    assert pool.spill is not None
    pages, keys = fill(runner, pool, 0, 3)
    pool.release(pages)
    pool.release(pool.take(3))
    pages = pool.match(keys[:2])
    pool.forget(pages)
    assert [key in pool.spill for key in keys] == [False, False, True]
    pool.forget_all()
    assert len(pool.spill) == 0
    assert pool.match(keys) == []
    pool.check()


def test_sizes_that_cannot_be_are_refused(model: Qwen3, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a spill of 4,095 bytes: a page of this model takes 4,096"):
        Engine(TorchRunner(model), spill=SpillConfig(max_bytes=4_095))
    for folder, place in ((None, "memory has"), (tmp_path, f"the disk of {tmp_path} has")):
        with pytest.raises(ConfigError, match=place):
            Engine(TorchRunner(model), spill=SpillConfig(max_bytes=2**60, folder=folder))
    with pytest.raises(ConfigError, match="leave share on"):
        Engine(model, share=False, spill=small(1))


def test_a_spill_in_memory_is_part_of_what_the_engine_takes(model: Qwen3, tmp_path: Path) -> None:
    plain = Engine(TorchRunner(model), cache_tokens=6 * PAGE).footprint.total
    for folder, more in ((None, 7 * page_bytes()), (tmp_path, 0)):
        spill = SpillConfig(max_bytes=8 * page_bytes() - 1, folder=folder)
        assert Engine(TorchRunner(model), cache_tokens=6 * PAGE, spill=spill).footprint.total == plain + more


def test_a_directory_is_opened_with_a_spill_or_with_a_runner_that_has_its_weights(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size).eval()
    folder = save(model, tokenizer, tmp_path / "model")
    turn = [{"role": "user", "content": "Last digit, left to right: 3+4"}]
    expected = LLM(folder).chat(turn, max_tokens=8)
    with_spill = LLM(folder, spill=SpillConfig(max_bytes=MIB))
    assert with_spill.engine.pool.spill is not None
    runner = TorchRunner(model)
    with_runner = LLM(folder, runner=runner)
    assert with_runner.engine.runner is runner
    for llm in (with_spill, with_runner):
        assert llm.chat(turn, max_tokens=8) == expected
    with pytest.raises(ConfigError, match="weights='int8' and cache='as_is' with a runner"):
        LLM(folder, runner=runner, weights="int8")


# ---------------------------------------------------------------- faults


def damage(spill: Spill, kind: str) -> None:
    fd = spill._store._fd  # type: ignore[attr-defined]
    if kind == "truncated":
        os.ftruncate(fd, page_bytes() + 100)
    else:
        byte = bytearray(os.pread(fd, 1, page_bytes() + 7))
        byte[0] ^= 1
        os.pwrite(fd, byte, page_bytes() + 7)


@pytest.mark.parametrize("kind", ["truncated", "corrupt"])
def test_a_damaged_file_is_computed_again_with_one_warning(
    model: Qwen3, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    engine = Engine(TorchRunner(model), cache_tokens=6 * PAGE, spill=small(50, tmp_path))
    spill = engine.pool.spill
    assert spill is not None
    prompt = prompt_of(1, 70)
    [expected] = engine.run([asks("a", prompt)])
    engine.run([asks("b", prompt_of(2, 80))])
    assert len(spill) >= 4
    damage(spill, kind)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            [got] = engine.run([asks("c", prompt)])
            assert got.tokens == expected.tokens
            engine.run([asks("d", prompt_of(2, 80))])
            engine.pool.check()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "is not what was written; it is computed again" in caplog.text


def test_a_full_disk_keeps_what_it_has_with_one_warning(
    model: Qwen3, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(TorchRunner(model), cache_tokens=6 * PAGE, spill=small(50, tmp_path))
    spill = engine.pool.spill
    assert spill is not None
    write, room = os.pwrite, 6 * page_bytes()

    def on_a_small_disk(fd: int, data: Any, offset: int) -> int:
        if offset + len(data) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", on_a_small_disk)
    expected = {seed: Engine(model).run([asks("x", prompt_of(seed, 70))])[0].tokens for seed in range(2)}
    with caplog.at_level(logging.WARNING):
        for seed in [0, 1] * 4:
            assert engine.run([asks(str(seed), prompt_of(seed, 70))])[0].tokens == expected[seed]
            engine.pool.check()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the spilled cache grows no further: [Errno 28] No space left" in caplog.text
    assert 0 < len(spill) <= 6
    assert spill.num_restored > 0


def test_the_file_has_no_name_and_ends_with_the_engine(model: Qwen3, tmp_path: Path) -> None:
    engine = Engine(model, cache_tokens=6 * PAGE, spill=small(9, tmp_path / "deep" / "er"))
    assert list((tmp_path / "deep" / "er").iterdir()) == []
    assert engine.pool.spill is not None
    fd = engine.pool.spill._store._fd  # type: ignore[attr-defined]
    engine.pool.spill = None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# ---------------------------------------------------------------- the engine


def test_a_talk_that_comes_back_is_copied_and_not_computed(model: Qwen3) -> None:
    """Every turn is the one before and more, and between two turns others fill the cache."""
    for runner in runners(model):
        with_one = Engine(runner, cache_tokens=10 * PAGE, spill=SpillConfig(max_bytes=MIB))
        text, computed = prompt_of(0, 40), []
        run = runner.run
        runner.run = lambda batch, run=run, computed=computed: (  # type: ignore[method-assign]
            computed.append(len(batch.tokens_N)),
            run(batch),
        )[1]
        for turn in range(4):
            asked = [*text, *prompt_of(100 + turn, 9)]
            computed.clear()
            [reply] = with_one.run([asks("talk", asked, 10)])
            if turn:
                # What was computed of the turn before are its full pages: all but the last token, in whole pages.
                assert reply.num_cached_tokens == (len(text) - 1) // PAGE * PAGE
                assert computed[0] == len(asked) - reply.num_cached_tokens
            text = [*asked, *reply.tokens]
            with_one.run([asks("other", prompt_of(7 + turn, 150), 4)])
        runner.run = run  # type: ignore[method-assign]


def test_a_preempted_request_computes_only_its_last_partial_page_again(model: Qwen3) -> None:
    """The swap of paged engines: its pages go to the spill while another has the cache, and come back from there."""
    engine = Engine(model, slots=2, cache_tokens=9 * PAGE, spill=small(30))
    assert engine.pool.spill is not None
    plain = Engine(model, slots=2, cache_tokens=9 * PAGE)
    requests = [
        asks("first", prompt_of(0, 20), 60),
        Request("urgent", prompt_of(1, 90), SamplingParams(max_tokens=40), priority=-1),
    ]
    counts: dict[bool, list[int]] = {}
    for one in (engine, plain):
        run, spilling = one.runner.run, one is engine
        seen: list[int] = counts.setdefault(spilling, [])

        def counted(batch: Any, run: Any = run, seen: list[int] = seen) -> Any:
            seen.append(len(batch.tokens_N))
            return run(batch)

        one.runner.run = counted  # type: ignore[method-assign]
        one.submit(requests[0])
        for _ in range(30):
            one.step()
        one.submit(requests[1])
        tokens: dict[str, list[int]] = {}
        while one.num_running or one.num_waiting:
            for piece in one.step():
                tokens.setdefault(piece.id, []).extend(piece.tokens)
            one.pool.check()
        assert one.scheduler.num_preempted == 1
        # 20 + 30 tokens were computed but for the last, which makes 3 full pages; the urgent one has 90.
        assert 90 in seen
        assert len(tokens["urgent"]) == 40
        again = seen[seen.index(90) + 1 :]
        assert max(again) == (50 - 3 * PAGE if spilling else 50)
    assert engine.pool.spill.num_restored == 3


def test_new_weights_empty_the_spill(make_model: Callable[..., Qwen3]) -> None:
    for recompute in (True, False):
        engine = Engine(make_model(0), cache_tokens=6 * PAGE, spill=small(30))
        prompt = prompt_of(0, 70)
        engine.run([asks("a", prompt)])
        engine.run([asks("b", prompt_of(1, 80))])
        assert engine.pool.spill is not None
        assert len(engine.pool.spill) > 0
        engine.load(make_model(1), recompute=recompute)
        assert len(engine.pool.spill) == 0
        [got] = engine.run([asks("c", prompt)])
        assert got.num_cached_tokens == 0
        assert got.tokens == Engine(make_model(1)).run([asks("x", prompt)])[0].tokens


@pytest.mark.parametrize("spilling", [False, True])
def test_pages_made_by_two_weights_are_nobody_elses(make_model: Callable[..., Qwen3], spilling: bool) -> None:
    """Without `recompute` a running text goes on over keys and values of old weights; no other may begin with those."""
    engine = Engine(make_model(0), cache_tokens=14 * PAGE, spill=small(60) if spilling else None)
    prompt = prompt_of(0, 20)
    engine.submit(asks("mixed", prompt, 70))
    text = list(prompt)
    for turn in range(60):
        if turn == 20:
            engine.load(make_model(1), recompute=False)
        text += [token for piece in engine.step() for token in piece.tokens]
    plain = Engine(make_model(1), share=False)
    for length in (
        34,
        70,
        80,
    ):  # the first brings the beginning of the new weights, on which the rest could follow
        asked = asks("x", text[:length], 5, logprobs=True)
        [got], [expected] = engine.run([asked]), plain.run([asked])
        if available():
            assert (got.tokens, got.logprobs) == (expected.tokens, expected.logprobs)
        if spilling:
            engine.run([asks("y", prompt_of(length, 120), 4)])
        engine.pool.check()
    assert got.num_cached_tokens > 0


def test_a_page_of_nan_does_not_come_back(model: Qwen3) -> None:
    """A broken row's pages are wiped in the cache; what the spill has of them is forgotten too."""
    engine = Engine(TorchRunner(model), cache_tokens=6 * PAGE, spill=small(30))
    prompt = prompt_of(0, 70)
    [expected] = engine.run([asks("a", prompt)])
    spill = engine.pool.spill
    assert spill is not None
    engine.run([asks("b", prompt_of(1, 80))])
    poison = torch.full((1, page_bytes() // 4), float("nan")).view(torch.uint8)
    for slot in list(spill._slot_of.values()):
        spill._store.write([slot], poison)
    [broken] = engine.run([asks("c", prompt)])
    assert broken.finish_reason == "error"
    [fine] = engine.run([asks("d", prompt)])
    assert fine.tokens == expected.tokens


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32))
def test_random_loads_get_the_same_replies_with_and_without_a_spill(
    make_model: Callable[..., Qwen3], tmp_path: Path, seed: int
) -> None:
    """Too few pages, a spill of any size in either place, preemptions, aborts, new weights: not a bit differs.

    Native kernels, whose bits do not depend on what is computed beside; without a compiler torch in float64.
    """
    random = Random(seed)
    model, other = make_model(0), make_model(1)
    if not available():
        model, other = model.double(), other.double()
    size = (NativeRunner(model) if available() else TorchRunner(model)).page_bytes()
    spill = SpillConfig(
        max_bytes=random.choice([1, 2, 5, 40]) * size,
        folder=tmp_path if random.random() < 0.5 else None,
    )
    pages, slots = random.randint(7, 14), random.randint(1, 4)
    engine = Engine(
        model, slots=slots, cache_tokens=PAGE * pages, step_tokens=random.choice([5, 16, 64]), spill=spill
    )
    beginnings = [prompt_of(90 + number, length) for number, length in enumerate((0, 20, 33, 49))]
    requests = []
    for number in range(16):
        tokens = beginnings[random.randrange(4)] + prompt_of(random.randrange(4), random.randint(1, 12))
        params = SamplingParams(
            max_tokens=random.randint(1, 30),
            temperature=random.choice([0.0, 1.0]),
            seed=number % 3,
            logprobs=True,
        )
        requests.append(Request(str(number), tokens, params, priority=random.randrange(2)))
    log: dict[str, list[int]] = {}
    scores: dict[str, list[float]] = {}
    aborted: dict[str, Completion] = {}
    waiting, reloads = list(requests), random.choice([0, 0, 1])
    while waiting or engine.num_running or engine.num_waiting:
        for _ in range(random.randint(0, 2)):
            if waiting:
                engine.submit(waiting.pop())
        if random.random() < 0.05 and (done := engine.abort(str(random.randrange(16)))) is not None:
            aborted[str(len(aborted))] = done
        if reloads and random.random() < 0.1:
            reloads = 0
            engine.load({name: values.detach() for name, values in model.named_parameters()})
        for piece in engine.step():
            log.setdefault(piece.id, []).extend(piece.tokens)
            scores.setdefault(piece.id, []).extend(piece.logprobs)
        engine.scheduler.check()
    assert engine.pool.num_held == 0
    alone = Engine(model, share=False)
    for request in requests:
        [expected] = alone.run([request])
        got = log.get(request.id, [])
        assert got == expected.tokens[: len(got)]
        if available():
            assert scores.get(request.id, []) == expected.logprobs[: len(got)]
