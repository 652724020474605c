import json
import re
import subprocess
import sys
import time
from enum import Enum
from typing import Annotated, Literal

import msgspec
import numpy as np
import pytest
import torch

from pensar.base.errors import ModelError
from pensar.infer import grammar as module
from pensar.infer.budget import Thinking
from pensar.infer.constraint import Constraints, apply_all
from pensar.infer.engine import Engine
from pensar.infer.grammar import Grammars
from pensar.infer.request import Grammar, Request, SamplingParams, checked_prompt
from pensar.text.reply import parse_reply
from pensar.text.tokenizer import THINK, THINK_END

VOCABULARY = 330
"""Rows of the embedding: ten more than the tokenizer has tokens."""

CALL, CALL_END = "<tool_call>", "</tool_call>"


@pytest.fixture(scope="module")
def constraints(tokenizer):
    return Constraints(VOCABULARY, tokenizer, Thinking(tokenizer), (tokenizer.eos_id, tokenizer.pad_id))


def make(constraints, kind, text="", prompt=(1,), **fields):
    grammar = Grammar(kind=kind, text=text if isinstance(text, str) else json.dumps(text))
    params = SamplingParams(max_tokens=900, grammar=grammar, **fields)
    return constraints.of(Request("r", list(prompt), params), np.asarray(prompt, np.int64))


def allowed(constraint):
    logits = torch.zeros(VOCABULARY)
    constraint.apply(logits)
    return torch.isfinite(logits).nonzero()[:, 0].tolist()


def write(constraint, tokenizer, seed, limit=900, skip=()):
    """A reply of tokens drawn from what is allowed, often from what closes things, up to its end.

    It does not think, and the first token is none of `skip`.
    """
    rng = np.random.default_rng(seed)
    closing = {token for text in '"}],' for token in tokenizer.encode(text)} | {
        tokenizer.eos_id,
        tokenizer.pad_id,
    }
    tokens = []
    while len(tokens) < limit:
        choices = [
            token
            for token in allowed(constraint)
            if token not in (() if tokens else skip) and token != tokenizer.special(THINK)
        ]
        assert choices, (constraint.error, tokenizer.decode(tokens))
        closers = [token for token in choices if token in closing]
        token = int(rng.choice(closers if closers and rng.random() < 0.5 else choices))
        if token in (tokenizer.eos_id, tokenizer.pad_id):
            break
        constraint.accept(token)
        tokens.append(token)
    assert not constraint.error
    return tokens


def answers(constraints, tokenizer, kind, text, count=12, **fields):
    """Texts of replies; the line feeds that may stand before an answer and the choice to think are left out."""
    skip = constraints.grammars.newlines
    texts = []
    for seed in range(count):
        constraint = make(constraints, kind, text, **fields)
        tokens = write(constraint, tokenizer, seed, skip=skip)
        texts.append(tokenizer.decode(tokens))
    return texts


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Leaf(msgspec.Struct, tag="leaf", forbid_unknown_fields=True):
    size: Annotated[int, msgspec.Meta(ge=-3, le=12)]


class Node(msgspec.Struct, tag="node", forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(max_length=6)]
    colour: Colour
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] | None
    children: Annotated[list["Leaf | Node"], msgspec.Meta(max_length=2)] = []
    note: Annotated[str, msgspec.Meta(pattern=r"^[a-c]{2,3}$")] = ""
    kind: Literal["x", "y"] | bool = "x"


def test_answers_by_a_json_schema_are_of_the_type_it_was_made_from(constraints, tokenizer):
    schema = msgspec.json.schema(Node)
    depths = set()
    for text in answers(constraints, tokenizer, "json_schema", schema, 30):
        node = msgspec.json.decode(text, type=Node)
        depths.add(len(node.children))
    assert len(depths) > 1


def test_any_json_object(constraints, tokenizer):
    for text in answers(constraints, tokenizer, "json_object", ""):
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "pattern", [r"[0-9]{3}-[a-z]+", r"(yes|no)(, (yes|no)){0,3}\.", "ä?[^a]é", "a{0,1000000}"]
)
def test_answers_by_an_expression_match_it_as_a_whole(constraints, tokenizer, pattern):
    for text in answers(constraints, tokenizer, "regex", pattern):
        assert re.fullmatch(pattern, text)


def test_a_choice_is_one_of_them_whatever_its_characters(constraints, tokenizer):
    choices = ["yes", "yes, sure", 'a "b" \\n', "é\nü", "<think>", "日本"]
    assert set(answers(constraints, tokenizer, "choice", choices, 60)) == set(choices)


