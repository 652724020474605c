"""A model that has learnt five conversations by heart, one that never stops, and servers for both."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import openai
import pytest
import torch
from torch.nn import functional as F

from pensar.infer.engine import Engine, Piece
from pensar.model.attention import Packed
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3, initialize
from pensar.model.weights import load_model, save_model
from pensar.serve.app import make_service
from pensar.serve.server import ServerThread
from pensar.serve.service import ServeConfig, Service
from pensar.text.chat import STOP_SENTENCE, encode_training, render
from pensar.text.conversation import Conversation, Message, ToolCall
from pensar.text.sample import Sample
from pensar.text.tokenizer import Tokenizer, train_tokenizer

QUESTION = "What is 2+3?"
THOUGHT = "Two and three: 2, then 3, 4, 5. So the sum is 5."
ANSWER = "The sum is 5."
GUESS = "Maybe 6, maybe 5, I guess."
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
STEPS = 80


def _talk(question: str, answer: Message, tools: Sequence[dict[str, object]] = ()) -> Conversation:
    return Conversation(messages=(Message(role="user", content=question), answer), tools=tuple(tools))


def lessons() -> list[tuple[Conversation, bool | None]]:
    """The conversations, each with the mode that its prompt asks for."""
    thinks = Message(role="assistant", content=ANSWER, reasoning_content=THOUGHT)
    guesses = Message(role="assistant", content=GUESS)
    calls = Message(role="assistant", tool_calls=(ToolCall(name="weather", arguments={"city": "Évora"}),))
    return [
        (_talk(QUESTION, thinks), None),
        (_talk(QUESTION, guesses), False),
        (_talk(QUESTION + " /no_think", guesses), None),
        (_talk("Weather in Évora?", calls, [WEATHER]), False),
        (_talk("Weather in Évora?", calls), False),
    ]


def _cut_short(tokenizer: Tokenizer) -> Sample:
    """How to answer after the stop sentence; writing that sentence is not taught."""
    thought = "Two and three" + STOP_SENTENCE.removesuffix("\n</think>\n\n")
    talk = _talk(QUESTION, Message(role="assistant", content=ANSWER, reasoning_content=thought))
    sample = encode_training(tokenizer, talk)
    assert sample.ce is not None
    end = int((sample.tokens == tokenizer.special("</think>")).argmax())
    sample.ce[: end + 1] = 0
    return sample


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = [render(talk) for talk, _ in lessons()] + [STOP_SENTENCE]
    return train_tokenizer(texts * 2, 600, model_max_length=2048)


@pytest.fixture(scope="session")
def shape(tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        rope_theta=10_000.0,
        max_positions=2048,
        tied=True,
    )


@pytest.fixture(scope="session")
def model_folder(tokenizer: Tokenizer, shape: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a model that answers the lessons word for word."""
    model = Qwen3(shape)
    initialize(model, seed=1)
    samples = [encode_training(tokenizer, talk, thinking=thinking) for talk, thinking in lessons()]
    samples.append(_cut_short(tokenizer))
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(s.tokens).long() for s in samples], batch_first=True
    )
    weights = torch.nn.utils.rnn.pad_sequence([torch.tensor(s.ce) for s in samples], batch_first=True)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / STEPS) + 1e-3
        logits = model.logits(model(tokens, positions, Packed()))
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    known = (logits[:, :-1].argmax(-1) == tokens[:, 1:]) | (weights[:, 1:] == 0)
    assert bool(known.all()), "the fixture's model has not learnt its lessons; give it more STEPS"
    folder = tmp_path_factory.mktemp("model")
    save_model(model, folder, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def service(model_folder: Path) -> Service:
    """Over the model that knows its lessons."""
    tokenizer = Tokenizer.load(model_folder)
    engine = Engine(load_model(model_folder), tokenizer)
    return make_service(engine, tokenizer, ServeConfig(model_name="tiny", max_body_bytes=200_000))


@pytest.fixture(scope="session")
def server(service: Service) -> Iterator[ServerThread]:
    with ServerThread(service) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: ServerThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def endless_engine(tokenizer: Tokenizer, shape: ModelConfig) -> Engine:
    """Two slots of a random model that repeats itself up to the limit, slowly enough for clients to act first."""
    model = Qwen3(shape)
    initialize(model, seed=2)
    engine = Engine(model.eval(), tokenizer, slots=2)
    step = engine.step

    def slow() -> list[Piece]:
        time.sleep(0.004)
        return step()

    engine.step = slow  # type: ignore[method-assign]
    return engine
