"""The native decoder and the PyTorch model, driven by the same script, give the same numbers.

Both stand behind a runner, so every step an engine can ask for is asked of both: prompts in pieces,
mixed batches, captured states, drafts that are kept in part, resumed sequences, MTP rows.
"""

import random
from dataclasses import replace

import pytest
import torch
from tests.model.parity import CASES, build

from qnext.engine.engine import Engine
from qnext.engine.native_runner import NativeRunner
from qnext.engine.request import Request, SamplingParams
from qnext.engine.runner import MtpWork, Runner, Work
from qnext.engine.sequence import Sequence
from qnext.model.model import CausalLM
from qnext.model.native import NativeModel
from qnext.weights.formats import pack_q8

BOUND = 2e-4
CHOSEN = [
    case
    for case in CASES
    if not case.raw.get("attention_bias") and case.raw.get("dtype", "float32") == "float32"
]


class Twins:
    """Two runners that get every call."""

    def __init__(self, model: CausalLM, seed: int) -> None:
        self.random, self.model = random.Random(seed), model
        sizes = {"num_slots": 6, "num_pages": 24, "track_mtp": model.mtp is not None}
        self.runners = (
            Runner(model, **sizes),
            NativeRunner(NativeModel.from_model(model), num_speculative=3, max_drafts=4, **sizes),
        )
        self.worst = 0.0

    def both(self, name: str, *args):
        want, got = (getattr(runner, name)(*args) for runner in self.runners)
        if isinstance(want, torch.Tensor):
            self.compare(name, got, want)
        else:
            assert got == want, (name, got, want)
        return want

    def compare(self, what: str, got: torch.Tensor, want: torch.Tensor) -> None:
        assert got.shape == want.shape, (what, got.shape, want.shape)
        gap = (got.float() - want.float()).abs().max().item() if want.numel() else 0.0
        assert gap < BOUND, f"{what}: differs by {gap:.2e}"
        self.worst = max(self.worst, gap)

    def compare_states(self) -> None:
        ours, theirs = self.runners[0].cache, self.runners[1].cache
        for slot in range(theirs.num_slots):
            ours.settle(slot)
            theirs.settle(slot)
            assert ours.length(slot) == theirs.length(slot)
        self.compare("recurrent", theirs.recurrent, ours.recurrent)
        self.compare("conv", theirs.conv, ours.conv)
        self.compare("kv", theirs.kv, ours.kv)
        self.compare("last_hidden", theirs.last_hidden, ours.last_hidden)

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(self.model.config.vocab_size) for _ in range(count)]


def _run(twins: Twins, prompts: list[int]) -> None:
    has_mtp = twins.model.mtp is not None
    slots = [twins.both("open") for _ in prompts]
    pages = [list(range(4 * b, 4 * b + 4)) for b in range(len(prompts))]
    texts = [twins.tokens(n) for n in prompts]
    done = [0] * len(prompts)
    captured = None
    while any(d < len(t) for d, t in zip(done, texts, strict=True)):
        works = []
        for b, text in enumerate(texts):
            left = len(text) - done[b]
            if not left:
                continue
            count = min(left, twins.random.choice([1, 2, 5, 16, 17, 40, 64, 90]))
            captures = ()
            if captured is None and count > 3 and b == 0:
                captured = (twins.both("open"), done[b] + 2)
                captures = ((2, captured[0]),)
            works.append(
                Work(
                    slot=slots[b], pages=pages[b], start=done[b],
                    ids=text[done[b] : done[b] + count], rows=(0, count - 1), captures=captures,
                )
            )  # fmt: skip
            done[b] += count
        twins.both("forward", works)
        twins.both("keep", [len(work.ids) for work in works])
    twins.compare_states()
    if has_mtp:
        _draft(twins, slots, pages, texts)
    for _ in range(4):
        # One plain sequence, the others speculative and kept in part.
        works, counts = [], []
        for b, text in enumerate(texts):
            size = 1 if b == 0 else twins.random.randint(1, 5)
            text += twins.tokens(size)
            works.append(
                Work(
                    slot=slots[b], pages=pages[b], start=len(text) - size, ids=text[-size:],
                    rows=tuple(range(size)), speculative=b > 0,
                )
            )  # fmt: skip
            counts.append(1 if b == 0 else twins.random.randint(1, size))
        twins.both("forward", works)
        twins.both("keep", counts)
        for b, (work, count) in enumerate(zip(works, counts, strict=True)):
            del texts[b][len(texts[b]) - len(work.ids) + count :]
    twins.compare_states()
    if captured is not None:
        slot, length = captured
        again = twins.both("resume", slot)
        twins.both("copy_page", pages[0][0], 20)
        work = Work(slot=again, pages=[20], start=length, ids=texts[0][length : length + 3],
                    rows=(0, 1, 2))  # fmt: skip
        twins.both("forward", [work])
        twins.both("keep", [3])


