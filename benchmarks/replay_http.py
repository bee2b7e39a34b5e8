"""The replay of a trace against a server with ``/v1/completions``, as its clients see it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
from tqdm import tqdm

from benchmarks.replay import Load, Look, Outcome, Replay, check_end, outcome_of, rss_bytes
from benchmarks.traces import Job
from qnext.errors import RequestError

POLL_EVERY_S = 0.2
"""How often the server is asked for the length of its queue."""


def replay_over_http(
    url: str, jobs: Sequence[Job], load: Load, *, process: int | None, progress: bool
) -> Replay:
    """Send all jobs to a server; ``process`` is its id where its memory can be watched."""
    return asyncio.run(_OverHttp(url, load, process).run(jobs, progress))


class _OverHttp:
    def __init__(self, url: str, load: Load, process: int | None) -> None:
        self.url, self.load, self.process = url.rstrip("/"), load, process
        self.replay = Replay(outcomes=[])
        self.start = 0.0

    def _now(self) -> float:
        return time.perf_counter() - self.start

    async def run(self, jobs: Sequence[Job], progress: bool) -> Replay:
        # Everything the trace asks for is sent: the queue belongs into the server, not the client.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits) as client:
            await self._check(client)
            self.start = time.perf_counter()
            with tqdm(total=len(jobs), desc="replay", unit="req", disable=not progress) as bar:
                async with self._watched(client):
                    await self._send_all(client, jobs, bar)
                self.replay.seconds = self._now()
        return self.replay

    async def _check(self, client: httpx.AsyncClient) -> None:
        try:
            await client.get("/health", timeout=30)
        except httpx.TransportError as error:
            raise RequestError(
                f"--url {self.url}: no server answers there ({error}). Start one with qnext serve, "
                "or leave --url out."
            ) from error

    async def _send_all(
        self, client: httpx.AsyncClient, jobs: Sequence[Job], bar: "tqdm[Any]"
    ) -> None:
        closed = self.load.closed_loop
        room = asyncio.Semaphore(closed or len(jobs))

        async def one(job: Job, outcome: Outcome) -> None:
            try:
                async with asyncio.timeout(max(self.load.deadline_s - self._now(), 0.0)):
                    await self._ask(client, job, outcome)
            except TimeoutError:
                outcome.failure = f"had not ended after {self._now():.0f} s (--deadline)"
            except (httpx.HTTPError, json.JSONDecodeError, KeyError, TypeError) as error:
                outcome.failure = f"{type(error).__name__}: {error}"
            finally:
                if outcome.end_s is None:
                    outcome.end_s = self._now()
                room.release()
                bar.update()

        async with asyncio.TaskGroup() as tasks:
            for job in jobs:
                await room.acquire()
                if closed is None:
                    due = min(self.load.due_s(job), self.load.deadline_s)
                    await asyncio.sleep(max(due - self._now(), 0.0))
                outcome = outcome_of(job, self._now() if closed else self.load.due_s(job))
                self.replay.outcomes.append(outcome)
                tasks.create_task(one(job, outcome))

    async def _ask(self, client: httpx.AsyncClient, job: Job, outcome: Outcome) -> None:
        body = {
            "prompt": list(job.prompt_ids),
            "max_tokens": job.output_tokens,
            "temperature": self.load.temperature,
            "seed": job.seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode("utf-8", errors="replace")
                # A server that protects itself says when to come back; another 5xx is an accident.
                if response.status_code < 500 or "retry-after" in response.headers:
                    outcome.refusal = _message(text)
                else:
                    outcome.failure = f"status {response.status_code}: {_message(text)}"
                return
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    self._read(json.loads(line.removeprefix("data: ")), outcome)
        if outcome.failure is None:
            check_end(outcome)
        if outcome.completed and not outcome.completion_tokens:
            outcome.failure = "the stream ended without usage, so its tokens are not known"

    def _read(self, chunk: dict[str, Any], outcome: Outcome) -> None:
        if "error" in chunk:
            outcome.failure = chunk["error"]["message"]
            return
        for choice in chunk["choices"]:
            # The chunk that only says why an answer ended came with the text before it.
            if choice["text"] or not outcome.pieces_s:
                outcome.pieces_s.append(self._now())
            if choice["finish_reason"] is not None:
                outcome.finish_reason, outcome.end_s = choice["finish_reason"], self._now()
        usage = chunk.get("usage")
        if usage:
            outcome.completion_tokens = usage["completion_tokens"]
            details = usage.get("prompt_tokens_details") or {}
            outcome.cached_tokens = details.get("cached_tokens") or 0
            details = usage.get("completion_tokens_details") or {}
            outcome.drafted_tokens = details.get("drafted_tokens")
            outcome.accepted_tokens = details.get("accepted_tokens")

    @asynccontextmanager
    async def _watched(self, client: httpx.AsyncClient) -> AsyncIterator[None]:
        task = asyncio.create_task(self._watch(client))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _watch(self, client: httpx.AsyncClient) -> None:
        """Ask for the length of the queue again and again."""
        while True:
            try:
                health = (await client.get("/health", timeout=30)).json()
            except (httpx.HTTPError, json.JSONDecodeError):
                return  # the requests themselves will tell
            if "running" not in health:
                return
            self.replay.looks.append(
                Look(
                    at_s=self._now(),
                    running=health["running"],
                    waiting=health["waiting"],
                    rss_bytes=rss_bytes(self.process) if self.process else None,
                )
            )
            await asyncio.sleep(POLL_EVERY_S)


def _message(text: str) -> str:
    """What an error body says."""
    with suppress(json.JSONDecodeError, KeyError, TypeError):
        return json.loads(text)["error"]["message"]
    return text.strip() or "no reason given"
