"""Every feature with every other: rows of features, the plain run, and what may differ from it.

A factor is one of two kinds. An *ask* changes what is wanted (sampling, stops, a conversation
instead of a text); the plain run is asked the same. A *way* changes how it is computed (chunks,
drafts, company, cache, interruptions) and must change nothing. A new feature is a new entry in
``ASKS`` or ``WAYS``: its values, and a function that writes a value into the ask or the way. What
cannot be combined stands in ``RULED_OUT``, with the reason.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from covering import Row
from oracle import with_oracle
from routers import Followed, Routes, following_routes, noting_routes

from qnext import llm as llm_module
from qnext import native
from qnext.engine import sampler, ties
from qnext.engine.request import SamplingParams, StructuredOutputs, TokenLogprobs, Usage
from qnext.engine.speculative import MAX_DRAFTS
from qnext.llm import LLM, Completion, Delta, Stream
from qnext.model.model import CausalLM
from qnext.model.native import NativeModel
from qnext.rules import RuleBook
from qnext.text.chat import ChatTemplate
from qnext.weights.decoder import load_decoder

Model = CausalLM | NativeModel

TOKENS = 16
"""Length of an answer that nothing stops and that has no form."""

TEMPLATE = """
{%- if tools -%}
    {{- "<|im_start|>system\\n<tool_call>: " ~ tools[0].function.name ~ "<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" ~ message.role ~ "\\n" ~ message.content ~ "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n<think>\\n" ~ ("" if enable_thinking else "\\n</think>\\n\\n") -}}
{%- endif -%}"""
"""A template in miniature, so that tools cost no long prompt; it opens or closes a think block."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model folder and what it is asked; every prompt has more than 90 tokens."""

    folder: str | Path
    text: str
    messages: Sequence[Mapping[str, Any]]
    company: Sequence[str]
    drafts_known: bool
    """Whether drafts come from the known answer: a random model's own are never right."""
    options: Mapping[str, Any] = field(default_factory=dict)
    _plain: dict[str, "Plain"] = field(default_factory=dict, repr=False)
    _models: list[Model] = field(default_factory=list, repr=False)
    _books: list[RuleBook] = field(default_factory=list, repr=False)

    def open(self, **options: Any) -> LLM:
        """The model with other options; two of them share the weights and nothing else."""
        settings = {"memory": "64MiB", "threads": 1, **self.options, **options}
        with mock.patch.object(llm_module, "load_decoder", self._load):
            llm = LLM(self.folder, **settings)
        llm.template = ChatTemplate(TEMPLATE)
        # Compiled grammars are shared like the weights.
        if not self._books:
            self._books.append(
                RuleBook(llm.tokenizer, template=llm.template, eos_ids=llm.eos_ids,
                         vocab_size=llm.config.vocab_size)
            )  # fmt: skip
        llm.rule_book = self._books[0]
        return llm

    def _load(self, folder: Path, **options: Any) -> Model:
        if not self._models:
            self._models.append(load_decoder(folder, **options))
        return self._models[0]

    def text_for(self, ask: "Ask") -> str:
        """The text prompt, which may end inside the reasoning."""
        return self.text + "\n<think>\n" if ask.opens_thinking else self.text

    @property
    def is_native(self) -> bool:
        """Whether the native kernels run it."""
        return isinstance(self.alone.model, NativeModel)

    @property
    def is_exact(self) -> bool:
        """Whether no bit may differ; otherwise rounding may decide ties."""
        return self.is_native or bool(self.options.get("batch_invariant"))

    def noting(self, llm: LLM) -> AbstractContextManager[Routes]:
        """What the routers see, where rounding may change it."""
        return nullcontext({}) if self.is_exact else noting_routes(llm.engine)

    def following(self, llm: LLM, plain: "Plain") -> AbstractContextManager[Followed]:
        """Break the ties of routers as the plain run did, where rounding may change them."""
        if self.is_exact:
            return nullcontext(Followed())
        return following_routes(llm.engine, plain.routes, plain.bound)

    @property
    def factors(self) -> Mapping[str, Sequence[object]]:
        """What its rows are made of."""
        return NATIVE_FACTORS if self.is_native else TORCH_FACTORS

    @cached_property
    def alone(self) -> LLM:
        """The model for plain runs, which leave nothing behind."""
        return self.open(prefix_cache=False)

    def plain(self, ask: "Ask") -> "Plain":
        """The plain run; many rows ask the same."""
        if str(ask) not in self._plain:
            if self.is_native:
                native.load().set_threads(1)
            self._plain[str(ask)] = plain_run(self, ask)
        return self._plain[str(ask)]


