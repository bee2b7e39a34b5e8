"""A watched request: its drafts, and the experts that ran for each of its tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from qnext import LLM, SamplingParams, native
from qnext.engine.watch import Watch

TEXT = "The fox sat by the river and thought about the moon. The moon sat by the fox."


@pytest.fixture(scope="module", params=["torch", "native"])
def llm(request, tiny_folder):
    if request.param == "native" and native.unfit() is not None:
        pytest.skip(f"no native kernels: {native.unfit()}")
    return LLM(
        tiny_folder,
        backend=request.param,
        max_num_seqs=4,
        max_batch_tokens=16,
        speculative_tokens=2,
    )


def run(llm, request, reader):
    llm.engine.add(request)
    deltas = []
    while llm.engine.has_work:
        for event in llm.engine.step():
            deltas.append(reader.push(event))
    return deltas


def test_routes_are_those_of_the_model(llm, tiny_model):
    """The prompt is run in chunks, beside another request that wants no routes."""
    watch = Watch(routes_from=5)
    request, reader = llm.prepare_score(TEXT, top=2, watch=watch)
    llm.engine.add(llm.prepare_text("The river", SamplingParams(max_tokens=9, ignore_eos=True))[0])
    run(llm, request, reader)
    ids = torch.tensor([request.prompt_ids])
    found = tiny_model(ids, output_router_logits=True).router_logits
    chosen = [logits.topk(tiny_model.config.num_experts_per_tok, -1).indices for logits in found]
    expected = torch.stack(chosen, dim=1).numpy()
    assert watch.routes.shape == expected[5:].shape
    assert np.array_equal(watch.routes, expected[5:])


def test_drafts_are_noted_where_they_were_made_and_count_as_the_usage_does(llm):
    request, reader = llm.prepare_text(
        "The fox", SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    )
    watch = Watch()
    request = replace(request, watch=watch)
    reader.request = request
    usage = run(llm, request, reader)[-1].usage
    assert len(watch.tokens) == 60
    assert usage.drafted_tokens > 0
    accepted = [i for i, draft in watch.drafts.items() if watch.tokens[i] == draft]
    assert len(accepted) == usage.accepted_tokens
    # A second draft of a step counts as drafted even where the first was wrong.
    assert len(accepted) <= len(watch.drafts) <= usage.drafted_tokens


def test_positions_that_run_again_are_recorded_once():
    watch = Watch(routes_from=3)
    rows = np.arange(40, dtype=np.int32).reshape(10, 2, 2)
    for start, end in ((0, 2), (2, 5), (0, 4), (4, 7), (7, 10)):
        watch.note_routes(start, rows[start:end])
    assert np.array_equal(watch.routes, rows[3:])


def test_without_a_watch_nothing_is_recorded(llm):
    run(llm, *llm.prepare_score(TEXT))
    assert llm.engine.runner.routes is None


def test_watching_changes_no_number(llm):
    plain = run(llm, *llm.prepare_score(TEXT, top=3))[-1]
    watched = run(llm, *llm.prepare_score(TEXT, top=3, watch=Watch(routes_from=0)))[-1]
    assert watched.prompt_logprobs == plain.prompt_logprobs
