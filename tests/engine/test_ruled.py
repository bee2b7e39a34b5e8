"""A token tried before the mask is known is the token the mask would have left."""

import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from schemas import schema

from qnext import LLM, SamplingParams, StructuredOutputs, native
from qnext.engine import native_sampler, ruled, sampler
from qnext.engine.guide import Guide, Rules
from qnext.engine.regions import Regions, Tag
from qnext.engine.request import Request
from qnext.engine.ruled import choose_ruled, mask_before, may_try, ruled_by
from qnext.engine.sampler import SampleRow, allowed
from qnext.text.grammar import GrammarCompiler, GrammarMatcher

FORMS = [
    {"json_schema": schema(3)},
    {"json_schema": schema(8)},
    {"regex": r"(abc|abd){2}[0-9]{0,3}"},
    {"regex": "(?s:.{1,40})"},
    {"choice": ["red", "green", "greenish"]},
    {"json_object": True},
]
V = 96
END = 90
GROUP = 8
"""Tokens that begin alike: none of them may follow where the first may not."""


class Numbers:
    """A grammar whose mask is drawn from all tokens before; mostly it leaves a choice."""

    def __init__(self) -> None:
        self.way: list[int] = []
        self.filled = 0

    def begin(self) -> "Numbers":
        return self

    def _allowed(self) -> set[int]:
        generator = random.Random(repr(self.way))
        count = generator.choice([1, 3, 30, 80])
        if count == 1:
            return {generator.randrange(0, END, GROUP)}
        found = generator.sample(range(END), count)
        return {*found, *(token - token % GROUP for token in found)}

    def fill(self, words: np.ndarray) -> str | None:
        self.filled += 1
        for token in self._allowed():
            words[token // 32] |= np.uint32(1 << token % 32)
        return None

    def knows_mask(self) -> bool:
        return False

    def consume(self, token: int) -> bool:
        self.way.append(token)
        return token in Numbers._allowed_of(self.way[:-1])

    @staticmethod
    def _allowed_of(way: list[int]) -> set[int]:
        other = Numbers()
        other.way = way
        return other._allowed()

    def rollback(self, count: int) -> None:
        del self.way[len(self.way) - count :]

    def accepts(self, token: int) -> bool:
        return token in self._allowed()

    def start_of(self, token: int) -> int | None:
        return None if token % 3 == 1 else token - token % GROUP

    def may_end(self) -> bool:
        return False

    def is_over(self) -> bool:
        return False

    def may_be_forced(self) -> bool:
        return len(self._allowed()) == 1

    def certain(self) -> tuple[int, ...] | None:
        return tuple(self._allowed()) if len(self.way) % 2 and self.may_be_forced() else None


def number_guide(way: list[int]) -> tuple[Guide, Numbers]:
    grammar = Numbers()
    regions = Regions(
        think=(Tag(text=b"<t>", id=91), Tag(text=b"</t>", id=92)),
        tool=(Tag(text=b"<c>", id=93), Tag(text=b"</c>", id=94)), may_think=False,
    )  # fmt: skip
    rules = Rules(regions=regions, vocab_size=V, end_ids=(END,), control_ids=(91, 92, 93, 94),
                  answer=grammar)  # fmt: skip
    guide = Guide(rules)
    for token in way:
        guide.commit(token)
    return guide, grammar


def some_way(generator: random.Random, length: int) -> list[int]:
    way: list[int] = []
    for _ in range(length):
        way.append(generator.choice(sorted(Numbers._allowed_of(way))))
    return way


def params_of(generator: random.Random) -> SamplingParams:
    filters = [{}, {}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}]
    adjusted = [{}, {"repetition_penalty": 1.5}, {"logit_bias": {3: 5.0, 40: -9.0}},
                {"frequency_penalty": 0.5}, {"min_tokens": 40}]  # fmt: skip
    return SamplingParams(
        temperature=generator.choice([0.0, 0.0, 0.7, 1.0]), max_tokens=50,
        **generator.choice(filters), **generator.choice(adjusted),
    )  # fmt: skip


BACKENDS = [
    sampler.choose,
    pytest.param(
        native_sampler.choose,
        marks=pytest.mark.skipif(native.unfit() is not None, reason="no native kernels"),
    ),
]


