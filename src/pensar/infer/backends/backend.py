"""Backend: what rollouts, evaluation and the server ask of an engine, ours or another."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from pensar.infer.request import Completion, Piece, Request
from pensar.model.qwen3 import Qwen3


class Backend(Protocol):
    """Requests in, pieces out; `pensar.infer.engine.Engine` is one. Not thread-safe."""

    version: int
    """How often new weights were loaded."""

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    def submit(self, request: Request) -> None:
        """Queues a request. Raises ModelError for one that cannot be served, where that is known before it is tried."""
        ...

    def step(self) -> list[Piece]:
        """What is new since the last call; a request's failure ends it alone. Empty when nothing is under way."""
        ...

    def abort(self, name: str) -> Completion | None:
        """Takes out a request and returns what it has so far; None where no such request is unfinished."""
        ...

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """Serves `requests` to their ends; one that is refused has finish_reason "error" and its reason."""
        ...

    def load(self, weights: Mapping[str, Tensor] | Qwen3) -> None:
        """New weights of the same shapes in place."""
        ...

    def load_adapter(self, name: str, folder: Path) -> None:
        """Requests may ask for the adapter in `folder`, in PEFT's format, from now on."""
        ...

    def unload_adapter(self, name: str) -> None: ...
