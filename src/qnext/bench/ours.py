"""qnext as a contestant: the native decoder behind the runner, as the engine drives it.

Contexts are not run but filled: keys, values and states are random numbers of a plausible size,
since neither kernels nor memory care which. Tokens fed are random too, so that every step routes
to other experts as a text would; the likeliest token is computed all the same.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qnext import native
from qnext.bench.cases import Case, chunks
from qnext.config import ModelConfig
from qnext.engine.engine import Engine
from qnext.engine.lanes import MOST_ROUNDS
from qnext.engine.native_runner import NativeRunner
from qnext.engine.native_sampler import chooser_of
from qnext.engine.request import Request, SamplingParams
from qnext.engine.runner import Work
from qnext.errors import RequestError
from qnext.model.cache import PAGE_SIZE, Saved
from qnext.model.native import NativeModel
from qnext.quantization import Bits
from qnext.weights.folder import resolve_model
from qnext.weights.packed import is_packed, open_packed, pack_model

PROMPT_TOKENS = 16
_PAGE = 4096


class Subject:
    """A model folder, opened for measuring: mapped, nothing unpacked or converted."""

    def __init__(self, name_or_path: str | os.PathLike[str], *, threads: int) -> None:
        self.folder: Path = resolve_model(name_or_path)
        config = ModelConfig.from_file(self.folder)
        native.load().set_threads(threads)
        packed = open_packed(self.folder) if is_packed(config) else pack_model(self.folder, 16)
        self.packed, self.config = packed, packed.config
        self.dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
        self.model = NativeModel(packed.config, packed.weights, dtype=self.dtype)
        self.threads = threads

    def touch(self) -> None:
        """Look at every page of the weights, so that no timed step waits for the disk."""
        for weight in self.packed.weights.values():
            data = weight if isinstance(weight, torch.Tensor) else weight.data
            if data.is_contiguous():
                data.view(-1).view(torch.uint8)[::_PAGE].sum()
            else:
                for row in data:
                    row.view(torch.uint8)[::_PAGE].sum()

    @property
    def bits(self) -> Bits | None:
        """Bits of a packed folder, None of one that is not."""
        return self.packed.bits if any(self.packed.bits.formats.values()) else None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def format(self) -> str:
        """A word for the weights: q4, q8, bfloat16, float32; of mixtures that of the experts."""
        bits = self.bits
        if bits is None:
            return self.dtype_name
        part = bits.formats["experts" if self.config.num_experts else "shared"]
        return part or self.dtype_name

    def check(self, case: Case) -> None:
        """RequestError when a case is longer than the model reaches."""
        most = self.config.max_position_embeddings
        if case.length > most:
            raise RequestError(
                f"{case.name}: {case.length} tokens are more than the {most} of this model. Lower "
                "--context or --tokens."
            )

    def open(self, cases: Sequence[Case], *, is_choosing: bool = True) -> list["OurSession"]:
        """Sessions for cases that will be run in turn; they share one cache.

        The sessions of an earlier call can no longer be used. ``is_choosing``: steps of few rows
        are the engine's steps of plain decoding, one native call that also chooses tokens and
        leaves no logits; otherwise they are its general steps, which return logits.
        """
        for case in cases:
            self.check(case)
        pages = sum(case.sequences * -(-case.length // PAGE_SIZE) for case in cases)
        drafts = max((case.rows - 1 for case in cases if case.kind == "verify"), default=0)
        runner = NativeRunner(
            self.model,
            num_slots=sum(case.sequences for case in cases),
            num_pages=pages,
            track_mtp=False,
            num_speculative=sum(case.sequences for case in cases if case.kind == "verify"),
            max_drafts=drafts,
        )
        generator = torch.Generator().manual_seed(0)
        _fill(runner.cache.kv, generator)
        sessions, first = [], 0
        for case in cases:
            sessions.append(OurSession(runner, case, first, generator, is_choosing=is_choosing))
            first += case.sequences * -(-case.length // PAGE_SIZE)
        return sessions


class OurSession:
    """One case on a runner; its sequences own slots and pages of their own."""

    def __init__(
        self,
        runner: NativeRunner,
        case: Case,
        first_page: int,
        generator: torch.Generator,
        *,
        is_choosing: bool,
    ) -> None:
        self.runner, self.case, self._generator = runner, case, generator
        each = -(-case.length // PAGE_SIZE)
        self._slots = [runner.open() for _ in range(case.sequences)]
        self._pages = [
            range(first_page + i * each, first_page + (i + 1) * each) for i in range(case.sequences)
        ]
        self._lanes = []
        if is_choosing and case.kind != "prefill":
            self._lanes = [
                _lane(runner, slot, pages, is_drafting=case.kind == "verify")
                for slot, pages in zip(self._slots, self._pages, strict=True)
            ]
        saved = runner.cache.save(self._slots[0])
        recurrent, conv = torch.empty_like(saved.recurrent), torch.empty_like(saved.conv)
        if case.context:
            recurrent.normal_(0.0, 0.05, generator=generator)
            _fill(conv, generator)
        else:
            recurrent.zero_()
            conv.zero_()
        self._start = Saved(
            length=case.context, recurrent=recurrent, conv=conv, last_hidden=saved.last_hidden
        )
        self._ids: list[list[list[int]]] = []
        self._done = 0
        self._experts = 0

    @property
    def experts(self) -> float | None:
        return float(self._experts)

    def reset(self) -> None:
        case, cache = self.case, self.runner.cache
        for slot in self._slots:
            cache.load(slot, self._start)
        vocabulary = self.runner.native.config.vocab_size
        size = (case.steps, case.sequences, case.rows)
        self._ids = torch.randint(0, vocabulary, size, generator=self._generator).tolist()
        self._done, self._experts = 0, 0

    def step(self) -> None:
        ids = self._ids[self._done % self.case.steps]
        if self._lanes:
            self._advance(ids)
        else:
            with self.runner.alone():
                if self.case.kind == "prefill":
                    self._prefill(ids)
                else:
                    self._decode(ids)
        self._done += 1

    @property
    def _kept(self) -> int:
        """Tokens of the running step that stay: of drafts one, two, ... all in turn."""
        case = self.case
        return 1 + self._done % case.rows if case.kind == "verify" else case.rows

    def _advance(self, ids: list[list[int]]) -> None:
        """The call of ``NativeRunner.advance``, with tokens and drafts from outside."""
        model, cache = self.runner.native, self.runner.deferred
        vocabulary = model.config.vocab_size
        decoder, is_verifying = cache.decoder, self.case.kind == "verify"
        hidden = np.empty((len(ids) * self.case.rows, model.config.hidden_size), dtype=np.float32)
        model.module.advance(
            decoder,
            model.drafting(vocabulary),
            self._lanes,
            [own[:1] for own in ids],
            [cache.length(slot) for slot in self._slots],
            [cache.kept[slot] for slot in self._slots],
            [own[1:] for own in ids],
            None,
            0,
            hidden,
            None,
            vocabulary,
            -1.0,
            0.0,
        )
        self._experts += decoder.experts_read
        kept = self._kept
        for slot in self._slots:
            cache.advance(slot, kept, kept if is_verifying else 0)

    def _decode(self, ids: list[list[int]]) -> None:
        case, runner = self.case, self.runner
        works = [
            Work(
                slot=slot,
                pages=pages,
                start=runner.cache.length(slot),
                ids=own,
                rows=range(case.rows),
                speculative=case.kind == "verify",
            )
            for slot, pages, own in zip(self._slots, self._pages, ids, strict=True)
        ]
        runner.forward(works).argmax(-1).tolist()
        self._experts += runner.native.decoder.experts_read
        runner.keep([self._kept] * case.sequences)

    def _prefill(self, ids: list[list[int]]) -> None:
        runner, start = self.runner, 0
        for rows in chunks(self.case.rows):
            is_last = start + rows == self.case.rows
            works = [
                Work(
                    slot=slot,
                    pages=pages,
                    start=self.case.context + start,
                    ids=own[start : start + rows],
                    rows=(rows - 1,) if is_last else (),
                )
                for slot, pages, own in zip(self._slots, self._pages, ids, strict=True)
            ]
            logits = runner.forward(works)
            self._experts += runner.native.decoder.experts_read
            runner.keep([rows] * len(works))
            start += rows
        logits.argmax(-1).tolist()


def _lane(runner: NativeRunner, slot: int, pages: Sequence[int], *, is_drafting: bool) -> Any:
    """A greedy answer without an end."""
    pending = runner.deferred.pending_of(slot) if is_drafting else 0
    chooser = chooser_of(
        SamplingParams(temperature=0.0), seed=0, prompt_ids=(), stop_ids=(), bad_words=()
    )
    return runner.native.module.Lane(
        chooser=chooser, slot=slot, first=1, pending=pending, max_tokens=1 << 30,
        pages=list(pages),
    )  # fmt: skip


class _Timed:
    """The native module; counts the time spent inside its steps."""

    def __init__(self, module: Any) -> None:
        self._module, self.seconds = module, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def advance(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        found = self._module.advance(*arguments)
        self.seconds += time.perf_counter() - start
        return found


def time_outside(subject: Subject, *, steps: int) -> float:
    """Share of a greedy decode step of the engine that is spent outside the native call.

    Scheduling and book-keeping: everything from one native step to the next.
    """
    plain = subject.model.module
    timed = _Timed(plain)
    # The first two steps of the engine warm up; they may be many of the model.
    tokens = steps + 2 * MOST_ROUNDS
    subject.model.module = timed
    try:
        engine = Engine(
            subject.model,
            max_num_seqs=1,
            prefix_cache=False,
            max_model_len=PROMPT_TOKENS + tokens + 2,
        )
        prompt = torch.randint(0, subject.config.vocab_size, (PROMPT_TOKENS,)).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        engine.add(Request(id="bench", prompt_ids=tuple(prompt), params=params))
        engine.step()
        engine.step()
        timed.seconds, start = 0.0, time.perf_counter()
        while engine.has_work:
            engine.step()
        total = time.perf_counter() - start
        engine.close()
    finally:
        subject.model.module = plain
    return 1.0 - timed.seconds / total


def _fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Random numbers around zero, a stretch of them repeated: drawing them all takes minutes."""
    flat = tensor.view(-1)
    stretch = torch.randn(min(flat.numel(), 1 << 20), generator=generator).to(tensor.dtype)
    for start in range(0, flat.numel(), stretch.numel()):
        piece = flat[start : start + stretch.numel()]
        piece.copy_(stretch[: piece.numel()])
