"""`pensar chat`: talk to a model in the terminal, its thinking and its answer apart, or ask once and get JSON."""

import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from pensar.base.errors import ConfigError, PensarError
from pensar.base.files import seed_of
from pensar.cli.options import Flag, ModelFolder
from pensar.cli.screen import Screen

if TYPE_CHECKING:
    from rich.console import Console

    from pensar.infer.llm import LLM, Reply
    from pensar.text.conversation import Message
    from pensar.text.reply import Delta

Mode = Literal["on", "off", "auto"]
THINKING: dict[Mode, bool | None] = {"on": True, "off": False, "auto": None}

# C0 without tab and line feed, DEL and C1.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

HELP = """\
/think, /no_think   alone on a line: thinking on or off from now on; inside a message: a wish for this turn
/budget N           at most N tokens of thinking per answer; /budget off lifts the limit
/reset              forget the conversation
/quit, /exit        leave (so do Ctrl-D and Ctrl-C)"""


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How to talk, checked before anything heavy is loaded."""

    model: Path
    thinking: Mode = "auto"
    thinking_budget: int | None = None
    temperature: float | None = None
    """None for what the model's own directory says of the mode."""
    max_tokens: int | None = None
    """Per answer; None for what the context window leaves."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise ConfigError(
                f"--thinking-budget {self.thinking_budget} is negative; give 0 to close the thinking at once, or leave "
                "it out for no limit"
            )
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"--temperature {self.temperature} cannot be used; give a finite number from 0 up; "
                "0 takes the likeliest token"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(
                f"--max-tokens {self.max_tokens} leaves no room to answer; give at least 1, or leave it out, "
                "so that only the context limits the answer"
            )
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed} is negative; give 0 or more")


@dataclass
class Session:
    """A conversation with one model."""

    llm: "LLM"
    options: SessionOptions
    thinking: bool | None
    budget: int | None
    messages: list["Message"] = field(default_factory=list)

    def ask(self, text: str, show: Callable[["Delta"], None] = lambda _: None) -> "Reply":
        """Answers `text` in the light of what was said before; `show` gets the reply as it grows.

        An interrupted or refused question leaves the conversation as it was.
        """
        from pensar.text.conversation import Message

        question = Message(role="user", content=text)
        reply = self._reply([*self.messages, question], show)
        answer = Message(
            role="assistant",
            content=reply.content,
            reasoning_content=reply.reasoning_content,
            tool_calls=reply.tool_calls,
        )
        self.messages += [question, answer]
        return reply

    def _reply(self, messages: list["Message"], show: Callable[["Delta"], None]) -> "Reply":
        stream = self.llm.stream(
            messages,
            thinking=self.thinking,
            thinking_budget=self.budget,
            temperature=self.options.temperature,
            max_tokens=self.options.max_tokens,
            # Another draw for every turn, and the same ones when the conversation is had again.
            seed=seed_of("chat", self.options.seed, len(messages)),
        )
        with closing(stream):
            while True:
                try:
                    show(next(stream))
                except StopIteration as end:
                    reply: Reply = end.value
                    return reply


class ReplyPrinter:
    """Prints a reply as it grows: thinking dim under its own mark, the answer plain."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._kind = ""

    def show(self, delta: "Delta") -> None:
        if delta.kind != self._kind:
            self._begin(delta.kind)
        style = "dim italic" if delta.kind == "reasoning" else ""
        self._write(printable(delta.text), style)
        if delta.tool_call is not None:
            arguments = json.dumps(delta.tool_call.arguments, ensure_ascii=False)
            self._write(printable(f"[calls {delta.tool_call.name} with {arguments}]\n"), "dim")

    def end(self) -> None:
        if self._kind:
            self._write("\n", "")
        self._kind = ""

    def _begin(self, kind: str) -> None:
        if kind == "reasoning":
            self._write("[thinking]\n", "dim italic")
        elif self._kind == "reasoning":
            self._write("\n[answer]\n", "dim")
        self._kind = kind

    def _write(self, text: str, style: str) -> None:
        self._console.print(
            text, end="", style=style, markup=False, highlight=False, emoji=False, soft_wrap=True
        )
        self._console.file.flush()