@dataclass(kw_only=True)
class Ask:
    """What is wanted of the model."""

    params: dict[str, Any] = field(default_factory=lambda: {"max_tokens": TOKENS})
    chat: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """What a conversation is asked with beside its messages."""
    opens_thinking: bool = False
    stop: str | None = None
    """How the answer ends early; where exactly is read off the plain run."""


@dataclass(kw_only=True)
class Way:
    """How it is computed."""

    options: dict[str, Any] = field(default_factory=dict)
    warm: str = "cold"
    company: int = 0
    park: str | None = None
    stream: bool = False
    rollback: str | None = None


SAMPLING: dict[object, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 77},
    "penalised": {
        "temperature": 1.0, "top_k": 0, "min_p": 0.01, "seed": 5, "repetition_penalty": 1.2,
        "presence_penalty": 0.4, "frequency_penalty": 0.2, "logit_bias": {3: 1.5},
    },
}  # fmt: skip
LOGPROBS: dict[object, dict[str, Any]] = {
    "none": {},
    "own": {"logprobs": 0},
    "best": {"logprobs": 3},
    "prompt": {"logprobs": 1, "prompt_logprobs": 2},
}


GRAMMARS: dict[object, dict[str, Any]] = {
    None: {},
    "json": {
        "structured_outputs": StructuredOutputs(
            json_schema={
                "type": "object",
                "properties": {
                    "a": {"type": "string", "maxLength": 5},
                    "b": {"type": "array", "items": {"$ref": "#/$defs/item"}, "maxItems": 2},
                },
                "required": ["a", "b"],
                "additionalProperties": False,
                "$defs": {"item": {"enum": ["x", "yes", 3, None]}},
            }
        )
    },
    "regex": {"structured_outputs": StructuredOutputs(regex="[a-z]{2,6}(, [a-z]{2,4}|-[0-9]{2})*")},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {"who": {"type": "string", "maxLength": 4}},
                "required": ["who"],
                "additionalProperties": False,
            },
        },
    }
]


def _think(ask: Ask, value: Any) -> None:
    ask.opens_thinking = value
    ask.options["enable_thinking"] = value


def _tools(ask: Ask, value: Any) -> None:
    if value is not None:
        ask.options.update(tools=TOOLS, tool_choice=value)


def _cache(way: Way, value: Any) -> None:
    way.warm = "cold" if value == "off" else value
    way.options["prefix_cache"] = value != "off"


