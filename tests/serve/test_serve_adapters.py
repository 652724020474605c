"""Adapters by the name in `model`: given at the start, or loaded and unloaded while others are answered."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from pensar.cli import main
from pensar.infer.outbox import Consumer, Outbox
from pensar.model.adapter import save_adapter
from pensar.model.lora import LoraConfig, adapt, adapted_weights
from pensar.model.weights import load_model
from pensar.serve.app import open_service
from pensar.serve.server import ServerThread
from pensar.serve.service import ServeConfig

FIELDS: dict[str, Any] = {"prompt": "Two and three: 2, then 3", "max_tokens": 12, "temperature": 0}


def adapter_in(folder: Path, model_folder: Path, seed: int) -> Path:
    """A strong change of the model, which then says something else."""
    model = load_model(model_folder)
    adapt(model, LoraConfig(rank=2, alpha=8.0), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in adapted_weights(model):
            weight.lora_b.normal_(generator=generator, std=0.3)
    save_adapter(model, folder)
    return folder


@pytest.fixture
def adapters(model_folder: Path, tmp_path: Path) -> dict[str, Path]:
    return {
        name: adapter_in(tmp_path / f"of-{name}", model_folder, seed) for seed, name in enumerate(("a", "b"))
    }


@pytest.fixture
def running(model_folder: Path, adapters: dict[str, Path], tmp_path: Path) -> Iterator[ServerThread]:
    config = ServeConfig(model_name="tiny", adapter_changes=True)
    given = {"a": adapters["a"]}
    with ServerThread(
        open_service(model_folder, config, adapters=given, outbox=Outbox(tmp_path / "usage"))
    ) as running:
        yield running


@pytest.fixture
def asking(running: ServerThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def change(running: ServerThread, verb: str, name: str, folder: Path | None = None) -> tuple[int, str]:
    body = {"lora_name": name} | ({} if folder is None else {"lora_path": str(folder)})
    asked = urllib.request.Request(
        f"{running.url}/v1/{verb}_lora_adapter",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(asked) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["error"]["message"]


def text(client: openai.OpenAI, model: str) -> str:
    reply = client.completions.create(model=model, **FIELDS)
    assert reply.model == model
    return reply.choices[0].text


def test_the_name_in_model_chooses_the_adapter(
    asking: openai.OpenAI,
    model_folder: Path,
    adapters: dict[str, Path],
    running: ServerThread,
    tmp_path: Path,
) -> None:
    from pensar.infer.engine import Request, SamplingParams
    from pensar.infer.llm import LLM

    llm = LLM(model_folder, adapters={"a": adapters["a"]})
    wanted = {}
    for name, adapter in (("tiny", ""), ("a", "a")):
        tokens = llm.tokenizer.encode(FIELDS["prompt"])
        request = Request(name, tokens, SamplingParams(max_tokens=12), adapter=adapter)
        (completion,) = llm.engine.run([request])
        wanted[name] = llm.tokenizer.decode(completion.tokens, skip_special=True)
    assert wanted["tiny"] != wanted["a"]
    assert {name: text(asking, name) for name in wanted} == wanted
    assert [(model.id, model.root, model.parent) for model in asking.models.list()] == [  # type: ignore[attr-defined]
        ("tiny", "tiny", None),
        ("a", "of-a", "tiny"),
    ]
    assert asking.models.retrieve("a").id == "a"
    with pytest.raises(openai.NotFoundError, match="'b' does not exist; this server has 'tiny', 'a'"):
        text(asking, "b")
    running.__exit__()
    found = [record for _, record in Consumer(tmp_path / "usage", "test").read(0)]
    assert [(record.model, record.adapter) for record in found] == [("tiny", ""), ("tiny", "a")]


def test_adapters_come_and_go_while_the_server_answers(
    asking: openai.OpenAI, adapters: dict[str, Path], running: ServerThread
) -> None:
    before = text(asking, "a")
    assert change(running, "load", "b", adapters["b"])[0] == 200
    other = text(asking, "b")
    assert other not in (before, text(asking, "tiny"))
    assert change(running, "load", "b", adapters["b"])[0] == 400
    assert change(running, "unload", "a")[0] == 200
    with pytest.raises(openai.NotFoundError):
        text(asking, "a")
    assert change(running, "unload", "a")[0] == 404
    assert text(asking, "b") == other
    # Another one by the same name is another model, also where the prompt was cached.
    assert change(running, "load", "a", adapters["b"])[0] == 200
    assert text(asking, "a") == other


def test_what_is_no_adapter_is_refused_and_the_server_goes_on(
    asking: openai.OpenAI,
    model_folder: Path,
    adapters: dict[str, Path],
    running: ServerThread,
    tmp_path: Path,
) -> None:
    for folder in (tmp_path / "none", model_folder, None):
        status, message = change(running, "load", "c", folder)
        assert status == 400, message
    status, message = change(running, "load", "tiny", adapters["b"])
    assert (status, "which is the model's" in message) == (400, True)
    assert text(asking, "a")
    assert [model.id for model in asking.models.list()] == ["tiny", "a"]


def test_an_adapter_in_use_stays(asking: openai.OpenAI, running: ServerThread) -> None:
    stream = asking.completions.create(
        model="a", prompt="Two", max_tokens=1900, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    status, message = change(running, "unload", "a")
    stream.close()
    assert (status, "used by 1 unfinished" in message) == (409, True)
    assert text(asking, "a")


def test_without_leave_nobody_changes_adapters(server: ServerThread, adapters: dict[str, Path]) -> None:
    for verb in ("load", "unload"):
        status, message = change(server, verb, "a", adapters["a"])
        assert (status, "--adapter-changes" in message) == (403, True)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--adapter", "a"], "--adapter a: give"),
        (["--adapter", "=x"], "--adapter =x: give"),
        (["--adapter", "a=x", "--adapter", "a=y"], "--adapter a=y: give"),
        (["--adapter", "a=x", "--tensor-parallel", "2"], "--adapter and --adapter-changes are for a model"),
        (["--model-name", "tiny", "--adapter", "tiny=x"], "which is the model's"),
    ],
)
def test_options_for_adapters_that_do_not_fit_are_exit_code_2(
    model_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    assert main(["serve", str(model_folder), "--port", "0", *arguments]) == 2
    assert part in capsys.readouterr().err
