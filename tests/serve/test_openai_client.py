"""The official client of OpenAI's interface against a live server."""

import json
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from qnext import SamplingParams

GREEDY = {"temperature": 0, "max_tokens": 24}
FOX = [{"role": "user", "content": "Tell me about the fox."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "grey"]}, "legs": {"enum": [3, 4]}},
    "required": ["colour", "legs"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def mini(mini_live) -> Iterator[OpenAI]:
    """A client of the embedded model."""
    with OpenAI(base_url=f"{mini_live.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_plain_and_streamed_answers_are_the_models(client, alone) -> None:
    expected = alone.chat(FOX, SamplingParams(**GREEDY))
    whole = client.chat.completions.create(model="tiny", messages=FOX, **GREEDY)
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    stream = client.chat.completions.create(
        model="tiny", messages=FOX, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected.text
    assert chunks[-1].usage.completion_tokens == expected.usage.completion_tokens
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_several_answers_differ_by_seed_and_arrive_side_by_side(client, alone) -> None:
    wanted = {"temperature": 1.0, "seed": 5, "max_tokens": 12, "n": 3}
    expected = alone.chat(FOX, SamplingParams(**wanted))
    texts = [expected.text, *(other.text for other in expected.others)]
    whole = client.chat.completions.create(model="tiny", messages=FOX, **wanted)
    assert [choice.message.content for choice in whole.choices] == texts
    assert len(set(texts)) == 3
    assert whole.usage.completion_tokens == expected.total_usage.completion_tokens
    found = ["", "", ""]
    for chunk in client.chat.completions.create(model="tiny", messages=FOX, stream=True, **wanted):
        for choice in chunk.choices:
            found[choice.index] += choice.delta.content or ""
    assert found == texts


def test_log_probabilities(client, alone) -> None:
    expected = alone.chat(FOX, SamplingParams(**GREEDY, logprobs=2))
    wanted = {"model": "tiny", "messages": FOX, "logprobs": True, "top_logprobs": 2, **GREEDY}
    whole = client.chat.completions.create(**wanted).choices[0].logprobs.content
    eos = set(alone.eos_ids)
    kept = [one for one in expected.logprobs if one.token_id not in eos]
    assert [entry.logprob for entry in whole] == pytest.approx(
        [one.logprob for one in kept], abs=1e-3
    )
    assert b"".join(bytes(entry.bytes) for entry in whole) == alone.tokenizer._join(
        [one.token_id for one in kept], False
    )
    assert all(len(entry.top_logprobs) == 2 for entry in whole)
    assert all(len(entry.token) > 0 for entry in whole)
    streamed = []
    for chunk in client.chat.completions.create(stream=True, **wanted):
        logprobs = chunk.choices[0].logprobs
        streamed += logprobs.content if logprobs else []
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]


def test_a_required_call_has_arguments_that_fit(mini, mini_live) -> None:
    wanted = {
        "model": "qnext-mini", "messages": FOX, "tools": [WEATHER], "tool_choice": "required",
        "parallel_tool_calls": False, "temperature": 0, "max_tokens": 400,
    }  # fmt: skip
    whole = mini.chat.completions.create(**wanted).choices[0]
    assert whole.finish_reason == "tool_calls"
    [call] = whole.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather"
    assert arguments["city"] in ("Paris", "Rome")
    assert 1 <= arguments["days"] <= 9
    pieces = []
    with mini_live.slowed():
        for chunk in mini.chat.completions.create(stream=True, **wanted):
            pieces += chunk.choices[0].delta.tool_calls or ()
    assert pieces[0].id
    assert pieces[0].function.name == "get_weather"
    assert len(pieces) > 3, "arguments arrive as they are written"
    assert json.loads("".join(piece.function.arguments or "" for piece in pieces)) == arguments


def test_the_result_of_a_call_goes_back(mini) -> None:
    wanted = {"model": "qnext-mini", "tools": [WEATHER], "temperature": 0, "max_tokens": 400}
    choice = {"type": "function", "function": {"name": "get_weather"}}
    message = mini.chat.completions.create(
        messages=FOX, tool_choice=choice, parallel_tool_calls=False, **wanted
    ).choices[0].message  # fmt: skip
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21 degrees"}
    later = mini.chat.completions.create(
        messages=[*FOX, message, result], tool_choice="none", **wanted
    )
    assert later.choices[0].message.tool_calls is None
    assert later.usage.prompt_tokens > 40


def test_structured_output_parses(client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
    found = client.chat.completions.create(
        model="tiny", messages=FOX, response_format=form, temperature=0, max_tokens=100
    )
    animal = json.loads(found.choices[0].message.content)
    assert animal["colour"] in ("red", "grey")
    assert animal["legs"] in (3, 4)


def test_a_message_the_client_began_is_gone_on_with(client, alone) -> None:
    whole = client.chat.completions.create(model="tiny", messages=FOX, **GREEDY)
    text = whole.choices[0].message.content
    begun = [*FOX, {"role": "assistant", "content": text[:10]}]
    later = client.chat.completions.create(
        model="tiny", messages=begun, extra_body={"continue_final_message": True}, **GREEDY
    )
    ids = alone.template.encode(begun, alone.tokenizer, continue_final_message=True)
    [expected] = alone.generate([ids], SamplingParams(**GREEDY))
    assert later.choices[0].message.content == expected.text


def test_plain_completions_of_several_prompts(client, alone) -> None:
    prompts = ["The fox", "The moon"]
    expected = alone.generate(prompts, SamplingParams(**GREEDY))
    whole = client.completions.create(model="tiny", prompt=prompts, **GREEDY)
    assert [choice.text for choice in whole.choices] == [one.text for one in expected]
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in expected)
    echoed = client.completions.create(
        model="tiny", prompt="The fox", echo=True, logprobs=1, temperature=0, max_tokens=4
    ).choices[0]
    assert echoed.text.startswith("The fox")
    assert echoed.logprobs.token_logprobs[0] is None
    assert "".join(echoed.logprobs.tokens) == echoed.text
    assert echoed.logprobs.text_offset[-1] < len(echoed.text)
    [score] = alone.score("The fox")
    known = echoed.logprobs.token_logprobs[1 : len(score.token_ids)]
    assert known == pytest.approx(list(score.logprobs), abs=1e-4)


def test_responses_whole_and_streamed(client, alone) -> None:
    expected = alone.chat(FOX, SamplingParams(**GREEDY))
    wanted = {"model": "tiny", "input": "Tell me about the fox.", "temperature": 0,
              "max_output_tokens": 24}  # fmt: skip
    whole = client.responses.create(**wanted)
    assert whole.output_text == expected.text
    assert whole.status == ("completed" if expected.finish_reason == "stop" else "incomplete")
    events = list(client.responses.create(stream=True, **wanted))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(texts) == expected.text
    last = events[-1]
    assert last.type == f"response.{whole.status}"
    assert last.response.output_text == expected.text
    assert last.response.usage.output_tokens == whole.usage.output_tokens


def test_responses_call_tools_and_take_results(mini) -> None:
    tool = {"type": "function", "strict": True, **WEATHER["function"]}
    wanted = {"model": "qnext-mini", "tools": [tool], "temperature": 0, "max_output_tokens": 400,
              "parallel_tool_calls": False}  # fmt: skip
    asked = [{"role": "user", "content": "How is the weather?"}]
    with mini.responses.stream(input=asked, tool_choice="required", **wanted) as stream:
        deltas = [
            event.delta
            for event in stream
            if event.type == "response.function_call_arguments.delta"
        ]
        found = stream.get_final_response()
    [call] = [item for item in found.output if item.type == "function_call"]
    assert "".join(deltas) == call.arguments
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    items = [{"type": item.type, **item.model_dump(exclude_none=True)} for item in found.output]
    later = mini.responses.create(input=[*asked, *items, result], tool_choice="none", **wanted)
    assert all(item.type != "function_call" for item in later.output)
    assert later.usage.input_tokens > found.usage.input_tokens


def test_a_structured_response_parses(client) -> None:
    form = {"format": {"type": "json_schema", "name": "animal", "schema": SCHEMA}}
    found = client.responses.create(
        model="tiny", input="A fox.", text=form, temperature=0, max_output_tokens=100
    )
    assert json.loads(found.output_text)["legs"] in (3, 4)


def test_leaving_a_stream_cancels_it(client, live) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=FOX, stream=True, max_tokens=400, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    live.check_that_nothing_is_held()


def test_errors_are_the_clients_own(client) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": 5}])
    assert caught.value.param == "messages[0].content"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=FOX)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="conversation: not supported"):
        client.responses.create(model="tiny", input="x", conversation="conv_1")


def test_models(client) -> None:
    assert [card.id for card in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "qnext"
