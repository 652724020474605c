"""Running the application on uvicorn, and leaving gracefully: running requests finish, new ones are refused."""

import asyncio
import logging
import socket
import threading
import time
from types import FrameType

import uvicorn

from pensar.base.errors import ConfigError, RunError
from pensar.serve.app import make_app
from pensar.serve.service import Service

log = logging.getLogger(__name__)

POLL_SECONDS = 0.02
MAX_PORT = 65_535


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 lets the system choose. Raises RunError where the address cannot be had."""
    if not 0 <= port <= MAX_PORT:
        raise ConfigError(f"port {port} is not between 0 and {MAX_PORT}; 0 takes any free port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        raise RunError(
            f"cannot listen on {host} port {port} ({error}); choose another with --host or --port"
        ) from error


class Server(uvicorn.Server):
    """uvicorn that drains: the first signal closes the door, the second one ends everything at once.

    Between the two, or until `drain_seconds` have passed, running requests go on, and health, readiness (503) and
    metrics are still answered, so that a load balancer sees the replica leave.
    """

    def __init__(self, service: Service, listening: socket.socket) -> None:
        config = uvicorn.Config(
            make_app(service),
            log_level="warning",
            lifespan="on",
            ws="none",
            # Whatever outlives the drain has had its error event by then; this is for clients that do not read it.
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._service = service
        self._listening = listening
        self._drain_until: float | None = None

    def serve_until_signal(self) -> None:
        """Runs in the calling thread until the server has ended."""
        try:
            self.run(sockets=[self._listening])
        finally:
            self._service.close()  # uvicorn leaves out the lifespan's end after a second signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called in the main thread on SIGINT and SIGTERM."""
        if self._drain_until is None and self.started:
            self.drain()
        else:
            super().handle_exit(sig, frame)

    def drain(self) -> None:
        """Refuses new requests from now on; the server ends when the running ones have, or when time is up."""
        num_unfinished = self._service.worker.num_unfinished
        if num_unfinished:
            log.warning("finishing %d running requests; another signal ends them at once", num_unfinished)
        self._service.worker.refuse()
        self._drain_until = time.monotonic() + self._service.config.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's heartbeat, ten times a second; True ends the main loop."""
        if self._drain_until is not None and self._drained(self._drain_until):
            # The clients of what is left get an error event instead of a cut connection.
            await asyncio.to_thread(self._service.worker.stop)
            self.should_exit = True
        return await super().on_tick(counter)

    def _drained(self, until: float) -> bool:
        return self._service.worker.idle or time.monotonic() > until

    @property
    def url(self) -> str:
        host, port = self._listening.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class ServerThread:
    """A server in a thread of this process, for programs that serve beside their own work; a context manager."""

    def __init__(self, service: Service, host: str = "127.0.0.1", port: int = 0) -> None:
        self.server = Server(service, bind(host, port))
        self.url = self.server.url
        self._thread = threading.Thread(
            target=self.server.serve_until_signal, name="pensar-server", daemon=True
        )

    def __enter__(self) -> "ServerThread":
        self._thread.start()
        while not self.server.started:
            if not self._thread.is_alive():
                raise RunError("the server ended before it had started; its log says why")
            time.sleep(POLL_SECONDS)
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.should_exit = True
        self._thread.join()
