"""Who runs in the next step: admission by memory, then rows under a token budget.

Every running request that has its whole prompt in the cache gets one row; what is left of the
budget goes to prompts, oldest first, in chunks. A request is admitted when a state slot and all
pages it can ever need are free, so that nothing admitted ever has to be thrown out. Waiting
requests are admitted strictly in order of arrival.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

from qnext.engine.blocks import PagePool
from qnext.engine.request import Request
from qnext.errors import RequestError


@dataclass(kw_only=True, slots=True)
class Sequence:
    """A request inside the engine: its tokens, where they are, and what it holds."""

    request: Request
    seed: int
    max_tokens: int
    slot: int | None = None
    """Its place in the cache, given by the engine once it is admitted."""
    pages: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    """How often each token was generated."""
    done: int = 0
    """Tokens that are in the cache."""

    @property
    def length(self) -> int:
        """Tokens of prompt and output together."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def most(self) -> int:
        """Tokens it can have at the end."""
        return len(self.request.prompt_ids) + self.max_tokens

    def tokens(self, start: int, count: int) -> list[int]:
        """``count`` token ids from position ``start`` of prompt and output."""
        prompt = self.request.prompt_ids
        if start >= len(prompt):
            return self.output_ids[start - len(prompt) : start - len(prompt) + count]
        ids = list(prompt[start : start + count])
        return ids + self.output_ids[: count - len(ids)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One step: which sequences run, and how many new tokens of each."""

    sequences: tuple[Sequence, ...]
    counts: tuple[int, ...]


class Scheduler:
    """Queues and pages of all requests; it owns no tensor.

    ``max_batch_tokens`` exceeds ``num_slots``, so that a prompt always makes progress beside the
    sequences that decode.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        num_pages: int,
        page_size: int,
        max_batch_tokens: int,
        max_model_len: int,
    ) -> None:
        if max_batch_tokens <= num_slots:
            raise RequestError(
                f"max_batch_tokens ({max_batch_tokens}) must be larger than max_num_seqs "
                f"({num_slots}): every running sequence needs one row per step and a waiting "
                "prompt needs room beside them."
            )
        self.page_size, self.max_model_len = page_size, max_model_len
        self.max_batch_tokens = max_batch_tokens
        self.pool = PagePool(num_pages)
        self.num_slots = num_slots
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, request: Request, seed: int) -> Sequence:
        """Queue a request; RequestError when it could never run."""
        prompt = len(request.prompt_ids)
        if prompt == 0:
            raise RequestError(
                "the prompt is empty: it must have at least one token. Give some text."
            )
        if prompt >= self.max_model_len:
            raise RequestError(
                f"the prompt has {prompt} tokens and the context holds {self.max_model_len}, of "
                "which at least one must be left to answer. Shorten the prompt or raise "
                "max_model_len."
            )
        room = self.max_model_len - prompt
        wanted = request.params.max_tokens
        sequence = Sequence(
            request=request, seed=seed, max_tokens=room if wanted is None else min(wanted, room)
        )
        need = self._pages(sequence.most)
        if need > self.pool.num_pages:
            held = self.pool.num_pages * self.page_size
            raise RequestError(
                f"prompt ({prompt} tokens) plus max_tokens ({sequence.max_tokens}) need {need} "
                f"pages, the memory budget holds {self.pool.num_pages} ({held} tokens). Lower "
                "max_tokens or raise the memory budget."
            )
        self.waiting.append(sequence)
        return sequence

    def plan(self) -> Plan:
        """Choose the next step."""
        self._admit()
        budget = self.max_batch_tokens
        chosen: list[tuple[Sequence, int]] = []
        decoding = [s for s in self.running if s.length - s.done == 1]
        prefilling = [s for s in self.running if s.length - s.done > 1]
        for sequence in decoding[:budget]:
            chosen.append((sequence, 1))
        budget -= len(chosen)
        for sequence in prefilling:
            count = min(budget, sequence.length - sequence.done)
            if count > 0:
                chosen.append((sequence, count))
                budget -= count
        return Plan(sequences=tuple(s for s, _ in chosen), counts=tuple(n for _, n in chosen))

    def release(self, sequence: Sequence) -> None:
        """Take back everything a sequence holds, wherever it is."""
        if sequence.pages:
            self.running.remove(sequence)
            self.pool.give_back(sequence.pages)
            sequence.pages = []
        else:
            self.waiting.remove(sequence)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.num_slots:
            sequence = self.waiting[0]
            need = self._pages(sequence.most)
            if need > self.pool.free:
                return
            self.waiting.popleft()
            sequence.pages = self.pool.take(need)
            self.running.append(sequence)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
