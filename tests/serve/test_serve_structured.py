"""What a request can ask of its answer beyond sampling: formats, forced calls, biases, the likeliest tokens."""

import json
import re
from typing import Any

import openai

HELLO: list[Any] = [{"role": "user", "content": "Say it."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Rio", "Oslo"]}, "days": {"type": "integer", "maximum": 9}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}
OFF = {"enable_thinking": False}


def asked(client: openai.OpenAI, **fields: Any) -> Any:
    extra = OFF | fields.pop("extra_body", {})
    return client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=fields.pop("max_tokens", 200), extra_body=extra, **fields
    ).choices[0]


def test_an_answer_follows_its_json_schema_from_a_model_that_knows_nothing(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}, "kind": {"enum": ["a", "bc"]}},
        "required": ["yes", "kind"],
        "additionalProperties": False,
    }
    for seed in range(3):
        choice = asked(
            client,
            seed=seed,
            max_tokens=900,
            response_format={"type": "json_schema", "json_schema": {"name": "it", "schema": schema}},
        )
        value = json.loads(choice.message.content)
        assert set(value) == {"yes", "kind"}
        assert type(value["yes"]) is bool
        assert value["kind"] in ("a", "bc")
        assert choice.finish_reason == "stop"


def test_other_forms_of_an_answer(client: openai.OpenAI) -> None:
    def structured(**wanted: Any) -> str:
        return str(asked(client, extra_body={"structured_outputs": wanted}).message.content)

    assert structured(choice=["red", "green"]) in ("red", "green")
    assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", structured(regex="[0-9]{3}-[a-f]{2}"))


def test_a_format_is_about_the_answer_and_leaves_the_thinking_free(client: openai.OpenAI) -> None:
    message = asked(
        client,
        extra_body={"enable_thinking": True, "thinking_budget": 5, "structured_outputs": {"choice": ["red"]}},
    ).message
    assert message.content == "red"


def test_a_forced_call_is_a_call_with_valid_arguments(client: openai.OpenAI) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = asked(client, tools=[WEATHER], tool_choice=choice)
        assert answer.finish_reason == "tool_calls"
        for call in answer.message.tool_calls:
            assert call.function.name == "weather"
            assert json.loads(call.function.arguments)["place"] in ("Rio", "Oslo")


def test_a_bias_decides_and_the_likeliest_tokens_are_told(client: openai.OpenAI) -> None:
    choice = asked(client, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3)
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob
    biased = asked(client, max_tokens=4, temperature=0, logit_bias={"65": 100})
    repeated = asked(client, max_tokens=4, temperature=0, logit_bias={"65": 100}, frequency_penalty=2)
    assert len(set(biased.message.content)) == 1
    assert repeated.message.content == biased.message.content, (
        "a penalty of 8 does not outweigh a bias of 100"
    )


def test_a_prompt_that_was_seen_before_is_counted_as_cached(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "0 1 2 3 4 5 6 7 8 9 " * 20}]
    first, second = (
        client.chat.completions.create(model="tiny", messages=long, max_tokens=2).usage for _ in range(2)
    )
    assert first is not None
    assert second is not None
    assert first.prompt_tokens_details is not None
    assert second.prompt_tokens_details is not None
    assert first.prompt_tokens_details.cached_tokens < 40
    assert second.prompt_tokens_details.cached_tokens > second.prompt_tokens - 17
