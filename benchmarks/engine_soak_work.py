"""The soak's requests: prompts that share, repeat and break, and parameters of every sort, all drawn from a seed."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from pensar.infer.engine import Request, SamplingParams
from pensar.infer.request import Grammar
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3, initialize
from pensar.text.tokenizer import THINK, TURN_START, Tokenizer, train_tokenizer

CONFIG = ModelConfig(
    vocab_size=336,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=256,
    # Wide weights: every context gets a next token of its own, and ties are far apart.
    initializer_range=0.3,
    tied=False,
)
WORDS = 320
"""Tokens of the tokenizer; the embedding has rows beyond them, as models have."""
BROKEN = 335
"""A token whose embedding is NaN: whatever text has it has broken logits from there on."""
NAMES = 211
"""Ids are used again and again, by requests that have nothing to do with one another."""
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
GRAMMARS = (
    Grammar(kind="json_schema", text=json.dumps(SCHEMA)),
    Grammar(kind="regex", text=r"[a-c]{1,6}-[0-9]{2}"),
    Grammar(kind="choice", text=json.dumps(["one", "two", "three and two"])),
)
STOPS = ("e", "th", " the", "at", "!", "<|im_start|>")


def tokenizer_of() -> Tokenizer:
    texts = ["the cat sat on the mat", "one and two are three", "considering the limited time"] * 4
    return train_tokenizer(texts, WORDS)


def model_of(
    seed: int, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32, *, broken: bool = True
) -> Qwen3:
    """Random weights, but for the broken token."""
    model = Qwen3(config).eval()
    initialize(model, seed)
    if broken:
        with torch.no_grad():
            model.model.embed_tokens.weight[BROKEN] = torch.nan
    return model.to(dtype)


class Requests:
    """An endless supply, the same for the same seed."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._number = 0
        self._ends = (tokenizer.eos_id, tokenizer.pad_id)
        self._opening = [
            tokenizer.special(TURN_START),
            *tokenizer.encode("assistant\n"),
            tokenizer.special(THINK),
        ]
        self._documents = [self._tokens(length) for length in self._rng.integers(16, 120, 12)]

    def group(self, taken: Callable[[str], bool], *, name: str | None = None) -> list[Request]:
        """One request, or now and then several for one prompt; `taken` says which ids are in use.

        The first is called `name`, where one is given.
        """
        rng = self._rng
        thinks = rng.random() < 0.15
        prompt = self._prompt(thinks)
        count = 1 if rng.random() < 0.9 else int(rng.integers(2, 7))
        found = []
        for _ in range(count):
            request = Request(
                name or self._free(taken, [other.id for other in found]),
                prompt,
                self._params(thinks, len(prompt)),
                user=f"user {rng.integers(8)}",
                priority=int(rng.choice([0, 0, 0, 0, 0, 1, -1])),
                timeout_seconds=float(rng.exponential(30.0)) + 0.5 if rng.random() < 0.1 else None,
                salt="other" if rng.random() < 0.03 else "",
            )
            found.append(request)
            name = None
        return found

    def refused(self, live: Sequence[str], taken: Callable[[str], bool]) -> Request:
        """One that no engine can serve."""
        rng = self._rng
        fine = Request(self._free(taken, ()), self._tokens(9), SamplingParams(max_tokens=5))
        change: dict[str, Any] = [
            {"tokens": self._tokens(CONFIG.max_positions - 4)},
            {"tokens": []},
            {"tokens": [1, CONFIG.vocab_size]},
            {"id": str(rng.choice(live))} if live else {"tokens": [-1]},
            {"adapter": "nobody's"},
            {"timeout_seconds": 0.0},
            {"params": SamplingParams(max_tokens=0)},
            {"params": SamplingParams(max_tokens=5, top_p=1.5)},
            {"params": SamplingParams(max_tokens=5, grammar=Grammar(kind="regex", text="(a"))},
        ][int(rng.integers(9))]
        return msgspec.structs.replace(fine, **change)

    def _free(self, taken: Callable[[str], bool], others: Sequence[str]) -> str:
        while True:
            self._number += 1
            name = f"request {self._number % NAMES}"
            if not taken(name) and name not in others:
                return name

    def _tokens(self, length: int) -> list[int]:
        return self._rng.integers(1, WORDS, length).tolist()  # type: ignore[no-any-return]

    def _prompt(self, thinks: bool) -> list[int]:
        rng = self._rng
        kind = rng.random()
        if kind < 0.65:
            prompt = self._tokens(int(rng.integers(1, 24)))
        elif kind < 0.92:  # begins like others
            document = self._documents[int(rng.integers(len(self._documents)))]
            prompt = document + self._tokens(int(rng.integers(1, 8)))
        else:
            prompt = self._tokens(int(rng.integers(60, 170)))
        if rng.random() < 0.01:
            prompt[int(rng.integers(len(prompt)))] = BROKEN
        return [*self._opening, *prompt] if thinks else prompt

    def _params(self, thinks: bool, length: int) -> SamplingParams:
        rng = self._rng

        def now(share: float) -> bool:
            return bool(rng.random() < share)

        most = int(rng.integers(1, 24)) if not now(0.05) else int(rng.integers(24, 70))
        fields: dict[str, Any] = {"seed": int(rng.integers(2**40))}
        if now(0.8):
            fields |= {"temperature": float(rng.uniform(0.3, 1.5))}
            fields |= {"top_k": int(rng.integers(1, 50))} if now(0.2) else {}
            fields |= {"top_p": float(rng.uniform(0.5, 1.0))} if now(0.2) else {}
            fields |= {"min_p": float(rng.uniform(0.0, 0.2))} if now(0.1) else {}
        fields |= {"logprobs": True} if now(0.5) else {}
        fields |= {"top_logprobs": int(rng.integers(1, 4))} if now(0.04) else {}
        fields |= {"prompt_logprobs": True} if now(0.03) else {}
        fields |= {"ignore_eos": True} if now(0.1) else {}
        fields |= {"stop_ids": tuple(self._tokens(3))} if now(0.1) else {}
        fields |= {"stop": tuple(rng.choice(STOPS, 2, replace=False).tolist())} if now(0.08) else {}
        fields |= {"logit_bias": tuple((end, 4.0) for end in self._ends)} if now(0.15) else {}
        fields |= {"presence_penalty": 1.0, "repetition_penalty": 1.2} if now(0.05) else {}
        fields |= {"bad_ids": tuple(self._tokens(4))} if now(0.03) else {}
        fields |= {"min_tokens": min(most, 4)} if now(0.05) else {}
        if thinks:
            most += 20
            fields |= {"thinking_budget": int(rng.integers(0, 16))} if now(0.8) else {}
        if now(0.03):
            most, fields["grammar"] = most + 20, GRAMMARS[int(rng.integers(len(GRAMMARS)))]
            fields.pop("ignore_eos", None)
        return SamplingParams(max_tokens=min(most, CONFIG.max_positions - length), **fields)
