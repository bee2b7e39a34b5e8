"""Sends the requests of a trace to a model and notes what came back, and when.

Here is what every replay shares, and the replay against an ``LLM`` in this process, whose engine
is stepped here; ``benchmarks/replay_http.py`` has the one over HTTP. Requests are sent when the
trace says (open loop; waiting then counts from that moment, however late they really were sent) or
whenever fewer than so many are under way (closed loop). Every outcome ends with a finish reason, a
refusal, or a failure.
"""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.traces import Job
from qnext import LLM, SamplingParams, cost
from qnext.errors import RequestError

SAMPLE_EVERY_S = 0.05
"""How often queue and memory of an LLM in this process are looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """When requests are sent, and how they are sampled."""

    speed: float = 1.0
    """The trace runs so many times as fast."""
    closed_loop: int | None = None
    """Requests under way at a time, whatever the trace says; None for the trace's own times."""
    temperature: float = 0.0
    deadline_s: float = 3600.0
    """When this long has passed, what has not ended has failed."""

    def due_s(self, job: Job) -> float:
        """When a job is sent in an open loop, in seconds after the start."""
        return job.arrival_s / self.speed


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of one request; times are seconds after the start of the replay."""

    index: int
    prompt_tokens: int
    asked_tokens: int
    reusable_tokens: int
    due_s: float
    """When it was to be sent; waiting counts from here."""
    pieces_s: list[float] = field(default_factory=list)
    """When something arrived: tokens in this process, text over HTTP."""
    end_s: float | None = None
    """When the last token was there, or the refusal, or the failure."""
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int | None = 0
    """None where the target does not say."""
    accepted_tokens: int | None = 0
    finish_reason: str | None = None
    refusal: str | None = None
    """Why the target did not take it."""
    failure: str | None = None
    """Why it neither ended nor was refused."""

    @property
    def completed(self) -> bool:
        """Whether it was answered to the end."""
        return self.failure is None and self.finish_reason is not None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return self.pieces_s[0] - self.due_s if self.pieces_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for answers of one token."""
        if not self.completed or self.end_s is None or self.completion_tokens < 2:
            return None
        return (self.end_s - self.pieces_s[0]) / (self.completion_tokens - 1)

    @property
    def latency_s(self) -> float | None:
        """From the moment it was to be sent to the end of the answer."""
        return self.end_s - self.due_s if self.completed and self.end_s is not None else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """The target at one moment."""

    at_s: float
    running: int
    waiting: int
    rss_bytes: int | None
    pages_held: int | None = None


@dataclass(kw_only=True, slots=True)
class Replay:
    """Everything a replay has seen."""

    outcomes: list[Outcome]
    looks: list[Look] = field(default_factory=list)
    seconds: float = 0.0
    """From the start to the end of the last request."""


def outcome_of(job: Job, due_s: float) -> Outcome:
    """The blank outcome of a job that is being sent."""
    return Outcome(
        index=job.index,
        prompt_tokens=len(job.prompt_ids),
        asked_tokens=job.output_tokens,
        reusable_tokens=job.reusable_tokens,
        due_s=due_s,
    )


def check_end(outcome: Outcome) -> None:
    """Nobody cancels here, so an answer is complete or something went wrong."""
    if outcome.finish_reason is None:
        outcome.failure = "the answer broke off without a finish reason"
    elif outcome.finish_reason not in ("stop", "length"):
        outcome.failure = f"ended as {outcome.finish_reason!r}, which nobody asked for"


# -- the model and its memory ----------------------------------------------------------------------


def facts(llm: LLM, budget_bytes: int) -> dict[str, Any]:
    """What the engine is and has: sizes, budget, kernels."""
    import torch

    engine, counts = llm.engine, cost.parameters(llm.config)
    return {
        "model": llm.name,
        "threads": torch.get_num_threads(),
        "parameters": counts.total + (counts.mtp if llm.model.has_mtp else 0),
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "device": str(llm.model.device),
        "max_model_len": llm.max_model_len,
        "max_num_seqs": engine.scheduler.num_slots,
        "max_batch_tokens": engine.scheduler.max_batch_tokens,
        "speculative_tokens": engine.policy.setting,
        "snapshot_slots": engine.prefix.num_slots,
        "pages": engine.pool.num_pages,
        "page_tokens": engine.scheduler.page_size,
        "cache_bytes": engine.runner.cache.nbytes,
        "budget_bytes": budget_bytes,
        "rss_bytes": rss_bytes("self"),
        "kernels": list(llm.model.kernels),
    }


