"""What the lab measures of a model: bits per byte, problems solved, scores of attention, retrieval by length."""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch

from pensar.data.mixture import HELD_OUT
from pensar.data.shards import Shards
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.model.attention import Attend, Packed
from pensar.model.config import ModelConfig, Yarn, replace
from pensar.model.count import parameters
from pensar.model.dual_chunk import DualChunk, chunks_for
from pensar.model.qwen3 import Qwen3
from pensar.tasks.families import FAMILIES, draw
from pensar.tasks.ruler import KINDS, ruler_task
from pensar.text.tokenizer import Tokenizer

Figure = tuple[str, float | None, float, str]
"""(metric, at which length or rate where there is one, value, unit)"""
BITS = "bits per byte"


def moe(found: Any, corpus: Any, amount: Mapping[str, Any]) -> Iterator[Figure]:
    """Loss over the run, bits per byte at its end, and parameters."""
    count = parameters(found.model.config)
    yield "active_parameters", None, count.active_non_embedding, "parameters without embeddings"
    yield "total_parameters", None, count.non_embedding, "parameters without embeddings"
    for kind in ("text and code", "problems"):
        yield f"held_out {kind}", None, held_out(found.model, corpus, amount, kind), BITS
    num = amount["points"]
    size = max(1, len(found.losses) // num)
    for start in range(0, num * size, size):
        window = found.losses[start : start + size]
        yield "training_loss", window[-1][0], sum(loss for _, loss in window) / len(window), "nats"


def qk_norm(found: Any, corpus: Any, amount: Mapping[str, Any]) -> Iterator[Figure]:
    """Loss at the end of a run at one learning rate, and the largest score of attention."""
    rate = found.part.train.optimizer.adamw_lr
    last = [loss for _, loss in found.losses[-max(1, len(found.losses) // 10) :]]
    yield "final_loss", rate, sum(last) / len(last), "nats"
    yield "diverged", rate, float(found.diverged), "share"
    yield "largest_score", rate, largest_score(found.model, corpus, amount), "score"


def mixture(found: Any, corpus: Any, amount: Mapping[str, Any]) -> Iterator[Figure]:
    """Problems of each family solved in writing, and bits per byte of what is held out."""
    for family, share in solved(found.model, corpus.tokenizer, amount["problems"]).items():
        yield f"solved {family}", None, share, "share"
    for kind in ("text and code", "problems"):
        yield f"held_out {kind}", None, held_out(found.model, corpus, amount, kind), BITS


def long_context(found: Any, corpus: Any, amount: Mapping[str, Any]) -> Iterator[Figure]:
    """Retrieval and bits per byte at each length, read in each of four ways."""
    trained = found.part.train.context
    for name, (model, attending) in readings(found.model, trained).items():
        for length in amount["lengths"]:
            for kind in KINDS:
                value = retrieved(model, attending, corpus.tokenizer, kind, length, amount["problems"])
                yield f"{kind}, {name}", length, value, "share"
            value = long_bits(model, attending, corpus, length, max(amount["lengths"]))
            yield f"bits_per_byte, {name}", length, value, BITS


MEASURES: Mapping[str, Callable[[Any, Any, Mapping[str, Any]], Iterator[Figure]]] = {
    "moe": moe,
    "qk-norm": qk_norm,
    "mixture": mixture,
    "long-context": long_context,
}

Attending = Callable[[ModelConfig, torch.Tensor], tuple[torch.Tensor, Attend]]
"""(configuration, positions) -> where the model rotates, and what attends."""


def readings(model: Qwen3, trained: int) -> dict[str, tuple[Qwen3, Attending]]:
    """The model as it was trained, with YaRN, and with Dual Chunk Attention without and with YaRN's temperature."""
    chunks = chunks_for(trained)
    cold = replace(
        model.config, dual_chunk=type(chunks)(chunk_size=chunks.chunk_size, local_size=chunks.local_size)
    )
    yarn = replace(model.config, rope_scaling=Yarn(factor=4.0, original_max_positions=trained))
    return {
        "as trained": (model, _whole),
        "YaRN": (_with(model, yarn), _whole),
        "DCA": (_with(model, cold), _in_chunks),
        "DCA and YaRN's temperature": (_with(model, replace(model.config, dual_chunk=chunks)), _in_chunks),
    }


def _whole(config: ModelConfig, positions_BT: torch.Tensor) -> tuple[torch.Tensor, Attend]:
    return positions_BT, Packed()


def _in_chunks(config: ModelConfig, positions_BT: torch.Tensor) -> tuple[torch.Tensor, Attend]:
    attend = DualChunk(config, positions_BT)
    return attend.rotary_positions_BT, attend


def _with(model: Qwen3, config: ModelConfig) -> Qwen3:
    other = Qwen3(config)
    other.load_state_dict(model.state_dict())
    return other.eval()


def logits_of(model: Qwen3, attending: Attending, tokens: list[int]) -> torch.Tensor:
    """Logits [T, V] of one text."""
    with torch.inference_mode():
        places_BT, attend = attending(model.config, torch.arange(len(tokens))[None])
        out: torch.Tensor = model.logits(model(torch.tensor([tokens]), places_BT, attend))[0]
        return out


def bits(model: Qwen3, attending: Attending, tokens: list[int]) -> list[float]:
    """Bits that each token after the first takes."""
    chances = logits_of(model, attending, tokens)[:-1].log_softmax(-1)
    values = -chances.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0] / math.log(2)
    return [float(value) for value in values]


def held_out(model: Qwen3, corpus: Any, amount: Mapping[str, Any], kind: str) -> float:
    """Bits per byte of documents that no stage read, natural text and code or our problems, in pieces of a context.

    The first `pieces` of each document count, one where the recipe does not say.
    """
    data = Shards(corpus.shards)
    problems = [source == "problems" for source in data.docs["source"].to_pylist()]
    chosen = (data.weights(HELD_OUT) > 0) & (data.lengths() > 1)
    context, total, size = amount["context"], 0.0, 0
    found = [i for i in chosen.nonzero()[0] if problems[i] == (kind == "problems")][: amount["documents"]]
    for index in found:
        tokens = [int(token) for token in data.tokens(int(index))]
        for piece in range(amount.get("pieces", 1)):
            part = tokens[piece * context : (piece + 1) * context]
            if len(part) > 1:
                total += sum(bits(model, _whole, part))
                size += len(corpus.tokenizer.decode_bytes(part[1:]))
    return total / size


def long_bits(model: Qwen3, attending: Attending, corpus: Any, length: int, longest: int) -> float:
    """Bits per byte of the `length / 4` tokens before place `length`, of documents with at least `longest` tokens."""
    data = Shards(corpus.shards)
    chosen = (data.weights(HELD_OUT) > 0) & (data.lengths() >= longest)
    total = size = 0.0
    for index in chosen.nonzero()[0]:
        tokens = [int(token) for token in data.tokens(int(index))[:length]]
        last = length // 4
        total += sum(bits(model, attending, tokens)[-last:])
        size += len(corpus.tokenizer.decode_bytes(tokens[-last:]))
    return total / size


def retrieved(
    model: Qwen3, attending: Attending, tokenizer: Tokenizer, kind: Any, length: int, num: int
) -> float:
    """Share of texts whose question the model answers, every token of the answer the likeliest."""
    count = lru_cache(maxsize=100_000)(lambda text: len(tokenizer.encode(text)))
    right = 0
    for index in range(num):
        task = ruler_task(kind, random.Random(f"{kind} {length} {index}"), length, count)
        prompt, answer = tokenizer.encode(task.prompt), tokenizer.encode(task.answer)
        likeliest = logits_of(model, attending, prompt + answer)[len(prompt) - 1 : -1].argmax(-1)
        right += likeliest.tolist() == answer
    return right / num


def solved(model: Qwen3, tokenizer: Tokenizer, num: int) -> dict[str, float]:
    """Share of held-out problems of each family worked out without a mistake to the answer, after two examples."""
    shares = {}
    for family in FAMILIES:
        requests, answers = [], []
        for index in range(num):
            rng = random.Random(f"{family} {index}")
            shown = [draw(family, "train", rng) for _ in range(2)]
            asked = draw(family, "test", rng)
            text = "".join(f"{task.prompt}\n{task.solution}\n{task.answer}\n\n" for task in shown)
            params = SamplingParams(max_tokens=72, temperature=0.0)
            requests.append(Request(str(index), tokenizer.encode(f"{text}{asked.prompt}\n"), params))
            answers.append([asked.solution, asked.answer])
        engine = Engine(_with(model, replace(model.config, max_positions=1_024)), tokenizer, slots=64)
        replies = [tokenizer.decode(list(reply.tokens)) for reply in engine.run(requests)]
        lines = [reply.split("\n\n")[0].split("\n") for reply in replies]
        right = sum(line == answer for line, answer in zip(lines, answers, strict=True))
        shares[family] = right / num
    return shares


class Watched(Packed):
    """Attention that notes its largest score."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0.0

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        scores = torch.einsum("bthd,bshd->bhts", q, keys) * q.shape[-1] ** -0.5
        seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
        self.largest = max(self.largest, float(scores.abs()[:, :, seen].max()))
        return super().__call__(layer, q, k, v)


def largest_score(model: Qwen3, corpus: Any, amount: Mapping[str, Any]) -> float:
    """Over some held-out documents, all heads and layers."""
    data, watched = Shards(corpus.shards), Watched()
    chosen = (data.weights(HELD_OUT) > 0) & (data.lengths() >= amount["context"])
    for index in chosen.nonzero()[0][: amount["documents"]]:
        tokens = [int(token) for token in data.tokens(int(index))[: amount["context"]]]
        logits_of(model, lambda _, positions: (positions, watched), tokens)
    return watched.largest
