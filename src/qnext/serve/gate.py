"""The gate every request passes: its id, who may come in, what is written down about it.

Plain ASGI, so that a stream is not buffered and a leaving client is noticed below.
"""

import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qnext.errors import RequestError
from qnext.serve.metrics import Metrics
from qnext.serve.record import Record
from qnext.serve.refusals import ApiError, shape_of

KEYS_VARIABLE = "QNEXT_API_KEYS"
_OPEN = ("/", "/health")
"""What needs no key: the page asks for one itself, and a probe has none."""
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

log = logging.getLogger("qnext.serve.requests")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """Who may use the server."""

    keys: Collection[str] = ()
    """Without any, everybody who reaches the server may use it."""
    hosts: Collection[str] | None = None
    """Names the server goes by beside ``localhost`` and addresses; None allows every name."""
    log_prompts: bool = False
    """Write what was asked into the log."""
    digests: tuple[bytes, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digests", tuple(_digest(key) for key in self.keys))

    def admitted(self, headers: Headers) -> bytes | None:
        """The digest of the key a request carries; takes the same time whichever it is.

        None without one of the keys.
        """
        scheme, _, value = headers.get("authorization", "").partition(" ")
        given = _digest(value.strip() if scheme.lower() == "bearer" else "")
        other = _digest(headers.get("x-api-key", ""))
        found = None
        for digest in self.digests:
            if hmac.compare_digest(given, digest) | hmac.compare_digest(other, digest):
                found = digest
        return found

    def knows(self, host: str) -> bool:
        """Whether a ``Host`` header names this server.

        A page whose name was made to point at this machine still carries its own name.
        """
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if self.hosts is None or name == "localhost" or name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def read_keys(file: str | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """API keys: one per line of a file (``#`` begins a comment), or of QNEXT_API_KEYS, by commas.

    Raises RequestError when the file cannot be read, is open to other users, or has no key.
    """
    found: list[str] = []
    if file is not None:
        path = Path(file)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise RequestError(f"--api-key-file {file}: cannot be read: {reason}.") from error
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise RequestError(
                f"--api-key-file {file}: other users of this machine can read it. Run "
                f"chmod 600 {file}."
            )
        found = [line.partition("#")[0].strip() for line in lines]
        if not any(found):
            raise RequestError(f"--api-key-file {file}: holds no key; write one per line.")
    found += [key.strip() for key in environment.get(KEYS_VARIABLE, "").split(",")]
    keys = tuple(dict.fromkeys(key for key in found if key))
    for key in keys:
        if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
            raise RequestError(
                "an API key: expected at least 8 printable ASCII characters without spaces. "
                "Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
    return keys


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, *, rules: Rules, metrics: Metrics) -> None:
        self._app, self._rules, self._metrics = app, rules, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = Record(_request_id(headers))
        scope["record"] = record
        status = 500

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = answer["request-id"] = record.id
                answer["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            refusal = self._refusal(scope["path"], headers, record)
            if refusal is None:
                await self._app(scope, receive, note)
            else:
                record.code = refusal.code
                body = msgspec.json.encode(refusal.body(shape_of(scope["path"])))
                answer = Response(
                    body, refusal.status, media_type="application/json", headers=refusal.headers
                )
                await answer(scope, receive, note)
        finally:
            # Also when the handler failed or its client has gone.
            now = time.monotonic()
            self._metrics.ended(record, status, now)
            if record.route not in ("/health", "/metrics"):
                found = {"method": scope["method"], "path": scope["path"]}
                log.info("request", extra={"fields": found | record.as_dict(status, now)})

    def _refusal(self, path: str, headers: Headers, record: Record) -> ApiError | None:
        if not self._rules.keys:
            if not self._rules.knows(headers.get("host", "")):
                return ApiError(
                    403,
                    f"host: this server does not go by the name {headers.get('host')!r}. Allow it "
                    "with --allow-host, or give the server a key.",
                    type="permission_error",
                    code="unknown_host",
                )
            return None
        owner = self._rules.admitted(headers)
        record.owner = owner or b""
        if path in _OPEN or path.startswith("/ui/") or owner is not None:
            return None
        return ApiError(
            401,
            "this server asks for a key: send it as Authorization: Bearer KEY, or as x-api-key.",
            type="authentication_error",
            code="invalid_api_key",
        )


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).digest()


# -- the log -----------------------------------------------------------------------------------


class _Lines(logging.Formatter):
    """Log records as lines of JSON, or of text for people."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        when += f".{int(record.msecs):03d}Z"
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        if self._json:
            line = {"time": when, "level": record.levelname.lower(), "message": text, **fields}
            return json.dumps(line, ensure_ascii=False, default=str)
        words = " ".join(f"{name}={_word(value)}" for name, value in fields.items())
        # Line breaks of a client's making must not look like further lines.
        return f"{when} {record.levelname.lower()} {text.splitlines()[0]} {words}".rstrip() + (
            "\n" + "\n".join(text.splitlines()[1:]) if record.exc_info else ""
        )


def _word(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) if not _plain(value) else str(value)


def _plain(value: Any) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, str) and re.fullmatch(r"[\w./:-]+", value) is not None
    )


def log_to_stderr(form: str, level: str = "info") -> None:
    """Write the log of the server to stderr, as ``json`` or ``text``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(form))
    names: Iterable[str] = ("qnext", "uvicorn")
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level.upper() if name == "qnext" else "WARNING")
