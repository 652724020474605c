"""Counters, gauges and histograms in Prometheus' text format (exposition format 0.0.4)."""

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the histograms' buckets."""

Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number per set of labels that only grows; safe to use from any thread."""

    def __init__(self, name: str, meaning: str) -> None:
        self.name, self.meaning = name, meaning
        self._values: dict[Labels, float] = {}
        self._lock = threading.Lock()

    def add(self, amount: float = 1, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def value(self, **labels: str) -> float:
        return self._values.get(tuple(sorted(labels.items())), 0)

    def lines(self) -> Iterator[str]:
        with self._lock:
            values = sorted(self._values.items())
        yield from _head(self.name, "counter", self.meaning)
        for labels, value in values or [((), 0.0)]:
            yield f"{self.name}{_braced(labels)} {_number(value)}"


class Gauge:
    """A number that is asked for when somebody reads the metrics."""

    def __init__(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        self.name, self.meaning, self._read = name, meaning, read

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, "gauge", self.meaning)
        yield f"{self.name} {_number(self._read())}"


class Histogram:
    """How often a duration in seconds fell under each bound."""

    def __init__(self, name: str, meaning: str, bounds: Sequence[float] = SECONDS) -> None:
        self.name, self.meaning, self._bounds = name, meaning, tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, seconds: float) -> None:
        with self._lock:
            self._counts[bisect_left(self._bounds, seconds)] += 1
            self._sum += seconds

    def lines(self) -> Iterator[str]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        yield from _head(self.name, "histogram", self.meaning)
        below = 0
        for bound, count in zip([*(f"{bound:g}" for bound in self._bounds), "+Inf"], counts, strict=True):
            below += count
            yield f'{self.name}_bucket{{le="{bound}"}} {below}'
        yield f"{self.name}_sum {_number(total)}"
        yield f"{self.name}_count {below}"


class ServerMetrics:
    """Every number that the server shows at /metrics."""

    def __init__(
        self, model: str, num_running: Callable[[], float], num_waiting: Callable[[], float]
    ) -> None:
        self._model = model
        self.requests = Counter("pensar_requests_total", "Answered HTTP requests by path and status.")
        self.aborted = Counter(
            "pensar_requests_aborted_total", "Requests whose client went away before the end."
        )
        self.engine_failures = Counter("pensar_engine_failures_total", "Engine steps that raised an error.")
        self.prompt_tokens = Counter("pensar_prompt_tokens_total", "Tokens of the prompts.")
        self.cached_tokens = Counter(
            "pensar_cached_tokens_total", "Tokens of prompts that were in the cache."
        )
        self.completion_tokens = Counter(
            "pensar_completion_tokens_total", "Generated tokens, thinking included."
        )
        self.reasoning_tokens = Counter("pensar_reasoning_tokens_total", "Generated tokens of thinking.")
        self.first_token = Histogram("pensar_time_to_first_token_seconds", "From request to first token.")
        self.duration = Histogram("pensar_request_duration_seconds", "From request to last token.")
        self.more: tuple[Counter | Gauge, ...] = ()
        """Those of parts that not every server has."""
        self._gauges = (
            Gauge("pensar_requests_running", "Sequences in the engine's batch.", num_running),
            Gauge("pensar_requests_waiting", "Sequences that wait for a place in the batch.", num_waiting),
        )

    def render(self) -> str:
        """The whole page, newline-terminated as the format asks."""
        lines = [*_head("pensar_model_info", "gauge", "The served model.")]
        lines.append(f"pensar_model_info{_braced((('model', self._model),))} 1")
        for metric in (
            self.requests,
            self.aborted,
            self.engine_failures,
            self.prompt_tokens,
            self.cached_tokens,
            self.completion_tokens,
            self.reasoning_tokens,
            self.first_token,
            self.duration,
            *self._gauges,
            *self.more,
        ):
            lines.extend(metric.lines())
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, meaning: str) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"


def _number(value: float) -> str:
    """All its digits: a counter of tokens soon has more than the six that `g` leaves."""
    return str(int(value)) if value == int(value) else repr(float(value))


def _braced(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
