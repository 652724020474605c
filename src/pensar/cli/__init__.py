"""The command line: one verb per user's intention, each loaded only when it is called.

Exit codes: 0 done, 1 failed work, 2 wrong use, 130 interrupted. `--json` prints one JSON document on standard output,
also for an error: {"error": {"kind": ..., "message": ...}}.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pensar import __version__
from pensar.base import torchrun
from pensar.base.errors import ConfigError, PensarError

if TYPE_CHECKING:
    from cyclopts import App


@dataclass(frozen=True)
class Verb:
    """A verb and what its help says; `target` is imported only when the verb is called."""

    target: str
    summary: str
    example: str
    more: str = ""
    interrupted: str = "interrupted"
    """What is said after Ctrl-C."""


RESUMES = "interrupted; the same command goes on from here"
VERBS = {
    "run": Verb(
        "pensar.cli.pipeline:run",
        "Run a recipe from raw documents to an evaluated model and its report.",
        "pensar run recipes/tiny.yaml",
        "Stages that are done are kept; an interrupted run goes on where it stopped.",
        interrupted=RESUMES,
    ),
    "plan": Verb(
        "pensar.cli.plan:plan",
        "Say what is done, stale or new and why, and what the rest will cost.",
        "pensar plan recipes/tiny.yaml --set seed=2",
        "Nothing is run. Of a model size: how a cluster would train it, with its memory, days, energy and cost, as in\n"
        "pensar plan 30b-a3b --gpus 64 --gpu h200 --tokens 1e12",
    ),
    "data": Verb(
        "pensar.cli.pipeline:data",
        "Run the data stages of a recipe.",
        "pensar data recipes/tiny.yaml",
        interrupted=RESUMES,
    ),
    "tokenizer": Verb(
        "pensar.cli.pipeline:tokenizer",
        "Run the tokenizer and token shard stages of a recipe, and what they need.",
        "pensar tokenizer recipes/tiny.yaml",
        interrupted=RESUMES,
    ),
    "train": Verb(
        "pensar.cli.pipeline:train",
        "Run the training stages of a recipe, or one of them, and what they need.",
        "pensar train recipes/tiny.yaml --stage fusion",
        interrupted=RESUMES,
    ),
    "eval": Verb(
        "pensar.cli.evaluate:evaluate",
        "Score a model on the benchmarks, in both modes, with confidence intervals.",
        "pensar eval runs/tiny/model",
    ),
    "chat": Verb(
        "pensar.cli.chat:chat",
        "Talk to a model; thinking and answer stream apart.",
        "pensar chat runs/tiny/model",
    ),
    "serve": Verb(
        "pensar.cli.serve:serve",
        "Serve a model over the OpenAI-compatible protocol.",
        "pensar serve runs/tiny/model",
    ),
    "bench": Verb(
        "pensar.cli.bench:bench",
        "Measure the speed of a model: prefill and decode tokens per second.",
        "pensar bench runs/tiny/model --batch 1 --batch 32",
    ),
    "report": Verb(
        "pensar.cli.report:report",
        "Draw the report of a run as it stands: its page, and the table of scores.",
        "pensar report runs/tiny",
    ),
    "show": Verb(
        "pensar.cli.show:show",
        "Show an artifact: lineage, counts, configuration, files, times.",
        "pensar show runs/tiny/model",
        "Of a run's folder it lists the artifacts.",
    ),
    "watch": Verb(
        "pensar.cli.watch:watch",
        "Follow a run in the terminal: stage, loss, speed, loss by domain, time left.",
        "pensar watch runs/tiny",
        "It reads the run's files and disturbs nothing; `--once` prints one frame, also into a pipe.",
    ),
    "completion": Verb(
        "pensar.cli.completion:completion",
        "Print the completion script for a shell.",
        "pensar completion bash > ~/.local/share/bash-completion/completions/pensar",
    ),
}

DONE, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130


def build_app() -> "App":
    """The parser of all verbs; importing none of them."""
    import cyclopts

    app = cyclopts.App(
        name="pensar",
        help="A language model's whole life: raw documents in, a served model that thinks on demand out.\n\n"
        "Start: pensar run recipes/tiny.yaml",
        version=__version__,
        help_format="plaintext",
    )
    for order, (name, verb) in enumerate(VERBS.items()):
        # The overview shows the first paragraph, the verb's own help all of them.
        paragraphs = [verb.summary, verb.more, f"Example: {verb.example}"]
        app.command(verb.target, name=name, help="\n\n".join(filter(None, paragraphs)), sort_key=order)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; what a user can mend is explained on standard error.

    Of the processes that torchrun started the first runs the verb and the others serve it.
    """
    if torchrun.is_follower():
        return torchrun.follow()
    code = _run_verb(arguments)
    if torchrun.launched():
        if code != DONE:
            torchrun.leave(code)
        torchrun.release()
    return code


def _run_verb(arguments: Sequence[str] | None) -> int:
    from cyclopts import CycloptsError

    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = build_app()(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        error.verbose = False
        return _fail(tokens, "UsageError", f"{error}\nsee: {_help_command(tokens)}", MISUSED)
    except ConfigError as error:
        return _fail(tokens, "ConfigError", _text(error), MISUSED)
    except PensarError as error:
        return _fail(tokens, type(error).__name__, _text(error), FAILED)
    except KeyboardInterrupt:
        verb = _verb_of(tokens)
        said = VERBS[verb].interrupted if verb else "interrupted"
        return _fail(tokens, "Interrupted", said, INTERRUPTED)
    except BrokenPipeError:
        # The reader (`| head`) has left: nothing more can be said there, not even by Python's own last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return code if isinstance(code, int) else DONE


def _fail(tokens: Sequence[str], kind: str, message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if "--json" in tokens:
        import json

        print(json.dumps({"error": {"kind": kind, "message": message}}, ensure_ascii=False))
    return code


def _text(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def _help_command(tokens: Sequence[str]) -> str:
    verb = _verb_of(tokens)
    return f"pensar {verb} --help" if verb else "pensar --help"


def _verb_of(tokens: Sequence[str]) -> str | None:
    """The verb is the first word that is no flag, if it is one."""
    first = next((token for token in tokens if not token.startswith("-")), None)
    return first if first in VERBS else None