def totals(llm: LLM) -> dict[str, Any]:
    """What the engine has counted since it was made."""
    engine = llm.engine
    return {
        "steps": engine.steps,
        "parkings": engine.scheduler.parkings,
        "drafts_tried": list(engine.policy.tried),
        "drafts_taken": list(engine.policy.taken),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def since(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Two ``totals`` apart; the peak of memory is a peak and stays."""
    found = dict(after)
    for name in ("steps", "parkings"):
        found[name] = after[name] - before[name]
    for name in ("drafts_tried", "drafts_taken"):
        found[name] = [b - a for a, b in zip(before[name], after[name], strict=True)]
    return found


def warm_up(llm: LLM, token_ids: Sequence[int]) -> None:
    """Run every kind of step once, so that the first request does not pay for it."""
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    llm.generate([list(token_ids[-24:]), list(token_ids[-8:])], params, progress=False)


def rss_bytes(process: int | str) -> int | None:
    """Memory a process has now; None where the system does not say (only Linux does)."""
    file = Path(f"/proc/{process}/statm")
    try:
        return int(file.read_text().split()[1]) * resource.getpagesize()
    except (FileNotFoundError, ProcessLookupError):
        return None


def peak_rss_bytes() -> int:
    """The most memory this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# -- in this process -------------------------------------------------------------------------------


def replay_in_process(llm: LLM, jobs: Sequence[Job], load: Load, *, progress: bool) -> Replay:
    """Send all jobs to an LLM that nobody else uses, stepping its engine."""
    return _InProcess(llm, jobs, load).run(progress)


class _InProcess:
    def __init__(self, llm: LLM, jobs: Sequence[Job], load: Load) -> None:
        self.llm, self.load = llm, load
        self.jobs = list(reversed(jobs))
        self.active: dict[str, tuple[Outcome, Any]] = {}
        self.replay = Replay(outcomes=[])
        self.last_look_s = -SAMPLE_EVERY_S

    def run(self, progress: bool) -> Replay:
        start = time.perf_counter()
        with tqdm(total=len(self.jobs), desc="replay", unit="req", disable=not progress) as bar:
            while self.jobs or self.active:
                now = time.perf_counter() - start
                if now > self.load.deadline_s:
                    self._give_up(now)
                    break
                self._send(now)
                if self.llm.engine.has_work:
                    self._step(start)
                elif self.jobs:
                    time.sleep(min(max(self.load.due_s(self.jobs[-1]) - now, 0.0), 0.05))
                self._look(time.perf_counter() - start)
                bar.update(len(self.replay.outcomes) - len(self.active) - bar.n)
        self.replay.seconds = time.perf_counter() - start
        return self.replay

    def _send(self, now: float) -> None:
        closed = self.load.closed_loop
        while self.jobs:
            job = self.jobs[-1]
            if closed is not None and len(self.active) >= closed:
                return
            if closed is None and self.load.due_s(job) > now:
                return
            self.jobs.pop()
            outcome = outcome_of(job, now if closed else self.load.due_s(job))
            self.replay.outcomes.append(outcome)
            params = SamplingParams(
                temperature=self.load.temperature,
                max_tokens=job.output_tokens,
                seed=job.seed,
                ignore_eos=True,
            )
            try:
                request, reader = self.llm.prepare_text(job.prompt_ids, params)
                self.llm.engine.add(request)
            except RequestError as error:
                outcome.refusal, outcome.end_s = str(error), now
            else:
                self.active[request.id] = outcome, reader

    def _step(self, start: float) -> None:
        events = self.llm.engine.step()
        now = time.perf_counter() - start
        for event in events:
            outcome, reader = self.active[event.request_id]
            delta = reader.push(event)
            if event.token_ids:
                outcome.pieces_s.append(now)
            if delta is None or delta.finish_reason is None:
                continue
            usage = delta.usage
            outcome.completion_tokens = usage.completion_tokens
            outcome.cached_tokens = usage.cached_tokens
            outcome.drafted_tokens = usage.drafted_tokens
            outcome.accepted_tokens = usage.accepted_tokens
            outcome.finish_reason, outcome.end_s = delta.finish_reason, now
            check_end(outcome)
            del self.active[event.request_id]

    def _look(self, now: float) -> None:
        if now - self.last_look_s < SAMPLE_EVERY_S:
            return
        self.last_look_s = now
        engine = self.llm.engine
        self.replay.looks.append(
            Look(
                at_s=now,
                running=len(engine.scheduler.running),
                waiting=len(engine.scheduler.waiting),
                rss_bytes=rss_bytes("self"),
                pages_held=engine.pool.num_pages - engine.pool.free,
            )
        )

    def _give_up(self, now: float) -> None:
        why = f"had not ended after {now:.0f} s (--deadline)"
        for name, (outcome, _) in self.active.items():
            outcome.failure, outcome.end_s = why, now
            self.llm.engine.cancel(name)
        self.llm.engine.step()
        for job in self.jobs:
            outcome = outcome_of(job, self.load.due_s(job))
            outcome.failure = "was never sent: " + why
            self.replay.outcomes.append(outcome)
