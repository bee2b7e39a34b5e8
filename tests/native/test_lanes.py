"""A step of decoding in one native call says what the general step says, about everything."""

from itertools import pairwise

import pytest
import torch

from qnext import LLM, StructuredOutputs, native
from qnext.engine import lanes as lanes_module
from qnext.engine import native_runner
from qnext.engine.engine import Engine
from qnext.engine.lanes import MOST_ROUNDS
from qnext.engine.request import Request, SamplingParams
from qnext.model.native import NativeModel

pytestmark = pytest.mark.skipif(native.unfit() is not None, reason="no native kernels")

WISHES = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "seed": 4, "top_k": 20, "top_p": 0.8, "logprobs": 2},
    {"temperature": 0.9, "seed": 5, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    {"temperature": 0.0, "frequency_penalty": 0.4, "min_tokens": 5, "logprobs": 0},
    {"temperature": 1.3, "seed": 6, "min_p": 0.02, "logit_bias": {7: 3.0}},
]


@pytest.fixture(scope="module")
def model(tiny_model) -> NativeModel:
    return NativeModel.from_model(tiny_model)


def run(model: NativeModel, *, lanes: bool, drafts: int | str, **options):
    """By request: tokens, log-probabilities, why it ended, usage; and steps made by lanes."""
    engine = Engine(
        model, max_num_seqs=4, memory_bytes=16 << 20, speculative_tokens=drafts,
        batch_invariant=True, **options,
    )  # fmt: skip
    if not lanes:
        engine.lanes = None
    by_lanes, step = 0, None if engine.lanes is None else engine.lanes.step

    def counted(told):
        nonlocal by_lanes
        by_lanes += 1
        assert step is not None
        return step(told)

    if engine.lanes is not None:
        engine.lanes.step = counted
    for number, wish in enumerate(WISHES):
        params = SamplingParams(max_tokens=9 + 17 * number, stop_token_ids=(9, 77), **wish)
        prompt = tuple(range(5 + number, 40 + 9 * number))
        engine.add(
            Request(id=str(number), prompt_ids=prompt, params=params, bad_ids=((3,), (4, 4)))
        )
    found = {str(number): ([], [], None, None) for number in range(len(WISHES))}
    while engine.has_work:
        for event in engine.step():
            tokens, logprobs, _, _ = found[event.request_id]
            tokens += event.token_ids
            logprobs += event.logprobs
            found[event.request_id] = (tokens, logprobs, event.finish_reason, event.usage)
    return found, by_lanes


@pytest.mark.parametrize("options", [{}, {"prefix_cache": False, "max_batch_tokens": 40}])
@pytest.mark.parametrize("drafts", [0, 1, 3, "auto"])
def test_one_call_says_what_the_general_step_says(model, drafts, options):
    plain, none = run(model, lanes=False, drafts=drafts, **options)
    found, by_lanes = run(model, lanes=True, drafts=drafts, **options)
    assert none == 0
    assert by_lanes > 20
    for name, (tokens, logprobs, reason, usage) in plain.items():
        assert found[name][:3] == (tokens, logprobs, reason), name
        assert found[name][3].completion_tokens == usage.completion_tokens == len(tokens)
        assert found[name][3].near_ties == usage.near_ties
    assert {reason for _, _, reason, _ in plain.values()} == {"stop", "length"}


def test_a_quiet_rest_is_made_of_steps_without_drafts(model, monkeypatch):
    """No clock, no hidden rows; and drafting goes on behind it as behind a snapshot."""
    clock = []
    monkeypatch.setattr(lanes_module, "perf_counter", lambda: clock.append(0) or 0.0)
    params = SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)
    found, usage, seen = {}, None, {}
    for setting in (0, "auto"):
        engine = Engine(
            model, max_num_seqs=2, memory_bytes=8 << 20, speculative_tokens=setting,
            batch_invariant=True,
        )  # fmt: skip
        policy, asked = engine.policy, []

        def held(*_, policy=policy, asked=asked, **__):
            asked.append(policy.quiet)
            return 2 if len(asked) % 6 else 0

        def rest(*_, policy=policy, **__):
            policy.quiet, policy.quiet_sizes = 10, {False: range(1, 3), True: range(0)}

        policy.held, policy.rest_quietly = held, rest
        for name in ("a", "b"):
            engine.add(Request(id=name, prompt_ids=(5, 6, 7, 8), params=params))
        answers, seen[setting] = {"a": [], "b": []}, 0
        while engine.has_work:
            quiet, asked_before, clock_before = policy.quiet, len(asked), len(clock)
            for event in engine.step():
                answers[event.request_id] += event.token_ids
                usage = event.usage
            if quiet and len(engine.scheduler.running) == 2:
                seen[setting] += 1
                assert (len(asked), len(clock)) == (asked_before, clock_before)
                assert not engine.runner.keeps_rows
                assert not any(engine.runner._backlog.values())
                assert not engine.runner._run_rows
                assert not any(s.drafts for s in engine.scheduler.running)
        found[setting] = answers
    assert seen[0] == 0 < seen["auto"]
    assert found[0] == found["auto"]
    assert usage is not None
    assert usage.drafted_tokens > 20


