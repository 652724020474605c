"""The budgets' requests: a model that thinks for ever, and answers that have to be of a form, with its own check."""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pensar.infer.engine import Request, SamplingParams
from pensar.infer.request import Grammar
from pensar.model.config import ModelConfig
from pensar.text.tokenizer import THINK, THINK_END, TURN_START, Tokenizer, train_tokenizer

CONFIG = ModelConfig(
    vocab_size=416,
    hidden_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    max_positions=512,
    # Wide weights: every context gets a next token of its own.
    initializer_range=0.3,
    tied=False,
)
WORDS = 400
"""Tokens of the tokenizer."""
MOST, ANSWER_TOKENS = 40, 160
"""The largest budget, and room for an answer."""
CALL = "<tool_call>"
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
SUM = {
    "type": "object",
    "properties": {
        "numbers": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 999},
            "maxItems": 4,
        },
        "exact": {"type": "boolean"},
        "unit": {"enum": ["m", "km"]},
    },
    "required": ["numbers", "exact", "unit"],
    "additionalProperties": False,
}
FUNCTIONS = {"weather": PLACE, "add": SUM}
EXPRESSION = r"(yes|no), [0-9]{1,3}(\.[0-9])? of [a-z]{2,8}"
CHOICE = ("all of it", "none", "half of it")


class Form(NamedTuple):
    """What an answer has to be."""

    name: str
    grammar: Grammar | None
    holds: Callable[[str], bool]


class Asked(NamedTuple):
    """A request, whether its prompt leaves the thinking open, and when its budget is changed to what."""

    request: Request
    form: Form
    opened: bool
    thinks: bool
    change_at: int | None
    """Reasoning tokens that it has to have for that."""
    change_to: int | None
    """None asks for the answer at once."""


def tokenizer_of() -> Tokenizer:
    texts = [
        '{"city": "Oslo", "days": 3}',
        "considering the limited time by the user",
        "yes, 12.5 of them",
    ] * 4
    return train_tokenizer(texts, WORDS)


def forms() -> list[Form]:
    return [
        Form("free", None, lambda answer: True),
        Form("schema", _grammar("json_schema", PLACE), lambda answer: fits(PLACE, json.loads(answer))),
        Form("second schema", _grammar("json_schema", SUM), lambda answer: fits(SUM, json.loads(answer))),
        Form(
            "expression",
            Grammar(kind="regex", text=EXPRESSION),
            lambda answer: re.fullmatch(EXPRESSION, answer) is not None,
        ),
        Form("choice", _grammar("choice", CHOICE), lambda answer: answer in CHOICE),
        Form("a tool", _tools("required"), lambda answer: _calls(answer, tuple(FUNCTIONS)) == 1),
        Form("this tool", _tools({"name": "add"}), lambda answer: _calls(answer, ("add",)) == 1),
        Form("perhaps a tool", _tools("auto"), lambda answer: _calls(answer, tuple(FUNCTIONS)) >= 0),
    ]


def asked_of(tokenizer: Tokenizer, num: int, seed: int = 0) -> list[Asked]:
    """Random prompts, budgets, forms and rules of sampling."""
    rng = np.random.default_rng(seed)
    opening = [tokenizer.special(TURN_START), *tokenizer.encode("assistant\n")]
    think, close = tokenizer.special(THINK), tokenizer.special(THINK_END)
    call, known = tokenizer.special(CALL), forms()
    found = []
    for number in range(num):
        form = known[int(rng.integers(len(known)))]
        kind = rng.random()
        thinks, opened = kind < 0.9, kind < 0.75
        prompt = [*rng.integers(1, 256, int(rng.integers(1, 60))).tolist(), *opening]
        bias = [(call, 3.0)] if form.name == "perhaps a tool" else []
        if opened:
            prompt += [think, *rng.integers(1, 256, int(rng.integers(0, 12))).tolist()]
        elif thinks:  # it opens the block itself
            bias.append((think, 40.0))
        else:
            prompt += [think, *tokenizer.encode("\n\n"), close, *tokenizer.encode("\n\n")]
        if rng.random() < 0.2:  # some close it before they have to
            bias.append((close, float(rng.uniform(0, 6))))
        changes = thinks and rng.random() < 0.3
        params = SamplingParams(
            max_tokens=MOST + 60 + ANSWER_TOKENS,
            temperature=float(rng.choice([0.0, 0.7, 1.0, 1.3])),
            top_k=int(rng.choice([0, 0, 20])),
            seed=number,
            thinking_budget=0 if rng.random() < 0.15 else int(rng.integers(1, MOST)),
            logprobs=bool(rng.random() < 0.3),
            logit_bias=tuple(bias),
            grammar=form.grammar,
        )
        found.append(
            Asked(
                Request(str(number), prompt, params),
                form,
                opened,
                thinks,
                int(rng.integers(0, MOST // 2)) if changes else None,
                int(rng.integers(0, MOST)) if rng.random() < 0.6 else None,
            )
        )
    return found


def fits(schema: Any, value: Any) -> bool:
    """Whether a value is of a schema, as far as the ones here go."""
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        properties = schema["properties"]
        names = value.keys() if isinstance(value, dict) else ()
        return set(names) == set(schema["required"]) and all(fits(properties[n], value[n]) for n in names)
    if kind == "array":
        return (
            isinstance(value, list)
            and len(value) <= schema["maxItems"]
            and all(fits(schema["items"], each) for each in value)
        )
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "boolean":
        return isinstance(value, bool)
    return isinstance(value, str) and len(value) <= schema["maxLength"]


def _calls(answer: str, names: tuple[str, ...]) -> int:
    """The tool calls of an answer, -1 where one is wrong."""
    found = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", answer, re.DOTALL)
    for text in found:
        call = json.loads(text)
        if call.keys() != {"name", "arguments"} or call["name"] not in names:
            return -1
        if not fits(FUNCTIONS[call["name"]], call["arguments"]):
            return -1
    return len(found) if answer.count(CALL) == len(found) else -1


def _grammar(kind: Any, what: Any) -> Grammar:
    return Grammar(kind=kind, text=json.dumps(what))


def _tools(choice: Any) -> Grammar:
    tools = [{"name": name, "parameters": schema, "strict": True} for name, schema in FUNCTIONS.items()]
    return _grammar("tools", {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False})