SUMS = {
    "lark": 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,2}/',
    "gbnf": 'root ::= term ("+" term)*\nterm ::= [0-9] [0-9]? | "(" root ")"',
}


@pytest.mark.parametrize("notation", list(SUMS))
def test_answers_by_rules_in_either_notation(constraints, tokenizer, notation):
    for text in answers(constraints, tokenizer, "ebnf", SUMS[notation], 8, min_tokens=3):
        assert re.fullmatch(r"[0-9+()]+", text)
        assert isinstance(eval(re.sub(r"\b0+(?=[0-9])", "", text)), int)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"type": "integer"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def check_call(call):
    assert call.name in ("weather", "now")
    if call.name == "now":
        assert call.arguments == {}
    else:
        assert {"city"} <= set(call.arguments) <= {"city", "days"}
        assert len(call.arguments["city"]) <= 5
        assert isinstance(call.arguments.get("days", 0), int)


def test_required_and_named_tool_calls_are_read_back_and_fit_their_schemas(constraints, tokenizer):
    numbers = set()
    for choice in ("required", {"type": "function", "function": {"name": "now"}}):
        for seed in range(12):
            constraint = make(constraints, "tools", {"tools": TOOLS, "tool_choice": choice})
            skip = () if seed % 2 else constraints.grammars.newlines
            message = parse_reply(tokenizer.decode(write(constraint, tokenizer, seed, skip=skip)))
            assert message.tool_calls
            assert message.content == ""
            for call in message.tool_calls:
                check_call(call)
            numbers.add((str(choice), len(message.tool_calls)))
    assert len(numbers) > 2
    one = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    for seed in range(5):
        reply = write(make(constraints, "tools", one), tokenizer, seed)
        assert len(parse_reply(tokenizer.decode(reply)).tool_calls) == 1


def test_with_a_free_choice_text_is_free_and_calls_are_not(constraints, tokenizer):
    opening, ending = tokenizer.special(CALL), tokenizer.special(CALL_END)
    text = tokenizer.encode("the cat {")
    for parallel in (True, False):
        constraint = make(constraints, "tools", {"tools": TOOLS, "parallel_tool_calls": parallel})
        assert len(allowed(constraint)) == VOCABULARY
        for token in [*text, opening]:
            constraint.accept(token)
        assert len(allowed(constraint)) < 10
        call = []
        while ending not in call:
            call.append(int(np.random.default_rng(len(call)).choice(allowed(constraint))))
            constraint.accept(call[-1])
        message = parse_reply(tokenizer.decode([*text, opening, *call]))
        check_call(message.tool_calls[0])
        assert message.content == "the cat {"
        if parallel:
            assert len(allowed(constraint)) == VOCABULARY
        else:
            assert constraint.ended
            assert sorted(allowed(constraint)) == sorted([tokenizer.eos_id, tokenizer.pad_id])
        constraint.rollback(len(call) + 1)
        assert len(allowed(constraint)) == VOCABULARY


def test_thinking_is_free_and_the_answer_follows_after_blank_lines(constraints, tokenizer):
    open_id, close_id = tokenizer.special(THINK), tokenizer.special(THINK_END)
    ends = {tokenizer.eos_id, tokenizer.pad_id}
    feed = tokenizer.encode("\n")[0]
    constraint = make(constraints, "choice", ["yes", "no"])
    first = {tokenizer.decode([token]) for token in allowed(constraint)}
    assert {"y", "n", "\n", THINK} <= first
    constraint.accept(feed)
    constraint.accept(open_id)
    for token in tokenizer.encode('free {" text'):
        assert set(allowed(constraint)) == set(range(VOCABULARY)) - ends
        constraint.accept(token)
    constraint.accept(close_id)
    assert not constraint.ended
    for _ in range(2):
        assert {"y", "n", "\n"} <= {tokenizer.decode([token]) for token in allowed(constraint)}
        constraint.accept(feed)
    assert feed not in allowed(constraint)
    assert open_id not in allowed(constraint)
    for token in tokenizer.encode("no"):
        assert token in allowed(constraint)
        constraint.accept(token)
    assert constraint.ended
    assert set(allowed(constraint)) == ends
    # A block that the prompt has closed leaves no more line feeds than it has not written itself.
    closed = make(constraints, "choice", ["yes"], [open_id, close_id, feed, feed])
    assert feed not in allowed(closed)
    assert open_id not in allowed(closed)


