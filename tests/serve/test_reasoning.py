"""Reasoning and its budget through every interface: the same thoughts, each in its own place."""

from collections.abc import Iterator

import pytest
from anthropic import Anthropic
from live_server import Live, running
from openai import OpenAI

from qnext import LLM, SamplingParams
from qnext.answers import Completion

FOX = [{"role": "user", "content": "Tell me about the fox."}]
BUDGET, LIMIT = 5, 110


@pytest.fixture(scope="module")
def thinker(thinking_folder) -> Iterator[Live]:
    with running(LLM(thinking_folder, backend="torch")) as found:
        yield found


@pytest.fixture(scope="module")
def expected(thinking_folder) -> Completion:
    """What the model answers after it has thought as much as it may."""
    params = SamplingParams(temperature=0, max_tokens=LIMIT, thinking_budget=BUDGET)
    found = LLM(thinking_folder, backend="torch").chat(FOX, params)
    assert found.reasoning
    assert found.text
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_chat_completions(stream, thinker, expected) -> None:
    with OpenAI(base_url=f"{thinker.url}/v1", api_key="none", max_retries=0) as client:
        asked = {"model": "thinker", "messages": FOX, "temperature": 0, "max_tokens": LIMIT,
                 "extra_body": {"thinking_budget": BUDGET}}  # fmt: skip
        if stream:
            deltas = [
                c.choices[0].delta for c in client.chat.completions.create(stream=True, **asked)
            ]
            reasoning = "".join(getattr(delta, "reasoning_content", "") or "" for delta in deltas)
            content = "".join(delta.content or "" for delta in deltas)
        else:
            found = client.chat.completions.create(**asked)
            message = found.choices[0].message
            reasoning, content = message.reasoning_content, message.content
            counted = found.usage.completion_tokens_details.reasoning_tokens
            assert counted == expected.usage.reasoning_tokens
    assert (reasoning, content) == (expected.reasoning, expected.text)


@pytest.mark.parametrize("stream", [False, True])
def test_responses(stream, thinker, expected) -> None:
    with OpenAI(base_url=f"{thinker.url}/v1", api_key="none", max_retries=0) as client:
        asked = {"model": "thinker", "input": FOX, "temperature": 0, "max_output_tokens": LIMIT,
                 "extra_body": {"thinking_budget": BUDGET}}  # fmt: skip
        if stream:
            events = list(client.responses.create(stream=True, **asked))
            found = events[-1].response
            kind = "response.reasoning_text.delta"
            thought = "".join(event.delta for event in events if event.type == kind)
            assert thought == expected.reasoning
        else:
            found = client.responses.create(**asked)
        assert [item.type for item in found.output] == ["reasoning", "message"]
        assert found.output[0].content[0].text == expected.reasoning
        assert found.output_text == expected.text


@pytest.mark.parametrize("stream", [False, True])
def test_messages(stream, thinker, expected) -> None:
    asked = {
        "model": "thinker", "messages": FOX, "max_tokens": LIMIT,
        "thinking": {"type": "enabled", "budget_tokens": BUDGET},
        "extra_body": {"temperature": 0},
    }  # fmt: skip
    with Anthropic(base_url=thinker.url, api_key="none", max_retries=0) as client:
        if stream:
            with client.messages.stream(**asked) as events:
                thoughts = [event.thinking for event in events if event.type == "thinking"]
                found = events.get_final_message()
            assert "".join(thoughts) == expected.reasoning
        else:
            found = client.messages.create(**asked)
        thinking, text = found.content
        assert thinking.thinking == expected.reasoning
        assert text.text == expected.text
        hidden = client.messages.create(
            **{**asked, "thinking": {**asked["thinking"], "display": "omitted"}}
        )
        assert hidden.content[0].thinking == ""
        assert hidden.content[1].text == expected.text


@pytest.mark.parametrize("fields", [{"reasoning_effort": "none"}, {"thinking_budget": 0}])
def test_an_effort_is_a_budget(fields, thinker, thinking_folder, expected) -> None:
    params = SamplingParams(temperature=0, max_tokens=LIMIT, thinking_budget=0)
    alone = LLM(thinking_folder, backend="torch").chat(FOX, params, enable_thinking=False)
    asked = {"messages": FOX, "temperature": 0, "max_tokens": LIMIT, **fields}
    message = thinker.client.post("/v1/chat/completions", json=asked).json()["choices"][0][
        "message"
    ]
    assert message["content"] == alone.text
    assert message.get("reasoning_content") == alone.reasoning
    assert len(message.get("reasoning_content") or "") < len(expected.reasoning)
