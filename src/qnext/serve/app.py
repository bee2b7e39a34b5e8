"""The HTTP routes: chat completions, completions, models, health, and the chat page.

``create_app`` builds a Starlette application around a loaded model. Reading and checking bodies is
in ``protocol.py``, the engine's thread in ``worker.py``, sockets and the banner in ``server.py``.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qnext.engine.explain import MAX_KEPT
from qnext.engine.request import Request
from qnext.errors import QnextError
from qnext.llm import LLM, Delta, TextReader
from qnext.serve.protocol import (
    ApiError,
    Body,
    ChatRequest,
    CompletionRequest,
    Reply,
    Sampling,
    read_body,
)
from qnext.serve.worker import EngineStopped, Job, Worker

MAX_BODY_BYTES = 8 * 2**20
"""A full context of 262,144 tokens is about 1 MB of English; the rest is for other scripts."""
CLIENT_GONE = 499

_log = logging.getLogger(__name__)
_UI = Path(__file__).resolve().parent / "ui"
_PAGE = {"/": ("index.html", "text/html"), "/ui/app.js": ("app.js", "text/javascript"),
         "/ui/style.css": ("style.css", "text/css")}  # fmt: skip
# The page loads nothing from elsewhere, and nothing the model writes can run or load anything.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def create_app(llm: LLM, *, max_body_bytes: int = MAX_BODY_BYTES) -> Starlette:
    """An ASGI application that serves one model; its engine runs from start-up to shutdown."""
    service = _Service(llm, max_body_bytes)
    routes = [
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.completion, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{model:path}", service.model),
        Route("/health", service.health),
        Route("/cache/explain", service.explain),
        *(Route(path, _page_file(*what)) for path, what in _PAGE.items()),
    ]
    app = Starlette(
        routes=routes,
        lifespan=service.lifespan,
        exception_handlers={
            ApiError: _api_error, HTTPException: _http_error, 500: _internal_error,
        },
    )  # fmt: skip
    app.state.worker = service.worker
    return app


class _Service:
    """The handlers of one model."""

    def __init__(self, llm: LLM, max_body_bytes: int) -> None:
        self.llm, self.worker = llm, Worker(llm)
        self._max_body_bytes = max_body_bytes
        self._started = int(time.time())
        self._names: deque[tuple[str, str]] = deque(maxlen=MAX_KEPT)
        """(id of an answer, id of its request in the engine)."""

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        try:
            yield
        finally:
            await run_in_threadpool(self.worker.stop)

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions"""
        body, ignored = await self._read(http, ChatRequest)

        def prepare() -> tuple[Request, TextReader]:
            return self.llm.prepare_chat(
                body.checked_messages(),
                body.params(self.llm),
                enable_thinking=body.enable_thinking,
            )

        job = await self._submit(prepare)
        return await self._answer(http, body, job, ignored, chat=True)

    async def completion(self, http: HttpRequest) -> Response:
        """POST /v1/completions"""
        body, ignored = await self._read(http, CompletionRequest)

        def prepare() -> tuple[Request, TextReader]:
            return self.llm.prepare_text(body.single_prompt(), body.params(self.llm))

        job = await self._submit(prepare)
        return await self._answer(http, body, job, ignored, chat=False)

    async def models(self, http: HttpRequest) -> Response:
        """GET /v1/models"""
        return _json({"object": "list", "data": [self._card()]})

    async def model(self, http: HttpRequest) -> Response:
        """GET /v1/models/NAME"""
        self._check_model(http.path_params["model"])
        return _json(self._card())

    async def health(self, http: HttpRequest) -> Response:
        """GET /health: 200 while requests are worked on, 503 when the engine has ended."""
        alive, load = self.worker.is_alive, self.worker.load
        body = {
            "status": "ok" if alive else "stopped",
            "model": self.llm.name,
            "running": load.running,
            "waiting": load.waiting,
            "background_prefill": {**load.background.as_dict(), "pending": load.preparing},
            "kernels": list(self.llm.model.kernels),
        }
        return _json(body, status=200 if alive else 503)

    async def explain(self, http: HttpRequest) -> Response:
        """GET /cache/explain: the last requests, newest first; ?request=ID for one, ?last=N."""
        wanted, last = http.query_params.get("request"), http.query_params.get("last", "20")
        if not last.isascii() or not last.isdecimal():
            raise ApiError(400, f"last: expected a whole number, got {last!r}.", param="last")
        log = self.llm.engine.scheduler.log
        known = {request: name for name, request in self._names}
        found = [
            {"id": known[request], "cache": report.as_dict()}
            for request, report in log.last()
            if request in known and wanted in (None, known[request])
        ]
        if wanted is not None and not found:
            raise ApiError(
                404,
                f"request: {wanted!r} is not among the last {MAX_KEPT} answers of this server.",
                param="request",
                code="request_not_found",
            )
        return _json({"requests": found[: int(last)], "counts": log.counts()})

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.llm.name,
            "object": "model",
            "created": self._started,
            "owned_by": "qnext",
            "max_model_len": self.llm.max_model_len,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.llm.name:
            raise ApiError(
                404,
                f"model: {name!r} is not served here; this server has {self.llm.name!r}.",
                param="model",
                code="model_not_found",
            )

    async def _read(self, http: HttpRequest, kind: type[Body]) -> tuple[Body, list[str]]:
        """The checked body; ApiError 413, 415, 400 or 404."""
        media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            # Also keeps foreign web pages out: a browser asks before it sends JSON elsewhere.
            raise ApiError(
                415, f"content-type: expected application/json, got {media_type or 'none'}."
            )
        raw = bytearray()
        async for chunk in http.stream():
            raw += chunk
            if len(raw) > self._max_body_bytes:
                raise ApiError(
                    413,
                    f"the body is larger than the limit of {self._max_body_bytes:,} bytes.",
                    code="body_too_large",
                )
        body, ignored = read_body(bytes(raw), kind)
        self._check_model(body.model)
        if ignored:
            _log.warning("ignored fields of a request: %s", ", ".join(ignored))
        return body, ignored

    async def _submit(self, prepare: Any) -> Job:
        """Encode in a thread of its own, so that a long prompt does not hold up other clients."""
        code = None
        try:
            request, reader = await run_in_threadpool(prepare)
            if len(request.prompt_ids) >= self.llm.max_model_len:
                code = "context_length_exceeded"
            return await self.worker.submit(request, reader)
        except EngineStopped as error:
            raise _unavailable(error) from error
        except QnextError as error:
            raise ApiError.of(error, code=code) from error

    async def _answer(
        self, http: HttpRequest, body: Sampling, job: Job, ignored: list[str], *, chat: bool
    ) -> Response:
        name = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self._names.append((name, job.request.id))
        reply = Reply(
            chat=chat,
            id=name,
            model=self.llm.name,
            created=int(time.time()),
            usage=body.wants_usage(),
            explain=body.wants_explanation(),
        )
        headers = {"x-qnext-ignored": ", ".join(ignored)} if ignored else {}
        if body.stream:
            headers["cache-control"] = "no-cache"
            return _EventStream(job, reply, headers)
        try:
            deltas = await _unless_gone(http, job)
        except EngineStopped as error:
            raise _unavailable(error) from error
        if deltas is None:
            return Response(status_code=CLIENT_GONE)
        return _json(reply.whole(deltas), headers=headers)


