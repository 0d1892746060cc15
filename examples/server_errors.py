"""What a client is told when it cannot be served: an error object of OpenAI's form, short, and about its own request.

Nothing that a client sent is repeated but the beginning of what it named, and no advice is given that a request cannot follow:
the library speaks of settings that only the server has.
"""

import math
import re
from collections.abc import Collection

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request

from kvcache import BusyError, CapacityError, ClosedError, InputError

LONGEST_MESSAGE = 500  # characters
RETRY_UNKNOWN, RETRY_CLOSING = 1, 5  # seconds, in Retry-After

_SETTING = re.compile(r"\b[a-z]+(?:_[a-z]+)+\b")  # such as max_cache_length
_SHORTER = "use shorter sentences, with spaces and full stops, or send the text in parts"


class Problem(Exception):
    """A request that is answered with an error object.

    Args:
        status: of HTTP.
        message: for whoever reads it; cut after 500 characters.
        code: for programs.
        headers: such as ``Retry-After``.
    """

    def __init__(self, status: int, message: str, code: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(shortened(message, LONGEST_MESSAGE))
        self.status, self.code, self.headers = status, code, headers or {}

    def body(self) -> dict[str, dict[str, str]]:
        """The error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


REFUSED = (InputError, CapacityError, BusyError, ClosedError, Problem)  # of a server that works


def shortened(text: str, longest: int) -> str:
    """A text of at most so many characters, whose end shows if some are missing."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def some(names: Collection[str], most: int = 20) -> str:
    """Names for a message, or the first of many."""
    shown = ", ".join(repr(shortened(name, 50)) for name in list(names)[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def for_clients(message: str, fields: Collection[str]) -> str:
    """A refusal of the library's, without advice about settings that are no fields of a request.

    Args:
        message: what is wrong, and behind the last semicolon what to do.
        fields: of a request.
    """
    if "language" in fields and "language_id" not in fields:
        message = message.replace("language_id", "language")
    what, _, advice = message.rpartition("; ")
    if set(_SETTING.findall(advice)) - set(fields):
        return f"{what}; {_SHORTER}" if what else _SHORTER
    return message


def problem_of(error: Exception, fields: Collection[str], request: Request | None = None) -> Problem:
    """What a client is told of an error.

    Args:
        fields: that its request may have.
        request: which it was.
    """
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        return _misread(error, None if request is None else request.headers)
    if isinstance(error, HTTPException):
        return Problem(error.status_code, str(error.detail), "http_error", dict(error.headers or {}))
    if isinstance(error, InputError | CapacityError):
        return Problem(400, for_clients(str(error), fields), "invalid_request")
    if isinstance(error, BusyError):
        return Problem(429, str(error), "busy", {"Retry-After": str(math.ceil(error.retry_after or RETRY_UNKNOWN))})
    if isinstance(error, ClosedError):
        return closing()
    # After an error that nobody foresaw the HTTP server closes the connection, and this says so.
    return Problem(500, "the server failed; its log says why", "internal_error", {"Connection": "close"})


def closing() -> Problem:
    """What whoever has heard nothing is told while the server ends."""
    return Problem(
        503, "the server is closing; ask again", "closing", {"Retry-After": str(RETRY_CLOSING), "Connection": "close"}
    )


def _misread(error: RequestValidationError, headers: Headers | None) -> Problem:
    first = error.errors()[0]
    kind = "" if headers is None else headers.get("content-type", "")
    if headers is not None and first["loc"][:1] == ("body",) and not _is_json(kind):
        said = f"is {shortened(kind, 80)!r}" if kind else "is missing"
        return Problem(
            415,
            f"the header Content-Type {said}; send the body as JSON, with Content-Type: application/json",
            "unsupported_media_type",
        )
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and part != "body") or "the body"
    return Problem(400, f"{shortened(where, 100)}: {first['msg']}", "invalid_request")


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
