"""Answers on their way to a client: as one piece, or as a stream of events.

Whichever it is, a client that leaves takes its request out of the engine.
"""

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qnext.serve.api.fields import Writer
from qnext.serve.record import Record
from qnext.serve.refusals import ApiError
from qnext.serve.worker import EngineStopped, Job, TimedOut

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""A proxy that kept events back would make a stream pointless."""


KEEP_ALIVE_S = 15.0
"""Proxies and clients often give up on a connection that is silent for half a minute or more."""
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients of server-sent events leave out."""


def failed(error: EngineStopped | TimedOut) -> ApiError:
    """What a client is told when the engine gives up on its request."""
    if isinstance(error, TimedOut):
        return ApiError(504, str(error), type="timeout_error", code="request_timeout")
    return ApiError(503, str(error), type="server_error", code="engine_stopped")


class EventStream(StreamingResponse):
    """Server-sent events; when the client leaves, at whatever moment, the job is cancelled."""

    def __init__(
        self,
        job: Job,
        writer: Writer,
        record: Record,
        headers: dict[str, str],
        keep_alive_s: float | None,
    ) -> None:
        """A stream that is silent for ``keep_alive_s`` sends a comment; None for never."""
        super().__init__(
            _events(job, writer, record, keep_alive_s),
            media_type="text/event-stream",
            headers={**HEADERS, **headers},
        )
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _events(
    job: Job, writer: Writer, record: Record, keep_alive_s: float | None
) -> AsyncIterator[bytes]:
    opening = writer.opening()
    if opening:
        yield opening
    try:
        async for batch in job.batches(keep_alive_s):
            if not batch:
                yield KEEP_ALIVE
                continue
            record.note(batch)
            # What has arrived meanwhile leaves in one write.
            text = b"".join([writer.piece(index, delta) for index, delta in batch])
            if job.is_done:
                text += writer.closing()
            if text:
                yield text
    except (EngineStopped, TimedOut) as error:
        refusal = failed(error)
        record.code = refusal.code
        yield writer.failure(refusal)


async def run_to_end(http: HttpRequest, job: Job, writer: Writer, record: Record) -> bool:
    """Feed the writer all deltas of a job; False when the client left before.

    The job is cancelled then. Raises ApiError when the engine gives up.
    """

    async def collect() -> None:
        async for batch in job.batches():
            record.note(batch)
            for index, delta in batch:
                writer.take(index, delta)

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.create_task(collect()), asyncio.create_task(gone())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return False
        try:
            work.result()
        except (EngineStopped, TimedOut) as error:
            raise failed(error) from error
        return True
    finally:
        job.cancel()
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)
