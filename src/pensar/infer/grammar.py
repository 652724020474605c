"""Grammars: which tokens may come next where an answer has to match a schema, an expression, a choice or tool calls.

The matching is llguidance's. A grammar comes from a stranger: its size is limited here, it is compiled once in a
process of its own that may be killed, and every later step of it has a limit of work inside the library.
"""

import importlib.util
import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pensar.base.errors import ModelError
from pensar.infer.request import Grammar
from pensar.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

Bits = npt.NDArray[np.uint8]
"""One bit per token of the vocabulary, the first in the lowest bit of the first byte, in whole words of 32 bits."""

MAX_TEXT = 65_536
"""Characters of a grammar."""
MAX_DEPTH = 64
"""Objects and lists of a schema inside one another."""
MAX_FUNCTIONS = 128

CHECK_CPU_SECONDS, CHECK_SECONDS, CHECK_BYTES = 2, 30, 2**31
"""What compiling may take: processor time, time on a busy machine, and memory."""

LIMITS: Mapping[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
"""llguidance's own: a mask takes at most some 15 ms, a lexer at most about 100 MB."""

NUM_CACHED = 64
JSON_SPACE = r"(\x20|\x0A\x20{0,24})"
"""Between two tokens of JSON: one space, or a new line and its indentation. Without a limit a small model would stay in
it for ever."""

CALL, CALL_END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar that can be used: a matcher at its beginning, to be forked."""

    start: "Matcher"
    trigger: int | None = None
    """The token after which the grammar begins, inside free text; None where it is the whole answer."""
    repeats: bool = False
    """Whether free text goes on after it."""


class Matcher:
    """Where an answer stands in its grammar."""

    def __init__(self, inner: "llguidance.LLMatcher", vocab_size: int) -> None:
        self._inner = inner
        self._vocab_size = vocab_size

    def fork(self) -> "Matcher":
        """Another one at the same place."""
        return Matcher(self._inner.deep_copy(), self._vocab_size)

    def fill(self, bits: Bits) -> str:
        """Marks the tokens that may come next; the end of turn where the answer may end. Returns what is wrong."""
        self._inner.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        return self._error()

    def accept(self, token: int) -> bool:
        """Goes on by a token; False, and of no more use, where the grammar does not allow it."""
        return self._inner.consume_token(token)

    def allows(self, token: int) -> bool:
        """Whether `token` may come next."""
        return token < self._vocab_size and bool(self._inner.validate_tokens([token]))

    def rollback(self, count: int) -> None:
        """Takes back the last tokens."""
        self._inner.rollback(count)

    def forced(self) -> list[int]:
        """Tokens that are a likely spelling of the only text that can come next."""
        return [] if self.finished else self._inner.compute_ff_tokens()

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return self._inner.is_accepting()

    @property
    def finished(self) -> bool:
        """Whether nothing can come but the end."""
        return self._inner.is_stopped() and not self._inner.is_error()

    def _error(self) -> str:
        return _first_line(self._inner.get_error()) if self._inner.is_error() else ""


class Grammars:
    """The grammars of one tokenizer, compiled when they are first asked for; may be used by several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache: OrderedDict[Grammar, Compiled | str] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Length of a matcher's Bits."""
        return 4 * -(-self._tokenizer.vocab_size // 32)

    @property
    def end_id(self) -> int:
        """The token by which a matcher says that the answer may end."""
        return self._tokenizer.eos_id

    @cached_property
    def newlines(self) -> dict[int, int]:
        """The tokens of one or two line feeds and nothing else, with their number."""
        found = {}
        for token in range(self._tokenizer.vocab_size):
            text = self._tokenizer.decode_bytes([token])
            if text in (b"\n", b"\n\n"):
                found[token] = len(text)
        return found

    def compiled(self, grammar: Grammar) -> Compiled:
        """Raises ModelError for one that cannot be used; it may take seconds the first time."""
        with self._lock:
            found = self._cache.get(grammar)
            if found is not None:
                self._cache.move_to_end(grammar)
        if found is None:
            try:
                found = self._compile(grammar)
            except ModelError as error:
                found = str(error)
            with self._lock:
                self._cache[grammar] = found
                while len(self._cache) > NUM_CACHED:
                    self._cache.popitem(last=False)
        if isinstance(found, str):
            raise ModelError(found)
        return found

    def _compile(self, grammar: Grammar) -> Compiled:
        if importlib.util.find_spec("llguidance") is None:
            raise ModelError(
                "grammars need llguidance, which is not installed: pip install 'pensar[grammar]'"
            )
        if len(grammar.text) > MAX_TEXT:
            raise ModelError(
                f"a grammar of {len(grammar.text):,} characters is over the limit of {MAX_TEXT:,}; shorten it"
            )
        if grammar.kind == "tools":
            return self._compile_tools(_read_tools(grammar.text))
        return Compiled(self._matcher(_source(grammar), grammar.kind))

    def _compile_tools(self, tools: "_Tools") -> Compiled:
        control = self._tokenizer.control_tokens
        missing = [tag for tag in (CALL, CALL_END) if tag not in control]
        if missing:
            raise ModelError(f"the tokenizer has no {missing[0]}, which tool calls need; leave the tools out")
        # In a process of its own there is only a vocabulary of bytes: there the tags are plain text.
        whole = tools.choice != "auto"
        many = whole and tools.parallel and tools.choice == "required"
        source = _tools_source(tools, f"<[{control[CALL]}]>", f"<[{control[CALL_END]}]>", whole, many)
        _check(_tools_source(tools, json.dumps(CALL), json.dumps(CALL_END), whole, many), "tools")
        start = self._matcher(source, "tools", checked=True)
        if whole:
            return Compiled(start)
        return Compiled(start, trigger=control[CALL], repeats=tools.parallel)

    def _matcher(self, source: str, kind: str, *, checked: bool = False) -> Matcher:
        import llguidance

        if not checked and kind not in ("choice", "json_object"):
            _check(source, kind)
        limits = llguidance.LLParserLimits(**LIMITS)
        inner = llguidance.LLMatcher(self._vocabulary, source, log_level=0, limits=limits)
        if not inner.is_error():
            inner.compute_bitmask()
        if inner.is_error():
            raise _unusable(kind, inner.get_error())
        return Matcher(inner, self._tokenizer.vocab_size)

    @cached_property
    def _vocabulary(self) -> "llguidance.LLTokenizer":
        import llguidance

        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer)))


