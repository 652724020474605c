"""Whose request goes first, how long it may take, and a thinking that is cut short or prolonged while it runs."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from pensar.infer.engine import Engine, Request
from pensar.model.weights import load_model
from pensar.serve.app import make_service
from pensar.serve.server import ServerThread
from pensar.serve.service import ServeConfig, Service
from pensar.text.chat import STOP_SENTENCE
from pensar.text.tokenizer import Tokenizer

QUESTION: list[Any] = [{"role": "user", "content": "What is 2+3?"}]
SENTENCE = STOP_SENTENCE.removesuffix("\n</think>\n\n").strip("\n")
KEY = "secret"


@pytest.fixture
def slow(model_folder: Path) -> Service:
    """The model that knows its lessons, at a pace that leaves time to ask for something else."""
    tokenizer = Tokenizer.load(model_folder)
    engine = Engine(load_model(model_folder), tokenizer)
    step = engine.step

    def slowly() -> Any:
        time.sleep(0.002)
        return step()

    engine.step = slowly  # type: ignore[method-assign]
    return make_service(engine, tokenizer, ServeConfig(model_name="tiny", api_key=KEY))


@pytest.fixture
def url(slow: Service) -> Iterator[str]:
    with ServerThread(slow) as running:
        yield running.url


@pytest.fixture
def asking(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def change(url: str, name: str, body: Any, key: str = KEY) -> tuple[int, Any]:
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    asked = urllib.request.Request(f"{url}/v1/requests/{name}/thinking", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(asked) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["error"]


def think(asking: openai.OpenAI, meanwhile: Callable[[str], None], **extra: Any) -> tuple[str, str, int]:
    """Reasoning, answer and reasoning tokens of a talk; `meanwhile` gets the id when some thinking has come."""
    stream = asking.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=extra.pop("max_tokens", 200),
        n=extra.pop("n", 1),
        extra_body=extra,
    )
    reasoning, answer, told, chunk = "", "", False, None
    for chunk in stream:
        for choice in chunk.choices:
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            answer += choice.delta.content or ""
        if reasoning and not told:
            meanwhile(chunk.id)
            told = True
    assert chunk is not None
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens_details is not None
    return reasoning, answer, chunk.usage.completion_tokens_details.reasoning_tokens or 0


def test_min_thinking_holds_the_block_open(asking: openai.OpenAI) -> None:
    _, _, short = think(asking, lambda name: None)
    reasoning, _, spent = think(asking, lambda name: None, min_thinking=60)
    assert short < 60 <= spent
    assert SENTENCE not in reasoning


@pytest.mark.parametrize("n", [1, 2])
def test_finish_now_ends_the_thinking_of_every_choice(url: str, asking: openai.OpenAI, n: int) -> None:
    def finish(name: str) -> None:
        assert change(url, name, {"finish": True}) == (
            200,
            {"id": name, "changed": n, "object": "request.thinking"},
        )

    reasoning, _, spent = think(asking, finish, min_thinking=800, max_tokens=900, n=n)
    assert reasoning.count(SENTENCE) == n
    assert spent < 800


def test_a_budget_can_be_set_and_lifted_while_the_reply_runs(url: str, asking: openai.OpenAI) -> None:
    def with_budget(budget: int | None) -> Callable[[str], None]:
        return lambda name: assert_changed(change(url, name, {"budget": budget}))

    def assert_changed(answer: tuple[int, Any]) -> None:
        assert answer[0] == 200

    reasoning, _, spent = think(asking, with_budget(300), min_thinking=800, max_tokens=900)
    assert spent == 300
    assert reasoning.endswith(SENTENCE)
    reasoning, _, spent = think(
        asking, with_budget(None), min_thinking=400, thinking_budget=400, max_tokens=600
    )
    assert spent > 400
    assert SENTENCE not in reasoning


def test_only_who_has_the_key_may_change_a_running_request(url: str, asking: openai.OpenAI) -> None:
    answers = []

    def try_all(name: str) -> None:
        answers.append(change(url, name, {"finish": True}, key="wrong"))
        answers.extend(
            change(url, name, body) for body in ({}, {"finish": True, "budget": 3}, {"budget": -1})
        )
        answers.append(change(url, "chatcmpl-nobody", {"finish": True}))
        names.append(name)

    names: list[str] = []
    reasoning, _, _ = think(asking, try_all, min_thinking=100)
    assert [status for status, _ in answers] == [401, 400, 400, 400, 404]
    assert answers[-1][1]["code"] == "request_not_found"
    assert SENTENCE not in reasoning
    assert change(url, names[0], {"finish": True})[0] == 404, "it has ended"


def test_what_a_request_says_of_itself_reaches_the_engine(slow: Service, asking: openai.OpenAI) -> None:
    submit, seen = slow.worker._engine.submit, []

    def noted(request: Request) -> None:
        seen.append(request)
        submit(request)

    slow.worker._engine.submit = noted  # type: ignore[method-assign]
    extra = {
        "priority": -3,
        "cache_salt": "s",
        "timeout": 9.5,
        "stop_token_ids": [7],
        "bad_token_ids": [8, 9],
    }
    asking.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        user="ann",
        max_tokens=20,
        extra_body=extra | {"min_thinking": 2, "thinking_token_budget": 4},
    )
    asking.completions.create(model="tiny", prompt="Two", user="bob", max_tokens=1, extra_body=extra)
    chat, text = seen
    for request in seen:
        assert (request.priority, request.salt, request.timeout_seconds) == (-3, "s", 9.5)
        assert request.params.bad_ids == (8, 9)
        assert 7 in request.params.stop_ids
    assert (chat.user, text.user) == ("ann", "bob")
    assert (chat.params.min_thinking, chat.params.thinking_budget) == (2, 4)


def test_a_reply_that_is_out_of_time_ends_as_it_is(asking: openai.OpenAI) -> None:
    begun = time.monotonic()
    reply = asking.completions.create(
        model="tiny",
        prompt="Two",
        max_tokens=1900,
        temperature=0,
        extra_body={"timeout": 0.2, "ignore_eos": True},
    )
    assert 0.2 <= time.monotonic() - begun < 2
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert 0 < reply.usage.completion_tokens < 1000


def test_only_equal_salts_share_what_is_cached(asking: openai.OpenAI) -> None:
    def cached(salt: str | None) -> int:
        reply = asking.completions.create(
            model="tiny",
            prompt="Two and three: 2, then 3, 4, 5. So the sum is 5. The sum is 5. I guess." * 2,
            max_tokens=1,
            extra_body={} if salt is None else {"cache_salt": salt},
        )
        assert reply.usage is not None
        assert reply.usage.prompt_tokens_details is not None
        return reply.usage.prompt_tokens_details.cached_tokens or 0

    assert [cached(salt) > 0 for salt in (None, "a", "b", "a", None)] == [False, False, False, True, True]


def test_an_important_request_takes_the_place_of_a_running_one(
    endless_engine: Engine, tokenizer: Tokenizer
) -> None:
    service = make_service(endless_engine, tokenizer, ServeConfig(model_name="endless"))
    with (
        ServerThread(service) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client,
    ):
        fields: dict[str, Any] = {"model": "endless", "prompt": "Two", "temperature": 0}
        long = client.completions.create(**fields, max_tokens=2000, n=2, stream=True)
        next(iter(long))
        client.completions.create(**fields, max_tokens=5, extra_body={"priority": -1})
        assert service.worker.num_unfinished == 2, "both places were taken, and are again"
        assert endless_engine.scheduler.num_preempted == 1
        long.close()


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"priority": 2**40}, "priority"),
        ({"timeout": 0}, "timeout"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"user": "u" * 257}, "user"),
        ({"stop_token_ids": [10**6]}, "stop_ids 1000000"),
        ({"bad_token_ids": [-1]}, "bad_ids -1"),
        ({"min_thinking": 5, "thinking_budget": 4}, "min_thinking 5 above its thinking_budget 4"),
        ({"min_thinking": 50}, "min_thinking 50"),
        ({"min_tokens": 50}, "min_tokens 50"),
        ({"adaptive_budget": 0.5}, "no learned thinking budgets"),
        ({"adaptive_budget": 1.5}, "adaptive_budget"),
        ({"thinking_token_budget": -1}, "thinking_budget -1 is negative"),
    ],
)
def test_a_wrong_value_is_400_and_explained(client: openai.OpenAI, fields: dict[str, Any], part: str) -> None:
    with pytest.raises(openai.BadRequestError, match=part):
        client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=20, extra_body=fields)
