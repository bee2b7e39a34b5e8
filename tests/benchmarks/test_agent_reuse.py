"""An agent's conversation on the embedded model reuses nearly all that could be reused."""

import pytest
from benchmarks.agent_reuse import ENOUGH, Agent, converse, hits, restarted

from benchmarks import agent_reuse
from qnext import LLM

SHORT = {"turns": 10, "max_tokens": 10}


@pytest.fixture(scope="module")
def prepared() -> Agent:
    return converse("qnext-mini", **SHORT)


def test_ten_turns_with_stripped_reasoning_reuse_what_they_can(prepared):
    assert len(prepared.requests) == 20
    assert prepared.requests[0].reusable == 0
    assert all(one.cached <= one.reusable for one in prepared.requests)
    assert all(one.reusable > 500 for one in prepared.requests[1:])
    assert prepared.rate() >= ENOUGH
    # The reasoning was there, and history is without it.
    assert sum("reasoning_content" in message for message in prepared.messages) > 10
    last = prepared.llm.prepare_chat(
        [*prepared.messages, agent_reuse.question(10)], prepared.params, tools=agent_reuse.TOOLS
    )[0]
    # One opening tag is that of the answer to come.
    tags = [token for token in last.prompt_ids if token == prepared.llm.tokenizer.id_of("<think>")]
    assert len(tags) == 1


def test_without_spare_time_it_is_less(prepared):
    bare = converse("qnext-mini", turns=3, max_tokens=10, idles=False)
    assert bare.llm.engine.background.counts.tokens == 0
    assert bare.rate() < prepared.rate()
    assert bare.requests[2].cached < bare.requests[2].reusable - 100


def test_kept_reasoning_and_edited_questions_reuse_as_much():
    kept = converse("qnext-mini", turns=2, max_tokens=10, keeps=True)
    edited = converse("qnext-mini", turns=2, max_tokens=10, edits=(1,))
    assert len(edited.requests) == 6
    assert min(kept.rate(), edited.rate()) >= ENOUGH


def test_the_oracle_sees_what_a_cache_that_is_off_does_not_reuse():
    agent = converse("qnext-mini", turns=1, max_tokens=4, prefix_cache=False)
    assert agent.rate() == 0.0
    assert all(one.reusable > 500 for one in agent.requests[1:])


@pytest.mark.parametrize(("shared", "unique"), [(300, 100), (200, 200)])
def test_the_split_does_not_change_how_many_prompts_hit(tiny_folder, shared, unique):
    assert hits(LLM(tiny_folder, max_num_seqs=2), shared, unique) >= agent_reuse.HITS


def test_after_a_restart_the_conversation_goes_on_from_the_disk(tmp_path):
    assert restarted("qnext-mini", str(tmp_path), turns=4, max_tokens=10) >= ENOUGH
