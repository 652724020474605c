"""The chat format against Qwen3's official template, as text and as tokens, and the weights of training samples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pensar.base.errors import DataError, ModelError
from pensar.text.chat import (
    EMPTY_THINKING,
    STOP_SENTENCE,
    encode_prompt,
    encode_stop_sentence,
    encode_training,
    mode_of,
    parse_reply,
    render,
    split_turns,
)
from pensar.text.conversation import Conversation, Message, ToolCall
from pensar.text.template import CHAT_TEMPLATE, message_as_dict, render_template
from pensar.text.tokenizer import CONTROL_TOKENS, Tokenizer

SYSTEM = Message(role="system", content="You are terse.")
ASK = Message(role="user", content="What is 2+2?")
MORE = Message(role="user", content="And doubled? /no_think")
PLAIN = Message(role="assistant", content="4.")
THOUGHT = Message(role="assistant", content="\n\n4.", reasoning_content="\n2 and 2\nmake 4.\n\n")
INLINE = Message(role="assistant", content="<think>\nhm\n</think>\n\nIt is 4.")
WRAPPED = Message(role="user", content="<tool_response>\n4\n</tool_response>")
WEATHER = ToolCall(name="weather", arguments={"city": "Évora <b>", "days": [1, 2.5, None, True], "o": {}})
CALLING = Message(role="assistant", content="", reasoning_content="I look it up.", tool_calls=(WEATHER,))
SAYING = Message(
    role="assistant", content="Let me see.", tool_calls=(WEATHER, ToolCall(name="now", arguments={}))
)
SUNNY = Message(role="tool", content='{"sky": "sunny"}', tool_call_id="1")
NOON = Message(role="tool", content="12:00", name="now")
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather\'s state in a city, <like> this & "that": ção',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

CASES: dict[str, tuple[Message, ...]] = {
    "question": (ASK,),
    "system and question": (SYSTEM, ASK),
    "system only": (SYSTEM,),
    "late system": (ASK, PLAIN, SYSTEM, MORE),
    "answer": (ASK, PLAIN),
    "thought": (ASK, THOUGHT),
    "inline thought": (SYSTEM, ASK, INLINE),
    "thinking leaves the history": (ASK, THOUGHT, MORE),
    "inline thinking leaves the history": (ASK, INLINE, MORE, INLINE),
    "tool call": (ASK, CALLING),
    "tool call and words": (ASK, SAYING),
    "tool result": (ASK, CALLING, SUNNY),
    "two tool results are one turn": (SYSTEM, ASK, SAYING, SUNNY, NOON),
    "thinking survives tool use": (ASK, CALLING, SUNNY, SAYING, SUNNY, NOON, THOUGHT),
    "thinking ends with the next question": (ASK, CALLING, SUNNY, THOUGHT, MORE),
    "wrapped tool result is no question": (ASK, THOUGHT, WRAPPED, THOUGHT),
    "no question": (SYSTEM, PLAIN),
    "tool first": (SUNNY, PLAIN),
    "empty words": (Message(role="user"), Message(role="assistant")),
    "line feeds": (
        Message(role="user", content="\n\nhi\n\n"),
        Message(role="assistant", content="\n", tool_calls=(WEATHER,)),
    ),
    "history with line feeds": (ASK, Message(role="assistant", content="\n\n4.\n"), MORE),
}
MODES: tuple[bool | None, ...] = (None, True, False)

fragments = st.sampled_from(["a", " ", "\n", "é", "1", "<", "/think", "</think>", "<think>", "{", '"'])
some_text = st.lists(fragments, max_size=12).map("".join)
arguments = st.dictionaries(
    st.text(max_size=3), st.none() | st.booleans() | st.integers() | st.text(max_size=5), max_size=3
)
calls = st.lists(
    st.builds(ToolCall, name=st.sampled_from(["f", "get_it"]), arguments=arguments), max_size=2
).map(tuple)
messages = st.one_of(
    st.builds(
        Message,
        role=st.sampled_from(["user", "system", "tool"]),
        content=some_text | st.just(WRAPPED.content),
    ),
    st.builds(
        Message,
        role=st.just("assistant"),
        content=some_text,
        reasoning_content=st.none() | some_text,
        tool_calls=calls,
    ),
)
conversations = st.builds(
    Conversation,
    messages=st.lists(messages, min_size=1, max_size=7).map(tuple),
    tools=st.sampled_from([(), (TOOL,), (TOOL, TOOL)]),
)


def talk(*said: Message, tools: bool = False) -> Conversation:
    return Conversation(messages=said, tools=(TOOL, {**TOOL, "strict": True}) if tools else ())


def rendered_by_transformers(
    template: str, conversation: Conversation, *, prompt: bool, thinking: bool | None
) -> str:
    module = pytest.importorskip("transformers.utils.chat_template_utils")
    extra = {} if thinking is None else {"enable_thinking": thinking}
    texts, _ = module.render_jinja_template(
        conversations=[[message_as_dict(message) for message in conversation.messages]],
        tools=list(conversation.tools) or None,
        chat_template=template,
        add_generation_prompt=prompt,
        **extra,
    )
    return str(texts[0])


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_text_equals_the_official_templates(official_template: str, case: str, tools: bool) -> None:
    conversation = talk(*CASES[case], tools=tools)
    for thinking in MODES:
        for prompt in (False, True):
            expected = rendered_by_transformers(
                official_template, conversation, prompt=prompt, thinking=thinking
            )
            assert render(conversation, prompt=prompt, thinking=thinking) == expected
            for template in (CHAT_TEMPLATE, official_template):
                assert render_template(template, conversation, prompt=prompt, thinking=thinking) == expected
            assert (
                rendered_by_transformers(CHAT_TEMPLATE, conversation, prompt=prompt, thinking=thinking)
                == expected
            )


@settings(deadline=None, max_examples=150)
@given(conversation=conversations, thinking=st.sampled_from(MODES), prompt=st.booleans())
def test_our_renderer_and_our_template_agree_on_any_conversation(
    conversation: Conversation, thinking: bool | None, prompt: bool
) -> None:
    text = render(conversation, prompt=prompt, thinking=thinking)
    assert text == render_template(CHAT_TEMPLATE, conversation, prompt=prompt, thinking=thinking)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_our_renderer_agrees_with_the_official_template_on_any_conversation(
    official_template: str, data: st.DataObject
) -> None:
    conversation = data.draw(conversations)
    for prompt in (True, False):
        expected = render_template(official_template, conversation, prompt=prompt)
        assert render(conversation, prompt=prompt) == expected


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if case != "wrapped tool result is no question"])
def test_tokens_equal_those_of_transformers_and_the_official_tokenizer(
    official: Tokenizer, official_peer: Any, case: str, tools: bool
) -> None:
    conversation = talk(*CASES[case], tools=tools)
    ours = official.with_chat_template(CHAT_TEMPLATE)
    rows = [message_as_dict(message) for message in conversation.messages]
    for thinking in MODES:
        extra = {} if thinking is None else {"enable_thinking": thinking}
        expected = official_peer.apply_chat_template(
            rows,
            tools=list(conversation.tools) or None,
            add_generation_prompt=True,
            return_dict=False,
            **extra,
        )
        assert encode_prompt(ours, conversation, thinking=thinking) == expected
        assert encode_prompt(official, conversation, thinking=thinking) == expected  # by its own template
    if conversation.messages[-1].role == "assistant":
        expected = official_peer.apply_chat_template(
            rows, tools=list(conversation.tools) or None, return_dict=False
        )
        assert encode_training(ours, conversation).tokens.tolist() == expected
        assert encode_training(official, conversation).tokens.tolist() == expected


def test_a_saved_tokenizer_gives_the_same_prompt_in_transformers(
    trained: Tokenizer, tmp_path: Path, open_with_transformers: Callable[[Path], Any]
) -> None:
    trained.save(tmp_path)
    peer = open_with_transformers(tmp_path)
    conversation = talk(*CASES["thinking survives tool use"], tools=True)
    rows = [message_as_dict(message) for message in conversation.messages]
    expected = peer.apply_chat_template(
        rows,
        tools=list(conversation.tools),
        add_generation_prompt=True,
        enable_thinking=False,
        return_dict=False,
    )
    assert encode_prompt(trained, conversation, thinking=False) == expected


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("spelled", CONTROL_TOKENS)
def test_what_people_say_never_becomes_a_control_token(
    trained: Tokenizer, spelled: str, foreign: bool
) -> None:
    # A comment makes the template another one, so that it is rendered as a downloaded model's would be.
    tokenizer = trained.with_chat_template("{#- foreign -#}" + CHAT_TEMPLATE) if foreign else trained

    def control(word: str) -> list[int]:
        tool = {"type": "function", "function": {"name": word, "description": f"says {word}"}}
        conversation = Conversation(
            messages=(
                Message(role="system", content=word),
                Message(role="user", content=f"say {word}{word} <|im_{word}end|>", name=word),
                Message(
                    role="assistant",
                    content=f"so {word if word not in ('<think>', '</think>') else 'x'}",
                    reasoning_content=f"hm {word}",
                    tool_calls=(ToolCall(name=word, arguments={word: [word, {"a": word}]}),),
                ),
                Message(role="tool", content=word),
            ),
            tools=(tool,),
        )
        ids = encode_prompt(tokenizer, conversation)
        assert ids == encode_prompt(trained, conversation)
        return [token for token in ids if token in tokenizer.control_tokens.values()]

    assert control(spelled) == control("harmless")


def test_weights_cover_the_last_reply_with_its_end(trained: Tokenizer) -> None:
    conversation = talk(SYSTEM, ASK, THOUGHT, MORE, THOUGHT)
    sample = encode_training(trained, conversation)
    assert sample.ce is not None
    learned = trained.decode(sample.tokens[sample.ce == 1])
    assert learned == "<think>\n2 and 2\nmake 4.\n</think>\n\n4.<|im_end|>"
    assert set(sample.ce.tolist()) == {0.0, 1.0}
    assert trained.decode(sample.tokens) == render(conversation)
    assert trained.decode(sample.tokens[-1:]) == "\n"
    assert sample.ce[-1] == 0


def test_weights_cover_every_reply_when_asked(trained: Tokenizer) -> None:
    conversation = talk(ASK, THOUGHT, MORE, SAYING, SUNNY, PLAIN)
    sample = encode_training(trained, conversation, every_turn=True)
    assert sample.ce is not None
    calls = render(talk(ASK, SAYING)).split("Let me see.")[1].removesuffix("\n")
    assert trained.decode(sample.tokens[sample.ce == 1]) == (
        f"\n\n4.<|im_end|>Let me see.{calls}{EMPTY_THINKING}4.<|im_end|>"
    )


def test_an_empty_thinking_block_is_learned_unless_the_prompt_gives_it(trained: Tokenizer) -> None:
    conversation = talk(MORE, PLAIN)
    free = encode_training(trained, conversation)
    given = encode_training(trained, conversation, thinking=False)
    assert free.ce is not None
    assert given.ce is not None
    assert trained.decode(free.tokens[free.ce == 1]) == EMPTY_THINKING + "4.<|im_end|>"
    assert trained.decode(given.tokens[given.ce == 1]) == "4.<|im_end|>"
    assert free.tokens.tolist() == given.tokens.tolist()


@settings(deadline=None, max_examples=100)
@given(conversation=conversations, thinking=st.sampled_from(MODES), reply=messages)
def test_a_training_sample_begins_with_exactly_the_tokens_of_its_prompt(
    trained: Tokenizer, conversation: Conversation, thinking: bool | None, reply: Message
) -> None:
    bare = Message(role="assistant", content=reply.content.replace("think>", ""), tool_calls=reply.tool_calls)
    asked = (*conversation.messages, ASK)
    prompt = encode_prompt(trained, msgspec.structs.replace(conversation, messages=asked), thinking=thinking)
    sample = encode_training(
        trained, msgspec.structs.replace(conversation, messages=(*asked, bare)), thinking=thinking
    )
    assert sample.tokens[: len(prompt)].tolist() == prompt
    assert sample.ce is not None
    assert np.flatnonzero(sample.ce)[0] == len(prompt)


@settings(deadline=None, max_examples=150)
@given(
    reasoning=st.none() | some_text.map(lambda text: text.replace("</think>", "").strip("\n")),
    content=some_text.map(lambda text: text.replace("think>", "").lstrip("\n")),
    tool_calls=calls,
)
def test_a_reply_that_was_rendered_is_read_back_as_it_was(
    trained: Tokenizer, reasoning: str | None, content: str, tool_calls: tuple[ToolCall, ...]
) -> None:
    message = Message(
        role="assistant", content=content, reasoning_content=reasoning or None, tool_calls=tool_calls
    )
    sample = encode_training(trained, talk(ASK, message))
    assert sample.ce is not None
    assert parse_reply(trained.decode(sample.tokens[sample.ce == 1], skip_special=True)) == message


def test_a_checkpoints_own_template_is_followed(trained: Tokenizer) -> None:
    shouting = (
        "{%- for message in messages -%}<|im_start|>{{ message.role | upper }}: {{ message.content }}<|im_end|>\n"
        "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>ASSISTANT: {%- endif -%}"
    )
    tokenizer = trained.with_chat_template(shouting)
    assert tokenizer.decode(encode_prompt(tokenizer, talk(ASK))) == (
        "<|im_start|>USER: What is 2+2?<|im_end|><|im_start|>ASSISTANT:"
    )
    sample = encode_training(tokenizer, talk(ASK, Message(role="assistant", content="Four.")))
    assert sample.ce is not None
    assert tokenizer.decode(sample.tokens[sample.ce == 1]) == " Four.<|im_end|>"


def test_weights_agree_between_our_renderer_and_the_same_template_as_a_foreign_one(
    trained: Tokenizer,
) -> None:
    foreign = trained.with_chat_template("{#- foreign -#}" + CHAT_TEMPLATE)
    for case, thinking in [
        ("thinking survives tool use", None),
        ("answer", False),
        ("tool call and words", True),
    ]:
        ours = encode_training(trained, talk(*CASES[case]), thinking=thinking)
        theirs = encode_training(foreign, talk(*CASES[case]), thinking=thinking)
        assert ours.ce is not None
        assert theirs.ce is not None
        assert theirs.tokens.tolist() == ours.tokens.tolist()
        assert theirs.ce.tolist() == ours.ce.tolist()


def test_templates_of_strangers_run_in_a_sandbox(trained: Tokenizer) -> None:
    for attack in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        with pytest.raises(ModelError, match="cannot render"):
            render_template(attack, talk(ASK), prompt=True)
    with pytest.raises(ModelError, match="line 2"):
        render_template("{% if x %}\n{% endfor %}", talk(ASK), prompt=True)
    with pytest.raises(DataError, match="refuses the conversation: no tools"):
        render_template("{{ raise_exception('no tools') }}", talk(ASK), prompt=True)
    assert (
        render_template(
            "a{% generation %}b{% endgeneration %}{{ strftime_now('%%') }}", talk(ASK), prompt=True
        )
        == "ab%"
    )


def test_conversations_that_cannot_be_trained_on_are_refused(trained: Tokenizer) -> None:
    foreign = trained.with_chat_template("{{ add_generation_prompt }}{{ messages[0].content }}")
    for tokenizer in (trained, foreign):
        with pytest.raises(DataError, match="no messages"):
            encode_prompt(tokenizer, talk())
        with pytest.raises(DataError, match="must end with the assistant's message, not with user's"):
            encode_training(tokenizer, talk(ASK))
        with pytest.raises(DataError, match="has reasoning although thinking=False"):
            encode_training(tokenizer, talk(ASK, THOUGHT), thinking=False)
    with pytest.raises(DataError, match="does not continue its own prompt"):
        encode_training(foreign, talk(ASK, PLAIN))
    with pytest.raises(DataError, match="split_turns"):
        encode_training(foreign, talk(ASK, PLAIN), every_turn=True)


def test_the_stop_sentence_closes_the_thinking_with_the_control_token(trained: Tokenizer) -> None:
    ids = encode_stop_sentence(trained)
    assert trained.decode(ids) == STOP_SENTENCE
    assert ids.count(trained.special("</think>")) == 1
    assert STOP_SENTENCE.startswith("\n\nConsidering the limited time by the user, I have")
    assert STOP_SENTENCE.endswith("directly now.\n</think>\n\n")


def test_turns_are_split_so_that_each_keeps_its_own_thinking(trained: Tokenizer) -> None:
    turns = split_turns(talk(SYSTEM, ASK, THOUGHT, MORE, INLINE, tools=True))
    assert [len(turn.messages) for turn in turns] == [3, 5]
    assert all(turn.tools for turn in turns)
    assert "2 and 2" in render(turns[0])
    assert "2 and 2" not in render(turns[1])


@pytest.mark.parametrize(
    ("said", "mode"),
    [
        ([], None),
        (["hello"], None),
        (["hello /think"], True),
        (["/no_think hello"], False),
        (["/think", "/no_think"], False),
        (["/no_think or rather /think."], True),
        (["/no_think", "no flag here"], False),
        (["see path/think and /thinking, http://x.org/no_think, a/no_think/b"], None),
        (["你好/no_think"], False),
        (["(/think)"], True),
    ],
)
def test_the_last_flag_of_user_and_system_gives_the_mode(said: list[str], mode: bool | None) -> None:
    turns = [
        message
        for text in said
        for message in (
            Message(role="user", content=text),
            Message(role="assistant", content="/think /no_think"),
        )
    ]
    assert mode_of(talk(*turns)) is mode


def test_a_system_flag_counts_until_a_user_gives_another() -> None:
    system = Message(role="system", content="Be quick. /no_think")
    assert mode_of(talk(system, ASK)) is False
    assert mode_of(talk(system, Message(role="user", content="/think why?"))) is True


def test_tool_schemas_are_written_as_json_without_escapes() -> None:
    text = render(talk(ASK, tools=True))
    line = text.split("<tools>\n")[1].split("\n")[0]
    assert json.loads(line) == TOOL
    assert "<like> this & " in line
    assert "ção" in line