Edit = Callable[[Any, Any], Any]
ASKS: dict[str, tuple[Sequence[object], Edit]] = {
    "prompt": (("chat", "text"), lambda ask, value: setattr(ask, "chat", value == "chat")),
    "sampling": (tuple(SAMPLING), lambda ask, value: ask.params.update(SAMPLING[value])),
    "stop": ((None, "token", "string"), lambda ask, value: setattr(ask, "stop", value)),
    "logprobs": (tuple(LOGPROBS), lambda ask, value: ask.params.update(LOGPROBS[value])),
    "choices": ((1, 2), lambda ask, value: ask.params.update(n=value)),
    "thinking": ((False, True), _think),
    "budget": (
        (None, 0, 8, 64),
        lambda ask, value: ask.params.update(thinking_budget=value),
    ),
    "grammar": (tuple(GRAMMARS), lambda ask, value: ask.params.update(GRAMMARS[value])),
    "tools": ((None, "auto", "required"), _tools),
}
WAYS: dict[str, tuple[Sequence[object], Edit]] = {
    "cache": (("cold", "exact", "partial", "branch", "together", "disk", "off"), _cache),
    "chunk": (
        (None, 1, 7, 64, 97),
        lambda way, value: way.options.update(max_chunk_tokens=value),
    ),
    "drafts": (
        (0, 1, 2, 3, 4, "auto"),
        lambda way, value: way.options.update(speculative_tokens=value),
    ),
    "batch": ((1, 3, 16), lambda way, value: setattr(way, "company", value - 1)),
    "park": ((None, "once", "often"), lambda way, value: setattr(way, "park", value)),
    "stream": ((False, True), lambda way, value: setattr(way, "stream", value)),
    "rollback": (("snapshots", "replay"), lambda way, value: setattr(way, "rollback", value)),
    "threads": ((1, 2), lambda way, value: way.options.update(threads=value)),
}
FACTORS = {name: values for name, (values, _) in {**ASKS, **WAYS}.items()}
TORCH_FACTORS = {name: values for name, values in FACTORS.items() if name != "threads"}
NATIVE_FACTORS = {name: values for name, values in FACTORS.items() if name != "rollback"}
"""The native cache knows one way to drop drafts, and the native kernels have their own threads."""
RULED_OUT: list[dict[str, Sequence[object]]] = [
    {"stream": (True,), "choices": (2,)},  # a stream is one answer; more are refused
    {"tools": ("auto", "required"), "prompt": ("text",)},  # tools belong to a conversation
    {"tools": ("required",), "grammar": ("json", "regex")},  # an answer cannot be both
]


def ask_of(row: Row) -> Ask:
    """What a row asks for."""
    ask = Ask()
    for name, (_, write) in ASKS.items():
        write(ask, row[name])
    if row["thinking"] and row["budget"] in (0, 8):
        ask.params["max_tokens"] += 40  # what is inserted, and some of the answer
    if row["grammar"] or row["tools"] == "required":
        ask.params["max_tokens"] += 16
    return ask


def way_of(row: Row) -> Way:
    """How a row has it computed."""
    way = Way()
    for name, (_, write) in WAYS.items():
        if name in row:
            write(way, row[name])
    return way


# -- the plain run -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a user gets of one answer."""

    token_ids: tuple[int, ...]
    text: str
    reasoning: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    forced_tokens: int
    reasoning_was_cut: bool
    near_ties: int
    ended_by: str | None
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, kw_only=True)
class Plain:
    """The answers of the plain run, and how certain every token of them is."""

    params: SamplingParams
    prompt_ids: tuple[int, ...]
    answers: list[Answer]
    rivals: list[list[tuple[int, ...]]]
    """Per answer and token: what rounding might have chosen instead."""
    slacks: list[list[float]]
    """Per answer and token: the largest margin that is a tie."""
    routes: Routes = field(default_factory=dict)
    """Of all answers, where rounding may change them."""
    bound: float = 0.0
    """``ties.tie_bound`` of the model."""


def plain_run(subject: Subject, ask: Ask) -> Plain:
    """Each answer alone: no cache, no drafts, no chunks, no company."""
    if ask.stop is None:
        return _plain(subject, ask, {})
    first = subject.plain(replace(ask, stop=None)).answers[0].token_ids
    if ask.stop == "token":
        return _plain(subject, ask, {"stop_token_ids": (first[min(9, len(first) - 1)],)})
    return _plain(subject, ask, {"stop": (_string_across_tokens(subject, first),)})


def _string_across_tokens(subject: Subject, ids: Sequence[int]) -> str:
    """A piece of the answer that begins in one token and ends in another."""
    pieces = [subject.alone.tokenizer.decode([token]) for token in ids]
    for one, other in list(itertools.pairwise(pieces))[2:]:
        if "\ufffd" not in one + other and one.strip() and other.strip():
            return one[-1] + other[:2]
    return "no such text"


