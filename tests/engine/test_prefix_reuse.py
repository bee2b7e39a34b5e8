"""A prompt that starts like an earlier one starts where that one was, and gets the same answer."""

import pytest
import torch
from test_engine import greedy, prompts, request, run, tokens

from qnext.engine.engine import Engine, choice_seed

LONG = [int(token) for token in torch.randint(0, 500, (200,), generator=torch.manual_seed(3))]


def one(engine: Engine, name: str, prompt: list[int], **params):
    engine.add(request(name, prompt, **params))
    return run(engine)[name]


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_longer_prompt_resumes_before_the_last_token_of_the_shorter(tiny_model, drafts):
    engine = Engine(tiny_model, speculative_tokens=drafts)
    one(engine, "first", LONG[:130])
    events = one(engine, "second", LONG[:170])
    assert events[-1].usage.cached_tokens == 129
    assert tokens(events) == greedy(tiny_model, LONG[:170], 8)


def test_a_conversation_resumes_at_the_end_of_the_answer(tiny_model):
    engine = Engine(tiny_model, speculative_tokens=2)
    answer = tokens(one(engine, "first", LONG[:100], max_tokens=10))
    events = one(engine, "second", [*LONG[:100], *answer, *LONG[150:170]])
    assert events[-1].usage.cached_tokens == 109  # the last token was never run
    prompt = [*LONG[:100], *answer, *LONG[150:170]]
    assert tokens(events) == greedy(tiny_model, prompt, 8)


@pytest.mark.parametrize("shared", [1, 3, 63, 64, 65, 100, 127, 128, 129])
@pytest.mark.parametrize("drafts", [0, 3])
def test_resuming_at_any_offset_equals_starting_cold(tiny_model, shared, drafts):
    engine = Engine(tiny_model, speculative_tokens=drafts)
    engine.add(request("plant", LONG[: shared + 1]))
    run(engine)
    prompt = [*LONG[: shared + 1], *LONG[150:190]]
    events = one(engine, "x", prompt)
    assert events[-1].usage.cached_tokens == shared
    assert tokens(events) == greedy(tiny_model, prompt, 8)
    # The page that was shared in part still belongs to its first owner.
    again = one(engine, "y", [*LONG[: shared + 1], *LONG[60:80]])
    assert again[-1].usage.cached_tokens == shared
    assert tokens(again) == greedy(tiny_model, [*LONG[: shared + 1], *LONG[60:80]], 8)


def test_where_prompts_part_is_learned_from_two_and_used_by_the_third(tiny_model):
    engine = Engine(tiny_model)
    cached = [
        one(engine, f"r{n}", [*LONG[:140], *prompt])[-1].usage.cached_tokens
        for n, prompt in enumerate([[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]])
    ]
    assert cached == [0, 0, 140, 140]


def test_a_hint_lets_the_second_prompt_hit(tiny_model):
    engine = Engine(tiny_model)
    cached = []
    for n, tail in enumerate([[1, 2, 3], [4, 5], [6]]):
        prompt = request(f"r{n}", [*LONG[:140], *tail])
        object.__setattr__(prompt, "hints", ((140, "system"),))
        engine.add(prompt)
        cached.append(run(engine)[f"r{n}"][-1].usage.cached_tokens)
    assert cached == [0, 140, 140]


@pytest.mark.parametrize("shift", [0, 30, 60])
def test_the_split_between_shared_and_unique_text_may_lie_anywhere(tiny_model, shift):
    engine = Engine(tiny_model)
    hits = 0
    for n, tail in enumerate(prompts(8, seed=shift)):
        events = one(engine, f"r{n}", [*LONG[: 100 + shift], *tail], max_tokens=2)
        hits += events[-1].usage.cached_tokens >= 100 + shift
    assert hits == 6


def test_the_same_prompt_again_runs_one_token(tiny_model):
    engine = Engine(tiny_model)
    for number, cached in enumerate([0, 199, 199, 0, 199, 199]):
        if number == 3:  # what is known is not what is there
            while len(engine.prefix):
                engine.prefix.evict(next(iter(engine.prefix)))
        count = 8 + number  # the ends of the answers come and go
        wanted = greedy(tiny_model, LONG, count)
        events = one(engine, f"r{number}", LONG, max_tokens=count)
        assert events[-1].usage.cached_tokens == cached
        assert tokens(events) == wanted


