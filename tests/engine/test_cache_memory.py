"""What a sequence takes is what ``cost`` says, and no step takes more than the one before."""

import gc
from dataclasses import replace

import pytest
import torch
from oracle import with_oracle
from test_engine import greedy, prompts, request, run

from qnext import cost
from qnext.engine.drafting import FULL_BACKLOG
from qnext.engine.engine import Engine
from qnext.engine.sizes import MAX_BACKLOG, CacheSizes
from qnext.model.batch import TokenBatch
from qnext.model.cache import PAGE_SIZE, HybridCache
from qnext.model.model import CausalLM, initialise
from qnext.ops import Segments

CHANGES = {
    "as it is": {},
    "more value heads": {"linear_num_value_heads": 8},
    "wide keys, three taps": {"linear_key_head_dim": 20, "linear_conv_kernel_dim": 3},
    "no MTP head": {"num_mtp_layers": 0},
}


def nbytes(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_slot_and_a_page_take_what_cost_says(tiny_model, name, dtype):
    config = replace(tiny_model.config, **CHANGES[name])
    cache = HybridCache(config, num_slots=3, num_pages=5, dtype=getattr(torch, dtype))
    slots = nbytes([cache.recurrent, cache.conv, cache.last_hidden])
    assert slots == 3 * cost.slot_bytes(config, dtype)
    page = cost.kv_bytes_per_token(config, dtype) + cost.mtp_kv_bytes_per_token(config, dtype)
    assert nbytes([cache.kv]) == 5 * PAGE_SIZE * page
    assert cache.nbytes == slots + nbytes([cache.kv])


@pytest.mark.parametrize("name", ["as it is", "more value heads", "wide keys, three taps"])
@pytest.mark.parametrize("rollback", ["snapshots", "replay"])
@pytest.mark.parametrize("company", [0, 40])
def test_the_pending_window_takes_what_cost_says(tiny_model, name, rollback, company):
    """Five undecided tokens of two sequences each, beside a chunk of a prompt."""
    config = replace(tiny_model.config, **CHANGES[name])
    model = CausalLM(config)
    initialise(model, seed=0)
    cache = HybridCache(config, num_slots=3, num_pages=6, rollback=rollback)
    lengths = [5, company, 5] if company else [5, 5]
    flags = [True, False, True] if company else [True, True]
    slots = [cache.open() for _ in lengths]
    table = torch.arange(2 * len(lengths)).view(-1, 2)
    segments = Segments.of(lengths, "cpu")
    view = cache.view(slots, table, segments, speculative=flags)

    pieces = [torch.arange(n) for n in lengths]
    with torch.inference_mode():
        model.run(TokenBatch.pack(pieces), view)
        held = [x for inputs in view.held.values() for x in inputs]
        taken = nbytes(held) + nbytes(view.states.values())
        assert taken == 2 * cost.pending_bytes(config, "float32", tokens=5, rollback=rollback)
        cache.keep([3, company, 1] if company else [3, 1])


@pytest.mark.parametrize("drafts", [0, 2, 4])
@pytest.mark.parametrize("rollback", ["snapshots", "replay"])
def test_the_budget_covers_everything_that_is_counted(tiny_model, drafts, rollback):
    config = tiny_model.config
    budget = 8_000_000
    sizes = CacheSizes.within(
        config, memory_bytes=budget, max_num_seqs=4, max_model_len=100_000, dtype="float32",
        prefix_cache=True, max_drafts=drafts, rollback=rollback,
    )  # fmt: skip
    running = cost.slot_bytes(config, "float32")
    if drafts:
        running += cost.pending_bytes(config, "float32", tokens=drafts + 1, rollback=rollback)
        running += cost.backlog_bytes(config, "float32", tokens=MAX_BACKLOG + drafts)
    spent = 4 * running + sizes.num_snapshots * sizes.state_bytes
    spent += sizes.num_pages * sizes.page_bytes
    assert budget - sizes.page_bytes < spent <= budget


def test_an_engine_takes_no_more_than_its_budget(tiny_model):
    budget = 6_000_000
    engine = Engine(tiny_model, max_num_seqs=3, memory_bytes=budget, speculative_tokens=4)
    pending = cost.pending_bytes(tiny_model.config, "float32", tokens=5)
    assert engine.runner.cache.nbytes + 3 * pending <= budget


def tensor_bytes() -> int:
    """Bytes of all storages that are alive."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) is torch.Tensor or type(item) is torch.nn.Parameter:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("setting", [3, "auto"])
def test_more_steps_take_no_more_memory(tiny_model, setting):
    engine = Engine(
        tiny_model, max_num_seqs=3, max_batch_tokens=64, memory_bytes=3_000_000,
        speculative_tokens=setting, max_model_len=400,
    )  # fmt: skip
    texts, number, measured, done = prompts(40, seed=2), 0, [], 0
    while engine.steps < 1600:
        while len(engine.scheduler.waiting) < 2:
            number += 1
            engine.add(request(f"r{number}", texts[number % 40], max_tokens=20, ignore_eos=True))
        engine.step()
        if engine.steps >= done + 200:
            done = engine.steps
            engine.prefix.clear()
            for name in list(engine._sequences):
                engine.cancel(name)
            run(engine)
            engine.prefix.clear()
            measured.append(tensor_bytes())
    assert len(measured) >= 7
    # After the first round nothing is added: pools, slots and backlogs are what they were.
    assert max(measured[1:]) - measured[1] <= 4096, measured
    assert not engine.runner._backlog.keys() - set(range(engine.runner.cache.num_slots))


def test_unread_rows_do_not_hold_the_rows_of_a_prompt_beside_them(tiny_model):
    """While drafting rests, rows of a decoding sequence wait; those of a prompt must not too."""
    engine = Engine(tiny_model, max_num_seqs=2, speculative_tokens="auto")
    engine.policy.held = lambda *_, **__: 0
    engine.add(request("x", [1, 2, 3], max_tokens=40, ignore_eos=True))
    engine.step()
    engine.add(request("y", list(range(200)), max_tokens=2))
    for _ in range(4):
        engine.step()
    [x] = [s for s in engine.scheduler.running if s.request.id == "x"]
    rows = engine.runner._backlog[x.slot]
    row = tiny_model.config.hidden_size * 4
    assert sum(r.shape[0] for r in rows) == x.done + 1 - x.mtp_len > 3
    assert all(r.untyped_storage().nbytes() <= 8 * row for r in rows)


def test_while_drafting_rests_prompts_are_not_read_by_the_mtp_layer(tiny_model):
    engine = Engine(tiny_model, speculative_tokens="auto")
    engine.policy.held = lambda *_, **__: 0
    filled = []
    fill = engine.runner.fill
    engine.runner.fill = lambda works: filled.append(len(works[0].ids)) or fill(works)
    engine.add(request("short", list(range(100)), max_tokens=30, ignore_eos=True))
    engine.add(request("long", list(range(300, 0, -1)), max_tokens=3, ignore_eos=True))
    first = engine.step() + engine.step()
    assert {s.request.id: s.done + 1 - s.mtp_len for s in engine.scheduler.running} == {
        "short": 101, "long": FULL_BACKLOG // 2 + 1,  # what is older is given up
    }  # fmt: skip
    events = [e for e in first if e.request_id == "short"] + run(engine)["short"]
    assert filled == []
    assert len([t for e in events for t in e.token_ids]) == 30


def test_drafts_after_a_rest_are_as_good_as_without_one(tiny_model):
    """What the MTP layer reads late it reads right."""
    prompt = list(range(100))
    wanted = greedy(tiny_model, prompt, 30)
    engine = Engine(tiny_model, speculative_tokens="auto")
    with_oracle(engine, {tuple(prompt): wanted}, 1.0)
    choices = iter([0] * 12 + [2] * 40)
    engine.policy.held = lambda *_, **__: next(choices)
    engine.policy.choose = lambda *_, **__: 2
    engine.add(request("x", prompt, max_tokens=30, ignore_eos=True))
    events = run(engine)["x"]
    assert [t for e in events for t in e.token_ids] == wanted
    assert events[-1].usage.accepted_tokens == events[-1].usage.drafted_tokens > 0
