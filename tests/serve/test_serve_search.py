"""The best of several replies, and beams: those of the engine's own functions, billed for every token drawn."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from pensar.infer.beam import beam_search
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.outbox import Consumer, Outbox, UsageRecord
from pensar.model.weights import load_model
from pensar.serve.app import make_service
from pensar.serve.server import ServerThread
from pensar.serve.service import ServeConfig, Service
from pensar.text.tokenizer import Tokenizer

QUESTION: list[Any] = [{"role": "user", "content": "What is 2+3?"}]
PROMPTS = ["Two and three: 2, then 3, 4, 5. So the sum", "What is"]
BEAMS: dict[str, Any] = {"use_beam_search": True}
PATIENCE_SECONDS = 30.0


@pytest.fixture
def metered(model_folder: Path, tmp_path: Path) -> Service:
    tokenizer = Tokenizer.load(model_folder)
    engine = Engine(load_model(model_folder), tokenizer)
    return make_service(engine, tokenizer, ServeConfig(model_name="tiny"), outbox=Outbox(tmp_path / "usage"))


@pytest.fixture
def running(metered: Service) -> Iterator[ServerThread]:
    with ServerThread(metered) as server:
        yield server


@pytest.fixture
def asking(running: ServerThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def records(service: Service, folder: Path, count: int) -> list[UsageRecord]:
    assert service.meter is not None
    assert service.meter._outbox.wait(count, PATIENCE_SECONDS)
    return [record for _, record in Consumer(folder / "usage", "test").read(0)]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def mean(choice: Any) -> float:
    return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)


def test_the_best_of_several_are_those_with_the_highest_mean(
    metered: Service, asking: openai.OpenAI, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "prompt": PROMPTS,
        "temperature": 1.7,
        "seed": 5,
        "max_tokens": 9,
    }
    every = asking.completions.create(**fields, n=6, logprobs=0)
    best = asking.completions.create(**fields, n=2, best_of=6)
    wanted = []
    for group in (every.choices[:6], every.choices[6:]):
        wanted += [choice.text for choice in sorted(group, key=mean, reverse=True)[:2]]
        assert len({choice.text for choice in group}) > 2
    assert [choice.text for choice in best.choices] == wanted
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert best.choices[0].logprobs is None
    assert every.usage is not None
    assert best.usage is not None
    assert best.usage.completion_tokens == every.usage.completion_tokens, (
        "what is thrown away was drawn as well"
    )
    assert best.usage.prompt_tokens == every.usage.prompt_tokens
    last = records(metered, tmp_path, 2)[-1]
    assert (last.id, last.output_tokens) == (best.id, best.usage.completion_tokens)


@pytest.mark.parametrize("penalty", [None, 0.0, 2.0])
def test_beams_are_those_of_the_engine(
    metered: Service, asking: openai.OpenAI, model_folder: Path, tmp_path: Path, penalty: float | None
) -> None:
    tokenizer = metered.tokenizer
    extra = BEAMS if penalty is None else BEAMS | {"length_penalty": penalty}
    reply = asking.completions.create(
        model="tiny", prompt=PROMPTS, n=4, max_tokens=12, temperature=0, extra_body=extra
    )
    asked = Counting(Engine(load_model(model_folder), tokenizer))
    texts = []
    for prompt in PROMPTS:
        request = Request("r", tokenizer.encode(prompt), SamplingParams(max_tokens=12))
        found = beam_search(
            asked,
            request,
            num_beams=4,
            end_ids=(tokenizer.eos_id, tokenizer.pad_id),
            length_penalty=1.0 if penalty is None else penalty,
        )
        texts += [tokenizer.decode(beam.tokens, skip_special=True) for beam in found]
    assert [choice.text for choice in reply.choices] == texts
    assert len(set(texts)) == 8
    assert reply.usage is not None
    assert reply.usage.completion_tokens == asked.num_tokens
    assert reply.usage.prompt_tokens == sum(len(tokenizer.encode(prompt)) for prompt in PROMPTS)
    (record,) = records(metered, tmp_path, 1)
    assert (record.id, record.output_tokens) == (reply.id, asked.num_tokens)
    assert record.prompt_tokens == reply.usage.prompt_tokens


class Counting:
    """An engine and the number of tokens that it has drawn."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.num_tokens = engine, 0

    def run(self, requests: Any) -> Any:
        done = self._engine.run(requests)
        self.num_tokens += sum(len(completion.tokens) for completion in done)
        return done


