"""The official client of Anthropic's interface against a live server."""

import json
from collections.abc import Iterator

import anthropic
import pytest
from anthropic import Anthropic

from qnext import SamplingParams

FOX = [{"role": "user", "content": "Tell me about the fox."}]
GREEDY = {"max_tokens": 24, "extra_body": {"temperature": 0}}
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(live) -> Iterator[Anthropic]:
    with Anthropic(base_url=live.url, api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def mini(mini_live) -> Iterator[Anthropic]:
    """A client of the embedded model."""
    with Anthropic(base_url=mini_live.url, api_key="none", max_retries=0) as found:
        yield found


def test_plain_and_streamed_answers_are_the_models(client, alone) -> None:
    expected = alone.chat(FOX, SamplingParams(temperature=0, max_tokens=24), enable_thinking=False)
    whole = client.messages.create(model="tiny", messages=FOX, **GREEDY)
    assert whole.content[0].text == expected.text
    assert whole.stop_reason == ("end_turn" if expected.finish_reason == "stop" else "max_tokens")
    used = whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    assert used == expected.usage.prompt_tokens
    with client.messages.stream(model="tiny", messages=FOX, **GREEDY) as stream:
        assert "".join(stream.text_stream) == expected.text
        final = stream.get_final_message()
    assert final.content[0].text == expected.text
    assert final.usage.output_tokens == whole.usage.output_tokens
    count = client.messages.count_tokens(model="tiny", messages=FOX)
    assert count.input_tokens == used


def test_the_system_prompt_and_blocks_reach_the_template(client, alone) -> None:
    found = client.messages.create(
        model="tiny",
        system=[{"type": "text", "text": "Be a fox."}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        **GREEDY,
    )
    messages = [{"role": "system", "content": "Be a fox."}, {"role": "user", "content": "hi"}]
    expected = alone.chat(
        messages, SamplingParams(temperature=0, max_tokens=24), enable_thinking=False
    )
    assert found.content[0].text == expected.text


def test_tools_are_called_and_answered(mini, mini_live) -> None:
    wanted = {"model": "qnext-mini", "tools": [WEATHER], "max_tokens": 400,
              "extra_body": {"temperature": 0}}  # fmt: skip
    choice = {"type": "any", "disable_parallel_tool_use": True}
    whole = mini.messages.create(messages=FOX, tool_choice=choice, **wanted)
    assert whole.stop_reason == "tool_use"
    [call] = [block for block in whole.content if block.type == "tool_use"]
    assert call.input["city"] in ("Paris", "Rome")
    streaming = mini.messages.stream(messages=FOX, tool_choice=choice, **wanted)
    with mini_live.slowed(), streaming as stream:
        pieces = [e.partial_json for e in stream if e.type == "input_json"]
        final = stream.get_final_message()
    assert json.loads("".join(pieces)) == call.input
    assert len(pieces) > 2
    assert [b.input for b in final.content if b.type == "tool_use"] == [call.input]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    later = mini.messages.create(
        messages=[
            *FOX,
            {"role": "assistant", "content": whole.content},
            {"role": "user", "content": [result]},
        ],
        tool_choice={"type": "none"},
        **wanted,
    )
    assert later.stop_reason != "tool_use"


def test_a_stop_sequence_is_named(client) -> None:
    text = client.messages.create(model="tiny", messages=FOX, **GREEDY).content[0].text
    stop = text[5:7]
    cut = client.messages.create(model="tiny", messages=FOX, stop_sequences=[stop], **GREEDY)
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    assert cut.content[0].text == text[: text.index(stop)]


def test_a_begun_answer_is_gone_on_with(client, alone) -> None:
    begun = [*FOX, {"role": "assistant", "content": "The fox"}]
    found = client.messages.create(model="tiny", messages=begun, **GREEDY)
    ids = alone.template.encode(begun, alone.tokenizer, continue_final_message=True)
    [expected] = alone.generate([ids], SamplingParams(temperature=0, max_tokens=24))
    assert found.content[0].text == expected.text


def test_leaving_a_stream_cancels_it(client, live) -> None:
    with client.messages.stream(model="tiny", messages=FOX, max_tokens=400) as stream:
        next(iter(stream))
    live.check_that_nothing_is_held()


def test_errors_are_the_clients_own(client) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(model="tiny", messages=[{"role": "king", "content": "x"}], **GREEDY)
    error = caught.value.body["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith("messages[0].role: expected one of")
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude", messages=FOX, **GREEDY)
    image = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}
    pictures = [{"role": "user", "content": [image]}]
    with pytest.raises(anthropic.BadRequestError, match=r"content\[0\].type: expected one of"):
        client.messages.create(model="tiny", messages=pictures, **GREEDY)