def _plain(subject: Subject, ask: Ask, stops: Mapping[str, Any]) -> Plain:
    params, llm = SamplingParams(**ask.params, **stops), subject.alone
    answers, rivals, slacks = [], [], []
    routes: Routes = {}
    prompt_ids: tuple[int, ...] = ()
    for choice in range(params.n):
        noted: dict[int, tuple[tuple[int, ...], float]] = {}
        if ask.chat:
            request, reader = llm.prepare_chat(subject.messages, params, **ask.options)
        else:
            request, reader = llm.prepare_text(subject.text_for(ask), params)
        request = replace(request, choice=choice)
        prompt_ids = request.prompt_ids
        assert len(prompt_ids) > 90, len(prompt_ids)
        llm.engine.add(request)
        deltas = []
        # Row by row, by the plain sampler: it names the rivals, and is what the native one equals.
        with (
            mock.patch.multiple(llm.engine, lanes=None, _choose=_noting(noted)),
            subject.noting(llm) as noted_routes,
        ):
            while llm.engine.has_work and not reader.stopped:
                for event in llm.engine.step():
                    delta = reader.push(event)
                    if delta is not None:
                        deltas.append(delta)
            if reader.stopped:
                llm.engine.cancel(request.id)
                llm.engine.step()
        answers.append(_answer(deltas))
        # What the answers have in common is the same run.
        routes = noted_routes | routes
        # Forced tokens have no rivals, and no margin of their own.
        widest = max((slack for _, slack in noted.values()), default=0.0)
        places = range(len(answers[-1].token_ids))
        rivals.append([noted.get(i, ((), 0.0))[0] for i in places])
        slacks.append([noted.get(i, ((), widest))[1] for i in places])
    return Plain(
        params=params, prompt_ids=prompt_ids, answers=answers, rivals=rivals, slacks=slacks,
        routes=routes, bound=llm.engine.tie_bound or 0.0,
    )  # fmt: skip


def _noting(noted: dict[int, tuple[tuple[int, ...], float]]):
    choose = sampler.choose

    def noting(logits: torch.Tensor, rows, *, defined_ids: int, tie_bound: float | None):
        chosen, others = choose(logits, rows, defined_ids=defined_ids, tie_bound=tie_bound)
        assert tie_bound is not None
        slacks = ties.tolerance(logits.float().amax(-1), tie_bound).tolist()
        for row, some, slack in zip(rows, others, slacks, strict=True):
            noted[row.index] = (some, slack)
        return chosen, others

    return noting


def _answer(pieces: Sequence[Delta] | Sequence[Completion]) -> Answer:
    last = pieces[-1]
    return Answer(
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        text="".join(piece.text for piece in pieces),
        reasoning="".join(piece.reasoning or "" for piece in pieces),
        finish_reason=last.finish_reason,
        prompt_tokens=last.usage.prompt_tokens,
        completion_tokens=last.usage.completion_tokens,
        reasoning_tokens=last.usage.reasoning_tokens,
        forced_tokens=last.usage.forced_tokens,
        reasoning_was_cut=last.usage.reasoning_was_cut,
        near_ties=last.usage.near_ties,
        ended_by=last.ended_by,
        logprobs=tuple(one for piece in pieces for one in piece.logprobs),
        prompt_logprobs=tuple(one for piece in pieces for one in piece.prompt_logprobs),
    )


# -- the composed run ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Composed:
    """The answers of a row, and what happened on the way."""

    answers: list[Answer]
    cached: list[int]
    drafted: int
    accepted: int
    parkings: int
    followed: Sequence[Followed] = ()
    """How routers broke their ties, before the row's own run and in it."""


def composed_run(subject: Subject, row: Row, plain: Plain) -> Composed:
    """A row: the same answers, computed as the row says."""
    ask, way = ask_of(row), way_of(row)
    way.options.update(max_num_seqs=16, max_batch_tokens=256)
    if way.warm != "disk":
        return _composed(subject, row, ask, way, plain, Followed())
    with TemporaryDirectory() as folder:
        way.options["cache_dir"] = folder
        before = subject.open(**way.options)
        with subject.following(before, plain) as followed:
            _warm(before, "exact", plain.prompt_ids)
        before.close()
        return _composed(subject, row, ask, way, plain, followed)


