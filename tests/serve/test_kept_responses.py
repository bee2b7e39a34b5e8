"""Responses the server keeps: going on from one, asking for it again, forgetting it, limits."""

import json
from collections.abc import Iterator

import msgspec
import openai
import pytest
from live_server import running
from openai import OpenAI

from qnext import LLM
from qnext.serve.api.responses import InputItem
from qnext.serve.app import Limits
from qnext.serve.gate import Rules
from qnext.serve.kept import KeptResponses
from qnext.serve.refusals import ApiError

GREEDY = {"model": "tiny", "temperature": 0, "max_output_tokens": 20}
FOX, MOON = "Tell me about the fox.", "And about the moon and the river?"


@pytest.fixture(scope="module")
def client(live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_going_on_is_the_same_as_sending_everything_again(client) -> None:
    first = client.responses.create(input=FOX, **GREEDY)
    assert first.store
    second = client.responses.create(input=MOON, previous_response_id=first.id, **GREEDY)
    assert second.previous_response_id == first.id
    said = [item.model_dump(exclude_none=True) for item in first.output]
    asked = [{"role": "user", "content": FOX}, *said, {"role": "user", "content": MOON}]
    again = client.responses.create(input=asked, **GREEDY)
    assert second.output_text == again.output_text
    assert second.usage.input_tokens == again.usage.input_tokens > first.usage.input_tokens
    assert second.usage.input_tokens_details.cached_tokens > 0
    # A third turn, streamed, still knows the first.
    last = list(
        client.responses.create(input="Why?", previous_response_id=second.id, stream=True, **GREEDY)
    )[-1].response
    said = [item.model_dump(exclude_none=True) for item in second.output]
    third = client.responses.create(
        input=[*asked, *said, {"role": "user", "content": "Why?"}], **GREEDY
    )
    assert last.output_text == third.output_text
    assert last.usage.input_tokens == third.usage.input_tokens
    assert client.responses.retrieve(last.id).output_text == last.output_text


def test_instructions_are_those_of_the_request_alone(client) -> None:
    first = client.responses.create(input=FOX, instructions="Be a fox.", **GREEDY)
    later = {"input": MOON, "previous_response_id": first.id, **GREEDY}
    plain = client.responses.create(**later)
    moon = client.responses.create(instructions="Be the moon.", **later)
    assert moon.usage.input_tokens > plain.usage.input_tokens
    said = [item.model_dump(exclude_none=True) for item in first.output]
    asked = [{"role": "user", "content": FOX}, *said, {"role": "user", "content": MOON}]
    again = client.responses.create(input=asked, instructions="Be the moon.", **GREEDY)
    assert (moon.output_text, moon.usage.input_tokens) == (
        again.output_text, again.usage.input_tokens,
    )  # fmt: skip


def test_the_result_of_a_call_is_enough_to_go_on(mini_live) -> None:
    tool = {
        "type": "function", "name": "get_weather", "strict": True,
        "parameters": {
            "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"], "additionalProperties": False,
        },
    }  # fmt: skip
    wanted = {"model": "qnext-mini", "tools": [tool], "temperature": 0, "max_output_tokens": 200,
              "parallel_tool_calls": False}  # fmt: skip
    with OpenAI(base_url=f"{mini_live.url}/v1", api_key="none", max_retries=0) as client:
        found = client.responses.create(input=FOX, tool_choice="required", **wanted)
        [call] = [item for item in found.output if item.type == "function_call"]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        later = client.responses.create(
            input=[result], previous_response_id=found.id, tool_choice="none", **wanted
        )
        said = [item.model_dump(exclude_none=True) for item in found.output]
        again = client.responses.create(
            input=[{"role": "user", "content": FOX}, *said, result], tool_choice="none", **wanted
        )
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    assert later.output_text == again.output_text
    assert later.usage.input_tokens == again.usage.input_tokens


def test_a_kept_response_is_sent_again_until_it_is_deleted(client) -> None:
    first = client.responses.create(input=FOX, metadata={"a": "b"}, **GREEDY)
    assert client.responses.retrieve(first.id) == first
    second = client.responses.create(input=MOON, previous_response_id=first.id, **GREEDY)
    assert client.responses.delete(first.id) is None
    for gone in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="is not kept here") as caught:
            gone(first.id)
        assert caught.value.code == "response_not_found"
    with pytest.raises(openai.NotFoundError, match="Send the items of the conv") as caught:
        client.responses.create(input="x", previous_response_id=first.id, **GREEDY)
    assert caught.value.code == "previous_response_not_found"
    assert caught.value.param == "previous_response_id"
    # The second has the whole conversation by itself.
    client.responses.create(input="Why?", previous_response_id=second.id, **GREEDY)
    with pytest.raises(openai.BadRequestError, match="stream: a response that is kept"):
        client.responses.retrieve(second.id, stream=True)


