"""Answers that are errors, in the shape the client of each interface expects."""

import re
from typing import Any, Literal

from qnext.errors import QnextError

Shape = Literal["openai", "anthropic"]

_PATH = re.compile(r"([a-z_]+(?:\[\d+\]|\.[a-z_]+)*): ")
_ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 500: "api_error",
    503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


class ApiError(Exception):
    """A refusal or a failure on its way to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.param, self.code = status, type, param, code
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, error: QnextError, *, code: str | None = None) -> "ApiError":
        """The refusal of a request by any part of qnext; its text already says where and why."""
        where = _PATH.match(str(error))
        return cls(400, str(error), param=where.group(1) if where else None, code=code)

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        found = {}
        if self.retry_after_s is not None:
            found["retry-after"] = str(self.retry_after_s)
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found

    def body(self, shape: Shape = "openai") -> dict[str, Any]:
        """The JSON that is sent."""
        if shape == "anthropic":
            fallback = "invalid_request_error" if self.status < 500 else "api_error"
            kind = _ANTHROPIC_TYPES.get(self.status, fallback)
            return {"type": "error", "error": {"type": kind, "message": str(self)}}
        return {
            "error": {
                "message": str(self),
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def shape_of(path: str) -> Shape:
    """Whose clients ask for this path."""
    return "anthropic" if path.startswith("/v1/messages") else "openai"
