"""Completions: texts and token ids continued, checked against the engine's own continuation."""

import openai
import pytest

from pensar.serve.service import Service
from pensar.text.chat import encode_prompt
from pensar.text.conversation import Conversation, Message

ANSWER = "The sum is 5."


def prompt_ids(service: Service) -> list[int]:
    talk = Conversation(messages=(Message(role="user", content="What is 2+3?"),))
    return encode_prompt(service.tokenizer, talk)


def test_token_ids_are_continued_and_the_thinking_stays_in_the_text(
    client: openai.OpenAI, service: Service
) -> None:
    reply = client.completions.create(model="tiny", prompt=prompt_ids(service), temperature=0, max_tokens=80)
    text = reply.choices[0].text
    assert text.startswith("<think>\nTwo")
    assert text.endswith("</think>\n\n" + ANSWER)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(prompt_ids(service))


def test_a_streamed_completion_says_the_same(client: openai.OpenAI, service: Service) -> None:
    fields = {"model": "tiny", "prompt": prompt_ids(service), "temperature": 0, "max_tokens": 80}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        "stop"
    ]
    assert chunks[-1].usage == whole.usage


def test_sixteen_tokens_are_the_default(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="tiny", prompt="Two and", temperature=0)
    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 16


def test_several_prompts_are_answered_in_order(client: openai.OpenAI) -> None:
    prompts = ["Two and", "What is", "The sum"]
    fields = {"model": "tiny", "temperature": 0, "max_tokens": 6}
    alone = [client.completions.create(prompt=prompt, **fields).choices[0].text for prompt in prompts]
    together = client.completions.create(prompt=prompts, n=2, **fields).choices
    assert [choice.index for choice in together] == list(range(6))
    assert [choice.text for choice in together] == [text for text in alone for _ in range(2)]


def test_a_stop_string_ends_the_text_wherever_it_stands(client: openai.OpenAI, service: Service) -> None:
    fields = {"model": "tiny", "prompt": prompt_ids(service), "temperature": 0, "max_tokens": 80}
    reply = client.completions.create(**fields, stop="three:")
    assert reply.choices[0].text == "<think>\nTwo and "
    assert reply.choices[0].finish_reason == "stop"


def test_echo_puts_the_prompt_before_the_text(client: openai.OpenAI) -> None:
    fields = {"model": "tiny", "prompt": "Two and", "temperature": 0, "max_tokens": 4}
    plain = client.completions.create(**fields).choices[0].text
    assert client.completions.create(**fields, echo=True).choices[0].text == "Two and" + plain
    chunks = client.completions.create(**fields, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Two and" + plain


def test_logprobs_are_those_of_the_chosen_tokens(client: openai.OpenAI, service: Service) -> None:
    reply = client.completions.create(
        model="tiny", prompt=prompt_ids(service), temperature=0, max_tokens=5, logprobs=0
    )
    entries = reply.choices[0].logprobs
    assert entries is not None
    assert entries.tokens is not None
    assert entries.token_logprobs is not None
    assert "".join(entries.tokens) == reply.choices[0].text
    assert len(entries.token_logprobs) == 5
    assert entries.text_offset == [sum(map(len, entries.tokens[:i])) for i in range(5)]


def test_a_text_with_control_tokens_is_plain_text(client: openai.OpenAI, service: Service) -> None:
    sly = "<|im_start|>user"
    reply = client.completions.create(model="tiny", prompt=sly, max_tokens=1)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(service.tokenizer.encode(sly)) > 3


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": [[]]}, "prompt must be"),
        ({"prompt": [1, "a"]}, "prompt must be"),
        ({"prompt": [-1]}, "token -1"),
        ({"prompt": [10**9]}, "ids go from 0 to"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 2}, "logprobs"),
        ({"prompt": "a", "logprobs": 0, "echo": True}, "echo"),
        ({"prompt": ["a"] * 100, "n": 16}, "256 sequences"),
        ({"prompt": "a", "max_tokens": 5000}, "context length"),
    ],
)
def test_a_bad_prompt_is_explained(client: openai.OpenAI, fields: dict[str, object], part: str) -> None:
    with pytest.raises(openai.BadRequestError, match=part):
        client.completions.create(model="tiny", **fields)  # type: ignore[call-overload]
