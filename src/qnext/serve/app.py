"""The HTTP routes of one model.

``create_app`` builds a Starlette application around a loaded model. What each interface accepts
and returns is in ``api/``, the engine's thread in ``worker.py``, keys and the log in ``gate.py``,
sockets and the banner in ``server.py``.
"""

import contextlib
import gc
import logging
import secrets
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from qnext.engine.explain import MAX_KEPT as MAX_EXPLAINED
from qnext.errors import QnextError
from qnext.llm import LLM
from qnext.serve.answering import KEEP_ALIVE_S, EventStream, failed, run_to_end
from qnext.serve.api.chat import ChatRequest
from qnext.serve.api.completions import CompletionRequest
from qnext.serve.api.fields import Head, Sampling
from qnext.serve.api.messages import CountRequest, MessagesRequest
from qnext.serve.api.responses import ResponsesRequest
from qnext.serve.api.responses_writer import ResponseWriter
from qnext.serve.api.tokens import DetokenizeRequest, TokenizeRequest
from qnext.serve.gate import Gate, Rules
from qnext.serve.inspecting import Inspector
from qnext.serve.kept import MAX_KEPT, KeptResponses
from qnext.serve.metrics import MEDIA_TYPE, Metrics
from qnext.serve.openapi import document
from qnext.serve.page import page_routes
from qnext.serve.reading import Body, read_body
from qnext.serve.refusals import ApiError, shape_of
from qnext.serve.worker import MAX_WAITING, Busy, Draining, EngineStopped, Job, Worker