class _Vocabulary:
    """The tokenizer in the form that the library asks for."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.special_token_ids = list(tokenizer.control_tokens.values())
        self.tokens = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


@dataclass(frozen=True, slots=True)
class _Tools:
    functions: list[dict[str, Any]]
    choice: str
    """auto, required, or named."""
    parallel: bool


def _source(grammar: Grammar) -> str:
    """The grammar as the library reads it."""
    import llguidance

    if grammar.kind == "json_object":
        return _json_source({"type": "object"}, lenient=False)
    if grammar.kind == "json_schema":
        return _json_source(_read_object(grammar.text, "json_schema"), lenient=False)
    if grammar.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "choice":
        choices = _read_json(grammar.text, "choice")
        if not isinstance(choices, list) or not choices or not all(isinstance(each, str) for each in choices):
            raise ModelError('a grammar of kind choice must be a JSON list of texts, such as ["yes", "no"]')
        return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(map(_quoted, choices)))
    try:
        return llguidance.grammar_from("ebnf", grammar.text)
    except ValueError as error:
        raise _unusable("ebnf", str(error)) from error


def _json_source(schema: Mapping[str, Any], *, lenient: bool) -> str:
    import llguidance

    plain = json.dumps(_without_hints(schema))
    return llguidance.LLMatcher.grammar_from_json_schema(plain, overrides=_json_options(lenient))


def _without_hints(schema: Any) -> Any:
    """The schema without OpenAPI's `discriminator`, which allows and forbids nothing and is refused if recursive."""
    if isinstance(schema, list):
        return [_without_hints(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    union = isinstance(schema.get("anyOf"), list) or isinstance(schema.get("oneOf"), list)
    return {
        key: _without_hints(value) for key, value in schema.items() if not (union and key == "discriminator")
    }


def _json_options(lenient: bool) -> Any:
    return {"whitespace_pattern": JSON_SPACE, "lenient": lenient}


def _tools_source(tools: _Tools, opening: str, closing: str, whole: bool, many: bool) -> str:
    """One call or several, from the opening tag on, or from behind it where that was found in free text."""
    rules = []
    for number, function in enumerate(tools.functions):
        schema = _without_hints(
            function.get("parameters") or {"type": "object", "additionalProperties": False}
        )
        # A function that is not declared strict may have a schema of which only a part can be kept.
        schema["x-guidance"] = _json_options(not function.get("strict", False))
        # The name is not escaped: that is how Qwen3 was taught.
        head = _quoted(f'\n{{"name": "{function["name"]}", "arguments": ')
        rules.append(f'call_{number}: {head} %json {json.dumps(schema)} "}}\\n"')
    names = " | ".join(f"call_{number}" for number in range(len(rules)))
    begin = f"{opening} " if whole else ""
    start = 'start: call ("\\n" call)*' if many else "start: call"
    return "\n".join([start, f"call: {begin}({names}) {closing}", *rules])


def _read_tools(text: str) -> _Tools:
    asked = _read_object(text, "tools")
    functions = [
        tool.get("function", tool) if isinstance(tool, dict) else tool for tool in asked.get("tools") or []
    ]
    if not functions or len(functions) > MAX_FUNCTIONS:
        raise ModelError(f"tools has {len(functions)} functions; give 1 to {MAX_FUNCTIONS}")
    for function in functions:
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name or any(c in '"\\' or ord(c) < 32 for c in name):
            raise ModelError(f"tools has a function with the name {name!r}; give it one without quotes")
        if not isinstance(function.get("parameters") or {}, dict):
            raise ModelError(f"the parameters of function {name} must be a JSON schema")
    choice = asked.get("tool_choice", "auto")
    if isinstance(choice, dict):
        name = choice.get("function", choice).get("name")
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise ModelError(f"tool_choice names {name!r}, which is none of the tools")
        choice = "named"
    if choice not in ("auto", "required", "named"):
        raise ModelError(f"tool_choice is {choice!r}; a grammar knows auto, required, or a function")
    return _Tools(functions, choice, bool(asked.get("parallel_tool_calls", True)))


def _read_object(text: str, kind: str) -> dict[str, Any]:
    value = _read_json(text, kind)
    if not isinstance(value, dict):
        raise ModelError(f"a grammar of kind {kind} must be a JSON object, not {type(value).__name__}")
    return value


def _read_json(text: str, kind: str) -> Any:
    """Raises ModelError for what is no JSON, or nested too deeply."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"a grammar of kind {kind} is not valid JSON: {_first_line(str(error))}") from error
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ModelError(f"a grammar of kind {kind} is nested deeper than {MAX_DEPTH} levels; flatten it")
        children = [list(each.values()) if isinstance(each, dict) else each for each in level]
        level = [part for each in children if isinstance(each, list) for part in each]
    return value


def _check(source: str, kind: str) -> None:
    """Compiles the grammar in a process of its own; ModelError where that fails or takes too much."""
    asked = {
        "source": source,
        "limits": dict(LIMITS),
        "cpu_seconds": CHECK_CPU_SECONDS,
        "memory_bytes": CHECK_BYTES,
    }
    # -P: the folder of this file has modules that are named like the standard library's.
    command = [sys.executable, "-P", str(Path(__file__).with_name("grammar_check.py"))]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=CHECK_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode != 0:
        raise ModelError(
            f"a grammar of kind {kind} takes more than {CHECK_CPU_SECONDS} seconds or {CHECK_BYTES >> 30} GiB to "
            "compile; simplify it (large repetitions, intersections and multipleOf are costly)"
        )
    if done.stdout:
        raise _unusable(kind, done.stdout)


def _unusable(kind: str, error: str) -> ModelError:
    reason = _first_line(error)
    if reason.startswith("NoExtension"):
        reason = "no text matches it"
    return ModelError(f"a grammar of kind {kind} cannot be used: {reason}")


def _first_line(error: str) -> str:
    """The error without the excerpts under it."""
    lines = error.strip().splitlines() or [""]
    reasons = [line.strip() for line in lines[1:] if line.strip().startswith("error: ")]
    return " ".join([lines[0][:200], *reasons])[:300]


def _quoted(text: str) -> str:
    """A literal of Lark's notation."""
    return json.dumps(text, ensure_ascii=False)
