"""ApiError: a refusal as OpenAI clients read it, with its HTTP status and machine-readable code."""

from typing import Literal

import msgspec

ErrorType = Literal[
    "invalid_request_error", "authentication_error", "not_found_error", "rate_limit_error", "server_error"
]


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that is not a success, and the last event of a stream that broke."""

    error: ErrorDetail


class ApiError(Exception):
    """Raised by handlers; answered as `{"error": {...}}` with `status`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: ErrorType = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message=message, type=kind, param=param, code=code)
        self.retry_after_seconds = retry_after_seconds

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(ErrorBody(error=self.detail))

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after_seconds is None:
            return {}
        return {"retry-after": str(self.retry_after_seconds)}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be served as it stands."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, message: str) -> ApiError:
    """A field that OpenAI's interface has and this server does not honour: refused, never ignored in silence."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def not_running(name: str) -> ApiError:
    """No request of that id is in work."""
    return ApiError(
        404,
        f"No request {name!r} is running; it has ended, or never was. The id is that of the reply's first chunk.",
        kind="not_found_error",
        code="request_not_found",
    )


def overlong(num_prompt_tokens: int, max_tokens: int, limit: int) -> ApiError:
    """Prompt and reply do not fit into the context window of `limit` tokens."""
    wanted = f" and {max_tokens} for the reply" if max_tokens else ""
    return ApiError(
        400,
        f"This model's maximum context length is {limit} tokens; the request needs {num_prompt_tokens} for the "
        f"prompt{wanted}. Shorten the messages or lower max_tokens.",
        param="messages",
        code="context_length_exceeded",
    )


def queue_full(num_waiting: int, limit: int) -> ApiError:
    return ApiError(
        429,
        f"{num_waiting} requests are waiting already and the server keeps at most {limit}; try again shortly.",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after_seconds=1,
    )


def draining() -> ApiError:
    return ApiError(
        503,
        "The server is shutting down and takes no new requests; try again on another replica.",
        kind="server_error",
        code="server_shutting_down",
        retry_after_seconds=5,
    )


def engine_failed(reason: str) -> ApiError:
    return ApiError(
        500, f"The engine failed on this request: {reason}", kind="server_error", code="engine_error"
    )
