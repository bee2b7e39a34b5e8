"""What a prompt has left on disk is used after a restart, and changes no bit of the answer."""

import random
from pathlib import Path

import pytest
import torch
from test_engine import request, run, tokens

from qnext.engine import disk
from qnext.engine.engine import Engine
from qnext.engine.tier import RETRY_EVERY, LoadTime
from qnext.errors import RequestError
from qnext.model.cache import HybridCache
from qnext.model.model import CausalLM
from qnext.ops import OpSpec, invariant, select

LONG = [int(token) for token in torch.randint(0, 500, (300,), generator=torch.manual_seed(5))]


class Ticking:
    """A clock that moves a millisecond with every look: prompts seem slow, reading fast."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture(scope="module")
def exact_model(tiny_model):
    """The tiny model with path-independent ops."""
    model = CausalLM(tiny_model.config, ops=select(OpSpec(), prefer=invariant()))
    model.load_state_dict(tiny_model.state_dict())
    return model.eval().requires_grad_(False)


@pytest.fixture
def start(exact_model, tmp_path):
    engines = []

    def start(**options) -> Engine:
        settings = {"cache_dir": tmp_path, "clock": Ticking()} | options
        engines.append(Engine(exact_model, **settings))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def answer(engine: Engine, name: str, prompt, **params):
    """Events of one request that also wants log-probabilities."""
    engine.add(request(name, list(prompt), logprobs=3, **params))
    return run(engine)[name]


def said(events):
    return tokens(events), [one for event in events for one in event.logprobs]


def cached(events) -> int:
    return events[-1].usage.cached_tokens


@pytest.mark.parametrize("length", [2, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("drafts", [0, 3])
def test_a_restart_loses_nothing_and_changes_no_bit(start, exact_model, length, drafts):
    prompt = [*LONG[: length + 1], *LONG[250:290]]
    cold = said(answer(Engine(exact_model, prefix_cache=False), "x", prompt))
    first = start(speculative_tokens=drafts)
    answer(first, "plant", LONG[: length + 1])
    first.close()
    second = start(speculative_tokens=drafts)
    events = answer(second, "x", prompt)
    assert cached(events) == length
    assert said(events) == cold
    assert second.tier.store.counts["loaded"] == 1


def test_the_same_prompt_runs_one_token_after_a_restart(start, exact_model):
    cold = said(answer(Engine(exact_model, prefix_cache=False), "x", LONG))
    for reused in (0, 299):
        engine = start(speculative_tokens=2)
        events = answer(engine, "x", LONG)
        assert cached(events) == reused
        assert said(events) == cold
        engine.close()


def test_what_was_written_without_drafts_serves_those_who_draft_and_the_other_way(
    start, exact_model
):
    prompt = LONG[:220]
    cold = said(answer(Engine(exact_model, prefix_cache=False), "x", prompt))
    for number, (writing, reading) in enumerate([(0, 3), (3, 0), (0, 2)]):
        engine = start(speculative_tokens=writing)
        answer(engine, "plant", LONG[: 101 + 40 * number])
        engine.close()
        engine = start(speculative_tokens=reading)
        events = answer(engine, "x", prompt)
        assert cached(events) == 100 + 40 * number
        assert said(events) == cold
        engine.prefix.clear()  # what this one has learned stays out of the next
        engine.close()


def test_a_conversation_goes_on_after_a_restart(start, exact_model):
    history, answers = list(LONG[:90]), []
    for turn in range(4):
        engine = start(speculative_tokens=2)
        events = answer(engine, f"turn {turn}", history, max_tokens=12)
        answers.append((list(history), said(events), cached(events)))
        history = [*history, *tokens(events), *LONG[100 + 20 * turn : 120 + 20 * turn]]
        engine.close()
    for prompt, found, _ in answers:
        assert said(answer(Engine(exact_model, prefix_cache=False), "x", prompt, max_tokens=12)) \
            == found  # fmt: skip
    # All but the token that was never run and what the user has added since.
    assert [reused for _, _, reused in answers] == [0] + [
        len(before) + 11 for before, _, _ in answers[:-1]
    ]


def test_what_is_evicted_comes_back_from_disk(start, exact_model):
    engine = start(max_num_seqs=2, max_batch_tokens=64)
    spare = engine.pool.num_pages - 8
    engine.pool.take(spare)  # as if the memory were that much smaller
    engine.pool.num_pages -= spare
    documents = [LONG[30 * n : 30 * n + 140] for n in range(5)]
    for number, document in enumerate(documents):
        answer(engine, f"plant {number}", document)
        engine.tier.store.flush()
    in_memory = len(engine.prefix)
    for number, document in enumerate(documents):
        prompt = [*document, *LONG[280:290]]
        events = answer(engine, f"again {number}", prompt)
        engine.tier.store.flush()
        assert cached(events) == 139
        assert said(events) == said(
            answer(Engine(exact_model, prefix_cache=False), "x", prompt)
        )  # fmt: skip
    assert engine.tier.store.counts["loaded"] >= 5 - in_memory > 0
    engine.prefix.clear()
    assert engine.pool.free == engine.pool.num_pages


def test_pages_that_are_in_memory_are_not_read_again(start):
    engine = start()
    answer(engine, "plant", LONG[:200])
    engine.close()
    engine = start()
    store = engine.tier.store
    store_reads = []
    load = store.load_page
    store.load_page = lambda state, number: store_reads.append(number) or load(state, number)
    answer(engine, "shorter", LONG[:100])  # nothing on disk fits: the state lies at 199
    assert store_reads == []
    assert cached(answer(engine, "longer", LONG[:220])) == 199
    assert store_reads == [1, 2]  # page 0 was there, shared with the shorter one


def test_a_damaged_file_is_a_miss_and_the_answer_is_right(start, tmp_path, exact_model):
    engine = start()
    answer(engine, "plant", LONG[:200])
    engine.close()
    free = engine.pool.free
    for ending in ("kv", "st"):
        engine = start()
        for path in tmp_path.rglob(f"*.{ending}"):
            raw = bytearray(path.read_bytes())
            raw[-5] ^= 1
            path.write_bytes(raw)
        events = answer(engine, "x", LONG[:220])
        assert cached(events) == 0
        assert engine.tier.store.counts["corrupt"] == 1
        assert said(events) == said(
            answer(Engine(exact_model, prefix_cache=False), "x", LONG[:220])
        )  # fmt: skip
        engine.prefix.clear()
        assert engine.pool.free >= free
        answer(engine, "plant", LONG[:200])
        engine.close()


def test_other_weights_find_nothing(exact_model, tmp_path, start):
    engine = start(cache_key={"weights": "one"})
    answer(engine, "plant", LONG[:200])
    engine.close()
    assert cached(answer(start(cache_key={"weights": "two"}), "x", LONG[:220])) == 0
    assert cached(answer(start(cache_key={"weights": "one"}), "x", LONG[:220])) == 199


def test_reading_that_is_slower_than_computing_is_left_out_but_tried_now_and_then(start):
    engine = start()
    answer(engine, "plant", LONG[:200])
    engine.close()
    engine = start()
    engine.tier.load_time.note(1, 1000.0)
    reused = []
    for number in range(RETRY_EVERY):
        engine.prefix.clear()
        reused.append(cached(answer(engine, f"x{number}", LONG[:220])))
    assert reused == [0] * (RETRY_EVERY - 1) + [199]


def test_the_time_to_read_is_learned():
    load = LoadTime()
    assert load.seconds(10**12) == 0.0  # nothing is known: try
    for _ in range(200):
        load.note(1000, 0.5)
    assert load.seconds(4000) == pytest.approx(2.0)
    for _ in range(300):
        load.note(1000, 0.1)
    assert load.seconds(4000) == pytest.approx(0.4, rel=0.01)


def test_a_disk_that_fails_does_not_stop_the_engine(start, exact_model, monkeypatch, caplog):
    engine = start()
    answer(engine, "plant", LONG[:200])

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "write_blob", full)
    while len(engine.prefix):
        engine.prefix.evict(next(iter(engine.prefix)))
    engine.tier.store.flush()
    events = answer(engine, "x", LONG[:220])
    assert said(events) == said(answer(Engine(exact_model, prefix_cache=False), "x", LONG[:220]))
    assert engine.tier.store.counts["write_errors"] >= 1
    assert "No space left on device" in caplog.text


def test_a_folder_without_a_prefix_cache_is_refused(start):
    with pytest.raises(RequestError, match="cache_dir needs the prefix cache"):
        start(prefix_cache=False)


def test_two_engines_share_a_folder(start):
    first = start()
    answer(first, "plant", LONG[:200])
    first.close()
    first, second = start(), start()
    assert (first.tier.store.writable, second.tier.store.writable) == (True, False)
    for engine in (first, second):
        assert cached(answer(engine, "x", LONG[:220])) == 199


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_cache_go_round(tiny_config, dtype):
    caches = [
        HybridCache(tiny_config, num_slots=3, num_pages=4, dtype=dtype) for _ in range(2)
    ]  # fmt: skip
    one, other = caches
    generator = torch.manual_seed(0)
    for tensor in (one.kv, one.recurrent, one.conv, one.last_hidden):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    assert one.layout == other.layout
    other.load_page(1, one.page_bytes(2))
    other.load_slot(2, 77, one.slot_bytes(1))
    assert torch.equal(other.kv[1], one.kv[2])
    assert torch.equal(other.recurrent[:, 2], one.recurrent[:, 1])
    assert torch.equal(other.conv[:, 2], one.conv[:, 1])
    assert torch.equal(other.last_hidden[2], one.last_hidden[1])
    assert other.length(2) == 77
    assert not other.kv[[0, 2, 3]].any()


def test_random_conversations_with_restarts_are_bit_identical(start, exact_model):
    generator = random.Random(4)
    past = [LONG[:70]]
    for number in range(6):
        engine = start(speculative_tokens=generator.choice([0, 2]))
        for turn in range(4):
            prompt = [*generator.choice(past), *LONG[200 : 200 + generator.randrange(1, 20)]]
            events = answer(engine, f"{number} {turn}", prompt, max_tokens=6)
            cold = answer(Engine(exact_model, prefix_cache=False), "x", prompt, max_tokens=6)
            assert said(events) == said(cold)
            if len(prompt) < 250:
                past.append([*prompt, *tokens(events)])
        engine.close()


def test_nothing_is_written_without_being_asked(exact_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = Engine(exact_model)
    answer(engine, "x", LONG[:100])
    engine.close()
    assert list(Path(tmp_path).rglob("*")) == []