MAX_BODY_BYTES = 8 * 2**20
"""A full context of 262,144 tokens is about 1 MB of English; the rest is for other scripts."""
CLIENT_GONE = 499
SWITCH_S = 0.0001
"""How long a thread may keep the interpreter from another one.

The event loop lets go of it at every read and write; each time it would wait so long to go on.
"""
MAX_AT_ONCE_BYTES = 2048
"""A prompt in a body of this size takes about half a millisecond to encode."""
FEW = 4
"""Unfinished requests among which a short prompt is encoded at once."""
ENCODERS = 2
"""Prompts that are encoded at the same time."""
Generating = ChatRequest | CompletionRequest | ResponsesRequest | MessagesRequest
ID_PREFIXES: dict[type, str] = {
    ChatRequest: "chatcmpl-", CompletionRequest: "cmpl-", ResponsesRequest: "resp_",
    MessagesRequest: "msg_",
}  # fmt: skip

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much a server lets its clients ask for."""

    max_body_bytes: int = MAX_BODY_BYTES
    max_waiting: int = MAX_WAITING
    """Requests that may wait beyond those that run; more are refused with status 429."""
    timeout_s: float | None = None
    """Time for an answer from when the engine has accepted it; None for any."""
    keep_alive_s: float | None = KEEP_ALIVE_S
    """A stream that has been silent for so long sends a comment; None for never."""
    max_kept: int = MAX_KEPT
    """Answers of ``/v1/responses`` that can be gone on from; see kept.py for the other limits."""


def create_app(
    llm: LLM,
    *,
    limits: Limits | None = None,
    rules: Rules | None = None,
    names: Sequence[str] = (),
    origins: Collection[str] = (),
) -> Starlette:
    """An ASGI application that serves one model; its engine runs from start-up to shutdown.

    ``names`` are what clients may call the model, the first of them in answers; by default the name
    of its folder. ``origins`` are web sites whose pages may use the server from a browser.
    """
    rules = rules or Rules()
    service = _Service(llm, limits or Limits(), tuple(names) or (llm.name,), rules.log_prompts)
    routes: dict[str, tuple[Callable[[HttpRequest], Awaitable[Response]], str]] = {
        "/v1/chat/completions": (service.generating(ChatRequest), "POST"),
        "/v1/completions": (service.generating(CompletionRequest), "POST"),
        "/v1/responses": (service.generating(ResponsesRequest), "POST"),
        "/v1/responses/{id}": (service.kept_response, "GET DELETE"),
        "/v1/messages": (service.generating(MessagesRequest), "POST"),
        "/v1/messages/count_tokens": (service.answering(CountRequest), "POST"),
        "/v1/models": (service.models, "GET"),
        "/v1/models/{model:path}": (service.model, "GET"),
        "/tokenize": (service.answering(TokenizeRequest), "POST"),
        "/detokenize": (service.answering(DetokenizeRequest), "POST"),
        "/health": (service.health, "GET"),
        "/metrics": (service.metrics_page, "GET"),
        "/cache/explain": (service.explain, "GET"),
        "/inspect/{id}": (service.inspect, "GET"),
        "/openapi.json": (_document, "GET"),
        **{path: (handler, "GET") for path, handler in page_routes().items()},
    }
    middleware = [Middleware(Gate, rules=rules, metrics=service.metrics)]
    if origins:
        # Before the gate: a browser asks for leave without the key it would send.
        cors = Middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "x-api-key", "x-request-id"],
            expose_headers=["x-request-id", "x-qnext-ignored", "retry-after"],
        )  # fmt: skip
        middleware.insert(0, cors)
    app = Starlette(
        routes=[
            Route(path, _recorded(path, handler), methods=methods.split())
            for path, (handler, methods) in routes.items()
        ],
        middleware=middleware,
        lifespan=service.lifespan,
        exception_handlers={
            ApiError: _api_error, HTTPException: _http_error, 500: _internal_error,
        },
    )  # fmt: skip
    app.state.worker = service.worker
    return app


class _Service:
    """The handlers of one model."""

    def __init__(self, llm: LLM, limits: Limits, names: tuple[str, ...], log_prompts: bool) -> None:
        self.llm, self.limits, self.names = llm, limits, names
        self.worker = Worker(llm, max_waiting=limits.max_waiting)
        self.metrics = Metrics(llm, self.worker)
        self._inspector = Inspector(llm, self.worker)
        self._log_prompts = log_prompts
        self._started = int(time.time())
        # More threads would only wait for each other, and the event loop for all of them.
        self._encoders = CapacityLimiter(ENCODERS)
        self._kept = KeptResponses(count=limits.max_kept)
        self._answers: deque[tuple[str, str]] = deque(maxlen=MAX_EXPLAINED)
        """(id of an answer, id of its request in the engine)."""

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        # The event loop has little to do at a time, and must not wait long for the engine's thread.
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        # What is there now stays: looking through all of it for garbage, again and again, would
        # hold up every thread for more than a tenth of a second each time.
        gc.collect()
        gc.freeze()
        self.worker.start()
        try:
            yield
        finally:
            await run_in_threadpool(self.worker.stop)
            gc.unfreeze()
            sys.setswitchinterval(before)

    # -- generating ------------------------------------------------------------------------------

    def generating(self, kind: type[Generating]) -> Callable[[HttpRequest], Awaitable[Response]]:
        """The handler of a route that answers with the model's text."""

        async def handler(http: HttpRequest) -> Response:
            asked = await self._read(http, kind)
            record = http.scope["record"]
            if isinstance(asked, ResponsesRequest) and asked.previous_response_id is not None:
                self._go_on(asked, record.owner)
            # Among many, one more has to wait anyway, and together they would hold up the loop.
            few = self.worker.unfinished < FEW
            at_once = few and record.body_bytes <= MAX_AT_ONCE_BYTES
            job = await self._submit(asked, at_once=at_once and not asked.is_laborious())
            record.submitted, record.stream = time.monotonic(), bool(asked.stream)
            record.per_prompt = job.requests[0].params.n
            head = Head(
                id=ID_PREFIXES[kind] + secrets.token_hex(12),
                model=asked.model or self.names[0],
                created=int(time.time()),
            )
            record.answer = head.id
            self._answers.append((head.id, job.requests[0].id))
            if isinstance(asked, Sampling) and asked.wants_inspection():
                self._inspector.remember(head.id, job.requests[0])
            writer = asked.writer(self.llm, head)
            if isinstance(asked, ResponsesRequest) and asked.store is not False:
                assert isinstance(writer, ResponseWriter), writer
                writer.keep = partial(self._kept.keep, items=asked.items(), owner=record.owner)
            headers = {"x-qnext-ignored": ", ".join(record.ignored)} if record.ignored else {}
            if asked.stream:
                return EventStream(job, writer, record, headers, self.limits.keep_alive_s)
            if not await run_to_end(http, job, writer, record):
                return Response(status_code=CLIENT_GONE)
            return _json(writer.whole(), headers=headers)

        return handler

    def answering(self, kind: Any) -> Callable[[HttpRequest], Awaitable[Response]]:
        """The handler of a route that answers without the engine."""

        async def handler(http: HttpRequest) -> Response:
            asked = await self._read(http, kind)
            try:
                return _json(await run_in_threadpool(asked.answer, self.llm))
            except QnextError as error:
                raise ApiError.of(error) from error

        return handler

    async def _read(self, http: HttpRequest, kind: type[Body]) -> Body:
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
            if len(raw) > self.limits.max_body_bytes:
                raise ApiError(
                    413,
                    f"the body is larger than the limit of {self.limits.max_body_bytes:,} bytes.",
                    code="body_too_large",
                )
        asked, ignored = read_body(bytes(raw), kind)
        self._check_model(asked.model)
        record = http.scope["record"]
        record.ignored, record.body_bytes = ignored, len(raw)
        if self._log_prompts:
            record.asked = msgspec.json.decode(raw)
        return asked

    def _go_on(self, asked: ResponsesRequest, owner: bytes) -> None:
        earlier = self._kept.items(asked.previous_response_id or "", owner)
        try:
            asked.go_on_from(earlier)
        except QnextError as error:
            raise ApiError.of(error) from error

    async def _submit(self, asked: Generating, *, at_once: bool) -> Job:
        """Encode in a thread of its own, so that a long prompt does not hold up other clients.

        For one that takes less time than the way to another thread and back, ``at_once`` does not.
        """
        code = None
        try:
            if at_once:
                pairs = asked.prepare(self.llm)
            else:
                pairs = await to_thread.run_sync(asked.prepare, self.llm, limiter=self._encoders)
            if isinstance(asked, Sampling) and asked.wants_inspection():
                pairs = self._inspector.watch(pairs)
            if max(len(request.prompt_ids) for request, _ in pairs) >= self.llm.max_model_len:
                code = "context_length_exceeded"
            return await self.worker.submit(pairs, timeout_s=self.limits.timeout_s)
        except EngineStopped as error:
            raise failed(error) from error
        except Busy as error:
            leaving = isinstance(error, Draining)
            raise ApiError(
                503 if leaving else 429,
                str(error),
                type="server_error" if leaving else "rate_limit_error",
                code="server_stopping" if leaving else "server_busy",
                retry_after_s=error.retry_after_s,
            ) from error
        except QnextError as error:
            raise ApiError.of(error, code=code) from error

    async def kept_response(self, http: HttpRequest) -> Response:
        """GET and DELETE /v1/responses/ID"""
        name, owner = http.path_params["id"], http.scope["record"].owner
        if http.method == "DELETE":
            self._kept.forget(name, owner)
            return _json({"id": name, "object": "response", "deleted": True})
        if http.query_params.get("stream", "false") != "false":
            raise ApiError(
                400, "stream: a response that is kept is sent in one piece.", param="stream"
            )
        return Response(self._kept.response(name, owner), media_type="application/json")

    # -- telling ---------------------------------------------------------------------------------

    async def models(self, http: HttpRequest) -> Response:
        """GET /v1/models"""
        return _json({"object": "list", "data": [self._card(name) for name in self.names]})

    async def model(self, http: HttpRequest) -> Response:
        """GET /v1/models/NAME"""
        name = http.path_params["model"]
        self._check_model(name)
        return _json(self._card(name))

    async def health(self, http: HttpRequest) -> Response:
        """GET /health: 200 while requests are taken, 503 when the engine has ended or will."""
        alive, load = self.worker.is_alive, self.worker.load
        takes = alive and not self.worker.draining
        body = {
            "status": "ok" if takes else "draining" if alive else "stopped",
            "model": self.names[0],
            "running": load.running,
            "waiting": load.waiting,
            "unfinished": self.worker.unfinished,
            "background_prefill": {**load.background.as_dict(), "pending": load.preparing},
            "kernels": list(self.llm.model.kernels),
        }
        return _json(body, status=200 if takes else 503)

    async def metrics_page(self, http: HttpRequest) -> Response:
        """GET /metrics"""
        return Response(self.metrics.text(), headers={"content-type": MEDIA_TYPE})

    async def inspect(self, http: HttpRequest) -> Response:
        """GET /inspect/ID: inside an answer that was asked for with ``qnext.inspect``."""
        return _json(await self._inspector.inspect(http.path_params["id"]))

    async def explain(self, http: HttpRequest) -> Response:
        """GET /cache/explain: the last requests, newest first; ?request=ID for one, ?last=N."""
        wanted, last = http.query_params.get("request"), http.query_params.get("last", "20")
        if not last.isascii() or not last.isdecimal():
            raise ApiError(400, f"last: expected a whole number, got {last!r}.", param="last")
        log = self.llm.engine.scheduler.log
        known = {request: name for name, request in self._answers}
        found = [
            {"id": known[request], "cache": report.as_dict()}
            for request, report in log.last()
            if request in known and wanted in (None, known[request])
        ]
        if wanted is not None and not found:
            raise ApiError(
                404,
                f"request: {wanted!r} is not among the last {MAX_EXPLAINED} answers of this "
                "server.",
                param="request",
                code="request_not_found",
            )
        return _json({"requests": found[: int(last)], "counts": log.counts()})

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "qnext",
            "max_model_len": self.llm.max_model_len,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            here = " or ".join(repr(one) for one in self.names)
            raise ApiError(
                404,
                f"model: {name!r} is not served here; this server has {here}.",
                param="model",
                code="model_not_found",
            )


