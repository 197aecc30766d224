"""Errors as the server tells them: every one, of whatever origin, a JSON object in OpenAI's shape.

    {"error": {"message": "…", "type": "invalid_request_error", "param": "n", "code": null}}

The message says what was received, the rule that it breaks and what to do, as in the terminal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from herdbook.errors import CapacityError, HerdbookError, RequestError, ServeError
from herdbook.serving.worker import Broken, Busy

RETRY_S = 2  # when a refused client may try again, where nothing better is known


class Refusal(RequestError):
    """A request error that knows its HTTP status, OpenAI's code, and the key that it is about.

    retry_s: when the client may try again, in seconds.
    """

    def __init__(
        self,
        status: int,
        what: str,
        *,
        code: str | None = None,
        param: str | None = None,
        rule: str = "",
        next: str = "",
        retry_s: float | None = None,
    ) -> None:
        super().__init__(what, rule=rule, next=next)
        self.status, self.code, self.param, self.retry_s = status, code, param, retry_s


def problem(error: HerdbookError) -> tuple[int, dict[str, Any]]:
    """A user error → (status, body in OpenAI's shape)."""
    message = f"{error.what} {error.rule}".strip()
    message = f"{message}; {error.next}" if error.next else message
    match error:
        case Refusal():
            return error.status, shaped(error.status, message, error.param, error.code)
        case Busy():
            return 503, shaped(503, message, code="overloaded")
        case ServeError():
            return 503, shaped(503, message, code="server_stopping")
        case Broken():
            return 500, shaped(500, message, code="engine_failed")
        case CapacityError():
            return 400, shaped(400, message, code="context_length_exceeded")
        case _:
            return 400, shaped(400, message)


def shaped(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if status == 429 else kind
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refused(error: HerdbookError) -> JSONResponse:
    """The whole response; with Retry-After where trying again can help."""
    status, body = problem(error)
    wait = getattr(error, "retry_s", None)
    wait = RETRY_S if wait is None and status == 503 else wait
    headers = None if wait is None else {"Retry-After": str(max(1, math.ceil(wait)))}
    return JSONResponse(body, status, headers=headers)


def install(api: FastAPI, paths: str) -> None:
    """Tell all errors of `api` so. paths: what there is, for those who ask for what there is not."""

    def user_error(http: Http, error: Exception) -> Response:
        assert isinstance(error, HerdbookError)
        return refused(error)

    def http_error(http: Http, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        where = ascii(http.url.path)
        message, code = str(error.detail), None
        if error.status_code == 404:
            message, code = f"there is no {where} here; there are: {paths}", "not_found"
        elif error.status_code == 405:
            message = f"{http.method} is not allowed for {where}; there are: {paths}"
            code = "method_not_allowed"
        elif error.status_code == 400:  # FastAPI could not even decode the body
            message = "the body could not be read as JSON in UTF-8"
        body = shaped(error.status_code, message, code=code)
        return JSONResponse(body, error.status_code, headers=error.headers)

    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(StarletteHTTPException, http_error)
    api.add_exception_handler(HerdbookError, user_error)
    api.add_exception_handler(Exception, _bug)


def _invalid(http: Http, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param = explain(error.errors())
    return JSONResponse(shaped(400, message, param), 400)


def bug(error: Exception) -> tuple[int, dict[str, Any]]:
    """An error that nobody expected → (status, body); what it says may be a client's text."""
    message = f"the server failed: {type(error).__name__}; its log has the details"
    return 500, shaped(500, message, code="internal_error")


def _bug(http: Http, error: Exception) -> Response:
    status, body = bug(error)
    return JSONResponse(body, status)


def explain(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Pydantic's errors → (one sentence, the key that it is about).

    >>> explain([{"loc": ("body", "messages", 0, "role"), "type": "missing"}])
    ("'messages[0].role' is required", 'messages[0].role')
    """
    error = errors[0]
    path = [part for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":
        reason = (error.get("ctx") or {}).get("error", "")
        return f"the body is not valid JSON: {reason} (at character {path[0]})", None
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    param = param.lstrip(".")
    if not param:
        if error["type"] == "value_error":  # our own sentence about several keys
            return str(error["ctx"]["error"]), None
        return "the body must be a JSON object, sent with Content-Type: application/json", None
    if error["type"] == "missing":
        return f"{param!r} is required", param
    reason = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
    return f"{param!r}: {reason[:1].lower()}{reason[1:]} (received {_short(error['input'])})", param


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
