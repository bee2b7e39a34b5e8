"""Engine: requests in, events out, one step of the model at a time.

Synchronous and single-threaded: ``add`` and ``cancel`` take effect at the next ``step``, ``step``
runs one packed batch and returns what it produced. Everything asynchronous is outside. Requests
join and leave between steps, so a long answer never holds up a short one. Steps of nothing but
decoding may follow each other for a few milliseconds before anybody looks (``lanes.py``).

A step is: plan -> forward -> sample every row -> accept drafts that equal what was sampled -> keep
what stays -> let the MTP layer read the new rows and draft for the next step -> plant snapshots.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qnext import cost, native
from qnext.engine import native_sampler
from qnext.engine.background import Background
from qnext.engine.blocks import PagePool
from qnext.engine.disk import DiskStore
from qnext.engine.drafting import Drafter
from qnext.engine.guide import Guide
from qnext.engine.invariance import check_path_independence
from qnext.engine.lanes import Lanes
from qnext.engine.masks_ahead import MasksAhead
from qnext.engine.native_runner import NativeRunner
from qnext.engine.prefix import PrefixCache
from qnext.engine.request import Event, FinishReason, Request, TokenLogprobs
from qnext.engine.ruled import Ruled, choose_ruled, mask_before, may_try, ruled_by
from qnext.engine.runner import Runner, Work, wants_routes
from qnext.engine.sampler import SampleRow, choose, logprobs_of
from qnext.engine.scheduler import Scheduler
from qnext.engine.sequence import Item
from qnext.engine.sequence import Sequence as Running
from qnext.engine.sizes import CacheSizes, Settings, check_counts
from qnext.engine.speculative import MAX_DRAFTS, DraftPolicy
from qnext.engine.telling import (
    ended_by,
    force,
    is_untold,
    known_rows,
    note_forced,
    step_on,
    stop_ids,
    tell,
    usage_of,
)
from qnext.engine.tier import DiskTier
from qnext.engine.ties import tie_bound
from qnext.engine.worth import PrefillTime
from qnext.errors import RequestError
from qnext.model.cache import PAGE_SIZE, Rollback
from qnext.model.model import CausalLM
from qnext.model.native import NativeModel

DRAIN_S = 10.0
"""Time to write the prefix cache to disk when the engine is closed."""


class Engine:
    """Continuous batching over one model and one cache.

    ``memory_bytes`` bounds the cache: states of ``max_num_seqs`` sequences, snapshots of prefixes,
    and pages of keys and values. ``defined_ids`` is one more than the largest id the tokenizer
    knows. ``speculative_tokens`` is a number of drafts (0 for none) or "auto"; it is 0 for a model
    without an MTP head. ``max_chunk_tokens`` bounds how much of one prompt a step runs.
    ``batch_invariant`` checks that the model's ops give a token the same bits on every path (it
    must have been loaded with them); BackendError if they do not.
    ``cache_dir`` keeps snapshots of prefixes over a restart, in at most ``cache_disk_limit`` bytes;
    ``cache_key`` names what the cache depends on beside this model's configuration and kernels,
    above all the weights. ``clock`` gives seconds; ``around`` takes another runner.
    """

    def __init__(
        self,
        model: CausalLM | NativeModel,
        *,
        max_num_seqs: int = 16,
        max_batch_tokens: int = 2048,
        memory_bytes: int = 1 << 30,
        max_model_len: int | None = None,
        defined_ids: int | None = None,
        speculative_tokens: int | str = 0,
        prefix_cache: bool = True,
        snapshot_interval: int = 0,
        max_chunk_tokens: int | None = None,
        batch_invariant: bool = False,
        rollback: Rollback = "snapshots",
        clock: Callable[[], float] = time.monotonic,
        cache_dir: str | Path | None = None,
        cache_disk_limit: int = 10 << 30,
        cache_key: Mapping[str, Any] | None = None,
    ) -> None:
        config = model.config
        check_counts(
            max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens,
            max_model_len=max_model_len, max_chunk_tokens=max_chunk_tokens,
        )  # fmt: skip
        if batch_invariant:
            check_path_independence(model)
        is_native = isinstance(model, NativeModel)
        setting = _draft_setting(speculative_tokens, has_head=model.has_mtp)
        max_model_len = min(
            max_model_len or config.max_position_embeddings, config.max_position_embeddings
        )
        limit = DraftPolicy(setting).limit
        sizes = CacheSizes.within(
            config,
            memory_bytes=memory_bytes,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            dtype=str(model.dtype).removeprefix("torch."),
            prefix_cache=prefix_cache,
            max_drafts=limit,
            rollback="deferred" if is_native else rollback,
        )
        slots = {
            "num_slots": sizes.num_slots + sizes.num_snapshots,
            "num_pages": sizes.num_pages,
            "track_mtp": setting != 0,
        }
        runner = (
            NativeRunner(
                model, num_speculative=sizes.num_slots if limit else 0, max_drafts=limit, **slots
            )
            if isinstance(model, NativeModel)
            else Runner(model, rollback=rollback, **slots)
        )
        settings = Settings(
            num_slots=sizes.num_slots,
            num_snapshots=sizes.num_snapshots,
            page_size=PAGE_SIZE,
            max_batch_tokens=max_batch_tokens,
            max_chunk_tokens=max_chunk_tokens,
            max_model_len=max_model_len,
            vocab_size=config.vocab_size,
            defined_ids=min(defined_ids or config.vocab_size, config.vocab_size),
            speculative_tokens=setting,
            snapshot_interval=snapshot_interval,
            tie_bound=tie_bound(model.dtype, config.num_hidden_layers),
            state_bytes=sizes.state_bytes,
            page_bytes=sizes.page_bytes,
            context_share=cost.attention_flops(config)
            / (cost.matmul_flops(config) + cost.delta_flops(config, chunked=not is_native)),
        )
        self._set_up(runner, PagePool(sizes.num_pages), settings, clock)
        if cache_dir is not None:
            if not sizes.num_snapshots:
                raise RequestError(
                    "cache_dir needs the prefix cache, which is switched off or has no room: "
                    "leave out prefix_cache=False, or raise memory."
                )
            key = {
                **(cache_key or {}), "config": config.to_dict(), "layout": runner.cache.layout,
                "page_tokens": PAGE_SIZE, "kernels": list(model.kernels),
                "torch": torch.__version__, "path_independent": is_native or batch_invariant,
            }  # fmt: skip
            self.attach(
                DiskStore(
                    cache_dir, fields=key, page_tokens=PAGE_SIZE, limit_bytes=cache_disk_limit
                )
            )

    def attach(self, store: DiskStore) -> None:
        """Put a store of snapshots behind the prefix cache; ``close`` lets go of it."""
        self.tier = DiskTier(
            store, slots=self.runner, pool=self.pool, prefix=self.prefix,
            page_size=self.scheduler.page_size, prefill=self.prefill_time, clock=self._clock,
        )  # fmt: skip
        self.scheduler.fetch = self.tier.fetch

    def close(self, drain_s: float = DRAIN_S) -> None:
        """Write what the prefix cache holds to disk, if there is one, for so long at most."""
        self.masks_ahead.close()
        tier, self.tier = self.tier, None
        if tier is not None:
            self.scheduler.fetch = self.prefix.on_evict = None
            tier.close(drain_s)

    @classmethod
    def around(
        cls,
        runner: Runner,
        pool: PagePool,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> "Engine":
        """An engine over a runner and pages that are there already.

        The runner has at least as many free slots as sequences and snapshots together, and as
        many pages as the pool.
        """
        engine = cls.__new__(cls)
        engine._set_up(runner, pool, settings, clock)
        return engine

    def _set_up(
        self, runner: Runner, pool: PagePool, settings: Settings, clock: Callable[[], float]
    ) -> None:
        self.runner, self.pool, self._clock = runner, pool, clock
        self.max_model_len, self.vocab_size = settings.max_model_len, settings.vocab_size
        self.defined_ids, self.tie_bound = settings.defined_ids, settings.tie_bound
        self.policy = DraftPolicy(settings.speculative_tokens)
        snapshot_slots = [runner.open() for _ in range(settings.num_snapshots)]
        self.prefill_time = PrefillTime(context_share=settings.context_share)
        self.prefix = PrefixCache(
            pool, snapshot_slots, clock=clock, prefill=self.prefill_time,
            state_bytes=settings.state_bytes, page_bytes=settings.page_bytes,
        )  # fmt: skip
        self.scheduler = Scheduler(
            slots=runner,
            num_slots=settings.num_slots,
            pool=pool,
            prefix=self.prefix,
            page_size=settings.page_size,
            max_batch_tokens=settings.max_batch_tokens,
            max_model_len=settings.max_model_len,
            max_drafts=self.policy.limit,
            max_chunk_tokens=settings.max_chunk_tokens,
            interval=settings.snapshot_interval,
        )
        # One definition, two ways to run it; logits that are not on the CPU stay where they are.
        self._choose = choose if native.unfit() else native_sampler.choose
        self._logprobs_of = logprobs_of
        self.lanes: Lanes | None = None
        if isinstance(runner, NativeRunner):
            self._logprobs_of = native_sampler.logprobs_of
            self.lanes = Lanes(
                runner, self.scheduler, self.policy, row=self._row, choose=self._choose,
                defined_ids=self.defined_ids, tie_bound=self.tie_bound,
            )  # fmt: skip
        self.drafter = Drafter(
            runner, self.policy, self.scheduler.running, row=self._row, choose=self._choose,
            defined_ids=self.defined_ids, clock=clock,
        )  # fmt: skip
        self.masks_ahead = MasksAhead()
        self.tier: DiskTier | None = None
        self.background = Background(self.scheduler, self.prefix)
        self._sequences: dict[str, Running] = {}
        self._cancelled: dict[str, FinishReason] = {}
        self.steps = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished or any cancellation unreported."""
        return bool(self._sequences)

    # -- requests --------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it could never run."""
        if request.id in self._sequences:
            raise RequestError(f"request id {request.id!r} is already in use; choose another.")
        limit, ids = self.vocab_size, request.prompt_ids
        if ids and not 0 <= min(ids) <= max(ids) < limit:
            position = next(i for i, token in enumerate(ids) if not 0 <= token < limit)
            raise RequestError(
                f"prompt token {position}: id {ids[position]} is outside the vocabulary "
                f"(0 ... {limit - 1}). Was the prompt encoded with another tokenizer?"
            )
        banned = [token for word in request.bad_ids for token in word]
        for token in (*request.params.logit_bias, *request.params.stop_token_ids, *banned):
            if not 0 <= token < limit:
                raise RequestError(
                    f"logit_bias, stop_token_ids and bad_words: id {token} is outside the "
                    f"vocabulary (0 ... {limit - 1})."
                )
        seed = request.params.seed
        if seed is None:
            seed = secrets.randbits(63)
        sequence = self.scheduler.add(request, choice_seed(seed, request.choice))
        if request.rules is not None and not request.score_only:
            sequence.guide = Guide(request.rules)
            force(sequence)
            sequence.lead = len(sequence.output_ids)
        self._sequences[request.id] = sequence
        self.background.overtaken(request.prompt_ids)

    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> None:
        """End a request at the next step; unknown or finished ids are ignored."""
        if request_id in self._sequences:
            self._cancelled.setdefault(request_id, reason)

    # -- the step --------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Run one batch; returns the events of all requests that made visible progress."""
        if self.lanes is not None and not self._cancelled and self.lanes.ready():
            return self._run_lanes(self.lanes)
        with self.runner.alone():
            return self._step()

    def _step(self) -> list[Event]:
        gone: list[tuple[Running, FinishReason]] = []
        for name, reason in self._cancelled.items():
            if name in self._sequences:
                gone.append((self._sequences[name], reason))
        self._cancelled.clear()
        self._catch_up([sequence for sequence, _ in gone])
        events = [self._end(sequence, reason) for sequence, reason in gone]
        if self.lanes is not None and gone and self.lanes.ready():
            events.extend(self._run_lanes(self.lanes))
            return events
        items = self.scheduler.plan()
        if items:
            events.extend(self._run(items))
            self.steps += 1
        return events

    def idle_step(self) -> int:
        """Use spare time: run a chunk of what later prompts are likely to begin with.

        Returns the number of tokens run; 0 when there is nothing to prepare, or a request is
        unfinished. ``background.add`` says what to prepare.
        """
        item = None if self.has_work else self.background.plan()
        if item is None:
            return 0
        with self.runner.alone():
            self.runner.forward([self._work(item)])
            self.runner.keep([item.count])
        item.sequence.done += item.count
        item.sequence.ran += item.count
        # So that a request which interrupts finds the MTP layer's rows in place.
        self.drafter.catch_up([item.sequence])
        self._plant([item])
        self.background.ran(item)
        return item.count

    def _run_lanes(self, lanes: Lanes) -> list[Event]:
        """A step of nothing but plain decoding."""
        events: list[Event] = []

        # Quoted: or Python would build these types anew in every step, with nothing in its caches.
        def told(
            sequence: Running, reason: "FinishReason | None", logprobs: "list[TokenLogprobs]"
        ) -> "FinishReason | None":
            sequence.untold += logprobs
            event = tell(sequence, (), reason)
            events.append(event)
            return event.finish_reason

        ended, due = lanes.step(told)
        self.steps += lanes.runner.rounds
        # Only what follows knows tensors; a plain step goes without asking PyTorch for anything.
        if due is not None or ended:
            with self.runner.alone():
                if due is not None:
                    self.drafter.draft([s for s in self.scheduler.running if s not in ended], due)
                self._catch_up(ended)
                for sequence in ended:
                    self._end_quietly(sequence)
        return events

    def _run(self, items: Sequence[Item]) -> list[Event]:
        started = self._clock()
        decoding = all(item.sequence.length - item.sequence.done == 1 for item in items)
        drafted = {len(item.sequence.drafts) for item in items}
        works = [self._work(item) for item in items]
        ahead = self._find_masks(items)
        logits = self.runner.forward(works)
        if ahead is not None:
            ahead.result()
        self._watch_routes(items, works)
        rows: list[SampleRow] = []
        rules: list[Ruled | None] = []
        wanted: list[int] = []
        spans: list[tuple[int, int]] = []
        known: list[tuple[int, int]] = []
        twins: list[tuple[Running, Running, int]] = []
        at = 0
        for item, work in zip(items, works, strict=True):
            sequence, first = item.sequence, len(rows)
            last = at + len(work.rows)
            forced = known_rows(sequence, item.count)
            before = forced.start if len(work.rows) == item.count else 0
            known.append((at + before, at + before + len(forced)))
            if self._samples(item):
                new = 1 + len(sequence.drafts)
                for i in range(new):
                    rows.append(self._row(sequence, sequence.drafts[:i]))
                    rules.append(ruled_by(sequence.guide, sequence.drafts, i))
                    wanted.append(last - new + i)
            spans.append((first, len(rows)))
            for twin in self.scheduler.twins(sequence) if self._samples(item) else ():
                twins.append((sequence, twin, len(rows)))
                rows.append(self._row(twin, ()))
                rules.append(ruled_by(twin.guide, (), 0))
                wanted.append(last - 1)
            at = last
        every = len(wanted) == logits.shape[0] and wanted == list(range(len(wanted)))
        chosen = logits[wanted] if rows and not every else logits
        tokens: list[int] = []
        rivals: Sequence[object] = []
        if rows:
            tokens, rivals = choose_ruled(
                self._choose, chosen, rows, rules,
                defined_ids=self.defined_ids, tie_bound=self.tie_bound,
            )  # fmt: skip
        counts, outcomes = [], []
        for item, (first, end) in zip(items, spans, strict=True):
            if first == end:
                counts.append(item.count)
                outcomes.append(([], None))
                continue
            emitted, reason = self._accept(item.sequence, tokens[first:end])
            now = len(item.sequence.output_ids)
            item.sequence.near_ties += [now + i for i in range(len(emitted)) if rivals[first + i]]
            outcomes.append((emitted, reason))
            counts.append(len(emitted) if item.sequence.drafts else item.count)
        self.runner.keep(counts)
        self._score_prompts(items, works, logits)
        forced_logits = [logits[first:end] for first, end in known]
        events = self._advance(items, counts, outcomes, chosen, spans, forced_logits)
        events += self._begin_twins(twins, tokens, rivals, chosen)
        seconds = self._clock() - started
        if not decoding:
            # What was run is what lies before ``done`` now, drafts that were dropped excepted.
            ends = [(item.sequence.done, count) for item, count in zip(items, counts, strict=True)]
            self.prefill_time.note([(end - count, end) for end, count in ends], seconds)
        if self.policy.quiet:
            pass  # what such steps take is known for now
        elif decoding and len(drafted) == 1:
            ruled = any(item.sequence.guide is not None for item in items)
            self.policy.verified(len(items), drafted.pop(), seconds, ruled=ruled)
        else:
            self.policy.mixed()
        ended = [sequence for event, sequence in events if event.finish_reason is not None]
        self.drafter.draft([item.sequence for item in items if item.sequence not in ended])
        self._plant(items)
        self._fork([(source, twin) for source, twin, _ in twins if twin not in ended])
        self._catch_up(ended)
        for sequence in ended:
            self._end_quietly(sequence)
        return [event for event, _ in events]

    def _find_masks(self, items: Sequence[Item]) -> Future[None] | None:
        """Begin to find the masks of a step's rows, if they are many."""
        return self.masks_ahead.begin(
            [
                (item.sequence.guide, tuple(item.sequence.drafts))
                for item in items
                if item.sequence.guide is not None
                and not may_try(item.sequence.request.params)
                and self._samples(item)
            ]
        )

    def _work(self, item: Item) -> Work:
        sequence = item.sequence
        assert sequence.slot is not None
        start, drafts = sequence.done, sequence.drafts
        known = sequence.tokens(start, start + item.count)
        ids = [*known, *drafts][: item.count]
        if sequence.scores_prompt:
            rows = range(item.count)
        else:
            rows = [*known_rows(sequence, item.count)]
            if self._samples(item):
                rows += range(item.count - 1 - len(drafts), item.count)
        return Work(
            slot=sequence.slot,
            pages=sequence.pages,
            start=start,
            ids=ids,
            rows=rows,
            speculative=bool(drafts),
            captures=[(length - start, slot) for length, _, slot in item.captures],
            wants_routes=sequence.request.score_only and sequence.request.watch is not None,
        )

    def _samples(self, item: Item) -> bool:
        """Whether this step reaches the newest known token, so that a next one can be chosen."""
        sequence = item.sequence
        reaches = sequence.done + item.count - len(sequence.drafts) == sequence.length
        return reaches and sequence.ends is None and not sequence.request.score_only

    def _row(self, sequence: Running, drafts: Sequence[int]) -> SampleRow:
        request = sequence.request
        row = SampleRow(
            params=request.params,
            seed=sequence.seed,
            index=len(sequence.output_ids) + len(drafts),
            prompt_ids=request.prompt_ids,
            counts=sequence.counts,
            stop_ids=stop_ids(request),
            bad_words=request.bad_ids,
            mask=mask_before(sequence.guide, drafts, request.params),
        )
        if drafts and (request.params.presence_penalty or request.params.frequency_penalty
                       or request.params.repetition_penalty != 1.0):  # fmt: skip
            row.counts = sequence.counts.copy()
            row.counts.update(drafts)
        if request.bad_ids:
            reach = max(len(word) for word in request.bad_ids)
            row.recent = [*sequence.output_ids[-reach:], *drafts]
        return row

    def _accept(
        self, sequence: Running, sampled: Sequence[int]
    ) -> tuple[list[int], FinishReason | None]:
        """The tokens a step adds: drafts that were sampled anyway, then one more; cut at an end."""
        emitted = [sampled[0]]
        for draft, following in zip(sequence.drafts, sampled[1:], strict=True):
            if emitted[-1] != draft:
                break
            emitted.append(following)
        drafted, accepted = len(sequence.drafts), len(emitted) - 1
        self.policy.note(sequence.request.id, drafted, accepted)
        sequence.drafted += drafted
        reason: FinishReason | None = None
        sure = 0
        for i, token in enumerate(emitted):
            if sequence.guide and sequence.guide.has_no_choice:
                # It counts as forced, however it was found.
                sequence.forced.append(len(sequence.output_ids) + i)
                sure += i < accepted
            reason = step_on(sequence, token, after=len(sequence.output_ids) + i + 1)
            if reason is not None or (sequence.guide and sequence.guide.is_due):
                del emitted[i + 1 :]
                break
        sequence.drafted -= sure
        sequence.accepted += min(accepted, len(emitted)) - sure
        if sequence.request.watch is not None:
            first = len(sequence.output_ids)
            sequence.request.watch.note_drafts(first, sequence.drafts, len(emitted))
        return emitted, reason

    def _advance(
        self,
        items: Sequence[Item],
        counts: Sequence[int],
        outcomes: Sequence[tuple[list[int], FinishReason | None]],
        chosen: Tensor,
        spans: Sequence[tuple[int, int]],
        forced_logits: Sequence[Tensor],
    ) -> list[tuple[Event, Running]]:
        """Move every sequence forward by what was kept, and say what it got.

        ``chosen`` [R, V] are the rows that were sampled from, ``spans`` those of each item;
        ``forced_logits`` [n, V] are the rows before its forced tokens.
        """
        events = []
        for item, count, (emitted, reason), (first, _), before in zip(
            items, counts, outcomes, spans, forced_logits, strict=True
        ):
            sequence = item.sequence
            sequence.done += count
            sequence.ran += count
            sequence.drafts.clear()
            if sequence.request.score_only and sequence.done == sequence.length:
                reason = "length"
            note_forced(sequence, before, self._logprobs_of)
            if emitted or reason is not None or is_untold(sequence):
                own = chosen[first : first + len(emitted)]
                events.append((self._tell(sequence, emitted, reason, own), sequence))
        return events

    def _tell(
        self,
        sequence: Running,
        emitted: Sequence[int],
        reason: FinishReason | None,
        chosen: Tensor,
    ) -> Event:
        """Add tokens to an answer; ``chosen`` [n, V] are the logits they were sampled from."""
        top = sequence.request.params.logprobs
        if top is not None and emitted:
            sequence.untold += self._logprobs_of(chosen, emitted, [top] * len(emitted))
        return tell(sequence, emitted, reason)

    # -- several answers to one prompt -----------------------------------------------------------

    def _begin_twins(
        self,
        twins: Sequence[tuple[Running, Running, int]],
        tokens: Sequence[int],
        rivals: Sequence[object],
        chosen: Tensor,
    ) -> list[tuple[Event, Running]]:
        """First tokens of the requests that waited for a prompt to be run.

        ``twins`` are (who ran it, who waited, row of ``chosen`` [R, V]): the row is that of the
        prompt's last token for all of them, each samples from it with its own noise.
        """
        events = []
        for source, twin, row in twins:
            twin.prompt_logprobs = list(source.prompt_logprobs)
            twin.untold = list(source.lead_logprobs)
            twin.report = source.report
            if source.report is not None:
                self.scheduler.log.add(twin.request.id, source.report, counted=False)
            if rivals[row]:
                twin.near_ties.append(len(twin.output_ids))
            emitted, reason = self._accept(twin, [tokens[row]])
            events.append((self._tell(twin, emitted, reason, chosen[row : row + 1]), twin))
        return events

    def _fork(self, twins: Sequence[tuple[Running, Running]]) -> None:
        """Let those who waited for a prompt go on from it, now or from a snapshot later."""
        self.drafter.catch_up(list(dict.fromkeys(source for source, _ in twins)))
        left = [source for source, twin in twins if not self.scheduler.fork(source, twin)]
        for source in dict.fromkeys(left):
            self.scheduler.plant_here(source, "fork")

    # -- scoring ---------------------------------------------------------------------------------

    def _score_prompts(self, items: Sequence[Item], works: Sequence[Work], logits: Tensor) -> None:
        """Log-probabilities of prompt tokens from the rows before them."""
        at = 0
        for item, work in zip(items, works, strict=True):
            sequence, rows = item.sequence, len(work.rows)
            if sequence.scores_prompt:
                prompt = sequence.request.prompt_ids
                start = len(sequence.prompt_logprobs)
                end = min(sequence.done + item.count, len(prompt) - 1)
                own = logits[at + start - sequence.done : at + end - sequence.done]
                top = sequence.request.params.prompt_logprobs or 0
                targets = prompt[start + 1 : end + 1]
                sequence.prompt_logprobs += self._logprobs_of(own, targets, [top] * len(targets))
            at += rows

    def _watch_routes(self, items: Sequence[Item], works: Sequence[Work]) -> None:
        """Hand the experts that ran to those who watch."""
        routes = self.runner.routes if wants_routes(works) else None
        if routes is None:
            return
        at = 0
        for item, work in zip(items, works, strict=True):
            watch = item.sequence.request.watch
            if watch is not None and work.wants_routes:
                watch.note_routes(work.start, routes[at : at + len(work.ids)])
            at += len(work.ids)

    # -- drafts and snapshots --------------------------------------------------------------------

    def _plant(self, items: Sequence[Item]) -> None:
        """Enter the snapshots taken in this step into the prefix cache."""
        self.drafter.catch_up([item.sequence for item in items if item.captures])
        for item in items:
            for length, why, slot in item.captures:
                self.scheduler.plant(item.sequence, length, why, slot)

    # -- ends ------------------------------------------------------------------------------------

    def _end(self, sequence: Running, reason: FinishReason) -> Event:
        event = Event(
            request_id=sequence.request.id,
            token_ids=(),
            finish_reason=reason,
            usage=usage_of(sequence),
            ended_by=ended_by(sequence, reason),
        )
        self._end_quietly(sequence)
        return event

    def _catch_up(self, ended: Sequence[Running]) -> None:
        """Have the MTP layer read what those who end leave to others."""
        self.drafter.catch_up([one for one in ended if self.scheduler.leaves_end(one)])

    def _end_quietly(self, sequence: Running) -> None:
        """Leave a snapshot of where the sequence got to, and free the rest."""
        if self.scheduler.leaves_end(sequence):
            self.scheduler.plant_here(sequence, "end")
        self.scheduler.release(sequence)
        self.policy.forget(sequence.request.id, len(sequence.output_ids))
        del self._sequences[sequence.request.id]


def choice_seed(seed: int, choice: int) -> int:
    """The noise key of answer number ``choice`` of a request: the seed itself for the first."""
    if choice == 0:
        return seed & ((1 << 64) - 1)
    text = f"{seed}:{choice}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _draft_setting(setting: int | str, *, has_head: bool) -> int | str:
    if setting != "auto" and (isinstance(setting, str) or not 0 <= setting <= MAX_DRAFTS):
        raise RequestError(
            f"speculative_tokens: expected 0 ... {MAX_DRAFTS} or 'auto', found {setting!r}."
        )
    if has_head:
        return setting
    if setting not in (0, "auto"):
        raise RequestError(
            f"speculative_tokens={setting}: this model has no MTP head to draft with. Leave the "
            "option out, or use a checkpoint with mtp.* tensors."
        )
    return 0