def _recorded(
    path: str, handler: Callable[[HttpRequest], Awaitable[Response]]
) -> Callable[[HttpRequest], Awaitable[Response]]:
    async def recorded(http: HttpRequest) -> Response:
        http.scope["record"].route = path
        return await handler(http)

    return recorded


def _json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(value), status, media_type="application/json", headers=headers
    )


# -- errors ------------------------------------------------------------------------------------


async def _api_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError), error
    http.scope["record"].code = error.code or "invalid_request"
    body = error.body(shape_of(http.url.path))
    return _json(body, status=error.status, headers=error.headers)


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException), error
    message = f"{http.method} {http.url.path}: {error.detail}."
    answer = ApiError(error.status_code, message, code="no_such_route")
    body = answer.body(shape_of(http.url.path))
    return _json(body, status=error.status_code, headers=dict(error.headers or {}))


async def _internal_error(http: HttpRequest, error: Exception) -> Response:
    """A bug. The client gets the shape it expects, the log gets the trace."""
    message = "an error inside the server; its log has the details."
    answer = ApiError(500, message, type="server_error", code="internal_error")
    return _json(answer.body(shape_of(http.url.path)), status=500)


async def _document(http: HttpRequest) -> Response:
    """GET /openapi.json"""
    return _json(document())