def test_a_forced_stop_sentence_leads_into_the_answer(constraints, tokenizer):
    constraint = make(constraints, "json_object", "", [tokenizer.special(THINK)])
    for token in [40, 41, *constraints.thinking.stop_sentence.tolist()]:
        constraint.accept(token)
    assert not constraint.error
    assert [tokenizer.decode([token]) for token in allowed(constraint)] == ["{"]


def test_stop_tokens_come_where_the_answer_may_end_and_min_tokens_cannot_hold_up_a_complete_one(
    constraints, tokenizer
):
    ends = {tokenizer.eos_id, tokenizer.pad_id, 300}
    constraint = make(constraints, "regex", "a+b?", min_tokens=3, stop_ids=(300,))
    a, b = (tokenizer.encode(text)[0] for text in "ab")
    constraint.accept(a)
    assert not ends & set(allowed(constraint))
    constraint.accept(b)
    assert set(allowed(constraint)) == ends
    constraint.rollback(1)
    constraint.accept(a)
    constraint.accept(a)
    assert ends < set(allowed(constraint))


def states(constraints, tokenizer):
    """Constraints of every kind in the middle of a reply."""
    cases = [
        ("json_schema", msgspec.json.schema(Node), (1,)),
        ("regex", "[a-c]{1,9}|x", (1, tokenizer.special(THINK))),
        ("tools", {"tools": TOOLS}, (1,)),
        ("tools", {"tools": TOOLS, "tool_choice": "required"}, (1,)),
    ]
    for kind, text, prompt in cases:
        for seed in range(3):
            constraint = make(constraints, kind, text, prompt, bad_ids=(70,), min_tokens=2)
            write(constraint, tokenizer, seed, limit=2 + 5 * seed)
            yield constraint


def test_whether_a_token_is_allowed_agrees_with_the_mask(constraints, tokenizer):
    for constraint in states(constraints, tokenizer):
        assert [token for token in range(VOCABULARY) if constraint.allows(token)] == allowed(constraint)


def test_taking_back_tokens_across_all_borders_restores_every_mask(constraints, tokenizer):
    open_id = tokenizer.special(THINK)
    for kind, text in (("json_schema", msgspec.json.schema(Leaf)), ("tools", {"tools": TOOLS})):
        constraint = make(constraints, kind, text)
        answer = json.dumps({"type": "leaf", "size": 7})
        if kind == "tools":
            call = '\n{"name": "weather", "arguments": {"city": "x"}}\n'
            tokens = [*tokenizer.encode("the cat"), tokenizer.special(CALL), *tokenizer.encode(call)]
            tokens += [tokenizer.special(CALL_END), *tokenizer.encode("\n"), tokenizer.special(CALL)]
        else:
            tokens = [open_id, *tokenizer.encode("cat"), tokenizer.special(THINK_END)]
            tokens += [*tokenizer.encode("\n\n"), *tokenizer.encode(answer), tokenizer.eos_id]
        masks = []
        for token in tokens:
            masks.append(allowed(constraint))
            assert token in masks[-1], tokenizer.decode([token])
            constraint.accept(token)
        for size in (1, 3, len(tokens)):
            constraint.rollback(size)
            for token, mask in zip(tokens[-size:], masks[-size:], strict=True):
                assert allowed(constraint) == mask
                constraint.accept(token)


def test_drafts_are_masked_as_far_as_they_are_allowed_and_leave_no_trace(constraints, tokenizer):
    close_id = tokenizer.special(THINK_END)
    constraint = make(constraints, "choice", ["yes", "no"], [tokenizer.special(THINK)])
    drafts = [40, close_id, *tokenizer.encode("no"), *tokenizer.encode("x")]
    logits = torch.zeros(len(drafts) + 1, VOCABULARY)
    apply_all(logits, [constraint], drafts=[drafts])
    twin = make(constraints, "choice", ["yes", "no"], [tokenizer.special(THINK)])
    for row, token in enumerate(drafts[:-1]):
        assert torch.isfinite(logits[row]).nonzero()[:, 0].tolist() == allowed(twin)
        twin.accept(token)
    assert torch.isfinite(logits[-1]).all()
    assert 40 in allowed(constraint)


