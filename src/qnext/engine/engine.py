"""Engine: requests in, events out, one step of the model at a time.

Synchronous and single-threaded: ``add`` and ``cancel`` take effect at the next ``step``, ``step``
runs one packed batch and returns what it produced. Everything asynchronous is outside. Requests
join and leave between steps, so a long answer never holds up a short one.
"""

import secrets

import torch

from qnext.config import ModelConfig
from qnext.engine.request import Event, FinishReason, Request, TokenLogprobs, Usage
from qnext.engine.sampler import SampleRow, sample
from qnext.engine.scheduler import Plan, Scheduler, Sequence
from qnext.errors import RequestError
from qnext.model.batch import TokenBatch
from qnext.model.cache import PAGE_SIZE, HybridCache
from qnext.model.model import CausalLM
from qnext.ops import Segments


class Engine:
    """Continuous batching over one model and one cache.

    ``memory_bytes`` bounds the cache: the state slots of ``max_num_seqs`` sequences, and pages of
    keys and values with the rest. ``defined_ids`` is the number of ids the tokenizer knows.
    Raises RequestError when the memory does not hold even one page beside the slots.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        max_num_seqs: int = 16,
        max_batch_tokens: int = 2048,
        memory_bytes: int = 1 << 30,
        max_model_len: int | None = None,
        defined_ids: int | None = None,
    ) -> None:
        config = model.config
        self.model = model
        self.max_model_len = min(
            max_model_len or config.max_position_embeddings, config.max_position_embeddings
        )
        self.defined_ids = min(defined_ids or config.vocab_size, config.vocab_size)
        num_pages = _pages_within(
            config, memory_bytes, max_num_seqs, self.max_model_len, model.dtype.itemsize
        )
        self.cache = HybridCache(
            config,
            num_slots=max_num_seqs,
            num_pages=num_pages,
            dtype=model.dtype,
            device=model.device,
            ops=model.ops,
        )
        self.scheduler = Scheduler(
            num_slots=max_num_seqs,
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            max_batch_tokens=max_batch_tokens,
            max_model_len=self.max_model_len,
        )
        self._sequences: dict[str, Sequence] = {}
        self._cancelled: list[str] = []

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished or any cancellation unreported."""
        return bool(self._sequences)

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it could never run."""
        if request.id in self._sequences:
            raise RequestError(f"request id {request.id!r} is already in use; choose another.")
        limit = self.model.config.vocab_size
        for position, token in enumerate(request.prompt_ids):
            if not 0 <= token < limit:
                raise RequestError(
                    f"prompt token {position}: id {token} is outside the vocabulary "
                    f"(0 ... {limit - 1}). Was the prompt encoded with another tokenizer?"
                )
        for token in (*request.params.logit_bias, *request.params.stop_token_ids):
            if not 0 <= token < limit:
                raise RequestError(
                    f"logit_bias and stop_token_ids: id {token} is outside the vocabulary "
                    f"(0 ... {limit - 1})."
                )
        seed = request.params.seed
        if seed is None:
            seed = secrets.randbits(63)
        self._sequences[request.id] = self.scheduler.add(request, seed)

    def cancel(self, request_id: str) -> None:
        """End a request at the next step; unknown or finished ids are ignored."""
        if request_id in self._sequences:
            self._cancelled.append(request_id)

    def step(self) -> list[Event]:
        """Run one batch; returns the events of all requests that made visible progress."""
        events = [self._finish(i, "cancelled") for i in self._cancelled if i in self._sequences]
        self._cancelled.clear()
        plan = self.scheduler.plan()
        if plan.sequences:
            events.extend(self._run(plan))
        return events

    @torch.inference_mode()
    def _run(self, plan: Plan) -> list[Event]:
        device = self.model.device
        segments = Segments.of(plan.counts, device)
        ids, firsts, slots, widest = [], [], [], 0
        for sequence, count in zip(plan.sequences, plan.counts, strict=True):
            if sequence.slot is None:
                sequence.slot = self.cache.open()
            ids.extend(sequence.tokens(sequence.done, count))
            firsts.append(sequence.done)
            slots.append(sequence.slot)
            widest = max(widest, len(sequence.pages))
        table = torch.tensor(
            [s.pages + [0] * (widest - len(s.pages)) for s in plan.sequences], device=device
        )
        positions = segments.offsets() + torch.tensor(firsts, device=device)[segments.ids()]
        # Only a sequence whose last known token is in this step gets a next token.
        sampling = [
            b
            for b, (s, n) in enumerate(zip(plan.sequences, plan.counts, strict=True))
            if s.done + n == s.length
        ]
        rows = segments.last_rows()[sampling]
        batch = TokenBatch(
            ids=torch.tensor(ids, device=device), positions=positions, segments=segments, rows=rows
        )
        view = self.cache.view(slots, table, segments)
        hidden = self.model.run(batch, view)
        self.cache.keep()
        for sequence, count in zip(plan.sequences, plan.counts, strict=True):
            sequence.done += count
        if not sampling:
            return []
        chosen = sample(
            self.model.lm_logits(hidden[rows]),
            [self._row(plan.sequences[b]) for b in sampling],
            defined_ids=self.defined_ids,
        )
        return [
            self._emit(plan.sequences[b], token, logprobs)
            for b, (token, logprobs) in zip(sampling, chosen, strict=True)
        ]

    def _row(self, sequence: Sequence) -> SampleRow:
        return SampleRow(
            params=sequence.request.params,
            seed=sequence.seed,
            index=len(sequence.output_ids),
            prompt_ids=sequence.request.prompt_ids,
            counts=sequence.counts,
            stop_ids=_stop_ids(sequence.request),
        )

    def _emit(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> Event:
        sequence.output_ids.append(token)
        sequence.counts[token] += 1
        reason: FinishReason | None = None
        if token in _stop_ids(sequence.request):
            reason = "stop"
        elif len(sequence.output_ids) >= sequence.max_tokens:
            reason = "length"
        reported = () if logprobs is None else (logprobs,)
        if reason is not None:
            return self._finish(sequence.request.id, reason, (token,), reported)
        return Event(
            request_id=sequence.request.id,
            token_ids=(token,),
            finish_reason=None,
            usage=_usage(sequence),
            logprobs=reported,
        )

    def _finish(
        self,
        request_id: str,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> Event:
        sequence = self._sequences.pop(request_id)
        self.scheduler.release(sequence)
        if sequence.slot is not None:
            self.cache.close(sequence.slot)
        return Event(
            request_id=request_id,
            token_ids=token_ids,
            finish_reason=reason,
            usage=_usage(sequence),
            logprobs=logprobs,
        )


def _usage(sequence: Sequence) -> Usage:
    return Usage(
        prompt_tokens=len(sequence.request.prompt_ids),
        completion_tokens=len(sequence.output_ids),
    )


def _stop_ids(request: Request) -> tuple[int, ...]:
    eos = () if request.params.ignore_eos else request.eos_ids
    return (*eos, *request.params.stop_token_ids)


def _pages_within(
    config: ModelConfig, memory_bytes: int, slots: int, max_model_len: int, itemsize: int
) -> int:
    """Pages that fit beside the state slots, at most what all slots at full length can use."""
    heads = config.linear_num_value_heads
    state = heads * config.linear_key_head_dim * config.linear_value_head_dim * 4
    window = (config.linear_conv_kernel_dim - 1) * config.conv_channels * itemsize
    fixed = slots * len(config.delta_layers) * (state + window)
    layers = len(config.attention_layers) + config.num_mtp_layers
    page = layers * 2 * PAGE_SIZE * config.num_key_value_heads * config.head_dim * itemsize
    most = slots * -(-max_model_len // PAGE_SIZE)
    fitting = (memory_bytes - fixed) // page if page else most
    if fitting < 1:
        raise RequestError(
            f"memory: {memory_bytes:,} bytes do not hold the state of {slots} sequences "
            f"({fixed:,} bytes) and one page of keys and values ({page:,} bytes). Raise memory or "
            "lower max_num_seqs."
        )
    return min(fitting, most)
