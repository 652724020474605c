"""The engine behind the server: clients that leave, full queues, failures, draining."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from pensar.base.errors import RunError
from pensar.infer.engine import Engine, Piece
from pensar.serve.app import make_service
from pensar.serve.server import ServerThread
from pensar.serve.service import ServeConfig, Service
from pensar.serve.worker import Job
from pensar.text.tokenizer import Tokenizer

LONG = {"prompt": "Two", "max_tokens": 2000, "temperature": 0}
PATIENCE_SECONDS = 10.0


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def endless(endless_engine: Engine, tokenizer: Tokenizer) -> Service:
    """Two slots, one place in the queue, replies of thousands of tokens."""
    config = ServeConfig(model_name="endless", max_waiting=1, drain_seconds=0.3, keep_alive_seconds=0.2)
    return make_service(endless_engine, tokenizer, config)


@pytest.fixture
def url(endless: Service) -> Iterator[str]:
    with ServerThread(endless) as running:
        yield running.url


@contextmanager
def sent(url: str, path: str = "/v1/completions", **fields: Any) -> Iterator[HTTPConnection]:
    """A request on its way; leaving the block hangs up, whatever the server is doing."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE_SECONDS)
    try:
        connection.request("POST", path, json.dumps(fields), {"content-type": "application/json"})
        yield connection
    finally:
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()


def fetch(url: str, path: str) -> tuple[int, str]:
    connection = HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def events(response: HTTPResponse) -> list[str]:
    return [line for line in response.read().decode().split("\n\n") if line]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(endless: Service, url: str, stream: bool) -> None:
    with sent(url, **LONG, stream=stream, n=2) as connection:
        if stream:
            response = connection.getresponse()
            assert response.readline().startswith(b"data: ")
            response.close()
        wait_until(lambda: endless.worker.num_running == 2)
    wait_until(lambda: endless.worker.num_unfinished == 0)
    # Sooner than the 2,000 tokens are drawn, and the abort is counted.
    wait_until(lambda: endless.metrics.aborted.value() == 1)
    assert endless.metrics.completion_tokens.value() < 2 * 2000
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        assert client.completions.create(model="endless", prompt="Two", max_tokens=2).choices


@pytest.mark.parametrize("turns", range(5))
def test_leaving_is_not_lost_where_mail_comes_at_the_same_moment(endless: Service, turns: int) -> None:
    piece = Piece(id="a", tokens=[1], logprobs=None, forced=[False], finish_reason=None, reasoning_tokens=0)

    async def leave() -> bool:
        job = Job(endless.worker, ["a"], asyncio.get_running_loop())
        reading = asyncio.ensure_future(job.next(PATIENCE_SECONDS))
        for _ in range(3):
            await asyncio.sleep(0)
        job._receive([("a", piece)])
        for _ in range(turns):  # of the event loop
            await asyncio.sleep(0)
        if not reading.cancel():
            return bool(reading.result())
        with pytest.raises(asyncio.CancelledError):
            await reading
        return True

    assert asyncio.run(leave())


def test_a_full_queue_is_429_with_the_time_to_wait(endless: Service, url: str) -> None:
    with sent(url, **LONG), sent(url, **LONG), sent(url, **LONG):
        wait_until(lambda: endless.worker.num_unfinished == 3)
        assert (endless.worker.num_running, endless.worker.num_waiting) == (2, 1)
        status, page = fetch(url, "/metrics")
        assert status == 200
        assert "\npensar_requests_running 2\n" in page
        assert "\npensar_requests_waiting 1\n" in page
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
            pytest.raises(openai.RateLimitError) as caught,
        ):
            client.completions.create(model="endless", prompt="Two")
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.response.headers["retry-after"] == "1"
    wait_until(lambda: endless.worker.num_unfinished == 0)


def test_silence_is_filled_with_comments(endless: Service, url: str) -> None:
    # The third request waits for a slot, so nothing arrives for it but signs of life.
    with sent(url, **LONG), sent(url, **LONG):
        wait_until(lambda: endless.worker.num_running == 2)
        with sent(url, prompt="Two", max_tokens=2, stream=True) as third:
            assert third.getresponse().readline() == b": keep-alive\n"


def test_a_request_that_the_engine_refuses_fails_alone(endless: Service, url: str) -> None:
    submit = endless.worker._engine.submit

    def picky(request: Any) -> None:
        if request.params.max_tokens == 3:
            raise ValueError("no threes")
        submit(request)

    endless.worker._engine.submit = picky  # type: ignore[method-assign]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        stream = client.completions.create(
            model="endless", prompt="Two", max_tokens=500, temperature=0, stream=True
        )
        next(iter(stream))
        with pytest.raises(openai.InternalServerError, match="no threes"):
            client.completions.create(model="endless", prompt="Two", max_tokens=3)
        # In mid-stream the client raises what the error event says.
        with pytest.raises(openai.APIError, match="no threes") as caught:
            list(client.completions.create(model="endless", prompt="Two", max_tokens=3, stream=True))
        assert caught.value.code == "engine_error"
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert endless.worker.num_unfinished == 0