def test_what_a_grammar_forces_can_be_proposed_as_drafts(constraints, tokenizer):
    constraint = make(constraints, "json_schema", msgspec.json.schema(Leaf))
    forced = constraint.forced()
    assert '{"type":"leaf"'.startswith(tokenizer.decode(forced)[:1])
    for token in forced:
        assert token in allowed(constraint)
        constraint.accept(token)
    assert make(constraints, "tools", {"tools": TOOLS}).forced() == []


def test_a_token_that_does_not_follow_ends_this_request_with_a_reason(constraints, tokenizer):
    constraint = make(constraints, "choice", ["yes"])
    constraint.accept(tokenizer.encode("no")[0])
    assert "does not follow its grammar" in constraint.error
    assert allowed(constraint) == []
    constraint.rollback(1)
    assert constraint.error == ""
    assert tokenizer.encode("y")[0] in allowed(constraint)
    first = allowed(constraint)
    stuck = make(constraints, "choice", ["yes"], bad_ids=tuple(first))
    assert allowed(stuck) == []
    assert "leave no token" in stuck.explain()


NESTED = {"type": "string"}
for _ in range(70):
    NESTED = {"type": "array", "items": NESTED}

HOSTILE = {
    "no JSON": ("json_schema", "{", "not valid JSON"),
    "no object": ("json_schema", [], "must be a JSON object"),
    "nested": ("json_schema", NESTED, "deeper than 64"),
    "nested without end": ("json_schema", "[" * 60_000, "not valid JSON"),
    "long": ("regex", "a" * 70_000, "over the limit of 65,536"),
    "unknown reference": ("json_schema", {"$ref": "#/$defs/none"}, "does not exist"),
    "foreign reference": ("json_schema", {"$ref": "http://example.org/schema.json"}, "not present"),
    "reference to itself": ("json_schema", {"$ref": "#"}, "no text matches"),
    "unsupported": ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
    "leniency asked for": ("json_schema", {"not": {}, "x-guidance": {"lenient": True}}, "not"),
    "unknown type": ("json_schema", {"type": "strnig"}, "strnig"),
    "contradiction": ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    "explosion": (
        "json_schema",
        {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in (0, 1)]} for i in range(22)]},
        "too large",
    ),
    "half an expression": ("regex", "(a", "unclosed group"),
    "look-around": ("regex", "(?=a)b", "look-around"),
    "back-reference": ("regex", r"(a)\1", "backreferences"),
    "nested repetition": ("regex", "((a{0,1000}){0,1000}){0,1000}", "too many"),
    "no choices": ("choice", [], "JSON list of texts"),
    "never-ending rule": ("ebnf", 'start: "a" start', "too many items"),
    "unknown rule": ("ebnf", "start: foo", "foo"),
    "deep rule": ("ebnf", "start: " + "(" * 5_000 + '"a"' + ")" * 5_000, "nested"),
    "deep rule in the other notation": ("ebnf", "root ::= " + "(" * 3_000 + '"a"' + ")" * 3_000, "recursion"),
    "empty intersection": ("ebnf", "start: A\nA: /[a-z]+/ & /[0-9]+/", "no text matches"),
    "no tools": ("tools", {"tools": []}, "0 functions"),
    "bad name": ("tools", {"tools": [{"name": 'a"b'}]}, "name"),
    "unknown tool": ("tools", {"tools": TOOLS, "tool_choice": {"name": "x"}}, "none of the tools"),
    "strict tool": (
        "tools",
        {"tools": [{"name": "f", "strict": True, "parameters": {"type": "array", "uniqueItems": True}}]},
        "uniqueItems",
    ),
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_a_hostile_grammar_is_refused_with_its_reason(constraints, tokenizer, case):
    kind, text, message = HOSTILE[case]
    with pytest.raises(ModelError, match=f"(?i)request r: .*{message}"):
        make(constraints, kind, text)
    assert answers(constraints, tokenizer, "choice", ["yes"], 1) == ["yes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        ("json_schema", {"type": "integer", "multipleOf": 999_983}),
        ("ebnf", "start: A\nA: ~/(.*a.{20}.*)/ & /(.*ba.{19}.*)/"),
    ],
)
def test_a_grammar_that_never_finishes_compiling_is_given_up_and_remembered(constraints, case):
    began = time.process_time()
    with pytest.raises(ModelError, match="takes more than 2 seconds or 2 GiB to compile"):
        make(constraints, *case)
    assert time.process_time() - began < 1  # it was another process's time
    clock = time.perf_counter()
    with pytest.raises(ModelError, match="takes more than 2 seconds"):
        make(constraints, *case)
    assert time.perf_counter() - clock < 0.1