@pytest.mark.parametrize("choose", BACKENDS, ids=["plain", "native"])
def test_choices_and_near_ties_are_those_under_the_mask(choose):
    """Answers with and without drafts in one batch, coarse logits: many ties, many refusals."""
    generator, torch_generator = random.Random(5), torch.Generator().manual_seed(5)
    spared = looked = refused = closes = 0
    for _ in range(60):
        rows, rules, masked, last = [], [], [], []
        for answer in range(4):
            way = some_way(generator, generator.randrange(4))
            drafts = some_way(generator, len(way) + generator.randrange(3))
            # Drafts continue the way they were made on.
            drafts = drafts[len(way) :] if drafts[: len(way)] == way else []
            params, (guide, _) = params_of(generator), number_guide(way)
            assert guide.valid(drafts) == len(drafts)
            for count in range(len(drafts) + 1):
                asked = {
                    "params": params, "seed": answer, "index": len(way) + count,
                    "prompt_ids": (1, 2, 3), "counts": Counter([*way, *drafts[:count]]),
                    "stop_ids": (END,), "bad_words": [(7,), (8,)],
                }  # fmt: skip
                rows.append(SampleRow(**asked, mask=mask_before(guide, drafts[:count], params)))
                rules.append(ruled_by(guide, drafts, count))
                other, _ = number_guide(way)
                masked.append(SampleRow(**asked, mask=other.mask(drafts[:count])))
                last.append(count == len(drafts))
        logits = (torch.randn(len(rows), V, generator=torch_generator) * 4).round() / 2
        spared += sum(row.mask is None for row in rows)
        before = [row.mask is None for row in rows]
        found, rivals = choose_ruled(choose, logits, rows, rules, defined_ids=V - 1, tie_bound=1e-4)
        looked += sum(now.mask is not None and was for now, was in zip(rows, before, strict=True))
        wanted, others = choose(logits, masked, defined_ids=V - 1, tie_bound=1e-4)
        dropped = False
        for r, rule in enumerate(rules):
            if not dropped:
                assert found[r] == wanted[r]
                assert bool(rivals[r]) == bool(others[r])
                closes += bool(rivals[r])
                refused += not allowed(masked[r].mask, V)[int(logits[r, : V - 1].argmax())]
            dropped = not last[r] and (dropped or found[r] != rule.draft)
    assert min(spared - looked, looked, refused, closes) > 10


@pytest.mark.parametrize("most", [1, 5, 64, 96, 200])
def test_tokens_are_ranked_as_sorted(most, monkeypatch):
    """By score, then by id, with many equal scores at the edge; natively and without."""
    generator = torch.Generator().manual_seed(most)
    for width in (1, 60, 64, 65, 96, 700):
        logits_V = (torch.randn(width + 3, generator=generator) * 2).round() / 2
        logits_V[::7] = -float("inf")
        scores = logits_V.tolist()[:width]
        right = sorted(range(width), key=lambda token: (-scores[token], token))[:most]
        finite = [(token, scores[token]) for token in right if scores[token] > -float("inf")]
        for reason in (native.unfit(), "left out"):
            monkeypatch.setattr(native, "unfit", lambda reason=reason: reason)
            found = ruled.ranked(logits_V.numpy(), defined_ids=width, most=most)
            assert [one for one in found if one[1] > -float("inf")] == finite
            monkeypatch.undo()


