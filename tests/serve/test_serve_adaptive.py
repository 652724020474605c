"""Learned thinking budgets over the wire: a model's folder that holds some gives each question its own."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from pensar.infer.adaptive import AdaptiveBudget
from pensar.model.weights import load_model
from pensar.serve.app import open_service
from pensar.serve.server import ServerThread
from pensar.serve.service import ServeConfig
from pensar.text.chat import STOP_SENTENCE

QUESTION: list[Any] = [{"role": "user", "content": "What is 2+3?"}]
SENTENCE = STOP_SENTENCE.removesuffix("\n</think>\n\n").strip("\n")
ERRORS = [-0.5, -0.25, 0.0, 0.25, 3.0]
"""In log(1 + tokens), around an expectation of 1.7: budgets of 3 tokens, ..., or of more than the thinking takes."""


@pytest.fixture
def asking(model_folder: Path, tmp_path: Path) -> Iterator[openai.OpenAI]:
    """A server of the model's folder, into which budgets were put that are the same for every question."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    width = load_model(folder).config.hidden_size
    AdaptiveBudget(torch.zeros(width), torch.zeros(width), 1.7, torch.tensor(ERRORS)).save(folder)
    service = open_service(folder, ServeConfig(model_name="tiny"))
    with (
        ServerThread(service) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client,
    ):
        yield client


def ask(client: openai.OpenAI, **extra: Any) -> tuple[str, int]:
    """The reasoning, and how many tokens it has."""
    reply = client.chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, max_tokens=100, extra_body=extra
    )
    assert reply.usage is not None
    assert reply.usage.completion_tokens_details is not None
    reasoning = getattr(reply.choices[0].message, "reasoning_content", None) or ""
    return reasoning, reply.usage.completion_tokens_details.reasoning_tokens or 0


def test_the_share_that_a_request_names_sets_its_budget(asking: openai.OpenAI) -> None:
    whole = ask(asking)
    assert SENTENCE not in whole[0]
    # Ranks of 6 equally likely places: half of new questions lie below the third of five errors, most below the last.
    for asked, error in ((0.2, -0.25), (0.5, 0.0), (0.6, 0.25)):
        budget = int(torch.tensor(1.7 + error, dtype=torch.float64).expm1().ceil())
        assert ask(asking, adaptive_budget=asked) == ask(asking, thinking_budget=budget)
        assert SENTENCE in ask(asking, adaptive_budget=asked)[0]
    assert ask(asking, adaptive_budget=0.9) == whole, "it suffices"


def test_nothing_asked_for_and_thinking_off_change_nothing(asking: openai.OpenAI) -> None:
    assert ask(asking, adaptive_budget=0.0) == ask(asking, adaptive_budget=None) == ask(asking)
    assert ask(asking, adaptive_budget=0.2, enable_thinking=False) == ask(asking, enable_thinking=False)


def test_the_smaller_of_two_budgets_holds(asking: openai.OpenAI) -> None:
    assert ask(asking, adaptive_budget=0.5, thinking_budget=2) == ask(asking, thinking_budget=2)
    assert ask(asking, adaptive_budget=0.5, thinking_budget=50) == ask(asking, adaptive_budget=0.5)


def test_a_share_needs_a_model_that_has_learned_budgets(client: openai.OpenAI) -> None:
    with pytest.raises(
        openai.BadRequestError, match=r"no learned thinking budgets; give thinking_budget instead"
    ):
        ask(client, adaptive_budget=0.9)


@pytest.mark.parametrize("share", [-0.1, 1.1, "most"])
def test_a_share_that_is_none_is_refused_with_its_field(asking: openai.OpenAI, share: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="adaptive_budget") as caught:
        ask(asking, adaptive_budget=share)
    assert caught.value.param == "adaptive_budget"