def chat(
    model: ModelFolder,
    /,
    *,
    prompt: str | None = None,
    thinking: Mode = "auto",
    thinking_budget: int | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    json: Flag = False,
) -> None:
    """Talk to a model; thinking and answer stream apart.

    Parameters
    ----------
    prompt
        Answer this once instead of opening a conversation.
    thinking
        off closes the thinking before it begins; on and auto leave it to the model and to /think and /no_think.
    thinking_budget
        At most this many tokens of thinking per answer.
    temperature
        0 takes the likeliest token; by default what the model's directory says of the mode.
    max_tokens
        Limit of each answer, thinking included; by default what the context leaves.
    seed
        Another seed, another answer.
    json
        Print one JSON document and nothing else; the question comes from --prompt or through a pipe.
    """
    options = SessionOptions(
        model=model,
        thinking=thinking,
        thinking_budget=thinking_budget,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
    )
    if json and prompt is None:
        if sys.stdin.isatty():
            raise ConfigError("--json answers once; give the question with --prompt or through a pipe")
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty; give at least one word")
    if json:
        assert prompt is not None
        with Screen(json=True) as screen:
            screen.result(msgspec.to_builtins(open_session(options).ask(prompt)))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if prompt is None:
        converse(open_session(options), console)
    else:
        _say(open_session(options), prompt, console)


def open_session(options: SessionOptions) -> Session:
    """Loads the model; raises ModelError for a directory that is none."""
    from pensar.infer.llm import LLM

    return Session(LLM(options.model, slots=1), options, THINKING[options.thinking], options.thinking_budget)


def converse(session: Session, console: "Console") -> None:
    """Reads lines until the end; in a pipe every line is a question and no prompt is shown."""
    interactive = sys.stdin.isatty() and console.is_terminal
    if interactive:
        _enable_line_editing()
        _note(console, f"{session.options.model}  ·  /help lists the commands")
    while True:
        try:
            line = input("\n> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            if interactive:
                console.print()
            return
        if line in ("/quit", "/exit"):
            return
        if not line or _command(session, console, line):
            continue
        try:
            _say(session, line, console)
        except PensarError as error:
            _note(console, str(error), style="red")
        except KeyboardInterrupt:
            console.print()
            _note(console, "interrupted; the question is forgotten")


def _command(session: Session, console: "Console", line: str) -> bool:
    """Carries out a line that is a command and says so; False for a line that is a message."""
    name, _, rest = line.partition(" ")
    if line in ("/think", "/no_think"):
        session.thinking = line == "/think"
        _note(console, f"thinking is {'on' if session.thinking else 'off'} from now on")
    elif line == "/reset":
        session.messages.clear()
        _note(console, "the conversation starts anew")
    elif line == "/help":
        _note(console, HELP)
    elif name == "/budget":
        _set_budget(session, console, rest.strip())
    elif line.startswith("/") and not rest and "/" not in line[1:]:
        _note(console, f"there is no command {line}; /help lists those there are")
    else:
        return False
    return True


def _set_budget(session: Session, console: "Console", value: str) -> None:
    if value in ("off", "none"):
        session.budget = None
        _note(console, "thinking has no limit")
    elif value.isascii() and value.isdecimal():
        session.budget = int(value)
        _note(console, f"at most {session.budget} tokens of thinking per answer")
    else:
        _note(console, f"/budget needs a number of tokens from 0 up, or off; not {value or 'nothing'!r}")


def _say(session: Session, text: str, console: "Console") -> None:
    printer = ReplyPrinter(console)
    started = time.monotonic()
    try:
        reply = session.ask(text, printer.show)
    finally:
        printer.end()
    if reply.finish_reason == "length":
        full = session.options.max_tokens is None
        cause = "the context is full" if full else "--max-tokens allows no more"
        _note(console, f"cut off after {reply.usage.completion_tokens} tokens: {cause}")
    if console.is_terminal:
        seconds = time.monotonic() - started
        usage = reply.usage
        _note(
            console,
            f"{usage.completion_tokens} tokens, {usage.reasoning_tokens} of them thinking, {seconds:.1f} s, "
            f"{usage.completion_tokens / max(seconds, 1e-9):.0f} tokens/s",
        )


def _note(console: "Console", text: str, style: str = "dim") -> None:
    """A remark of ours; in a pipe it goes to standard error, so that standard output holds replies only."""
    from rich.console import Console

    where = console if console.is_terminal else Console(stderr=True, highlight=False)
    where.print(text, style=style, markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """Without control characters, so that a reply cannot steer the terminal."""
    return _CONTROLS.sub("", text)


def _enable_line_editing() -> None:
    """History and cursor keys for `input`, where the platform has them; importing the module is what does it."""
    try:
        import readline
    except ImportError:
        return
    readline.set_auto_history(True)