def test_what_may_be_tried():
    assert may_try(SamplingParams(temperature=0.0, top_k=3, top_p=0.5))
    assert may_try(SamplingParams(temperature=1.0, frequency_penalty=0.4))
    for options in ({"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert not may_try(SamplingParams(temperature=0.5, **options))
    guide, grammar = number_guide([])
    if not guide.can_try():
        pytest.fail("the first choice of this grammar is not forced")
    assert mask_before(guide, (), SamplingParams(temperature=0.0)) is None
    assert grammar.filled == 0
    assert mask_before(guide, (), SamplingParams(temperature=1.0, top_p=0.9)) is not None


def test_a_near_tie_stands_where_nothing_is_ruled_out():
    """A budget for reasoning alone has rules, but no mask: nothing is chosen twice."""
    regions = number_guide([])[0].rules.regions
    guide = Guide(Rules(regions=regions, vocab_size=V, end_ids=(END,), budget=9))
    rows = [SampleRow(params=SamplingParams(temperature=0.0), seed=0, index=0)]
    chosen = 0

    def choose(*args, **options):
        nonlocal chosen
        chosen += 1
        return sampler.choose(*args, **options)

    tokens, [rivals] = choose_ruled(
        choose, torch.zeros(1, V), rows, [ruled_by(guide, (), 0)], defined_ids=V, tie_bound=1e-4
    )
    assert tokens == [0]
    assert len(rivals) == V - 1
    assert chosen == 1


def test_a_place_behind_which_drafts_stand_is_looked_up_again():
    generator = random.Random(1)
    for _ in range(40):
        way = some_way(generator, 6)
        guide, _ = number_guide(way[:2])
        assert guide.valid(way[2:]) == 4
        for count in (4, 1, 3, 0, 2):
            right = number_guide(way[: 2 + count])[0].mask()
            assert [guide.allows(t, way[2 : 2 + count]) for t in range(V)] == allowed(
                right, V
            ).tolist()
            np.testing.assert_array_equal(guide.mask(way[2 : 2 + count]), right)
        assert guide.failed is None


@pytest.fixture(scope="module")
def llm(tiny_folder):
    pytest.importorskip("llguidance")
    with LLM(tiny_folder, memory="64MiB", threads=1) as llm:
        yield llm


TOOLS = [{"type": "function", "function": {"name": "find", "parameters": schema(4)}}]


def requests(llm: LLM) -> list[Request]:
    forms = [SamplingParams(structured_outputs=StructuredOutputs(**form)) for form in FORMS]
    found = [llm.prepare_text("Go on.\n", params)[0] for params in forms]
    found += [llm.prepare_text("Go on.\n<think>\n", params)[0] for params in forms[:1]]
    ask = [{"role": "user", "content": "Find it."}]
    for choice in ("required", "auto"):
        found.append(
            llm.prepare_chat(
                ask, SamplingParams(), tools=TOOLS, tool_choice=choice, strict=True
            )[0]
        )  # fmt: skip
    return found


def test_a_token_is_allowed_where_its_bit_is_set(llm):
    """Every token, at every place of random answers, of every kind of grammar."""
    width, places, tried, forced, left_out = llm.engine.vocab_size, 0, 0, 0, 0
    for number, request in enumerate(requests(llm)):
        generator = random.Random(number)
        for _ in range(2):
            quick, slow = Guide(request.rules), Guide(request.rules)
            for _ in range(30):
                mask = slow.mask()
                right = [True] * width if mask is None else allowed(mask, width).tolist()
                tried += quick.can_try()
                probe = sorted(
                    {*generator.sample(range(width), 40), *request.rules.end_ids,
                     *request.rules.control_ids}
                )  # fmt: skip
                probe += [t for t in generator.sample(range(width), 200) if right[t]][:20]
                assert [quick.allows(t) for t in probe] == [right[t] for t in probe]
                if quick.can_try():
                    says, start_of = quick.tester()
                    assert [says(t) for t in probe] == [quick.says(t) for t in probe]
                    starts = [start_of(t) for t in range(width)]
                    for start in {*starts} - {None}:
                        alike = [t for t in range(width) if starts[t] == start]
                        assert right[start] or not any(right[t] for t in alike)
                        left_out += not right[start] and len(alike) > 3
                assert quick.has_no_choice == slow.has_no_choice == (sum(right) == 1)
                token = generator.choice([t for t in range(width) if right[t]])
                quick.commit(token)
                slow.commit(token)
                places += 1
                if slow.is_done or token in request.rules.end_ids:
                    break
                forced += len(found := quick.forced(room=5, stops=())) > 1
                for sure in found:
                    np.testing.assert_array_equal(
                        np.flatnonzero(allowed(slow.mask(), width)), [sure]
                    )  # fmt: skip
                    slow.commit(sure)
                assert len(found) == 5 or quick.is_done or not slow.has_no_choice
                if slow.is_done:
                    break
            assert quick.state == slow.state
            assert quick.failed is slow.failed is None
    assert 20 < tried < places
    assert forced > 10
    assert left_out > 30


def test_a_byte_that_ends_answers_says_nothing_about_longer_tokens(llm):
    """As where "\n" ends an answer: what begins with it may stand in one."""
    tokenizer, width = llm.tokenizer, llm.engine.vocab_size
    end, begun, refused, next_best = (tokenizer.id_of(text) for text in (" ", "f", ".", "a"))
    compiler = GrammarCompiler(tokenizer, end_ids=(end,), vocab_size=width)
    rules = Rules(regions=requests(llm)[0].rules.regions, vocab_size=width, end_ids=(end,),
                  answer=compiler.regex("[a-z ]{9,30}"))  # fmt: skip
    right = Guide(rules)
    right.commit(begun)
    assert not allowed(right.mask(), width)[end]  # nor does its byte mean that it may end here
    found = []
    for token in np.flatnonzero(allowed(right.mask(), width)).tolist():
        guide = Guide(rules)
        guide.commit(begun)
        logits = torch.zeros(1, width)
        logits[0, next_best], logits[0, token], logits[0, refused] = 1.0, 2.0, 3.0
        rows = [SampleRow(params=SamplingParams(temperature=0.0), seed=0, index=1)]
        [chosen], _ = choose_ruled(
            sampler.choose, logits, rows, [ruled_by(guide, (), 0)],
            defined_ids=tokenizer.id_limit, tie_bound=None,
        )  # fmt: skip
        assert chosen == token
        found.append(tokenizer.token_bytes(token))
    assert sum(text.startswith(b" ") for text in found) > 5


def test_a_byte_that_ends_answers_is_not_forced_as_text(llm):
    """Where nothing else spells what is certain, the form fails; it does not end as if complete."""
    tokenizer, width = llm.tokenizer, llm.engine.vocab_size
    end, begun, after = (tokenizer.id_of(text) for text in (" ", "f", " the"))
    compiler = GrammarCompiler(tokenizer, end_ids=(end,), vocab_size=width)
    guide = Guide(
        Rules(regions=requests(llm)[0].rules.regions, vocab_size=width, end_ids=(end,),
              answer=compiler.regex("f the 9"))
    )  # fmt: skip
    guide.commit(begun)
    mask = allowed(guide.mask(), width)
    assert mask[after]
    assert not mask[end]
    guide.commit(after)
    assert tokenizer.id_of(" 9") is None
    guide.forced(room=1, stops=())
    assert guide.failed == "the grammar allows nothing"


def test_what_is_known_of_the_start_and_the_end_is_what_the_library_finds(llm):
    """The mask before the first token, and that a complete text has only its end before it."""
    width, over = llm.engine.vocab_size, 0
    for number, request in enumerate(requests(llm)):
        grammar = request.rules.answer or request.rules.call
        generator = random.Random(number)
        for _ in range(3):
            matcher, plain = grammar.begin(), grammar.begin()
            plain._first = None
            for place in range(60):
                found = np.zeros((2, -(-width // 32)), dtype=np.uint32)
                assert matcher.fill(found[0]) is plain.fill(found[1]) is None
                np.testing.assert_array_equal(found[0], found[1])
                known = matcher._first is not None
                assert known == (place == 0)
                tokens = np.flatnonzero(allowed(found[1], width)).tolist()
                over += matcher.is_over()
                if matcher.is_over():
                    assert sorted(tokens) == sorted(request.rules.end_ids)
                token = generator.choice(tokens)
                if token in request.rules.end_ids:
                    break
                assert matcher.consume(token)
                assert plain.consume(token)
    assert over > 3


def test_where_the_mask_is_at_hand_nothing_is_tried(llm, monkeypatch):
    """Before the first token of an answer, and of a call: the library is not asked."""
    rules, choice = requests(llm)[-1].rules, ["red", "green"]
    opening = rules.regions.tool[0].id
    assert opening is not None
    asked = []
    for name in ("fill", "certain", "may_be_forced", "accepts"):
        ask = getattr(GrammarMatcher, name)

        def noted(matcher, *args, ask=ask, name=name):
            asked.append((name, matcher._first is not None))
            return ask(matcher, *args)

        monkeypatch.setattr(GrammarMatcher, name, noted)
    for grammar in (llm.rule_book.compiler.choice(choice), llm.rule_book.compiler.regex("ab")):
        for what, way in (("answer", []), ("call", [opening])):
            guide = Guide(replace(rules, **{"answer": None, "call": None, what: grammar}))
            for token in way:
                guide.commit(token)
            del asked[:]
            assert not guide.can_try()
            assert asked == [("fill", True)]
            mask = guide.mask()
            assert mask is not None
            assert guide.has_no_choice == (allowed(mask, llm.engine.vocab_size).sum() == 1)
            assert asked == [("fill", True)]


def test_answers_are_those_of_masks_alone(tiny_folder, monkeypatch):
    """Whole answers, log-probabilities and usage, greedy and drawn, drafted and not."""
    pytest.importorskip("llguidance")
    found, masks = {}, {}
    find = Guide._find_mask

    def counted(guide, frame):
        masks[key] += 1
        return find(guide, frame)

    monkeypatch.setattr(Guide, "_find_mask", counted)
    for drafts in (0, 2):
        for tries in (True, False):
            if not tries:
                monkeypatch.setattr(ruled, "may_try", lambda params: False)
            key = drafts, tries
            masks[key] = 0
            with LLM(tiny_folder, speculative_tokens=drafts, memory="64MiB",
                     batch_invariant=True, threads=1) as llm:  # fmt: skip
                closing = {llm.tokenizer.id_of(text): 9.0 for text in ('"', "}", "]", ",")}
                params = [
                    SamplingParams(
                        temperature=0.0 if i % 2 else 1.0, seed=i, max_tokens=40, n=1 + i % 2,
                        logit_bias=closing if i < len(FORMS) else {}, logprobs=1,
                        structured_outputs=StructuredOutputs(**one),
                    )
                    for i, one in enumerate(FORMS * 2)
                ]  # fmt: skip
                answers = llm.generate(["Go on.\n"] * len(params), params)
            found[key] = [
                (one.token_ids, one.text, one.finish_reason, one.logprobs,
                 one.usage.forced_tokens, one.usage.near_ties)
                for answer in answers for one in (answer, *answer.others)
            ]  # fmt: skip
            monkeypatch.setattr(ruled, "may_try", may_try)
    assert len({json.dumps([one[:4] for one in some], default=str) for some in found.values()}) == 1
    for drafts in (0, 2):
        assert found[drafts, True] == found[drafts, False]
        assert masks[drafts, True] < 0.7 * masks[drafts, False]
