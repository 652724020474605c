"""One record for every request, with the numbers that its reply told, whatever becomes of client, disk or process."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from pensar.infer import outbox as outbox_page
from pensar.infer.engine import Engine
from pensar.infer.outbox import Consumer, Outbox, UsageRecord
from pensar.model.weights import load_model
from pensar.serve.app import make_service
from pensar.serve.server import ServerThread
from pensar.serve.service import ServeConfig, Service
from pensar.text.tokenizer import Tokenizer

QUESTION: list[Any] = [{"role": "user", "content": "What is 2+3?"}]
PATIENCE_SECONDS = 30.0


def records(folder: Path) -> list[UsageRecord]:
    return [record for _, record in Consumer(folder, "test").read(0, limit=10**6)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "usage"


@pytest.fixture
def metered(model_folder: Path, folder: Path) -> Service:
    """The model that knows its lessons, with an outbox."""
    tokenizer = Tokenizer.load(model_folder)
    engine = Engine(load_model(model_folder), tokenizer)
    return make_service(engine, tokenizer, ServeConfig(model_name="tiny"), outbox=Outbox(folder))


@pytest.fixture
def endless(endless_engine: Engine, tokenizer: Tokenizer, folder: Path) -> Service:
    """Two slots, replies of thousands of tokens."""
    config = ServeConfig(model_name="endless", drain_seconds=0.3)
    return make_service(endless_engine, tokenizer, config, outbox=Outbox(folder))


def connected(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


def values(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics") as response:
        page = response.read().decode()
    lines = [line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def told(usage: Any) -> tuple[int, int, int, int]:
    cached, reasoning = (
        usage.prompt_tokens_details.cached_tokens,
        usage.completion_tokens_details.reasoning_tokens,
    )
    return usage.prompt_tokens, cached, usage.completion_tokens, reasoning


def recorded(record: UsageRecord) -> tuple[int, int, int, int]:
    return record.prompt_tokens, record.cached_tokens, record.output_tokens, record.reasoning_tokens


def requests() -> Iterator[tuple[str, dict[str, Any]]]:
    """Ways in which a request comes to its end."""
    for n in (1, 3):
        yield "chat", {"n": n}
        yield "chat", {"n": n, "stop": " sum"}
        yield "chat", {"n": n, "max_tokens": 5}
        yield "chat", {"n": n, "extra_body": {"thinking_budget": 4}}
        yield "completion", {"n": n, "prompt": "Two and three: 2, then 3, 4, 5. So the sum", "max_tokens": 9}
        yield "completion", {"n": n, "prompt": ["Two and three: 2, then", "What is", "The sum"], "stop": "e"}


@pytest.mark.parametrize("stream", [False, True])
def test_every_record_says_what_the_reply_said(metered: Service, folder: Path, stream: bool) -> None:
    seen: dict[str, tuple[int, int, int, int]] = {}
    with ServerThread(metered) as running, connected(running.url) as client:
        for kind, fields in requests():
            asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "user": "ann", **fields}
            create: Any = client.completions.create
            if kind == "chat":
                create, asked["messages"] = client.chat.completions.create, QUESTION
            if stream:
                *_, reply = create(**asked, stream=True, stream_options={"include_usage": True})
            else:
                reply = create(**asked)
            seen[reply.id] = told(reply.usage)
        metrics = values(running.url)
    found = records(folder)
    assert {record.id: recorded(record) for record in found} == seen
    assert len(found) == len(seen)
    assert {(record.user, record.model, record.adapter) for record in found} == {("ann", "tiny", "")}
    assert {record.finish_reason for record in found} == {"stop", "length"}
    names = ("prompt", "cached", "completion", "reasoning")
    for index, name in enumerate(names):
        assert metrics[f"pensar_{name}_tokens_total"] == sum(tokens[index] for tokens in seen.values())


def test_a_prompt_of_n_sequences_counts_once_and_is_not_cached_by_itself(
    metered: Service, folder: Path
) -> None:
    prompt = "Two and three: 2, then 3, 4, 5. So the sum is 5. The sum is 5. Two and three, I guess." * 2
    length = len(metered.tokenizer.encode(prompt))
    with ServerThread(metered) as running, connected(running.url) as client:
        for _ in range(2):
            reply = client.completions.create(model="tiny", prompt=prompt, n=4, max_tokens=3, temperature=1)
            assert reply.usage is not None
            assert reply.usage.prompt_tokens == length
    first, second = records(folder)
    assert (first.prompt_tokens, first.cached_tokens) == (length, 0)
    assert (second.prompt_tokens, second.cached_tokens) == (length, (length - 1) // 16 * 16)
    assert first.output_tokens <= 4 * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_billed_for_what_the_engine_drew(
    endless: Service, folder: Path, stream: bool
) -> None:
    drawn: list[int] = []
    abort = endless.worker._engine.abort

    def noted(name: str) -> Any:
        completion = abort(name)
        drawn.append(0 if completion is None else len(completion.tokens))
        return completion

    endless.worker._engine.abort = noted  # type: ignore[method-assign]
    body = {"prompt": "Two", "max_tokens": 2000, "temperature": 0, "n": 2, "stream": stream}
    with ServerThread(endless) as running:
        connection = HTTPConnection(urlsplit(running.url).netloc, timeout=PATIENCE_SECONDS)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        wait_until(lambda: endless.worker.num_running == 2)
        time.sleep(0.2)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        wait_until(lambda: endless.worker.num_unfinished == 0)
    (record,) = records(folder)
    assert record.finish_reason == "abort"
    assert record.output_tokens == sum(drawn)
    assert 2 < record.output_tokens < 2 * 2000
    assert record.prompt_tokens == len(endless.tokenizer.encode("Two"))


def test_a_step_that_fails_is_recorded_with_what_was_drawn_before(endless: Service, folder: Path) -> None:
    step, count = endless.worker._engine.step, iter(range(1000))

    def fragile() -> Any:
        if next(count) == 7:
            raise RuntimeError("a cosmic ray")
        return step()

    endless.worker._engine.step = fragile  # type: ignore[method-assign]
    with ServerThread(endless) as running, connected(running.url) as client:
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="endless", prompt="Two", max_tokens=50, temperature=0, user="bob")
        # OpenAI's newer field wins, and a refused request is one that the engine never took.
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="endless", prompt="Two", max_tokens=5000)
        client.completions.create(
            model="endless",
            prompt="Two",
            max_tokens=5,
            temperature=0,
            extra_body={"safety_identifier": "eve"},
            user="bob",
        )
    failed, fine = records(folder)
    assert (failed.finish_reason, failed.output_tokens, failed.user) == ("error", 7, "bob")
    assert (fine.finish_reason, fine.output_tokens, fine.user) == ("length", 5, "eve")


def test_what_runs_when_the_server_ends_is_recorded(endless: Service, folder: Path) -> None:
    with ServerThread(endless) as running, connected(running.url) as client:
        stream = client.completions.create(
            model="endless", prompt="Two", max_tokens=2000, temperature=0, stream=True
        )
        next(iter(stream))
        running.server.drain()
        with pytest.raises(openai.APIError):
            list(stream)
    (record,) = records(folder)
    assert record.finish_reason == "abort"
    assert 0 < record.output_tokens < 2000


def test_a_full_disk_stops_no_request_and_is_told(
    metered: Service, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = True
    fsync = os.fsync

    def no_room(descriptor: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(outbox_page, "RETRY_SECONDS", 0.02)
    with ServerThread(metered) as running, connected(running.url) as client:

        def ask() -> str:
            return client.completions.create(model="tiny", prompt="Two", max_tokens=2, temperature=0).id

        ids = [ask()]
        wait_until(lambda: values(running.url)["pensar_usage_durable"] == 1)
        monkeypatch.setattr(os, "fsync", no_room)
        ids += [ask(), ask()]
        wait_until(lambda: values(running.url)["pensar_usage_failing"] == 1)
        metrics = values(running.url)
        assert (metrics["pensar_usage_backlog"], metrics["pensar_usage_durable"]) == (2, 1)
        ids.append(ask())
        assert "No space left" in caplog.text or "full" in caplog.text
        full = False
        wait_until(lambda: values(running.url)["pensar_usage_backlog"] == 0)
        metrics = values(running.url)
        assert (metrics["pensar_usage_failing"], metrics["pensar_usage_durable"]) == (0, 4)
        assert metrics["pensar_usage_lost_total"] == 0
    assert [record.id for record in records(folder)] == ids


def test_records_beyond_what_memory_keeps_are_counted_as_lost(
    endless_engine: Engine, tokenizer: Tokenizer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    box = Outbox(folder, commit_seconds=60, max_pending=2)  # as slow as a full disk
    service = make_service(endless_engine, tokenizer, ServeConfig(model_name="endless"), outbox=box)
    with ServerThread(service) as running, connected(running.url) as client:
        for _ in range(5):
            client.completions.create(model="endless", prompt="Two", max_tokens=2)
        assert values(running.url)["pensar_usage_lost_total"] == 3
        assert values(running.url)["pensar_usage_backlog"] == 2
    assert "is lost" in caplog.text
    assert len(records(folder)) == 2


def served(model: Path, folder: Path) -> tuple[subprocess.Popen[str], str]:
    verb = [
        "-m",
        "pensar",
        "serve",
        str(model),
        "--port",
        "0",
        "--model-name",
        "tiny",
        "--usage",
        str(folder),
    ]
    process = subprocess.Popen(
        [sys.executable, *verb], stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    return process, process.stdout.readline().split()[4].removesuffix("/v1")


def test_a_killed_server_has_kept_what_it_said_was_durable_and_a_stopped_one_everything(
    model_folder: Path, folder: Path
) -> None:
    seen: list[str] = []

    def ask(client: openai.OpenAI) -> None:
        seen.append(client.completions.create(model="tiny", prompt="Two", max_tokens=3).id)

    process, url = served(model_folder, folder)
    try:
        with connected(url) as client:
            for _ in range(20):
                ask(client)
            durable = int(values(url)["pensar_usage_durable"])
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE_SECONDS)
    finally:
        process.kill()
        process.communicate()
    kept = [record.id for record in records(folder)]
    assert durable > 0
    assert kept == seen[: len(kept)], "in order, none twice and none that nobody saw"
    with Outbox(folder):  # what was written and not yet noted counts as well
        kept = [record.id for record in records(folder)]
    assert durable <= len(kept) <= 20
    assert kept == seen[: len(kept)]
    process, url = served(model_folder, folder)
    try:
        with connected(url) as client:
            ask(client)
            ask(client)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0
    finally:
        process.kill()
        process.communicate()
    assert [record.id for record in records(folder)] == [*kept, *seen[-2:]]


def test_two_servers_do_not_share_a_folder(model_folder: Path, folder: Path, capsys: Any) -> None:
    from pensar.cli import main

    with Outbox(folder):
        assert main(["serve", str(model_folder), "--port", "0", "--usage", str(folder)]) == 1
    assert "in use by process" in capsys.readouterr().err
