"""A stream with nothing to say says so, and every client leaves that out."""

import json

import httpx
import pytest
from anthropic import Anthropic
from live_server import running
from openai import OpenAI

from qnext import LLM
from qnext.serve.app import Limits

COMMENT = ": keep-alive"
FOX = [{"role": "user", "content": "Tell me about the fox."}]
BODY = {"messages": FOX, "temperature": 0, "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def patient(tiny_folder):
    """A server with room for one request, which lets nobody wait in silence for long."""
    llm = LLM(tiny_folder, max_num_seqs=1, backend="torch")
    with running(llm, limits=Limits(keep_alive_s=0.03)) as found:
        yield found


def lines_of(live) -> list[str]:
    body = {**BODY, "stream": True}
    with httpx.stream("POST", f"{live.url}/v1/chat/completions", json=body, timeout=60) as answer:
        return [line for line in answer.iter_lines() if line]


def text_of(lines: list[str]) -> str:
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def test_comments_fill_the_silence_and_change_nothing(patient) -> None:
    whole = patient.client.post("/v1/chat/completions", json=BODY).json()
    with patient.slowed(0.25):
        lines = lines_of(patient)
    assert text_of(lines) == whole["choices"][0]["message"]["content"]
    assert lines[-1] == "data: [DONE]"
    comments = lines.count(COMMENT)
    # Five steps of a quarter of a second at least, and no more than one comment per interval.
    assert comments >= 8
    assert all(line.startswith("data: ") for line in lines if line != COMMENT)


def test_whoever_waits_for_a_place_hears_something(patient) -> None:
    long = {**BODY, "max_tokens": 400, "stream": True}
    url = f"{patient.url}/v1/chat/completions"
    with (
        patient.slowed(),
        patient.client.stream("POST", url, json=long) as first,
        httpx.stream("POST", url, json={**BODY, "stream": True}, timeout=60) as second,
    ):
        running_lines = first.iter_lines()  # kept, because dropping it would close the stream
        next(running_lines)
        waiting = (line for line in second.iter_lines() if line)
        assert '"role":"assistant"' in next(waiting)
        assert [next(waiting) for _ in range(3)] == [COMMENT] * 3
    patient.check_that_nothing_is_held()


def test_the_official_clients_read_over_it(patient) -> None:
    whole = patient.client.post("/v1/chat/completions", json=BODY).json()
    expected = whole["choices"][0]["message"]["content"]
    with patient.slowed(0.1), OpenAI(base_url=f"{patient.url}/v1", api_key="none") as client:
        chunks = client.chat.completions.create(
            model="tiny", messages=FOX, temperature=0, max_tokens=4, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        events = list(
            client.responses.create(
                model="tiny", input="Hi", temperature=0, max_output_tokens=4, stream=True
            )
        )
        assert events[-1].type in ("response.completed", "response.incomplete")
    with patient.slowed(0.1), Anthropic(base_url=patient.url, api_key="none") as client:
        wanted = {"model": "tiny", "messages": FOX, "max_tokens": 4,
                  "extra_body": {"temperature": 0}}  # fmt: skip
        with client.messages.stream(**wanted) as stream:
            streamed = stream.get_final_message()
        assert streamed.content[0].text == client.messages.create(**wanted).content[0].text


def test_it_can_be_switched_off(tiny_folder) -> None:
    llm = LLM(tiny_folder, backend="torch")
    with running(llm, limits=Limits(keep_alive_s=None)) as live, live.slowed(0.1):
        assert COMMENT not in lines_of(live)
