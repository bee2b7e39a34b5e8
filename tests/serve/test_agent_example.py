"""The agent of ``examples/`` against a live server: a call, its result, an answer."""

import json
import sys
from pathlib import Path

import pytest
from openai import OpenAI

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
import agent


def test_tools_are_called_until_there_is_an_answer(mini_live, monkeypatch) -> None:
    """The embedded model is too small to choose a tool, so the first round requires one."""
    with OpenAI(base_url=f"{mini_live.url}/v1", api_key="none", max_retries=0) as client:
        create, rounds = client.chat.completions.create, []

        def ask(**fields):
            rounds.append(fields)
            first = len(rounds) == 1
            choice = {"type": "function", "function": {"name": "today"}} if first else "none"
            return create(**{**fields, "tool_choice": choice})

        monkeypatch.setattr(client.chat.completions, "create", ask)
        answer, messages = agent.run(
            client, "qnext-mini", "What day is it?", temperature=0, max_tokens=60,
            parallel_tool_calls=False,
        )  # fmt: skip
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    [called] = messages[1]["tool_calls"]
    assert json.loads(called["function"]["arguments"]) == {}
    assert messages[2] == {
        "role": "tool", "tool_call_id": called["id"], "content": agent.today(),
    }  # fmt: skip
    assert messages[3].get("content", "") == answer


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("calculate", '{"expression": "17 * (2 + -0.5)"}', "25.5"),
        ("calculate", '{"expression": "1 / 0"}', "error: "),
        ("calculate", '{"expression": "__import__(\'os\')"}', "error: cannot calculate"),
        ("calculate", '{"expression": "1 +"}', "error: "),
        ("calculate", "{}", "error: "),
        ("calculate", "no json", "error: "),
        ("nothing", "{}", "error: 'nothing'"),
    ],
)
def test_the_model_reads_what_went_wrong(name, arguments, result) -> None:
    assert agent.call(name, arguments).startswith(result)