def test_a_chat_by_beams_is_read_like_any_other(asking: openai.OpenAI) -> None:
    reply = asking.chat.completions.create(
        model="tiny", messages=QUESTION, n=3, max_tokens=80, extra_body=BEAMS
    )
    first = reply.choices[0]
    assert first.message.content == "The sum is 5."
    assert first.message.reasoning_content == "Two and three: 2, then 3, 4, 5. So the sum is 5."  # type: ignore[attr-defined]
    assert first.finish_reason == "stop"
    assert len(reply.choices) == 3
    assert reply.usage is not None
    assert reply.usage.completion_tokens_details is not None
    reasoning = reply.usage.completion_tokens_details.reasoning_tokens
    assert reasoning is not None
    assert 0 < reasoning < reply.usage.completion_tokens


def test_a_search_that_nobody_waits_for_is_given_up(
    metered: Service, running: ServerThread, tmp_path: Path
) -> None:
    connection = HTTPConnection(urlsplit(running.url).netloc, timeout=PATIENCE_SECONDS)
    body = {"prompt": "Two", "n": 8, "max_tokens": 1900, "ignore_eos": True, **BEAMS}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    wait_until(lambda: metered.worker.num_running == 8)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    wait_until(lambda: metered.worker.idle)
    (record,) = records(metered, tmp_path, 1)
    assert record.finish_reason == "abort"
    assert 8 < record.output_tokens < 8 * 1900


def test_a_search_that_is_out_of_time_gives_what_it_has(asking: openai.OpenAI) -> None:
    reply = asking.completions.create(
        model="tiny",
        prompt="Two",
        n=2,
        max_tokens=1900,
        extra_body=BEAMS | {"timeout": 0.3, "ignore_eos": True},
    )
    assert [choice.finish_reason for choice in reply.choices] == ["length", "length"]
    assert all(len(choice.text) > 3 for choice in reply.choices)
    assert reply.usage is not None
    assert reply.usage.completion_tokens < 2 * 1900


def test_a_server_that_leaves_lets_a_search_finish(metered: Service) -> None:
    with ServerThread(metered) as running:
        connection = HTTPConnection(urlsplit(running.url).netloc, timeout=PATIENCE_SECONDS)
        body = {"prompt": "Two", "n": 4, "max_tokens": 60, "ignore_eos": True, **BEAMS}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        wait_until(lambda: not metered.worker.idle)
        running.server.drain()
        reply = json.loads(connection.getresponse().read())
        connection.close()
    assert len(reply["choices"]) == 4
    assert reply["usage"]["completion_tokens"] == 1 + 59 * 4


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"best_of": 2, "n": 3}, "best_of 2 is less than n 3"),
        ({"best_of": 3, "temperature": 0}, "best_of 3 at temperature 0"),
        ({"best_of": 3, "stream": True}, "cannot be streamed"),
        ({"best_of": 21}, "best_of"),
        ({"best_of": 20, "prompt": ["a"] * 20}, "256 sequences"),
        ({"length_penalty": 1.0}, "use_beam_search"),
        (BEAMS | {"stream": True}, "stream cannot"),
        (BEAMS | {"best_of": 3}, "best_of cannot"),
        (BEAMS | {"stop": "e"}, "stop cannot"),
        (BEAMS | {"temperature": 0.6}, "temperature cannot"),
        (BEAMS | {"top_p": 0.9}, "top_p cannot"),
        (BEAMS | {"logit_bias": {"5": 1}}, "logit_bias cannot"),
        (BEAMS | {"structured_outputs": {"choice": ["a"]}}, "structured_outputs cannot"),
        (BEAMS | {"n": 16, "max_tokens": 1100}, "over the limit of 16,384"),
        (BEAMS | {"n": 16, "stop_token_ids": [1, 2, 3, 4, 5]}, "num_beams 16"),
        (BEAMS | {"early_stopping": "soon"}, "early_stopping"),
        (BEAMS | {"length_penalty": 11}, "length_penalty"),
        (BEAMS | {"logprobs": 0}, "logprobs cannot be had"),
    ],
)
def test_what_cannot_be_searched_for_is_refused(client: openai.OpenAI, fields: Any, part: str) -> None:
    body = {"prompt": "a", **fields}
    with pytest.raises(openai.BadRequestError, match=part):
        client.completions.create(model="tiny", prompt=body.pop("prompt"), extra_body=body)


@pytest.mark.parametrize(
    "field", ["thinking_budget", "min_thinking", "logprobs", "response_format", "tool_choice"]
)
def test_a_chat_by_beams_refuses_what_it_cannot_honour(client: openai.OpenAI, field: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    values: dict[str, Any] = {
        "thinking_budget": 4,
        "min_thinking": 4,
        "logprobs": True,
        "response_format": {"type": "json_object"},
        "tool_choice": "required",
    }
    extra = BEAMS | {field: values[field], "tools": [tool]}
    with pytest.raises(openai.BadRequestError, match=f"{field} cannot"):
        client.chat.completions.create(model="tiny", messages=QUESTION, extra_body=extra)
