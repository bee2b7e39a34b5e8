"""A live server answers what the model answers, streams it, and gives up what nobody reads."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from live_server import Live, running

from qnext import LLM, SamplingParams

CHAT = "/v1/chat/completions"
GREEDY = {"temperature": 0, "max_tokens": 24}


def ask(text: str, **options) -> dict:
    return {"messages": [{"role": "user", "content": text}], **GREEDY, **options}


def events(response: httpx.Response) -> list[dict]:
    """The chunks of a stream, which must end as OpenAI's do."""
    # Where a machine is so slow that the server says nothing for long, it sends comments.
    lines = [line for line in response.iter_lines() if line and line != ": keep-alive"]
    assert all(line.startswith("data: ") for line in lines), lines
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def stream(live: Live, body: dict, path: str = CHAT) -> list[dict]:
    with live.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response)


def assembled(chunks: list[dict], key: str = "content") -> str:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get(key, "") for delta in deltas)


# -- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False])
def test_the_answer_is_the_models(live, alone, at_once, monkeypatch) -> None:
    """Whether the prompt is encoded between other events, or in a thread of its own."""
    if not at_once:
        monkeypatch.setattr("qnext.serve.app.MAX_AT_ONCE_BYTES", 0)
    found = live.client.post(CHAT, json=ask("Tell me about the fox.")).json()
    messages = [{"role": "user", "content": "Tell me about the fox."}]
    expected = alone.chat(messages, SamplingParams(**GREEDY))
    [choice] = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert choice["finish_reason"] == expected.finish_reason
    assert found["object"] == "chat.completion"
    assert found["model"] == "tiny"
    usage = found["usage"]
    assert usage["prompt_tokens"] == expected.usage.prompt_tokens
    assert usage["completion_tokens"] == expected.usage.completion_tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_stream_adds_up_to_the_answer(live) -> None:
    body = ask("Tell me about the moon.")
    whole = live.client.post(CHAT, json=body).json()
    chunks = stream(live, body)
    assert assembled(chunks) == whole["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole["choices"][0]["finish_reason"]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert not any("usage" in chunk for chunk in chunks)


def test_the_first_piece_does_not_wait_for_others(live, monkeypatch) -> None:
    monkeypatch.setattr("qnext.serve.worker.HAND_OVER_S", 1e9)
    body = ask("Tell me about the moon.", max_tokens=200, ignore_eos=True, stream=True)
    with live.slowed(), live.client.stream("POST", CHAT, json=body) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        opening, first = (json.loads(next(lines)[6:])["choices"][0]["delta"] for _ in range(2))
        assert live.busy() == 1  # it goes on
        assert opening["content"] == ""
        assert first["content"]
    live.wait_until(busy=0)
    pieces = stream(live, {**body, "max_tokens": 40})
    assert len(pieces) <= 4, "the rest came with the end"


def test_usage_comes_last_in_a_stream_that_asks_for_it(live) -> None:
    body = ask("Tell me about the moon.")
    whole = live.client.post(CHAT, json=body).json()
    chunks = stream(live, {**body, "stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert chunks[-1]["usage"][name] == whole["usage"][name]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_eight_streams_at_once_each_get_their_own_text(live, alone) -> None:
    prompts = [f"Question number {i}: " + "fox " * i for i in range(8)]
    expected = [
        alone.chat([{"role": "user", "content": text}], SamplingParams(**GREEDY)).text
        for text in prompts
    ]
    assert len(set(expected)) > 4  # the model does tell them apart
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: assembled(stream(live, ask(text))), prompts))
    assert found == expected
    live.wait_until(busy=0)


def test_sampling_fields_reach_the_sampler(live, alone) -> None:
    fields = {
        "temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 0.001, "seed": 11,
        "presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.1,
        "max_tokens": 20, "min_tokens": 2, "ignore_eos": True,
    }  # fmt: skip
    messages = [{"role": "user", "content": "Tell me about the fox."}]
    expected = alone.chat(messages, SamplingParams(**fields))
    for body in (
        {"messages": messages, **fields},
        {"messages": messages, **fields, "max_tokens": None, "max_completion_tokens": 20},
    ):
        found = live.client.post(CHAT, json=body).json()
        assert found["choices"][0]["message"]["content"] == expected.text
        assert found["usage"]["completion_tokens"] == 20
    other = live.client.post(CHAT, json={"messages": messages, **fields, "seed": 12}).json()
    assert other["choices"][0]["message"]["content"] != expected.text


def test_logit_bias_and_stop_tokens(live, alone) -> None:
    token = alone.tokenizer.id_of("x")
    body = ask("hi", logit_bias={str(token): 100}, max_tokens=5)
    found = live.client.post(CHAT, json=body).json()
    assert found["choices"][0]["message"]["content"] == "xxxxx"
    found = live.client.post(CHAT, json={**body, "stop_token_ids": [token]}).json()
    assert found["choices"][0] | {"index": 0} == found["choices"][0]
    assert found["choices"][0]["message"]["content"] == ""
    assert found["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("several", [False, True])
def test_a_stop_string_ends_the_answer(live, several) -> None:
    body = ask("Tell me about the fox.")
    text = live.client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    stop = text[4:6]
    stops = ["never in there", stop] if several else stop
    cut = live.client.post(CHAT, json={**body, "stop": stops}).json()["choices"][0]
    assert cut["message"]["content"] == text[: text.index(stop)]
    assert cut["finish_reason"] == "stop"
    assert assembled(stream(live, {**body, "stop": stops})) == text[: text.index(stop)]
    live.wait_until(busy=0)


@pytest.mark.parametrize("limit", [None, 2**70])
def test_the_context_is_a_limit_too(limit, live) -> None:
    body = {**ask("hi"), "max_tokens": limit, "ignore_eos": True}
    usage = live.client.post(CHAT, json=body).json()["usage"]
    assert usage["total_tokens"] == live.llm.max_model_len


def test_reasoning_is_separate_from_content(thinking_folder) -> None:
    """The closing tag is made likely enough to come by chance; a seed makes it come again."""
    alone = LLM(thinking_folder)
    close = alone.tokenizer.id_of("</think>")
    messages = [{"role": "user", "content": "Tell me about the fox."}]
    for seed in range(20):
        fields = {"temperature": 1.0, "seed": seed, "max_tokens": 60, "ignore_eos": True}
        expected = alone.chat(messages, SamplingParams(**fields, logit_bias={close: 4.0}))
        if expected.reasoning and expected.text:
            break
    assert expected.reasoning
    assert expected.text
    with running(LLM(thinking_folder)) as live:
        body = {"messages": messages, **fields, "logit_bias": {str(close): 4.0}}
        found = live.client.post(CHAT, json=body).json()
        message = found["choices"][0]["message"]
        assert message["reasoning_content"] == expected.reasoning
        assert message["content"] == expected.text
        reasoned = found["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert 0 < reasoned < found["usage"]["completion_tokens"]
        chunks = stream(live, body)
        assert assembled(chunks, "reasoning_content") == expected.reasoning
        assert assembled(chunks) == expected.text
        only_thinks = live.client.post(CHAT, json={**body, "max_tokens": 1, "logit_bias": {}})
        assert only_thinks.json()["choices"][0]["message"]["content"] == ""


def test_enable_thinking_reaches_the_template(live, alone) -> None:
    messages = [{"role": "user", "content": "hi"}]
    texts = set()
    for thinks in (True, False):
        options = {"enable_thinking": thinks}
        found = live.client.post(CHAT, json=ask("hi", chat_template_kwargs=options)).json()
        expected = alone.chat(messages, SamplingParams(**GREEDY), enable_thinking=thinks)
        message = found["choices"][0]["message"]
        assert message["content"] == expected.text
        texts.add(found["usage"]["prompt_tokens"])
    assert len(texts) == 2


def test_a_developer_message_is_a_system_message(live) -> None:
    answers = [
        live.client.post(
            CHAT,
            json={**GREEDY, "messages": [{"role": role, "content": "Be a fox."},
                                         {"role": "user", "content": "hi"}]},
        ).json()["choices"]
        for role in ("system", "developer")
    ]  # fmt: skip
    assert answers[0] == answers[1]


@pytest.mark.parametrize("form", ["text", "ids", "list"])
def test_plain_completions(form, live, alone) -> None:
    prompt = {"text": "The fox", "ids": alone.tokenizer.encode("The fox"), "list": ["The fox"]}
    [expected] = alone.generate("The fox", SamplingParams(**GREEDY))
    body = {"prompt": prompt[form], **GREEDY}
    found = live.client.post("/v1/completions", json=body).json()
    assert found["object"] == "text_completion"
    assert found["choices"][0]["text"] == expected.text
    assert found["choices"][0]["finish_reason"] == expected.finish_reason
    chunks = stream(live, body, "/v1/completions")
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.text
    assert chunks[-1]["choices"][0]["finish_reason"] == expected.finish_reason


def test_models_and_health(live) -> None:
    [card] = live.client.get("/v1/models").json()["data"]
    assert card["id"] == "tiny"
    assert card["max_model_len"] == 512
    assert live.client.get("/v1/models/tiny").json() == card
    assert live.client.post(CHAT, json=ask("hi", model="tiny")).status_code == 200
    live.wait_until(busy=0)
    health = live.client.get("/health")
    assert health.status_code == 200
    assert health.json()["status"] == "ok"
    assert any(line.startswith(("experts: ", "decoder: ")) for line in health.json()["kernels"])


def test_the_next_turn_of_a_conversation_is_prepared_meanwhile(tiny_folder) -> None:
    messages = [{"role": "user", "content": "Tell me about the fox."}]
    asked = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    with running(LLM(tiny_folder, backend="torch")) as live:
        first = live.client.post(CHAT, json={"messages": messages, **asked}).json()
        counts = live.wait_until_prepared()
        assert (counts["queued"], counts["finished"]) == (1, 1), (counts, first)
        said = first["choices"][0]["message"]["content"]
        later = [
            *messages,
            {"role": "assistant", "content": said},
            {"role": "user", "content": "Why?"},
        ]
        second = live.client.post(CHAT, json={"messages": later, **asked}).json()
        reused = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert reused > counts["tokens"] > 16
        assert reused > second["usage"]["prompt_tokens"] - 20
        live.check_that_nothing_is_held()


def test_fields_without_influence_are_named_in_a_header(live) -> None:
    response = live.client.post(CHAT, json=ask("hi", user="me", metadata={"a": "b"}))
    assert response.status_code == 200
    assert response.headers["x-qnext-ignored"] == "metadata, user"
    assert "x-qnext-ignored" not in live.client.post(CHAT, json=ask("hi")).headers


# -- leaving early -------------------------------------------------------------------------------

LONG = {"max_tokens": 400, "ignore_eos": True}


def test_leaving_a_stream_frees_the_engine(live) -> None:
    live.wait_until(busy=0)
    opened = live.client.stream("POST", CHAT, json=ask("hi", **LONG, stream=True))
    with live.slowed(), opened as response:
        lines = response.iter_lines()
        next(lines)
        assert live.busy() == 1
    live.check_that_nothing_is_held()


def test_leaving_an_answer_frees_the_engine(live) -> None:
    with live.slowed(), pytest.raises(httpx.ReadTimeout):
        live.client.post(CHAT, json=ask("hi", **LONG), timeout=0.15)
    live.check_that_nothing_is_held()


def test_a_request_may_leave_while_it_waits(tiny_folder) -> None:
    """One runs, the second waits for its place and is given up; the third gets the place."""
    with running(LLM(tiny_folder, max_num_seqs=1, backend="torch")) as live:
        first = live.client.stream("POST", CHAT, json=ask("one", **LONG, stream=True))
        with live.slowed(), first as response:
            lines = response.iter_lines()
            next(lines)
            with pytest.raises(httpx.ReadTimeout):
                live.client.post(CHAT, json=ask("two", **LONG), timeout=0.15)
            live.wait_until(busy=1)
        found = live.client.post(CHAT, json=ask("three"))
        assert found.status_code == 200
        live.check_that_nothing_is_held()


def test_many_clients_that_leave_at_once_leave_nothing_behind(live) -> None:
    barrier = threading.Barrier(6)

    def visit(number: int) -> None:
        body = ask(f"visitor {number}", **LONG, stream=True)
        with httpx.stream("POST", live.url + CHAT, json=body, timeout=60) as response:
            lines = response.iter_lines()
            for _ in range(number):
                next(lines)
            barrier.wait(60)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(visit, range(6)))
    live.check_that_nothing_is_held()


# -- the end -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engine_fails_nobody_waits_for_ever(tiny_folder, monkeypatch) -> None:
    with running(LLM(tiny_folder, backend="torch")) as live:
        step, count = live.llm.engine.step, 0

        def failing_step():
            nonlocal count
            count += 1
            if count > 5:
                raise RuntimeError("out of memory")
            return step()

        monkeypatch.setattr(live.llm.engine, "step", failing_step)
        body = ask("hi", **LONG, stream=True)
        with live.client.stream("POST", CHAT, json=body) as response:
            lines = [line for line in response.iter_lines() if line]
        last = json.loads(lines[-1].removeprefix("data: "))
        assert last["error"]["code"] == "engine_stopped"
        health = live.client.get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "stopped"
        refused = live.client.post(CHAT, json=ask("hi"))
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "server_error"


def test_stopping_the_server_ends_its_streams(tiny_folder) -> None:
    with running(LLM(tiny_folder, backend="torch")) as live:
        opened = live.client.stream("POST", CHAT, json=ask("hi", **LONG, stream=True))
        with live.slowed(), opened as response:
            lines = response.iter_lines()
            next(lines)
            live.worker.stop()
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_stopped"