def _draft(twins: Twins, slots: list[int], pages: list[list[int]], texts: list[list[int]]) -> None:
    """The MTP layer reads each prompt, then drafts twice."""
    works = []
    for slot, table, text in zip(slots, pages, texts, strict=True):
        backlog = twins.both("backlog", slot)
        ids = [*text[len(text) - backlog + 1 :], twins.tokens(1)[0]]
        works.append(MtpWork(slot=slot, pages=table, start=len(text) - backlog + 1, ids=ids,
                             first=len(text) - backlog + 1))  # fmt: skip
    twins.both("fill", works)
    for depth in (1, 2):
        works = [
            replace(work, start=len(text) + depth, ids=twins.tokens(1))
            for work, text in zip(works, texts, strict=True)
        ]
        twins.both("draft", works)


@pytest.mark.parametrize("case", CHOSEN, ids=[case.name for case in CHOSEN])
def test_every_step_equals_the_pytorch_model(kernels, case):
    model = build(case).ours
    assert isinstance(model, CausalLM)
    _run(Twins(model, seed=1), [case.tokens, 70, 5])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(kernels, tiny_model, threads):
    results = []
    for count in (1, threads):
        kernels.set_threads(count)
        runner = NativeRunner(
            NativeModel.from_model(tiny_model), num_slots=2, num_pages=8, track_mtp=False
        )
        slot = runner.open()
        ids = [(7 * i) % 512 for i in range(90)]
        results.append(
            runner.forward([Work(slot=slot, pages=[0, 1], start=0, ids=ids, rows=range(90))])
        )
    assert torch.equal(results[0], results[1])


def _read_prompt(runner: NativeRunner, text: list[int], pages: list[int]) -> tuple[int, MtpWork]:
    slot = runner.open()
    runner.forward([Work(slot=slot, pages=pages, start=0, ids=text[:-1], rows=(len(text) - 2,))])
    runner.keep([len(text) - 1])
    return slot, MtpWork(slot=slot, pages=pages, start=1, ids=text[1:], first=1)


