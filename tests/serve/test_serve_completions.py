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


def test_the_likeliest_tokens_come_with_each(client: openai.OpenAI) -> None:
    fields = {"model": "tiny", "prompt": "Two and", "temperature": 0, "max_tokens": 4, "logprobs": 3}
    entries = client.completions.create(**fields).choices[0].logprobs
    assert entries.top_logprobs is not None
    for token, logprob, top in zip(entries.tokens, entries.token_logprobs, entries.top_logprobs, strict=True):
        assert max(top, key=top.__getitem__) == token, "greedy takes the likeliest"
        assert top[token] == logprob
    streamed = [chunk.choices[0].logprobs for chunk in client.completions.create(**fields, stream=True)]
    assert [top for part in streamed if part for top in part.top_logprobs] == entries.top_logprobs
    plain = client.completions.create(**fields | {"logprobs": 0}).choices[0].logprobs
    assert plain.top_logprobs is None


def test_a_text_is_scored_by_its_echo(client: openai.OpenAI, service: Service) -> None:
    """What evaluation harnesses do: the text goes in whole, and its own tokens' log-probabilities come out."""
    text = "Two and two are four."
    ids = service.tokenizer.encode(text)
    reply = client.completions.create(
        model="tiny", prompt=text, temperature=0, max_tokens=1, logprobs=1, echo=True
    )
    found = reply.choices[0].logprobs
    assert len(found.tokens) == len(ids) + 1
    assert "".join(found.tokens[:-1]) == text
    assert reply.choices[0].text.startswith(text)
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(len(found.tokens))]
    for place in range(1, len(ids)):
        one = client.completions.create(
            model="tiny", prompt=ids[:place], temperature=0, max_tokens=1, logprobs=1
        )
        (likeliest,) = one.choices[0].logprobs.tokens
        top = found.top_logprobs[place]
        assert max(top, key=top.__getitem__) == likeliest
        assert top[likeliest] == pytest.approx(one.choices[0].logprobs.token_logprobs[0], abs=1e-4)
        assert top[found.tokens[place]] == found.token_logprobs[place]
    twice = client.completions.create(
        model="tiny", prompt=[text, "Two"], n=2, max_tokens=1, logprobs=0, echo=True
    )
    assert [choice.logprobs.token_logprobs[0] for choice in twice.choices] == [None] * 4
    assert not twice.choices[2].logprobs.token_logprobs[1:-1]
    for choice in twice.choices[:2]:
        assert choice.logprobs.token_logprobs[1:-1] == pytest.approx(found.token_logprobs[1:-1], abs=1e-4)


def test_a_reply_without_a_token_has_no_places(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model="tiny", prompt="Two", logprobs=0, extra_body={"timeout": 1e-6}
    ).choices[0]
    assert found.text == ""
    assert (found.logprobs.tokens, found.logprobs.token_logprobs, found.logprobs.text_offset) == ([], [], [])


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
        ({"prompt": "a", "logprobs": 21}, "logprobs 21 must be at least 0 and at most 20"),
        ({"prompt": "a", "logprobs": -1}, "logprobs -1"),
        (
            {"prompt": "a", "logprobs": 0, "echo": True, "stream": True},
            "echo with logprobs cannot be streamed",
        ),
        ({"prompt": ["a"] * 100, "n": 16}, "256 sequences"),
        ({"prompt": "a", "max_tokens": 5000}, "context length"),
    ],
)
def test_a_bad_prompt_is_explained(client: openai.OpenAI, fields: dict[str, object], part: str) -> None:
    with pytest.raises(openai.BadRequestError, match=part):
        client.completions.create(model="tiny", **fields)  # type: ignore[call-overload]
