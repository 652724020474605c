"""Weight sync: from a trainer's memory and over a process group, while requests run."""

import time
from collections.abc import Iterator

import pytest
import sync_work
import torch

from pensar.base.ranks import Crew
from pensar.infer.engine import Engine, Request, SamplingParams
from tiny import tiny_model


@pytest.fixture(scope="module")
def pair() -> Iterator[Crew]:
    with Crew(2) as crew:
        yield crew


@pytest.mark.parametrize("bucket_bytes", [1_000, 2**26])
def test_every_rank_goes_on_with_the_senders_weights(pair: Crew, bucket_bytes: int) -> None:
    first, second = pair.call(sync_work.received, bucket_bytes)
    assert all(torch.equal(first[2][name], second[2][name]) for name in second[2])
    sender = tiny_model(seed=1)
    assert all(torch.equal(parameter, first[2][name]) for name, parameter in sender.named_parameters())
    assert first[0][:4] != second[0][:4]
    for tokens, versions, _ in (first, second):
        assert versions == {1}
        [expected] = Engine(sender).run(
            [Request("x", [*sync_work.PROMPT, *tokens[:4]], SamplingParams(max_tokens=4))]
        )
        assert tokens[4:] == expected.tokens


def test_ranks_with_other_models_are_told(pair: Crew) -> None:
    for said in pair.call(sync_work.refused):
        assert "rank 1 has another model than rank 0" in said


def test_a_tiny_model_takes_new_weights_in_less_than_a_tenth_of_a_second() -> None:
    engine, other = Engine(tiny_model()), tiny_model(seed=1)
    engine.submit(Request("a", sync_work.PROMPT, SamplingParams(max_tokens=50)))
    engine.step()
    start = time.process_time()
    engine.load(other)
    assert time.process_time() - start < 0.1
    assert engine.num_running == 1
