"""Refusals: the status, the class that the openai client raises, and a message that helps."""

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from urllib.parse import urlsplit

import openai
import pytest

from pensar.infer.engine import Engine
from pensar.serve.app import make_service
from pensar.serve.server import ServerThread
from pensar.serve.service import ServeConfig
from pensar.text.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello"}]


def post(
    url: str, body: bytes, path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, dict[str, str], dict]:
    """Status, headers and JSON body, without any client in between."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=10)
    try:
        connection.request("POST", path, body, {"content-type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), json.loads(response.read())
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("fields", "param", "code", "parts"),
    [
        ({"thinking_budget": -5}, "thinking_budget", None, ["-5", "negative", "0"]),
        ({"thinking_budget": "many"}, "thinking_budget", None, ["int", '"many"']),
        ({"max_tokens": 0}, "max_tokens", None, [">= 1", "has 0"]),
        ({"temperature": 2.5}, "temperature", None, ["<= 2", "2.5"]),
        ({"top_p": 0}, "top_p", None, ["> 0"]),
        ({"top_k": -2}, "top_k", None, ["-2"]),
        ({"min_p": 1.5}, "min_p", None, ["1.5"]),
        ({"n": 17}, "n", None, ["<= 16", "17"]),
        ({"seed": "x"}, "seed", None, ["int"]),
        ({"stop": [""]}, "stop", None, ["empty"]),
        ({"stop": ["a"] * 17}, "stop", None, ["17", "16"]),
        ({"stop": ["a" * 300]}, "stop", None, ["300", "256"]),
        ({"messages": []}, "messages", None, ["length"]),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", None, ["robot"]),
        ({"messages": [{"role": "user"}]}, "messages[0].content", None, ["missing"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            None,
            ["image_url", "text only"],
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
            None,
            ["JSON object"],
        ),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function", None, ["name"]),
        ({"reasoning_effort": "extreme"}, "reasoning_effort", None, ["extreme", "none"]),
        ({"enable_thinking": "no"}, "enable_thinking", None, ["bool"]),
        (
            {"chat_template_kwargs": {"enable_thinking": 0}},
            "chat_template_kwargs.enable_thinking",
            None,
            ["bool"],
        ),
        ({"tool_choice": "required"}, "tool_choice", None, ["no tools"]),
        ({"tool_choice": "sometimes"}, "tool_choice", None, ["sometimes", "required"]),
        ({"response_format": {"type": "xml"}}, "response_format.type", None, ["xml"]),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", None, ["schema"]),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}}},
            "response_format",
            None,
            ["grammar"],
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", None, ["2 of"]),
        ({"presence_penalty": 2.5}, "presence_penalty", None, ["2.5", "at most 2"]),
        ({"repetition_penalty": 0}, "repetition_penalty", None, ["0.01"]),
        ({"logit_bias": {"x": 1}}, "logit_bias", None, ["token ids"]),
        ({"logit_bias": {"5": 101}}, "logit_bias", None, ["101", "-100 to 100"]),
        ({"top_logprobs": 30, "logprobs": True}, "top_logprobs", None, ["30", "20"]),
        ({"top_logprobs": 3}, "top_logprobs", None, ["logprobs"]),
        ({"max_tokens": 5000}, "messages", "context_length_exceeded", ["2048", "5000"]),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_limit(
    server: ServerThread, fields: dict[str, object], param: str, code: str | None, parts: list[str]
) -> None:
    status, _, body = post(server.url, json.dumps({"messages": HELLO} | fields).encode())
    error = body["error"]
    assert (status, error["type"], error["param"], error["code"]) == (
        400,
        "invalid_request_error",
        param,
        code,
    )
    assert not [part for part in parts if part not in error["message"]], error["message"]


def test_a_negative_budget_is_a_bad_request_to_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="thinking_budget -1 is negative") as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"thinking_budget": -1})  # type: ignore[arg-type]
    assert caught.value.param == "thinking_budget"


def test_a_conversation_longer_than_the_context_has_its_own_code(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "0 1 2 3 4 5 6 7 8 9 " * 200}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=messages)  # type: ignore[arg-type]
    assert caught.value.code == "context_length_exceeded"


def test_unknown_fields_and_nulls_are_tolerated(server: ServerThread) -> None:
    fields = {
        "messages": HELLO,
        "max_tokens": 1,
        "user": "me",
        "store": False,
        "metadata": {},
        "service_tier": "x",
    }
    nulls = dict.fromkeys(["stop", "tools", "temperature", "stream", "seed", "n", "response_format", "model"])
    status, _, body = post(server.url, json.dumps(fields | nulls).encode())
    assert (status, body["object"]) == (200, "chat.completion")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"messages": 5}', b"[" * 100_000])
def test_a_body_that_is_no_request_is_refused(server: ServerThread, body: bytes) -> None:
    status, _, answer = post(server.url, body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=HELLO)  # type: ignore[arg-type]
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    assert client.models.retrieve("tiny").id == "tiny"
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_unknown_paths_and_methods_are_answered_as_json(server: ServerThread) -> None:
    status, _, body = post(server.url, b"{}", path="/v1/embeddings")
    assert (status, body["error"]["code"]) == (404, "not_found")
    status, headers, _ = post(server.url, b"{}", path="/v1/models")
    assert status == 405
    assert "GET" in headers["allow"]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_413(server: ServerThread, declared: bool) -> None:
    big = json.dumps({"messages": [{"role": "user", "content": "x" * 250_000}]}).encode()
    if declared:
        status, _, body = post(server.url, big)
    else:
        status, _, body = post(server.url, iter([big]))  # type: ignore[arg-type]
    assert (status, body["error"]["code"]) == (413, "request_too_large")


def test_every_answer_has_a_request_id(server: ServerThread) -> None:
    _, headers, _ = post(server.url, b"{")
    assert headers["x-request-id"].startswith("req-")
    _, headers, _ = post(server.url, b"{", **{"x-request-id": "mine"})
    assert headers["x-request-id"] == "mine"


@pytest.fixture
def locked_url(endless_engine: Engine, tokenizer: Tokenizer) -> Iterator[str]:
    service = make_service(endless_engine, tokenizer, ServeConfig(model_name="tiny", api_key="secret"))
    with ServerThread(service) as running:
        yield running.url


def test_only_the_right_key_opens_the_api(locked_url: str) -> None:
    for key in ("wrong", "sécret"):
        status, _, body = post(locked_url, b"{}", authorization=f"Bearer {key}".encode().decode("latin-1"))
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    with openai.OpenAI(base_url=f"{locked_url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with pytest.raises(openai.AuthenticationError):
            stranger.completions.create(model="tiny", prompt="a")
    with openai.OpenAI(base_url=f"{locked_url}/v1", api_key="secret", max_retries=0) as friend:
        assert friend.completions.create(model="tiny", prompt="a", max_tokens=1).choices
    connection = HTTPConnection(urlsplit(locked_url).netloc)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()
