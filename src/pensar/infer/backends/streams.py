"""Streams: many streaming HTTP requests at once, whose events arrive through one queue.

Server-sent events (WHATWG HTML, 9.2), as OpenAI's API uses them: lines that begin with `data:` hold a JSON object,
`data: [DONE]` ends the stream, and an object with `error` reports a failure in the middle of it. Each request has a
thread of its own while it is under way; closing its connection is what cancels it.
"""

import json
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pensar.base.errors import ConfigError, RunError


class Stream:
    """One request; it ends with its server's answer, with an error, or by `close`."""

    def __init__(self, path: str, body: Mapping[str, Any]) -> None:
        self.path, self.body = path, body
        self.closed = False
        self.socket: socket.socket | None = None
        """While its answer is read."""


class Event(NamedTuple):
    """What has happened to a stream: an object that arrived, its end, or why it failed."""

    stream: Stream
    content: dict[str, Any] | None = None
    error: str | None = None

    @property
    def ends(self) -> bool:
        return self.content is None


class Streams:
    """Requests to one server, at most `connections` of them at a time; further ones wait their turn."""

    def __init__(
        self, address: str, *, api_key: str = "", connections: int = 256, timeout_seconds: float = 600.0
    ) -> None:
        """`timeout_seconds` is for silence of the server, not for a whole reply."""
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"the address {address!r} is not one of a server; write http://host:port")
        self.address = address
        self._parts, self._prefix, self._timeout = parts, parts.path.rstrip("/"), timeout_seconds
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._connections = connections
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: deque[Stream] = deque()
        self._num_running = 0

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def open(self, path: str, body: Mapping[str, Any]) -> Stream:
        """Posts a request whose answer is a stream of events, or one JSON object, which counts as one event."""
        stream = Stream(path, body)
        with self._lock:
            self._waiting.append(stream)
        self._start()
        return stream

    def close(self, stream: Stream) -> None:
        """Breaks off; events of it that are still under way may arrive."""
        with self._lock:
            stream.closed = True
            if stream in self._waiting:
                self._waiting.remove(stream)
            if stream.socket is not None:
                with suppress(OSError):  # it has just ended by itself
                    stream.socket.shutdown(socket.SHUT_RDWR)

    def events(self, wait_seconds: float) -> list[Event]:
        """What has arrived, as it arrived; waits for the first of it at most so long."""
        found: list[Event] = []
        with suppress(queue.Empty):
            found.append(self._events.get(timeout=wait_seconds))
            while True:
                found.append(self._events.get_nowait())
        return found

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """A request that is answered at once: the status, and the answer as JSON or text."""
        content = b"" if body is None else json.dumps(body).encode()
        connection = self._connection()
        try:
            connection.request(method, self._prefix + path, content, self._headers)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        except (OSError, HTTPException) as error:
            raise RunError(
                f"{method} {self.address}{path} failed ({_name(error)}); is the server up?"
            ) from error
        finally:
            connection.close()
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text

    def _start(self) -> None:
        """Threads for those whose turn it is."""
        while True:
            with self._lock:
                if not self._waiting or self._num_running >= self._connections:
                    return
                stream = self._waiting.popleft()
                self._num_running += 1
            threading.Thread(target=self._serve, args=(stream,), daemon=True).start()

    def _serve(self, stream: Stream) -> None:
        try:
            error = self._read(stream)
        except (OSError, HTTPException, ValueError, AttributeError) as failure:
            # A socket that is closed under the reader shows as any of these.
            error = f"the connection to {self.address} broke: {_name(failure)}"
        finally:
            with self._lock:
                self._num_running -= 1
                stream.socket = None
        self._events.put(Event(stream, error=error))
        self._start()

    def _read(self, stream: Stream) -> str | None:
        """Reads to the end; returns what went wrong."""
        connection = self._connection()
        try:
            connection.connect()
            with self._lock:
                if stream.closed:
                    return None
                # The connection lets go of it once the answer has begun.
                stream.socket = connection.sock
            connection.request("POST", self._prefix + stream.path, json.dumps(stream.body), self._headers)
            with connection.getresponse() as response:  # which holds the socket as well
                return self._hear(stream, response)
        finally:
            connection.close()

    def _hear(self, stream: Stream, response: HTTPResponse) -> str | None:
        if response.status != 200:
            return f"{response.status}: {error_text(response.read().decode('utf-8', 'replace'))}"
        if "text/event-stream" not in (response.getheader("Content-Type") or ""):  # all of it at once
            self._events.put(Event(stream, content=json.loads(response.read())))
            return None
        for line in response:
            name, _, value = line.partition(b":")
            if name != b"data":  # a comment that keeps the connection alive, or an empty line
                continue
            if value.strip() == b"[DONE]":
                return None
            content = json.loads(value)
            if content.get("error"):
                return error_text(content)
            self._events.put(Event(stream, content=content))
        return None

    def _connection(self) -> HTTPConnection:
        kind = HTTPSConnection if self._parts.scheme == "https" else HTTPConnection
        assert self._parts.hostname is not None
        return kind(self._parts.hostname, self._parts.port, timeout=self._timeout)


def error_text(content: Any) -> str:
    """The message of an error in OpenAI's shape, or whatever else came instead."""
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except ValueError:
            return str(content).strip()[:500]
    for key in ("error", "message", "detail"):
        if isinstance(content, dict) and content.get(key):
            return error_text(content[key])
    return json.dumps(content)[:500]


def wait_until_up(streams: Streams, path: str, seconds: float) -> None:
    """Waits for a server that is starting; RunError when it takes longer."""
    end = time.monotonic() + seconds
    while True:
        with suppress(RunError):
            if streams.ask("GET", path)[0] == 200:
                return
        if time.monotonic() > end:
            raise RunError(
                f"{streams.address}{path} has not answered within {seconds:g} s; see the server's log"
            )
        time.sleep(0.1)


def _name(error: BaseException) -> str:
    return str(error) or type(error).__name__