def test_a_failed_step_ends_its_batch_and_not_the_server(
    endless: Service, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    step, broken = endless.worker._engine.step, iter([True])

    def fragile() -> Any:
        if next(broken, False):
            raise RuntimeError("a cosmic ray")
        return step()

    endless.worker._engine.step = fragile  # type: ignore[method-assign]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="endless", prompt="Two", max_tokens=3)
        assert client.completions.create(model="endless", prompt="Two", max_tokens=3).choices
    assert "a cosmic ray" in caplog.text
    assert endless.metrics.engine_failures.value() == 1
    assert fetch(url, "/health")[0] == 200


def test_an_engine_that_cannot_go_on_makes_health_fail(endless: Service, url: str) -> None:
    """As when one of the processes that compute the model has died: who watches the server starts it again."""

    def dead() -> Any:
        raise RunError("rank 1 has ended; start the engine again")

    endless.worker._engine.step = dead  # type: ignore[method-assign]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError):
                client.completions.create(model="endless", prompt="Two", max_tokens=3)
            wait_until(lambda: not endless.worker.alive)
    assert fetch(url, "/health")[0] == fetch(url, "/ready")[0] == 503


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engine_thread_dies_nobody_waits_for_it(endless: Service, url: str) -> None:
    def die() -> None:
        raise SystemError("out of everything")

    endless.worker._take_mail = die  # type: ignore[method-assign, assignment]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="endless", prompt="Two", max_tokens=3)
        wait_until(lambda: not endless.worker.alive)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="endless", prompt="Two", max_tokens=3)
    assert fetch(url, "/health")[0] == fetch(url, "/ready")[0] == 503


def test_draining_finishes_what_it_can_and_tells_the_rest(endless: Service) -> None:
    with ServerThread(endless) as running:
        with sent(running.url, **LONG, stream=True) as connection:
            response = connection.getresponse()
            assert response.readline().startswith(b"data: ")
            running.server.drain()
            # Until the running request has ended, the replica says that it is leaving.
            assert fetch(running.url, "/ready") == (503, "shutting down\n")
            assert fetch(running.url, "/health")[0] == 200
            with sent(running.url, prompt="Two") as late:
                refused = late.getresponse()
                assert (refused.status, refused.getheader("retry-after")) == (503, "5")
                assert json.loads(refused.read())["error"]["code"] == "server_shutting_down"
            last = events(response)[-2:]
        assert json.loads(last[0].removeprefix("data: "))["error"]["code"] == "server_shutting_down"
        assert last[1] == "data: [DONE]"
        wait_until(lambda: not running._thread.is_alive())


def test_draining_waits_for_a_short_request(endless: Service) -> None:
    with ServerThread(endless) as running:
        replies: list[int] = []

        def ask() -> None:
            with sent(running.url, prompt="Two", max_tokens=30, temperature=0) as connection:
                replies.append(json.loads(connection.getresponse().read())["usage"]["completion_tokens"])

        asking = Thread(target=ask)
        asking.start()
        wait_until(lambda: endless.worker.num_unfinished == 1 or bool(replies))
        running.server.drain()
        asking.join()
        assert replies == [30]
        wait_until(lambda: not running._thread.is_alive())


def test_health_readiness_and_metrics(server: ServerThread, client: openai.OpenAI) -> None:
    assert fetch(server.url, "/health") == (200, "ok\n")
    assert fetch(server.url, "/ready") == (200, "ready\n")

    def values() -> dict[str, float]:
        _, page = fetch(server.url, "/metrics")
        lines = [line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = values()
    reply = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "What is 2+3?"}], temperature=0
    )
    after = values()
    assert reply.usage is not None
    assert reply.usage.completion_tokens_details is not None

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("pensar_prompt_tokens_total") == reply.usage.prompt_tokens
    assert grown("pensar_completion_tokens_total") == reply.usage.completion_tokens
    assert grown("pensar_reasoning_tokens_total") == reply.usage.completion_tokens_details.reasoning_tokens
    assert grown("pensar_time_to_first_token_seconds_count") == 1
    assert grown('pensar_request_duration_seconds_bucket{le="+Inf"}') == 1
    assert grown('pensar_requests_total{path="/v1/chat/completions",status="200"}') == 1
    assert after['pensar_model_info{model="tiny"}'] == 1
    assert after["pensar_requests_running"] == after["pensar_requests_waiting"] == 0
