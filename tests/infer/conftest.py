"""A tiny model and tokenizer, and the naive generator that the engine is held against."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from pensar.model.attention import Packed
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3, initialize
from pensar.text.chat import encode_stop_sentence
from pensar.text.tokenizer import THINK, THINK_END, Tokenizer, train_tokenizer

Naive = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = ["the cat sat on the mat", "one and two are three", "considering the limited time"] * 4
    return train_tokenizer(texts, 320)


@pytest.fixture(scope="session")
def make_model(tokenizer: Tokenizer) -> Callable[..., Qwen3]:
    def make(seed: int = 0, **changes: Any) -> Qwen3:
        shape: dict[str, Any] = {
            "vocab_size": 320,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "intermediate_size": 64,
            "max_positions": 256,
            # Wide weights: every context gets a next token of its own, and ties are far apart.
            "initializer_range": 0.3,
        }
        model = Qwen3(ModelConfig(**{**shape, **changes})).eval()
        initialize(model, seed)
        return model

    return make


@pytest.fixture
def model(make_model: Callable[..., Qwen3]) -> Qwen3:
    return make_model()


@pytest.fixture(scope="session")
def naive(tokenizer: Tokenizer) -> Naive:
    """Greedy generation by a full forward pass per token."""
    close = tokenizer.special(THINK_END)
    sentence = encode_stop_sentence(tokenizer)

    def generate(
        model: Qwen3,
        prompt: Sequence[int],
        max_tokens: int,
        stops: Sequence[int] = (),
        budget: int | None = None,
    ) -> dict[str, Any]:
        """`budget` is for prompts that end inside an open thinking block."""
        tokens, forced, thinking, reasoning = list(prompt), [], THINK_ID in prompt, 0
        queue: list[int] = []
        finish = "length"
        while len(tokens) - len(prompt) < max_tokens:
            if not queue:
                ids = torch.tensor([tokens])
                with torch.no_grad():
                    logits = model.logits(model(ids, torch.arange(len(tokens))[None], Packed())[0, -1])
                token = int(logits.argmax())
                if thinking and token != close and budget is not None and reasoning >= budget:
                    queue = list(sentence)
            was_forced = bool(queue)
            token = queue.pop(0) if queue else token
            tokens.append(token)
            forced.append(was_forced)
            if token in stops and not was_forced:
                finish = "stop"
                break
            thinking = thinking and token != close
            reasoning += thinking and not was_forced
        return {"tokens": tokens[len(prompt) :], "forced": forced, "finish": finish, "reasoning": reasoning}

    THINK_ID = tokenizer.special(THINK)
    return generate


@pytest.fixture(scope="session")
def full_logprobs() -> Callable[[Qwen3, Sequence[int], Sequence[int]], list[float]]:
    """Log-probabilities of a reply's tokens from one full forward pass."""

    def compute(model: Qwen3, prompt: Sequence[int], reply: Sequence[int]) -> list[float]:
        ids = torch.tensor([[*prompt, *reply]])
        with torch.no_grad():
            logits = model.logits(model(ids, torch.arange(ids.shape[1])[None], Packed())[0])
        values = logits.double().log_softmax(-1)
        return [float(values[len(prompt) - 1 + i, token]) for i, token in enumerate(reply)]

    return compute
