"""The one thread that touches the engine, and the way from it to coroutines.

Coroutines put commands into an inbox; the thread empties it between steps, so that requests join
and leave a running batch. What a step produced goes back in one call per event loop.
"""

import asyncio
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qnext.answers import Delta, TextReader
from qnext.engine.background import BackgroundCounts
from qnext.engine.request import Event, Request
from qnext.errors import QnextError, RequestError
from qnext.llm import LLM

MAX_WAITING = 256
"""Requests that may wait for a place in the engine."""
MAX_RETRY_S = 60
HAND_OVER_S = 1 / 30
"""What an answer adds is handed to the event loop no more often: of quick steps, several at once.

Its first token and its last do not wait; thirty pieces a second look like a flow. A hand-over costs
a third of a millisecond of the loop's time, in part of which the engine's thread has to wait. What
is handed over together is also made text together: once, not step by step.
"""


class EngineStopped(QnextError):
    """The engine ended before the request did: the server is going down, or the engine failed."""


class Busy(QnextError):
    """There is no room for another request at the moment."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(Busy):
    """The server finishes what it has and takes nothing new."""


class TimedOut(QnextError):
    """The request took longer than the server allows."""


Item = tuple[int, Delta] | QnextError | None


@dataclass(eq=False, kw_only=True, slots=True)
class Job:
    """The requests of one client's call on their way through the engine.

    Whoever has submitted it calls ``cancel`` when done with it, however that came about.
    """

    pairs: Sequence[tuple[Request, TextReader]]
    _worker: "Worker"
    _loop: asyncio.AbstractEventLoop
    begun: float = field(default_factory=time.monotonic)
    _left: int = 0
    """Requests that have not ended, as far as the reading side knows."""
    _has_begun: bool = False
    """Whether the event loop was given a first piece of text."""
    _arrived: deque[Item] = field(default_factory=deque)
    """None says that the engine has accepted the requests; an error is the last item."""
    _waiter: "asyncio.Future[None] | None" = None
    _timer: asyncio.TimerHandle | None = None
    _listener: asyncio.TimerHandle | None = None
    _heard: float = 0.0
    """When there was something to read, or to say that there is nothing."""

    @property
    def requests(self) -> list[Request]:
        """What was asked of the engine, one request per choice."""
        return [request for request, _ in self.pairs]

    @property
    def is_done(self) -> bool:
        """Whether every request has ended, and its last piece was read."""
        return not self._left

    async def batches(
        self, silence_s: float | None = None
    ) -> AsyncIterator[list[tuple[int, Delta]]]:
        """What the requests produce, as it is produced: (choice, delta), whatever has arrived.

        What arrived of one choice is one delta: of quick steps, several tokens leave together. The
        last delta of every choice has a finish reason. A batch is empty when there was nothing for
        ``silence_s``. Raises EngineStopped or TimedOut.
        """
        self._heard = self._loop.time()
        if silence_s is not None:
            self._listen(silence_s)
        while self._left:
            await self._wait()
            self._heard = self._loop.time()
            batch: dict[int, list[Delta]] = {}
            while self._arrived:
                item = self._arrived.popleft()
                if isinstance(item, QnextError):
                    if batch:
                        self._arrived.appendleft(item)
                        break
                    raise item
                assert item is not None, "accepted twice"
                choice, delta = item
                batch.setdefault(choice, []).append(delta)
                self._left -= delta.finish_reason is not None
            yield [(choice, Delta.joined(deltas)) for choice, deltas in batch.items()]

    def cancel(self) -> None:
        """Take the requests out of the engine at its next step; harmless when they have ended."""
        for timer in (self._timer, self._listener):
            if timer is not None:
                timer.cancel()
        if self._left:
            self._worker._inbox.put(("cancel", self))

    def _expire(self, after_s: float) -> None:
        self._worker._inbox.put(("cancel", self))
        error = TimedOut(f"the request did not end within {after_s:g} s, the limit of this server.")
        _put_all([(self, [error])])

    def _listen(self, silence_s: float) -> None:
        """Wake whoever reads after so long a silence; one timer, however many pieces there are."""
        left_s = self._heard + silence_s - self._loop.time()
        if left_s <= 0:
            _put_all([(self, ())])
            left_s = silence_s
        self._listener = self._loop.call_later(left_s, self._listen, silence_s)

    async def _wait(self) -> None:
        if not self._arrived:
            self._waiter = self._loop.create_future()
            await self._waiter

    async def _accepted(self) -> None:
        await self._wait()
        item = self._arrived.popleft()
        if isinstance(item, QnextError):
            self._left = 0
            raise item


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
    steps: int = 0
    pages_free: int = 0
    pages_total: int = 0
    slots_total: int = 0
    snapshots: int = 0
    """Prefixes held in memory."""
    snapshot_slots: int = 0


class Worker:
    """Owns an LLM's engine from ``start`` to ``stop``.

    ``max_waiting`` bounds the requests beyond those that can run at once.
    """

    def __init__(self, llm: LLM, *, max_waiting: int = MAX_WAITING) -> None:
        self._llm = llm
        self._slots = llm.engine.scheduler.num_slots
        self._limit = self._slots + max_waiting
        self._inbox: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: dict[str, tuple[Job, int, TextReader]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopped = threading.Event()
        self._mutex = threading.Lock()
        self._unfinished = 0
        """Requests accepted and not ended; guarded by the mutex, as is the next."""
        self._usual_s = 1.0
        """How long a request took lately, on average."""
        self._unread: dict[str, list[Event]] = {}
        """What requests have produced and nobody has made text of yet, by id."""
        self._pending: dict[Job, list[Item]] = {}
        """What the event loops have not been given yet."""
        self._handed_over = 0.0
        self.draining = False
        self.generated = 0
        """Tokens of answers, those of unfinished ones included."""
        self.load = self._look()
        self.ended: Counter[str] = Counter()
        """Requests by the way they ended."""

    @property
    def is_alive(self) -> bool:
        """Whether requests are being worked on."""
        return self._thread.is_alive() and not self._stopped.is_set()

    @property
    def unfinished(self) -> int:
        """Requests that were submitted and have not ended."""
        return self._unfinished

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

    def end_all(self) -> None:
        """End every request at the next step; their last delta says "cancelled"."""
        self._inbox.put(("end_all", None))

    async def submit(
        self, pairs: Sequence[tuple[Request, TextReader]], *, timeout_s: float | None = None
    ) -> Job:
        """Hand requests to the engine; returns when they are accepted.

        Raises the engine's RequestError when one cannot run (then none does), Busy when too many
        wait already, Draining, EngineStopped when there is no engine any more.
        """
        if self.draining:
            raise Draining("the server is being stopped; ask again later.", self._drained_after())
        with self._mutex:
            # An idle engine takes what one call asks for, however much that is.
            if self._unfinished and self._unfinished + len(pairs) > self._limit:
                waiting = max(self._unfinished - self._slots, 0)
                raise Busy(
                    f"the server is busy: {waiting} requests wait already. Try again later.",
                    self._retry_after(waiting),
                )
            self._unfinished += len(pairs)
        loop = asyncio.get_running_loop()
        job = Job(pairs=pairs, _worker=self, _loop=loop, _left=len(pairs))
        self._inbox.put(("add", job))
        if self._stopped.is_set():
            raise EngineStopped("the server is not running any more.")
        try:
            await job._accepted()
        except asyncio.CancelledError:
            job.cancel()
            raise
        if timeout_s is not None:
            job._timer = loop.call_later(timeout_s, job._expire, timeout_s)
        return job

    def _retry_after(self, waiting: int) -> int:
        """Seconds until about half of those that wait now will have run."""
        rounds = max(waiting, 1) / 2 / self._slots
        return min(max(math.ceil(rounds * self._usual_s), 1), MAX_RETRY_S)

    def _drained_after(self) -> int:
        return self._retry_after(self._unfinished)

    # -- the engine's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._step()
        finally:
            # Also after an exception, which the thread then reports: nobody must wait for ever.
            self._stopped.set()
            self._read_all()
            self._deliver(self._pending)
            self._deliver({job: [EngineStopped("the server stopped.")] for job in self._left()})
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
                self.load = self._look()
                if prepares:
                    continue
            elif self._inbox.empty():
                return True
            command, job = self._inbox.get()
            if command == "stop":
                return False
            if command == "end_all":
                for name in self._jobs:
                    self._llm.engine.cancel(name)
            elif command == "add" and job is not None:
                self._add(job)
            elif job is not None:
                self._drop(job, "abandoned")

    def _add(self, job: Job) -> None:
        for index, (request, reader) in enumerate(job.pairs):
            try:
                self._llm.engine.add(request)
            except RequestError as error:
                self._drop(job, "refused")
                self._forget("refused", len(job.pairs) - index)
                self._deliver({job: [error]})
                return
            self._jobs[request.id] = (job, index, reader)
        self.load = self._look()
        self._deliver({job: [None]})

    def _drop(self, job: Job, why: str) -> None:
        for request, _ in job.pairs:
            if self._jobs.pop(request.id, None) is not None:
                self._unread.pop(request.id, None)
                self._llm.engine.cancel(request.id)
                self._forget(why)

    def _forget(self, why: str, count: int = 1) -> None:
        self.ended[why] += count
        with self._mutex:
            self._unfinished -= count

    def _step(self) -> None:
        urgent: dict[Job, list[Item]] = {}
        for event in self._llm.engine.step():
            found = self._jobs.get(event.request_id)
            if found is None:
                continue  # cancelled while it ran
            job, _, reader = found
            self.generated += len(event.token_ids)
            self._unread.setdefault(event.request_id, []).append(event)
            ends = event.finish_reason is not None
            if ends or not job._has_begun or reader.must_read_at_once:
                delta = self._read(event.request_id)
                if delta is None:
                    continue
                if not job._has_begun or delta.finish_reason is not None:
                    # A think tag, say, is nothing to be seen yet.
                    job._has_begun = bool(delta.parts)
                    urgent[job] = self._pending[job]
                if delta.finish_reason is not None:
                    self._llm.ended(reader, delta.finish_reason)
                    del self._jobs[event.request_id]
                    self._forget(delta.finish_reason)
                    self._usual_s += 0.1 * (time.monotonic() - job.begun - self._usual_s)
        now = time.monotonic()
        if now - self._handed_over >= HAND_OVER_S or not self._llm.engine.has_work:
            self._handed_over = now
            self.load = self._look()
            self._read_all()
            results, self._pending = self._pending, {}
            self._deliver(results)
        elif urgent:
            self.load = self._look()
            for job in urgent:
                del self._pending[job]
            self._deliver(urgent)

    def _read(self, request_id: str) -> Delta | None:
        """Make text of what a request has produced; the last delta, if there is any."""
        job, index, reader = self._jobs[request_id]
        deltas = reader.push_all(self._unread.pop(request_id, ()))
        if deltas:
            self._pending.setdefault(job, []).extend((index, delta) for delta in deltas)
        if reader.stopped:
            self._llm.engine.cancel(request_id, "stop")
        return deltas[-1] if deltas else None

    def _read_all(self) -> None:
        for request_id in list(self._unread):
            self._read(request_id)

    def _deliver(self, results: Mapping[Job, Sequence[Item]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, Sequence[Item]]]] = {}
        for job, items in results.items():
            by_loop.setdefault(job._loop, []).append((job, items))
        for loop, several in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_all, several)

    def _left(self) -> list[Job]:
        """Jobs nobody will finish: those that run, and those still in the inbox."""
        left = {id(job): job for job, _, _ in self._jobs.values()}
        while not self._inbox.empty():
            command, job = self._inbox.get()
            if command == "add" and job is not None:
                left[id(job)] = job
        return list(left.values())

    def _look(self) -> Load:
        engine = self._llm.engine
        return Load(
            running=len(engine.scheduler.running),
            waiting=len(engine.scheduler.waiting),
            background=replace(engine.background.counts),
            preparing=self._llm.unprepared,
            steps=engine.steps,
            pages_free=engine.pool.free,
            pages_total=engine.pool.num_pages,
            slots_total=engine.scheduler.num_slots,
            snapshots=len(engine.prefix),
            snapshot_slots=engine.prefix.num_slots,
        )


def _put_all(several: Sequence[tuple[Job, Sequence[Item]]]) -> None:
    """Hand over what has arrived; runs in the event loop."""
    for job, items in several:
        job._arrived.extend(items)
        waiter = job._waiter
        if waiter is not None:
            job._waiter = None
            if not waiter.done():
                waiter.set_result(None)
