"""Reasoning does not spoil the cache: what the next turn reuses, however history is sent back."""

import pytest

from qnext import LLM, SamplingParams
from qnext.text.chat import ChatTemplate

OPENS = '{{- "<think>\\n" if add_generation_prompt -}}'
ASK = [{"role": "user", "content": "Tell me about the fox by the river."}]
FOLLOW_UP = {"role": "user", "content": "And the moon?"}


@pytest.fixture
def llm(tiny_folder):
    with LLM(tiny_folder, memory="64MiB", threads=1, speculative_tokens=2) as llm:
        llm.template = ChatTemplate(llm.template.source + OPENS)  # like the Thinking models
        yield llm


def params(llm: LLM) -> SamplingParams:
    # A random model writes control tokens too, which would be other text in a history.
    banned = dict.fromkeys(llm.tokenizer.added_tokens.values(), -100.0)
    return SamplingParams(temperature=0.0, max_tokens=130, thinking_budget=9, logit_bias=banned)


@pytest.mark.parametrize("waits", [True, False], ids=["idle", "at once"])
@pytest.mark.parametrize("history", ["stripped", "preserved", "edited"])
def test_the_next_turn_reuses_what_its_prompt_shares(llm, history, waits):
    first = llm.chat(ASK, params(llm))
    assert first.usage.reasoning_was_cut
    assert first.reasoning
    answer = {"role": "assistant", "content": first.text}
    if history == "preserved":
        answer["reasoning_content"] = first.reasoning
    if history == "edited":
        answer["content"] = "Something else."
    if waits:
        llm.idle()
    second = llm.chat([*ASK, answer, FOLLOW_UP], params(llm))
    question = first.usage.prompt_tokens - len(llm.tokenizer.encode("<think>\n"))
    if waits and history != "edited":
        # All but the new question: the template drops the reasoning either way.
        fresh = len(llm.tokenizer.encode(FOLLOW_UP["content"])) + 12
        assert second.usage.cached_tokens >= second.usage.prompt_tokens - fresh - 30
        assert second.usage.cached_tokens > question
    else:
        assert second.usage.cached_tokens >= question
    assert second.usage.cached_tokens < second.usage.prompt_tokens