@pytest.mark.parametrize("hint", [130, 199, 200])
def test_the_same_conversation_again_starts_at_its_hint_or_further(tiny_model, hint):
    engine = Engine(tiny_model)
    for cached in (0, min(hint, 199), 199):
        prompt = request("x", LONG)
        object.__setattr__(prompt, "hints", ((hint, "stable"),))
        engine.add(prompt)
        assert run(engine)["x"][-1].usage.cached_tokens == cached


def test_an_answer_of_one_token_leaves_one_state(tiny_model):
    engine = Engine(tiny_model, speculative_tokens=2)
    for _ in range(2):
        one(engine, "x", LONG, max_tokens=1)
        assert [(one.length, one.why) for one in engine.prefix] == [(199, "stable")]
    assert one(engine, "y", LONG, max_tokens=2)[-1].usage.cached_tokens == 199
    assert sorted(snapshot.length for snapshot in engine.prefix) == [199, 201]


def test_prompts_that_run_together_share_pages_without_harm(tiny_model):
    engine = Engine(tiny_model, max_num_seqs=4, max_batch_tokens=64, speculative_tokens=2)
    one(engine, "plant", LONG[:90])
    several = {f"r{n}": [*LONG[:90], *tail] for n, tail in enumerate(prompts(6, seed=30))}
    for name, prompt in several.items():
        engine.add(request(name, prompt))
    events = run(engine)
    for name, prompt in several.items():
        assert tokens(events[name]) == greedy(tiny_model, prompt, 8)
        assert events[name][-1].usage.cached_tokens >= 89


def small(tiny_model, **options) -> Engine:
    """An engine with pages for barely more than one long request."""
    engine = Engine(tiny_model, max_num_seqs=3, max_batch_tokens=64, **options)
    spare = engine.pool.num_pages - 9
    engine.pool.take(spare)  # for good: as if the memory were that much smaller
    engine.pool.num_pages -= spare
    return engine


@pytest.mark.parametrize("drafts", [0, 3])
def test_under_pressure_requests_are_parked_and_come_back_the_same(tiny_model, drafts):
    engine = small(tiny_model, speculative_tokens=drafts)
    several = {f"r{n}": LONG[10 * n : 10 * n + 60] for n in range(4)}
    for name, prompt in several.items():
        engine.add(request(name, prompt, max_tokens=150, ignore_eos=True))
    events = run(engine)
    assert engine.scheduler.parkings > 0
    for name, prompt in several.items():
        assert tokens(events[name]) == greedy(tiny_model, prompt, 150), name
    engine.prefix.clear()
    assert engine.pool.free == engine.pool.num_pages


def test_without_a_prefix_cache_nothing_is_reused(tiny_model):
    engine = Engine(tiny_model, prefix_cache=False)
    for number in range(3):
        assert one(engine, f"r{number}", LONG)[-1].usage.cached_tokens == 0
    assert engine.pool.free == engine.pool.num_pages


def test_prompt_logprobs_are_computed_and_never_reused(tiny_model):
    engine = Engine(tiny_model, max_batch_tokens=50)
    one(engine, "plant", LONG[:120])
    events = one(engine, "x", LONG[:150], prompt_logprobs=2, max_tokens=3)
    assert events[-1].usage.cached_tokens == 0
    found = events[0].prompt_logprobs
    logprobs = tiny_model(torch.tensor([LONG[:150]])).logits[0].log_softmax(-1)
    wanted = [float(logprobs[t, LONG[t + 1]]) for t in range(149)]
    assert [one.token_id for one in found] == LONG[1:150]
    assert [one.logprob for one in found] == pytest.approx(wanted, abs=2e-4)
    assert all(len(one.top) == 2 for one in found)
    assert all(not event.prompt_logprobs for event in events[1:])


def test_banned_words_are_never_completed(tiny_model):
    prompt = LONG[:20]
    plain = greedy(tiny_model, prompt, 8)
    for bad in ((plain[2],), (plain[1], plain[2])):
        engine = Engine(tiny_model, speculative_tokens=2)
        banned = request("x", prompt)
        object.__setattr__(banned, "bad_ids", (bad,))
        engine.add(banned)
        found = tokens(run(engine)["x"])
        for i in range(len(found) - len(bad) + 1):
            assert tuple(found[i : i + len(bad)]) != bad
        assert found[:2] == plain[:2] or plain[2] in plain[:2]


def test_choices_have_their_own_noise():
    seeds = {choice_seed(5, choice) for choice in range(100)}
    assert len(seeds) == 100
    assert choice_seed(5, 0) == 5