def _composed(
    subject: Subject, row: Row, ask: Ask, way: Way, plain: Plain, before: Followed
) -> Composed:
    llm = subject.open(**way.options)
    if way.rollback is not None:
        llm.engine.runner.cache.rollback = way.rollback
    if subject.drafts_known:
        truth = defaultdict(list, {plain.prompt_ids: list(plain.answers[0].token_ids)})
        with_oracle(llm.engine, truth, 0.75)
    with subject.following(llm, plain) as warming:
        _warm(llm, way.warm, plain.prompt_ids)
    generator = random.Random(2)
    others: list[Stream] = []
    if way.warm == "together":
        # Begins alike and comes first: what is asked waits for the state where they part.
        settings = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        start = [*plain.prompt_ids[:-21], *[1] * 5]
        others.append(Stream(llm, llm._submit(*llm.prepare_text(start, settings))))
    for number in range(way.company):
        length = generator.randrange(1, TOKENS)
        settings = SamplingParams(
            temperature=0.0 if number % 4 else 1.0, seed=number, max_tokens=length, ignore_eos=True
        )
        others.append(llm.stream(subject.company[number % len(subject.company)], settings))
    if way.park:
        _interrupt(llm, plain, often=way.park == "often")
    with subject.following(llm, plain) as followed:
        answers, usages = _answers(subject, llm, ask, way, plain)
        for other in others:
            assert [delta.finish_reason for delta in other][-1] == "length"
        while llm.engine.has_work:
            llm.engine.step()
    llm.close()
    llm.engine.prefix.clear()
    assert llm.engine.pool.free == llm.engine.pool.num_pages, row
    return Composed(
        answers=answers,
        cached=[usage.cached_tokens for usage in usages],
        drafted=sum(usage.drafted_tokens for usage in usages),
        accepted=sum(usage.accepted_tokens for usage in usages),
        parkings=llm.engine.scheduler.parkings,
        followed=(before, warming, followed),
    )


def _answers(
    subject: Subject, llm: LLM, ask: Ask, way: Way, plain: Plain
) -> tuple[list[Answer], list[Usage]]:
    """Ask in the way of a row."""
    answers, usages = [], []
    if way.stream:
        if ask.chat:
            pieces = list(llm.stream(subject.messages, plain.params, **ask.options))
        else:
            pieces = list(llm.stream(subject.text_for(ask), plain.params))
        answers, usages = [_answer(pieces)], [pieces[-1].usage]
    else:
        if ask.chat:
            found = llm.chat(subject.messages, plain.params, **ask.options)
        else:
            [found] = llm.generate(subject.text_for(ask), plain.params)
        for one in (found, *found.others):
            answers.append(_answer([one]))
            usages.append(one.usage)
    return answers, usages