def test_what_is_not_to_be_stored_is_not(client) -> None:
    found = client.responses.create(input=FOX, store=False, **GREEDY)
    assert not found.store
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(found.id)
    kept = client.responses.create(input=FOX, **GREEDY)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(input=[{"role": "user"}], previous_response_id=kept.id, **GREEDY)
    assert caught.value.param == "input[0].content"  # its own number, not that in the whole


def test_another_key_does_not_get_it(tiny_folder) -> None:
    keys = ("first-key-1234", "second-key-5678")
    with running(LLM(tiny_folder, backend="torch"), rules=Rules(keys=keys)) as live:
        mine, other = (
            OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0) for key in keys
        )
        with mine, other:
            found = mine.responses.create(input=FOX, **GREEDY)
            assert mine.responses.retrieve(found.id).id == found.id
            for ask in (
                lambda: other.responses.retrieve(found.id),
                lambda: other.responses.delete(found.id),
                lambda: other.responses.create(input="x", previous_response_id=found.id, **GREEDY),
            ):
                with pytest.raises(openai.NotFoundError):
                    ask()
            assert mine.responses.retrieve(found.id).id == found.id


def test_a_server_may_keep_nothing(tiny_folder) -> None:
    with running(LLM(tiny_folder, backend="torch"), limits=Limits(max_kept=0)) as live:
        body = {"input": FOX, "max_output_tokens": 2, "temperature": 0}
        name = live.client.post("/v1/responses", json=body).json()["id"]
        answer = live.client.get(f"/v1/responses/{name}")
        assert answer.status_code == 404
        assert "This server keeps no responses" in answer.json()["error"]["message"]


# -- limits --------------------------------------------------------------------------------------


def body(name: str, text: str = "yes") -> dict:
    part = {"type": "output_text", "text": text, "annotations": []}
    return {"id": name, "output": [{"type": "message", "role": "assistant", "content": [part]}]}


ITEMS = [InputItem(role="user", content="hi")]


def there(kept: KeptResponses, name: str) -> bool:
    """Whether a response is kept; what is not is refused with status 404."""
    try:
        found = json.loads(kept.response(name, b""))
    except ApiError:
        with pytest.raises(ApiError, match="is not kept here"):
            kept.items(name, b"")
        return False
    return found["id"] == name


def test_the_oldest_go_first_when_there_are_too_many() -> None:
    kept = KeptResponses(count=2)
    for name in "abc":
        kept.keep(body(name), ITEMS, b"")
    assert [there(kept, name) for name in "abc"] == [False, True, True]
    kept.forget("b", b"")
    kept.keep(body("d"), ITEMS, b"")
    assert [there(kept, name) for name in "bcd"] == [False, True, True]
    said = [(item.role, item.content) for item in kept.items("d", b"")]
    assert said[0] == ("user", "hi")
    assert said[1][1][0].text == "yes"


def test_the_oldest_go_first_when_they_are_too_large() -> None:
    one = len(msgspec.json.encode(body("a", "y" * 1000)))
    kept = KeptResponses(num_bytes=5 * one)  # each counts twice: itself, and its conversation
    for name in "abc":
        kept.keep(body(name, "y" * 1000), ITEMS, b"")
    assert [there(kept, name) for name in "abc"] == [False, True, True]
    kept.keep(body("huge", "y" * 5000), ITEMS, b"")
    assert len(kept) == 0
    kept.keep(body("d"), ITEMS, b"")
    assert there(kept, "d")


def test_they_are_forgotten_after_their_time() -> None:
    now = 0.0
    kept = KeptResponses(lifetime_s=10, clock=lambda: now)
    kept.keep(body("a"), ITEMS, b"")
    now = 6.0
    kept.keep(body("b"), ITEMS, b"")
    assert there(kept, "a")
    now = 11.0
    assert not there(kept, "a")
    assert len(kept) == 1
    assert there(kept, "b")
