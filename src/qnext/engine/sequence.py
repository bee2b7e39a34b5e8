"""A request inside the engine, and what it does in a step. No torch here."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from qnext.engine.explain import CacheReport
from qnext.engine.guide import Guide
from qnext.engine.prefix import Match
from qnext.engine.request import FinishReason, Request, TokenLogprobs
from qnext.engine.tier import Fetched

CLASS_OVERTAKINGS = 8
"""After so many overtakings a request counts as one class higher."""
MAX_OVERTAKINGS = 64
"""After so many it comes before every class."""


@dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """A request inside the engine: its tokens, where they are, and what it holds."""

    request: Request
    seed: int
    max_tokens: int
    arrival: int
    slot: int | None = None
    """Its place in the cache while it runs."""
    pages: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    """How often each token was generated."""
    done: int = 0
    """Tokens whose keys, values and state are in the cache."""
    mtp_len: int = 1
    """Next position the MTP layer has not read."""
    mtp_first: int = 1
    """First position whose MTP keys and values exist."""
    drafts: list[int] = field(default_factory=list)
    """Proposed tokens after the newest one."""
    report: CacheReport | None = None
    """What of the prompt was reused; None before the first admission."""
    drafted: int = 0
    accepted: int = 0
    near_ties: list[int] = field(default_factory=list)
    """Places in the output where rounding might have chosen another token."""
    plants: list[tuple[int, str]] = field(default_factory=list)
    """(length, why) of snapshots still to be taken while its prompt runs."""
    ran: int = 0
    """Tokens run since it was last admitted."""
    bypassed: int = 0
    """How often others were admitted out of turn, since it last ran."""
    overtaken: int = 0
    """How often others that came later were served while it got nothing, ever."""
    found: tuple[int, int, Match] | None = None
    """The last lookup: version of the prefix cache, length, and what was found."""
    parked: int = 0
    """How often it was parked."""
    fetched: Fetched | None = None
    """What a look at the disk for its prompt has come to; None before there was one."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    lane: Any = None
    """What the native step of decoding knows of it, while it has a slot."""
    lane_pages: int = 0
    """Pages the lane knows of."""
    guide: Guide | None = None
    """What its rules allow next; None for a request without rules."""
    told: int = 0
    """Tokens of the output that events have told of."""
    lead: int = 0
    """Tokens of the output that were forced before anything was sampled."""
    forced: list[int] = field(default_factory=list)
    """Places in the output of tokens that were not sampled."""
    ends: FinishReason | None = None
    """Why it ends with the last token of its output, once that has been told."""
    untold: list[TokenLogprobs] = field(default_factory=list)
    """Log-probabilities of tokens not told of yet."""
    lead_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and output together."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def settled(self) -> int:
        """Tokens behind which it may go on: what follows is forced, and not told of yet."""
        return len(self.request.prompt_ids) + self.told

    @property
    def family(self) -> tuple[object, ...] | None:
        """What it shares with requests that can go on from its prompt; None once it answers."""
        request = self.request
        has_begun = len(self.output_ids) > self.lead
        if not request.group or has_begun or request.score_only:
            return None
        return (request.group, request.prompt_ids, request.params.prompt_logprobs)

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still to be computed."""
        request = self.request
        wants = request.score_only or request.params.prompt_logprobs is not None
        return wants and len(self.prompt_logprobs) < len(request.prompt_ids) - 1

    @property
    def rank(self) -> float:
        """Its class, smaller first; whoever is overtaken rises, and at last above all."""
        if self.overtaken >= MAX_OVERTAKINGS:
            return -math.inf
        return self.request.priority - self.overtaken // CLASS_OVERTAKINGS

    @property
    def order(self) -> tuple[float, int]:
        """Smaller is served first."""
        return (self.rank, self.arrival)

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids at positions start ... end - 1 of prompt and output."""
        prompt, split = self.request.prompt_ids, len(self.request.prompt_ids)
        if start >= split:
            return self.output_ids[start - split : end - split]
        return [*prompt[start:end], *self.output_ids[: max(end - split, 0)]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a sequence can start: a snapshot, or another one that runs the same prompt."""

    length: int
    slot: int
    pages: list[int]
    mtp_first: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """What one sequence does in a step: so many tokens from ``done`` on, drafts included."""

    sequence: Sequence
    count: int
    captures: tuple[tuple[int, str, int], ...] = ()
    """(length, why, slot) of snapshots to take on the way."""