def _warm(llm: LLM, how: str, prompt: tuple[int, ...]) -> None:
    """Let the cache hold some beginning of the prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=1)
    last = len(prompt) - 1
    if how == "exact":
        llm.generate([prompt], params)
    elif how == "partial":
        llm.generate([prompt[: last - 20]], params)
    elif how == "branch":
        for number in (1, 2):
            llm.generate([[*prompt[: last - 20], *[number] * 5]], params)


def _interrupt(llm: LLM, plain: Plain, *, often: bool) -> None:
    """Take running answers to the prompt off, once or every third step."""
    step, generator = llm.engine.step, random.Random(1)
    scheduler = llm.engine.scheduler
    # A short answer may be accepted as a whole in the step behind its prompt.
    seen, once = 0, 1 if _sampled(plain) <= 2 + MAX_DRAFTS else 2

    def interrupted():
        nonlocal seen
        mine = [one for one in scheduler.running if one.request.prompt_ids == plain.prompt_ids]
        if mine:
            seen += 1
            # A few times only: without a cache a parked prompt starts over.
            if seen == once or (often and seen % 3 == 0 and seen <= 18):
                scheduler.park(generator.choice(mine))
        return step()

    llm.engine.step = interrupted


def _sampled(plain: Plain) -> int:
    """Tokens of its first answer that were chosen."""
    return len(plain.answers[0].token_ids) - plain.answers[0].forced_tokens


def assert_it_happened(row: Row, plain: Plain, composed: Composed) -> None:
    """A row that hits nothing, or interrupts nothing, shows nothing."""
    if row["cache"] not in ("cold", "off") and plain.params.prompt_logprobs is None:
        assert min(composed.cached) >= 64, (row, composed.cached)
    sampled = _sampled(plain)
    if row["park"] and sampled > 2:
        assert composed.parkings > 0, row
    if row["drafts"] in (1, 2, 3, 4) and sampled > 12:
        assert composed.drafted > 0, row


# -- what may differ -----------------------------------------------------------------------------


@dataclass(kw_only=True)
class Tally:
    """What a comparison under the tie rule has seen."""

    answers: int = 0
    positions: int = 0
    """Tokens compared: those before, and at, the first difference of two answers."""
    near_ties: int = 0
    """Of these, positions at which the plain run had a rival."""
    differences: int = 0
    """Answers that part from the plain run, each at a near-tie."""
    broken_alike: int = 0
    """Near-ties of routers that would have fallen the other way, and were broken alike."""
    logprobs: int = 0
    """Log-probabilities compared, of these positions and of prompts."""
    furthest: float = 0.0
    """The largest difference of two of them, in units of the bound."""
    beyond: list[str] = field(default_factory=list)
    """Those that differ by more than the bound."""
    drafted: int = 0
    accepted: int = 0

    def __str__(self) -> str:
        return (
            f"{self.answers} answers, {self.positions} positions compared, {self.near_ties} "
            f"near-ties, {self.differences} differences (all at near-ties), {self.broken_alike} "
            f"near-ties of routers broken alike, {len(self.beyond)} of {self.logprobs} "
            f"log-probabilities beyond the bound (furthest {self.furthest:.2f}), {self.accepted} "
            f"of {self.drafted} drafts accepted"
        )


def compare_under_tie_rule(plain: Plain, composed: Composed, tally: Tally) -> None:
    """Raise AssertionError unless every answer is the plain one up to a near-tie.

    Log-probabilities that moved by more than the bound are noted in ``tally.beyond``.
    From the first difference on two answers have different contexts and are not compared. Routers
    break their ties alike in both runs (``routers``), and may differ at nothing else.
    """
    tally.drafted += composed.drafted
    tally.accepted += composed.accepted
    for followed in composed.followed:
        assert not followed.complaints, followed.complaints
        tally.broken_alike += followed.broken_alike
    for one, other, rivals, slacks in zip(
        plain.answers, composed.answers, plain.rivals, plain.slacks, strict=True
    ):
        tally.answers += 1
        same = 0
        for mine, others in zip(one.token_ids, other.token_ids, strict=False):
            if mine != others:
                break
            same += 1
        tally.positions += same
        tally.near_ties += sum(bool(some) for some in rivals[:same])
        for i in range(min(same, len(one.logprobs))):
            _compare_logprobs(one.logprobs[i], other.logprobs[i], slacks[i], tally)
        widest = max(slacks)
        for mine, others in zip(one.prompt_logprobs, other.prompt_logprobs, strict=True):
            _compare_logprobs(mine, others, widest, tally)
        if same == len(one.token_ids) == len(other.token_ids):
            for name in ("text", "reasoning", "finish_reason", "completion_tokens",
                         "reasoning_tokens", "forced_tokens", "reasoning_was_cut",
                         "ended_by"):  # fmt: skip
                assert getattr(one, name) == getattr(other, name), name
            continue
        assert same < min(len(one.token_ids), len(other.token_ids)), (
            f"answers of {len(one.token_ids)} and {len(other.token_ids)} equal tokens"
        )
        tally.positions += 1
        tally.near_ties += 1
        tally.differences += 1
        assert other.token_ids[same] in rivals[same], (
            f"token {same} is {other.token_ids[same]} instead of {one.token_ids[same]}, and only "
            f"{rivals[same]} are within rounding"
        )


def _compare_logprobs(
    mine: TokenLogprobs, other: TokenLogprobs, slack: float, tally: Tally
) -> None:
    pairs = [(mine.logprob, other.logprob)]
    # By rank: which of two equals comes first may differ.
    pairs += [(a, b) for (_, a), (_, b) in zip(mine.top, other.top, strict=True)]
    for a, b in pairs:
        tally.logprobs += 1
        tally.furthest = max(tally.furthest, abs(a - b) / slack)
        if abs(a - b) > slack:
            tally.beyond.append(f"log-probabilities {a} and {b} are further apart than {slack}")
