"""The engine gives each request what it would get alone, and gives back all it took."""

import random

import pytest
import torch

from qnext.engine.engine import Engine
from qnext.engine.request import Event, Request, SamplingParams
from qnext.errors import RequestError


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """Decoding without cache or engine: a full forward per token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def run(engine: Engine) -> dict[str, list[Event]]:
    """Step until nothing is left; events by request."""
    events: dict[str, list[Event]] = {}
    for _ in range(10_000):
        if not engine.has_work:
            return events
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    raise AssertionError("the engine did not finish")


def tokens(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def request(name: str, prompt: list[int], **params) -> Request:
    settings = {"temperature": 0.0, "max_tokens": 8, **params}
    return Request(id=name, prompt_ids=tuple(prompt), params=SamplingParams(**settings))


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [
        [generator.randrange(500) for _ in range(generator.randrange(1, 90))] for _ in range(count)
    ]


@pytest.mark.parametrize("max_batch_tokens", [4, 7, 40, 2048])
def test_greedy_equals_a_full_forward_per_token_for_any_chunking(tiny_model, max_batch_tokens):
    engine = Engine(tiny_model, max_num_seqs=3, max_batch_tokens=max_batch_tokens)
    wanted = {}
    for number, prompt in enumerate(prompts(5)):
        engine.add(request(f"r{number}", prompt))
        wanted[f"r{number}"] = greedy(tiny_model, prompt, 8)
    found = {name: tokens(events) for name, events in run(engine).items()}
    assert found == wanted


def test_seeded_samples_do_not_depend_on_the_company(tiny_model):
    settings = {"temperature": 0.9, "top_k": 40, "seed": 123, "max_tokens": 12}
    prompt = prompts(1, seed=5)[0]
    alone = Engine(tiny_model)
    alone.add(request("x", prompt, **settings))
    wanted = tokens(run(alone)["x"])
    crowd = Engine(tiny_model, max_num_seqs=4, max_batch_tokens=32)
    for number, other in enumerate(prompts(6, seed=6)):
        crowd.add(request(f"o{number}", other, temperature=1.0, max_tokens=5 + number))
    crowd.add(request("x", prompt, **settings))
    assert tokens(run(crowd)["x"]) == wanted


def test_unseeded_samples_differ(tiny_model):
    engine = Engine(tiny_model)
    for name in "ab":
        engine.add(request(name, [1, 2, 3], temperature=5.0, max_tokens=30))
    events = run(engine)
    assert tokens(events["a"]) != tokens(events["b"])


def test_finish_reasons_and_usage(tiny_model):
    prompt = [5, 6, 7]
    plain = greedy(tiny_model, prompt, 8)
    engine = Engine(tiny_model)
    engine.add(request("length", prompt))
    engine.add(request("stop", prompt, stop_token_ids=(plain[3],)))
    engine.add(request("later", prompt, stop_token_ids=(plain[0],), min_tokens=3))
    events = run(engine)
    first = plain.index(plain[3])
    assert events["length"][-1].finish_reason == "length"
    assert events["length"][-1].usage.as_dict()["completion_tokens"] == 8
    assert events["length"][-1].usage.prompt_tokens == 3
    assert events["stop"][-1].finish_reason == "stop"
    assert tokens(events["stop"]) == plain[: first + 1]
    assert plain[0] not in tokens(events["later"])[:3]
    assert all(event.finish_reason is None for event in events["length"][:-1])


def test_end_of_sequence_stops_unless_ignored(tiny_model):
    plain = greedy(tiny_model, [9, 8], 6)
    engine = Engine(tiny_model)
    for name, ignore in (("stops", False), ("goes on", True)):
        params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=ignore)
        engine.add(Request(id=name, prompt_ids=(9, 8), params=params, eos_ids=(plain[2],)))
    events = run(engine)
    assert tokens(events["stops"]) == plain[: plain.index(plain[2]) + 1]
    assert tokens(events["goes on"]) == plain


def test_answers_end_where_the_context_ends(tiny_model):
    engine = Engine(tiny_model, max_model_len=20)
    engine.add(request("x", list(range(15)), max_tokens=None))
    events = run(engine)["x"]
    assert len(tokens(events)) == 5
    assert events[-1].finish_reason == "length"


def test_undefined_ids_are_never_chosen(tiny_model):
    engine = Engine(tiny_model, defined_ids=40)
    engine.add(request("x", [1, 2], temperature=3.0, seed=1, max_tokens=60))
    assert max(tokens(run(engine)["x"])) < 40


def test_logprobs_are_those_of_the_raw_logits(tiny_model):
    prompt = [3, 1, 4, 1, 5]
    engine = Engine(tiny_model)
    engine.add(request("x", prompt, logprobs=3, max_tokens=2, temperature=0.0, logit_bias={7: 50}))
    first = run(engine)["x"][0].logprobs[0]
    wanted = tiny_model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert first.token_id == 7
    assert first.logprob == pytest.approx(float(wanted[7]), abs=1e-4)
    values, ids = wanted.topk(3)
    assert [token for token, _ in first.top] == ids.tolist()
    assert [value for _, value in first.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_cancelling_at_any_moment_frees_everything(tiny_model):
    engine = Engine(tiny_model, max_num_seqs=2, max_batch_tokens=16)
    pages, slots = engine.pool.free, engine.runner.cache.slots_free
    generator = random.Random(3)
    alive, finished = set(), set()
    for number, prompt in enumerate(prompts(30, seed=4)):
        engine.add(request(f"r{number}", prompt, max_tokens=generator.randrange(1, 12)))
        alive.add(f"r{number}")
        for _ in range(generator.randrange(3)):
            if alive and generator.random() < 0.4:
                name = generator.choice(sorted(alive))
                engine.cancel(name)
                engine.cancel(name)
            for event in engine.step():
                if event.finish_reason:
                    alive.discard(event.request_id)
                    finished.add(event.request_id)
    finished.update(run(engine))
    assert len(finished) == 30
    engine.prefix.clear()
    assert engine.pool.free == pages
    assert engine.runner.cache.slots_free == slots
    engine.cancel("r0")
    assert not engine.has_work


def test_a_reused_slot_remembers_nothing(tiny_model):
    prompt = prompts(1, seed=8)[0]
    engine = Engine(tiny_model, max_num_seqs=1)
    for number in range(3):
        engine.add(request(f"r{number}", prompts(1, seed=number)[0]))
    engine.add(request("last", prompt))
    assert tokens(run(engine)["last"]) == greedy(tiny_model, prompt, 8)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 512], {}, r"prompt token 1: id 512 is outside the vocabulary \(0 ... 511\)"),
        ([-1], {}, "id -1 is outside"),
        ([1] * 512, {}, "the prompt has 512 tokens and the context holds 512"),
        ([1], {"stop_token_ids": (600,)}, "id 600 is outside"),
        ([1], {"logit_bias": {700: 1.0}}, "id 700 is outside"),
    ],
)
def test_impossible_requests_are_refused_by_name(tiny_model, prompt, params, message):
    engine = Engine(tiny_model)
    with pytest.raises(RequestError, match=message):
        engine.add(request("x", prompt, **params))
    assert not engine.has_work


def test_two_requests_cannot_share_an_id(tiny_model):
    engine = Engine(tiny_model)
    engine.add(request("x", [1]))
    with pytest.raises(RequestError, match="already in use"):
        engine.add(request("x", [2]))


def test_too_little_memory_is_refused_with_both_numbers(tiny_model):
    with pytest.raises(RequestError, match="memory: 1,000 bytes do not hold"):
        Engine(tiny_model, memory_bytes=1000)
    small = Engine(tiny_model, max_num_seqs=1, memory_bytes=60_000)
    with pytest.raises(RequestError, match="Lower max_tokens or raise the memory budget"):
        small.add(request("x", [1] * 400, max_tokens=100))


def test_the_step_budget_must_exceed_the_number_of_sequences(tiny_model):
    with pytest.raises(RequestError, match=r"max_batch_tokens \(4\) must be larger"):
        Engine(tiny_model, max_num_seqs=4, max_batch_tokens=4)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -1}, "temperature: expected at least 0 and at most 100, found -1"),
        ({"temperature": float("nan")}, "temperature: expected at least 0"),
        ({"top_p": 0}, "top_p: expected more than 0 and at most 1, found 0"),
        ({"min_p": 2}, "min_p"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1"),
        ({"max_tokens": "5"}, "max_tokens: expected a number, found '5'"),
        ({"min_tokens": 9, "max_tokens": 3}, r"min_tokens \(9\) is larger than max_tokens \(3\)"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": [""]}, "stop: an empty string"),
    ],
)
def test_impossible_parameters_are_refused_by_name(params, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**params)