# -- answers -----------------------------------------------------------------------------------


class _EventStream(StreamingResponse):
    """Server-sent events; when the client leaves, at whatever moment, the job is cancelled."""

    def __init__(self, job: Job, reply: Reply, headers: dict[str, str]) -> None:
        super().__init__(_events(job, reply), media_type="text/event-stream", headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _events(job: Job, reply: Reply) -> AsyncIterator[bytes]:
    for chunk in reply.opening():
        yield _event(chunk)
    try:
        async for delta in job.deltas():
            for chunk in reply.piece(delta):
                yield _event(chunk)
    except EngineStopped as error:
        yield _event(_unavailable(error).body())
        return
    yield b"data: [DONE]\n\n"


async def _unless_gone(http: HttpRequest, job: Job) -> list[Delta] | None:
    """All deltas of a job, or None when the client left before; the job is cancelled then."""

    async def collect() -> list[Delta]:
        return [delta async for delta in job.deltas()]

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.create_task(collect()), asyncio.create_task(gone())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        job.cancel()
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


def _event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(value), status, media_type="application/json", headers=headers
    )


# -- errors ------------------------------------------------------------------------------------


def _unavailable(error: EngineStopped) -> ApiError:
    return ApiError(503, str(error), type="server_error", code="engine_stopped")


async def _api_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError), error
    return _json(error.body(), status=error.status)


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException), error
    message = f"{http.method} {http.url.path}: {error.detail}."
    answer = ApiError(error.status_code, message, code="no_such_route")
    return _json(answer.body(), status=error.status_code, headers=dict(error.headers or {}))


async def _internal_error(http: HttpRequest, error: Exception) -> Response:
    """A bug. The client gets the shape it expects, the log gets the trace."""
    message = "an error inside the server; its log has the details."
    answer = ApiError(500, message, type="server_error", code="internal_error")
    return _json(answer.body(), status=500)


# -- the page ----------------------------------------------------------------------------------


def _page_file(name: str, media_type: str) -> Any:
    content = (_UI / name).read_bytes()

    async def page(http: HttpRequest) -> Response:
        return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

    return page