def test_a_rest_is_no_longer_than_it_was_to_be(model, monkeypatch):
    """Its first step, and those that follow in the same call, count too."""
    monkeypatch.setattr(native_runner, "WITHIN_S", 60.0)
    engine = Engine(model, max_num_seqs=2, memory_bytes=8 << 20, speculative_tokens="auto")
    policy, asked = engine.policy, []

    def rest(*_, **__):
        policy.quiet, policy.quiet_sizes = 10, {False: range(1, 3), True: range(0)}

    policy.held = lambda *_, **__: asked.append(engine.steps) or 0
    policy.rest_quietly = rest
    for name in ("a", "b"):
        params = SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)
        engine.add(Request(id=name, prompt_ids=(5, 6, 7, 8), params=params))
    while engine.has_work:
        engine.step()
    assert len(asked) > 5
    # The first is asked about behind the prompts, and its steps follow.
    assert [after - before for before, after in pairwise(asked[1:])] == [11] * (len(asked) - 2)


@pytest.mark.parametrize("drafts", [0, 2])
def test_steps_follow_each_other_in_one_call_as_long_as_time_allows(model, drafts, monkeypatch):
    """What comes in between waits for the time allowed and no longer; answers are the same."""

    def answer(seconds, **wish):
        monkeypatch.setattr(native_runner, "WITHIN_S", seconds)
        engine = Engine(
            model, max_num_seqs=2, memory_bytes=16 << 20, speculative_tokens=drafts,
            batch_invariant=True,
        )  # fmt: skip
        for name, stop in (("a", ()), ("b", (77,))):
            params = SamplingParams(
                max_tokens=150, seed=1, ignore_eos=True, stop_token_ids=stop, **wish
            )
            engine.add(Request(id=name, prompt_ids=(5, 6, 7, ord(name)), params=params))
        found, most = {"a": [], "b": []}, 0
        while engine.has_work:
            for event in engine.step():
                found[event.request_id] += event.token_ids
                most = max(most, len(event.token_ids))
        return found, most

    (alone, most), (together, more) = answer(0.0), answer(60.0)
    assert together == alone
    assert most <= 1 + drafts < MOST_ROUNDS <= more
    # Stop strings are looked for behind every step.
    watched, most = answer(60.0, stop=("never said",))
    assert watched == alone
    assert most <= 1 + drafts


def test_unlikely_drafts_are_not_made(model):
    """Random weights find every token unlikely: with a bar, nothing is drafted."""
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    drafted = {}
    for least_share in (0.0, 0.9):
        engine = Engine(model, max_num_seqs=1, memory_bytes=8 << 20, speculative_tokens=2)
        engine.policy.least_share = least_share
        engine.add(Request(id="a", prompt_ids=(5, 6, 7), params=params))
        while engine.has_work:
            for event in engine.step():
                drafted[least_share] = event.usage.drafted_tokens
    assert drafted[0.0] > 10
    assert drafted[0.9] == 0


def test_pytorch_leaves_the_cores_to_the_kernels_during_a_step(tiny_folder, monkeypatch):
    with LLM(tiny_folder, backend="native") as llm:
        seen = []
        step = llm.engine._step
        monkeypatch.setattr(
            llm.engine, "_step", lambda: (seen.append(torch.get_num_threads()), step())[1]
        )
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            llm.generate("a", SamplingParams(temperature=0.0, max_tokens=3))
            assert set(seen) == {1}
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)


FORMS = [
    {
        "json_schema": {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
        }
    },
    {"regex": r"(abc|abd){2}[0-9]{0,9}"},
    {"choice": ["red", "green", "greenish"]},
    {"json_object": True},
]


@pytest.mark.parametrize("drafts", [0, 1, "auto"])
def test_one_call_holds_to_rules_as_the_general_step_does(tiny_folder, drafts):
    """Forms beside free answers, greedy, drawn and behind a filter, with and without numbers."""
    pytest.importorskip("llguidance")
    wishes = [
        {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.0, "logprobs": 1},
        {"temperature": 0.8, "top_k": 9}, {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "frequency_penalty": 0.4, "logprobs": 0}, {"temperature": 0.0, "n": 2},
    ]  # fmt: skip
    params = [
        SamplingParams(**wish, seed=i, max_tokens=8 + 6 * i, structured_outputs=form)
        for i, wish in enumerate(wishes)
        for form in (*[StructuredOutputs(**one) for one in FORMS], None)
    ]
    found, by_lanes = {}, 0
    for lanes in (False, True):
        with LLM(tiny_folder, speculative_tokens=drafts, memory="64MiB", batch_invariant=True,
                 threads=1, max_num_seqs=3, backend="native") as llm:  # fmt: skip
            engine = llm.engine
            if lanes:
                assert engine.lanes is not None
                step, running = engine.lanes.step, engine.scheduler.running

                def counted(told, step=step, running=running):
                    nonlocal by_lanes
                    by_lanes += any(sequence.guide is not None for sequence in running)
                    return step(told)

                engine.lanes.step = counted
            else:
                engine.lanes = None
            answers = llm.generate(["Go on.\n"] * len(params), params)
        found[lanes] = [
            (one.token_ids, one.text, one.finish_reason, one.logprobs, one.usage.forced_tokens,
             one.usage.near_ties, one.usage.completion_tokens, one.usage.reasoning_tokens)
            for answer in answers for one in (answer, *answer.others)
        ]  # fmt: skip
    assert found[True] == found[False]
    assert by_lanes > 40 or drafts == 1
    assert {one[2] for one in found[True]} == {"stop", "length"}
    assert sum(one[4] > 0 for one in found[True]) > 5
