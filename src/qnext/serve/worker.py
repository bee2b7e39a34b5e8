"""The one thread that touches the engine, and the way from it to coroutines.

Coroutines put commands into an inbox; the thread empties it between steps, so that requests join
and leave a running batch. What a step produced goes back in one call per event loop.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from qnext.engine.background import BackgroundCounts
from qnext.engine.request import Request
from qnext.errors import QnextError, RequestError
from qnext.llm import LLM, Delta, TextReader


class EngineStopped(QnextError):
    """The engine ended before the request did: the server is going down, or the engine failed."""


@dataclass(eq=False, kw_only=True, slots=True)
class Job:
    """One request on its way through the engine.

    Whoever has submitted it calls ``cancel`` when done with it, however that came about.
    """

    request: Request
    reader: TextReader
    _worker: "Worker"
    _loop: asyncio.AbstractEventLoop
    _arrived: asyncio.Queue[Delta | QnextError | None] = field(default_factory=asyncio.Queue)
    """None says that the engine has accepted the request; an error is the last item."""

    async def deltas(self) -> AsyncIterator[Delta]:
        """What the request produces, as it is produced; the last one has a finish reason."""
        while True:
            delta = await self._next()
            assert delta is not None, "accepted twice"
            yield delta
            if delta.finish_reason is not None:
                return

    def cancel(self) -> None:
        """Take the request out of the engine at its next step; harmless when it has ended."""
        self._worker._inbox.put(("cancel", self))

    async def _next(self) -> Delta | None:
        item = await self._arrived.get()
        if isinstance(item, QnextError):
            raise item
        return item


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """How busy the engine was after its last step."""

    running: int = 0
    waiting: int = 0
    """Requests for which there was no slot or no memory yet."""
    background: BackgroundCounts = field(default_factory=BackgroundCounts)
    """What was prepared for later prompts while nothing else was to do."""
    preparing: int = 0
    """Conversations whose next turn is still to be prepared."""


class Worker:
    """Owns an LLM's engine from ``start`` to ``stop``."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._inbox: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: dict[str, Job] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopped = threading.Event()
        self.load = Load()

    @property
    def is_alive(self) -> bool:
        """Whether requests are being worked on."""
        return self._thread.is_alive() and not self._stopped.is_set()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step; unfinished jobs get EngineStopped."""
        self.ask_to_stop()
        self._thread.join()

    def ask_to_stop(self) -> None:
        """Like ``stop``, but does not wait for the thread."""
        self._inbox.put(("stop", None))

    async def submit(self, request: Request, reader: TextReader) -> Job:
        """Hand a request to the engine; returns when it is accepted.

        Raises the engine's RequestError when the request cannot run, EngineStopped when there is
        no engine any more.
        """
        loop = asyncio.get_running_loop()
        job = Job(request=request, reader=reader, _worker=self, _loop=loop)
        self._inbox.put(("add", job))
        if self._stopped.is_set():
            raise EngineStopped("the server is not running any more.")
        try:
            await job._next()
        except asyncio.CancelledError:
            job.cancel()
            raise
        return job

    # -- the engine's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._step()
        finally:
            # Also after an exception, which the thread then reports: nobody must wait for ever.
            self._stopped.set()
            self._deliver([(job, EngineStopped("the server stopped.")) for job in self._left()])
            self._jobs.clear()
            self.load = Load()
            # Only this thread touches the cache, so it is the one to write it to disk.
            self._llm.close()

    def _take_commands(self) -> bool:
        """Carry out what has been asked for since the last step; waits when there is no work.

        While it waits, later prompts are prepared, a small step at a time. False means stop.
        """
        while True:
            idle = not self._llm.engine.has_work and self._inbox.empty()
            if idle:
                prepares = self._llm.idle_step() > 0
                self._note_load()
                if prepares:
                    continue
            elif self._inbox.empty():
                return True
            command, job = self._inbox.get()
            if job is None:
                return False
            if command == "add":
                self._add(job)
            elif self._jobs.pop(job.request.id, None) is not None:
                self._llm.engine.cancel(job.request.id)

    def _add(self, job: Job) -> None:
        try:
            self._llm.engine.add(job.request)
        except RequestError as error:
            self._deliver([(job, error)])
            return
        self._jobs[job.request.id] = job
        self._note_load()
        self._deliver([(job, None)])

    def _step(self) -> None:
        results: list[tuple[Job, Delta | QnextError | None]] = []
        for event in self._llm.engine.step():
            job = self._jobs.get(event.request_id)
            if job is None:
                continue  # cancelled while it ran
            delta = job.reader.push(event)
            if job.reader.stopped:
                self._llm.engine.cancel(event.request_id, "stop")
            if delta is None:
                continue
            results.append((job, delta))
            if delta.finish_reason is not None:
                self._llm.ended(job.reader, delta.finish_reason)
                del self._jobs[event.request_id]
        self._note_load()
        self._deliver(results)

    def _deliver(self, results: list[tuple[Job, Delta | QnextError | None]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, Delta | QnextError | None]]] = {}
        for job, item in results:
            by_loop.setdefault(job._loop, []).append((job, item))
        for loop, items in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_all, items)

    def _left(self) -> list[Job]:
        """Jobs nobody will finish: those that run, and those still in the inbox."""
        left = list(self._jobs.values())
        while not self._inbox.empty():
            command, job = self._inbox.get()
            if command == "add" and job is not None:
                left.append(job)
        return left

    def _note_load(self) -> None:
        scheduler = self._llm.engine.scheduler
        self.load = Load(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            background=replace(self._llm.engine.background.counts),
            preparing=self._llm.unprepared,
        )


def _put_all(items: list[tuple[Job, Delta | QnextError | None]]) -> None:
    for job, item in items:
        job._arrived.put_nowait(item)