@pytest.mark.parametrize("defined_ids", [512, 500])
@pytest.mark.parametrize("share", [1, 8])
@pytest.mark.parametrize("counts", [[3, 0, 1], [1, 1, 1], [0, 0, 0]])
def test_drafts_of_one_call_are_those_of_single_steps(
    kernels, tiny_model, monkeypatch, share, defined_ids, counts
):
    monkeypatch.setattr("qnext.model.native.DRAFT_SHARE", share)
    monkeypatch.setattr("qnext.model.native.DRAFT_LEAST", 32)
    model = NativeModel.from_model(tiny_model)
    sizes = {"num_slots": 3, "num_pages": 6, "track_mtp": True}
    single, whole = NativeRunner(model, **sizes), NativeRunner(model, **sizes)
    allowed = torch.zeros(512, dtype=torch.bool)
    head = model.draft_head(defined_ids)
    allowed[torch.from_numpy(head.ids[: head.limit]).long()] = True
    assert allowed.sum() == (defined_ids if share == 1 else 64 + 64 + defined_ids % 32)
    generator = random.Random(5)
    texts = [[generator.randrange(500) for _ in range(n)] for n in (9, 30, 4)]
    pages = [[0, 1], [2, 3], [4, 5]]
    works = [_read_prompt(single, text, table)[1] for text, table in zip(texts, pages, strict=True)]
    works = [_read_prompt(whole, text, table)[1] for text, table in zip(texts, pages, strict=True)]
    params = SamplingParams(temperature=0.0)
    readers = [
        Sequence(
            request=Request(id=str(b), prompt_ids=tuple(text), params=params), seed=0,
            max_tokens=9, arrival=b, slot=works[b].slot, pages=pages[b],
        )
        for b, text in enumerate(texts)
    ]  # fmt: skip
    got = whole.propose(works, counts, readers, defined_ids=defined_ids, least_share=0.0)
    logits = single.fill(works)
    wanted: list[list[int]] = [[], [], []]
    for depth in range(3):
        logits = logits.masked_fill(~allowed, float("-inf"))
        drafting = [b for b in range(3) if counts[b] > depth]
        for b, token in zip(drafting, logits.argmax(-1)[drafting].tolist(), strict=True):
            wanted[b].append(token)
        logits = single.draft(
            [
                replace(work, start=len(text) + depth, ids=[wanted[b][-1] if wanted[b] else 0])
                for b, (work, text) in enumerate(zip(works, texts, strict=True))
            ]
        )
    assert got == wanted
    # Keys and values of what was read, of which all but the last row are asked for nothing else.
    for text, table in zip(texts, pages, strict=True):
        mine, theirs = (
            runner.deferred.kv[table, -1].transpose(0, 1).flatten(1, 2)[:, 1 : len(text)]
            for runner in (whole, single)
        )
        assert mine.abs().sum() > 0
        assert torch.equal(mine, theirs)


def test_engines_that_share_a_model_do_not_share_a_cache(kernels, tiny_model):
    model = NativeModel.from_model(tiny_model)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompts = [tuple(range(5, 30)), tuple(range(40, 47))]

    def engine() -> Engine:
        return Engine(model, max_num_seqs=1, memory_bytes=8 << 20, speculative_tokens=2)

    def run(engines: list[Engine]) -> list[list[int]]:
        """Every prompt on an engine of its own, a step of each in turn."""
        answers: list[list[int]] = [[] for _ in engines]
        for one, prompt in zip(engines, prompts, strict=True):
            one.add(Request(id="a", prompt_ids=prompt, params=params))
        while any(one.has_work for one in engines):
            for one, answer in zip(engines, answers, strict=True):
                for event in one.step() if one.has_work else ():
                    answer.extend(event.token_ids)
        return answers

    alone = engine()
    alone.add(Request(id="a", prompt_ids=prompts[0], params=params))
    expected = []
    while alone.has_work:
        expected += [token for event in alone.step() for token in event.token_ids]
    del alone
    found = run([engine(), engine()])
    assert found[0] == expected
    assert len(found[1]) == 12


def test_packed_drafts_change_drafts_at_most(kernels, tiny_model):
    """Tokens are those of no drafts at all; most drafts are those of the unpacked layer."""
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)

    def answer(k: int, pack) -> tuple[list[int], int]:
        model = NativeModel.from_model(tiny_model, pack_drafts=pack)
        engine = Engine(model, max_num_seqs=1, memory_bytes=8 << 20, speculative_tokens=k)
        engine.add(Request(id="a", prompt_ids=tuple(range(9, 40)), params=params))
        tokens, drafted = [], 0
        while engine.has_work:
            for event in engine.step():
                tokens += event.token_ids
                drafted = event.usage.drafted_tokens
        return tokens, drafted

    plain, none = answer(0, None)
    packed, drafted = answer(3, pack_q8)
    assert (none, packed) == (0, plain)
    assert drafted > 0
    whole = NativeModel.from_model(tiny_model)
    part = NativeModel.from_model(tiny_model, pack_drafts=pack_q8)
    assert part.draft_head(512).matrix.rows == whole.draft_head(512).matrix.rows == 512