def test_large_bounds_cost_little_and_work(constraints, tokenizer):
    for kind, text in (
        ("regex", r"\w{0,10000}"),
        ("json_schema", {"type": "string", "minLength": 1_000_000}),
        ("json_schema", {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
    ):
        constraint = make(constraints, kind, text)
        began = time.process_time()
        tokens = write(constraint, tokenizer, 1, limit=60, skip=tuple(constraints.grammars.newlines))
        assert (time.process_time() - began) / max(1, len(tokens)) < 0.05
        assert not constraint.error


def test_compiled_grammars_are_kept_up_to_a_number(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "NUM_CACHED", 3)
    grammars, compiled = Grammars(tokenizer), []
    plain = Grammars._compile
    monkeypatch.setattr(
        Grammars, "_compile", lambda self, asked: compiled.append(asked) or plain(self, asked)
    )
    asked = [Grammar(kind="choice", text=json.dumps([str(number)])) for number in range(4)]
    for number in (0, 1, 2, 0, 3, 0, 1):
        grammars.compiled(asked[number])
    assert compiled == [asked[number] for number in (0, 1, 2, 3, 1)]


def test_an_engine_answers_by_grammars_after_budgeted_thinking_beside_free_requests(make_model, tokenizer):
    engine = Engine(make_model(vocab_size=VOCABULARY), tokenizer, slots=8)
    open_id, close_id = tokenizer.special(THINK), tokenizer.special(THINK_END)
    schema = Grammar(kind="json_schema", text=json.dumps(msgspec.json.schema(Leaf)))
    blank = [token for token in range(VOCABULARY) if not tokenizer.decode_bytes([token]).strip()]
    terse = tuple((token, -100.0) for token in blank)

    def request(name, seed, grammar, **fields):
        params = SamplingParams(max_tokens=120, temperature=1.0, seed=seed, grammar=grammar, **fields)
        return Request(name, [1, 2, 3, open_id], params)

    asked = [
        request(f"leaf-{n}", n, schema, thinking_budget=6, min_thinking=3, logit_bias=terse) for n in range(6)
    ]
    asked.append(request("free", 9, None))
    choice = Grammar(kind="choice", text='["yes", "no"]')
    asked.append(request("choice", 7, choice, thinking_budget=0, logprobs=True, top_logprobs=2))
    unsound = Grammar(kind="regex", text="(a")
    stuck = Grammar(kind="choice", text='["y"]')
    bans = tuple(token for token in range(VOCABULARY) if tokenizer.decode([token]) in ("y", "\n", "\n\n"))
    asked.append(request("unsound", 1, unsound))
    asked.append(request("stuck", 2, stuck, thinking_budget=0, bad_ids=bans))
    replies = dict(zip([each.id for each in asked], engine.run(asked), strict=True))
    for name, reply in replies.items():
        if name.startswith("leaf"):
            assert 3 <= reply.num_reasoning_tokens <= 6
            assert reply.finish_reason == "stop"
            answer = tokenizer.decode(reply.tokens[reply.tokens.index(close_id) + 1 : -1])
            msgspec.json.decode(answer, type=Leaf)
    assert replies["choice"].finish_reason == "stop"
    assert tokenizer.decode(replies["choice"].tokens[:-1]).strip().endswith(("yes", "no"))
    # Log-probabilities are the model's own, whatever the grammar forbids.
    assert min(replies["choice"].logprobs) > -50
    assert all(
        top[0][1] >= value - 1e-5
        for top, value in zip(replies["choice"].top_logprobs, replies["choice"].logprobs, strict=True)
    )
    assert replies["free"].finish_reason in ("stop", "length")
    assert "unclosed group" in replies["unsound"].error
    assert "leave no token to draw" in replies["stuck"].error
    # The same requests alone give the same texts.
    for each in asked[:8]:
        assert engine.run([each])[0].tokens == replies[each.id].tokens


def test_a_grammar_needs_a_tokenizer_and_an_end():
    blind = Constraints(VOCABULARY, None, None, ())
    with pytest.raises(ModelError, match="needs an engine with a tokenizer"):
        make(blind, "json_object")
    params = SamplingParams(max_tokens=3, ignore_eos=True, grammar=Grammar(kind="json_object"))
    with pytest.raises(ModelError, match="ignore_eos with a grammar"):
        checked_prompt(Request("r", [1], params), VOCABULARY, 10)


def test_grammars_need_no_torch():
    code = "import sys, pensar.infer.grammar, llguidance; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
