"""Tiny real things that the tests of several rooms share: a model, a tokenizer, token shards, a taught model."""

import json
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pensar.base.ranks import World
from pensar.data.documents import write_table
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3, initialize
from pensar.model.weights import save_model
from pensar.posttrain.examples import Example, encode, in_batches
from pensar.tasks.tools import LOOKUP
from pensar.text.conversation import Conversation, Message, ToolCall
from pensar.text.tokenizer import Tokenizer, train_tokenizer
from pensar.train.loss import LossConfig
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.step import train_step

BENCHED = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    initializer_range=0.3,
    tied=True,
)
"""What the benchmarks are tried on: every context gets a next token of its own."""

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_positions": 512,
    "rope_theta": 10_000.0,
    "tied": True,
    # Wide weights: every token is told from the others from the start.
    "initializer_range": 0.2,
}
SPARSE: dict[str, Any] = {
    "num_experts": 4,
    "experts_per_token": 2,
    "moe_intermediate_size": 16,
    "intermediate_size": 0,
}

PREAMBLE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
    "function signatures within <tools></tools> XML tags:\n<tools>\n</tools>\n\nFor each function call, return a "
    "json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
"""What the chat format says of tools, to be learnt as few tokens."""


def tiny_model(seed: int = 0, **changes: Any) -> Qwen3:
    """An initialised model in training mode; `**SPARSE` makes it a mixture of experts."""
    model = Qwen3(ModelConfig(**(SHAPE | changes)))
    initialize(model, seed)
    return model


def tiny_tokenizer(vocab_size: int = 480) -> Tokenizer:
    """Trained on the tools' preamble and on problems, so that prompts stay short."""
    texts = [
        json.dumps(LOOKUP),
        "Last digit, left to right: 3+4*5-6 /think /no_think",
        "True or false, left to right: T and F or T xor F. Arrows 1>2,3>4. From 1 go 3",
        PREAMBLE,
        "user assistant system What is the code of amber? lookup amber code 42",
    ]
    return train_tokenizer(texts * 8, vocab_size)


def save(model: Qwen3, tokenizer: Tokenizer, folder: Path) -> Path:
    """A model directory."""
    save_model(model, folder, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    tokenizer.save(folder)
    return folder


def teach(
    model: Qwen3, tokenizer: Tokenizer, conversations: Sequence[tuple[Conversation, bool | None]], steps: int
) -> Qwen3:
    """Trains on the last turn of every conversation until the model writes replies of their shape."""
    examples = [Example(id=str(n), conversation=c, thinking=t) for n, (c, t) in enumerate(conversations)]
    batches_of = in_batches(encode(tokenizer, examples), 8, seed=0)
    optimizer = Optimizer(model, OptimizerConfig(lr=0.02, adamw_lr=0.01))
    model.train()
    for step in range(steps):
        train_step(model, optimizer, batches_of(step), min(1.0, 2 - 2 * step / steps), World(), LossConfig())
    return model.eval()


def ask(prompt: str, *turns: Message, tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    return Conversation(messages=(Message(role="user", content=prompt), *turns), tools=tools)


def write_shards(folder: Path, documents: Sequence[Sequence[int]], *, end: int, vocab_size: int) -> Path:
    """Token shards of one file with the mixtures `general`, `reasoning`, `long` and, of every fifth, `held_out`."""
    folder.mkdir(parents=True)
    lengths = [len(document) + 1 for document in documents]
    content = np.concatenate([[*document, end] for document in documents]).astype("<u2")
    index = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    content.tofile(folder / "tokens-a.bin")
    index.tofile(folder / "tokens-a.idx")
    held = np.array([float(n % 5 == 4) for n in range(len(documents))])
    columns: dict[str, Any] = {
        "doc_id": [f"doc-{n}" for n in range(len(documents))],
        "shard": ["a"] * len(documents),
        "start": index[:-1],
        "end": index[1:],
        "source": ["test"] * len(documents),
        "language": ["eng_Latn"] * len(documents),
        "kind": ["text"] * len(documents),
        "domain": [""] * len(documents),
        "cell": [""] * len(documents),
    }
    columns |= {f"weight_{name}": 1.0 - held for name in ("general", "reasoning", "long")}
    write_table(folder / "docs.parquet", pa.table(columns | {"weight_held_out": held}))
    meta = {
        "dtype": "uint16",
        "tokenizer_sha256": "0" * 64,
        "vocab_size": vocab_size,
        "end_of_document": end,
        "num_documents": len(documents),
        "num_tokens": int(index[-1]),
        "mixtures": ["general", "reasoning", "long", "held_out"],
        "stems": ["a"],
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def parameters_of(model: Qwen3) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@cache
def taught() -> tuple[Qwen3, Tokenizer]:
    """A model that has learned the shape of replies: it thinks or not as asked, calls the tool, and guesses T or F.

    Trained once in a session; copy it before changing it.
    """
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size, hidden_size=48, initializer_range=0.02)
    lessons: list[tuple[Conversation, bool | None]] = []
    for first, word, second in product("TF", ("and", "or", "xor"), "TF"):
        prompt = f"True or false, left to right: {first} {word} {second}"
        for guess in "TF":
            thought = Message(
                role="assistant", content=guess, reasoning_content=f"{first} {word} {second}={guess}"
            )
            direct = Message(role="assistant", content=guess)
            lessons += [(ask(prompt, thought), None), (ask(prompt, direct), False)]
            lessons += [(ask(f"{prompt} /no_think", direct), None), (ask(f"{prompt} /think", thought), None)]
    for thinking, (name, code) in product((True, False), (("amber", "42"), ("stone", "17"))):
        call = ToolCall(name="lookup", arguments={"words": name})
        thoughts = (f"lookup {name}", f"code {code}") if thinking else (None, None)
        turns = (
            Message(role="assistant", reasoning_content=thoughts[0], tool_calls=(call,)),
            Message(role="tool", content=code),
            Message(role="assistant", reasoning_content=thoughts[1], content=code),
        )
        for number in (1, 3):
            whole = ask(f"What is the code of {name}?", *turns[:number], tools=(LOOKUP,))
            lessons += [(whole, None if thinking else False)] * 6
    return teach(model, tokenizer, lessons, steps=300), tokenizer
