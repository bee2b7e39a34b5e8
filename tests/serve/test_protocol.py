"""What the server refuses, in OpenAI's shape and naming the place."""

import json
import re
import signal
import subprocess
import sys

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qnext.serve.api.chat import ChatRequest
from qnext.serve.api.completions import CompletionRequest
from qnext.serve.reading import read_body
from qnext.serve.refusals import ApiError
from qnext.serve.server import address, banner, listen

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]


def hello(**fields) -> dict:
    return {"messages": HELLO, **fields}


REFUSALS = [
    ({}, "messages", "messages: required and missing."),
    ({"messages": "hi"}, "messages", "messages: expected array, got str."),
    ({"messages": []}, "messages", "messages: expected at least one message"),
    ({"messages": ["hi"]}, "messages[0]", "messages[0]: expected object, got str."),
    ({"messages": [*HELLO, *HELLO, {"role": "user", "content": 3}]}, "messages[2].content",
     "messages[2].content: expected str | array | null, got int."),
    ({"messages": [{"role": "user"}]}, "messages[0].content",
     "messages[0].content: expected str, got None."),
    ({"messages": [{"content": "hi"}]}, "messages[0].role",
     "messages[0].role: required and missing."),
    ({"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role",
     "messages[0].role: expected one of 'assistant', 'developer', 'system', 'tool', 'user', "
     "got 'king'."),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "messages[0].content[0].type", "expected 'text', got 'image_url'"),
    (hello(temperature="hot"), "temperature", "temperature: expected float | null, got str."),
    (hello(temperature=-1), "temperature", "temperature: expected at least 0"),
    (hello(top_p=0), "top_p", "top_p: expected more than 0 and at most 1, found 0"),
    (hello(top_k=1.5), "top_k", "top_k: expected int | null, got float."),
    (hello(max_tokens=0), "max_tokens", "max_tokens: expected at least 1, found 0."),
    (hello(max_tokens=3, max_completion_tokens=4), "max_tokens", "contradicts"),
    (hello(seed="x"), "seed", "seed: expected int | null, got str."),
    (hello(stream=1), "stream", "stream: expected bool | null, got int."),
    (hello(stream_options={"usage": True}), "stream_options.usage",
     "stream_options.usage: unknown field."),
    (hello(stop=[1]), "stop[0]", "stop[0]: expected str, got int."),
    (hello(stop=[""]), "stop", "stop: an empty string"),
    (hello(stop=["a"] * 17), "stop", "stop: expected at most 16 strings, got 17."),
    (hello(logit_bias={"fox": 1}), "logit_bias", "expected token ids as keys, got 'fox'"),
    (hello(logit_bias={"1": 101}), "logit_bias", "expected values from -100 to 100, got 101"),
    (hello(logit_bias={"999999": 1}), None, "id 999999 is outside the vocabulary"),
    (hello(n=0), "n", "n: expected at least 1 and at most 128, found 0."),
    (hello(top_logprobs=2), "top_logprobs", "top_logprobs: needs logprobs: true."),
    (hello(logprobs=True, top_logprobs=21), "top_logprobs", "expected 0 to 20, found 21"),
    (hello(tools=[{"type": "function"}]), "tools[0].function",
     "tools[0].function: required and missing."),
    (hello(tool_choice="required"), "tool_choice", "tool_choice: 'required' needs tools"),
    (hello(tool_choice="maybe"), "tool_choice", "tool_choice: "),
    (hello(response_format={"type": "yaml"}), "response_format.type",
     "expected one of 'json_object', 'json_schema', 'text', got 'yaml'."),
    (hello(response_format={"type": "json_schema"}), "response_format.json_schema.schema",
     "response_format.json_schema.schema: required and missing."),
    (hello(response_format={"type": "json_object"}, guided_regex="a"), "guided_regex",
     "guided_regex: contradicts response_format"),
    (hello(functions=[{}]), "functions", "functions: not supported"),
    (hello(modalities=["audio"]), "modalities", "modalities: not supported"),
    (hello(reasoning_effort="some"), "reasoning_effort", "reasoning_effort: expected one of"),
    (hello(thinking_budget=-1), "thinking_budget", "thinking_budget: expected at least 0"),
    (hello(temprature=1), "temprature", "temprature: unknown field. Did you mean temperature?"),
    (hello(xyzzy=1), "xyzzy", "xyzzy: unknown field."),
    (hello(chat_template_kwargs={"enable_thinking": "yes"}),
     "chat_template_kwargs.enable_thinking", "expected bool, got str."),
    (hello(chat_template_kwargs={"messages": []}), "chat_template_kwargs.messages",
     "chat_template_kwargs.messages: is not an option of the template"),
    (hello(enable_thinking=True, chat_template_kwargs={"enable_thinking": False}),
     "enable_thinking", "contradicts chat_template_kwargs.enable_thinking"),
    (hello(continue_final_message=True), "continue_final_message",
     "messages[0].role: expected assistant, got 'user'"),
    ({"messages": [{"role": "user", "content": "word " * 900}]}, None, "the context holds 512"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "message"), REFUSALS, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_chat_is_refused_with_its_place(body, param, message, stream, live) -> None:
    body = {"stream": True, **body} if stream else body
    response = live.client.post(CHAT, json=body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert message in error["message"]


def test_a_prompt_that_does_not_fit_has_the_code_clients_look_for(live) -> None:
    error = live.client.post(PLAIN, json={"prompt": "word " * 900}).json()["error"]
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt: required and missing."),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": ["a"] * 65}, "prompt: expected at most 64 prompts, got 65."),
        ({"prompt": ["a", ""]}, "the prompt is empty"),
        ({"prompt": [1, "a"]}, "prompt: expected str, a list of str, a list of token ids, or"),
        ({"prompt": [True]}, "prompt[0]: expected int | str | array, got bool."),
        ({"prompt": "x", "best_of": 3}, "best_of: 3 asks for more answers than n (1)"),
        ({"prompt": "x", "logprobs": 21}, "logprobs: expected at least 0 and at most 20"),
        ({"prompt": [5, 70000]}, "prompt token 1: id 70000 is outside the vocabulary"),
        ({"prompt": "x", "messages": []}, "messages: unknown field."),
        ({"prompt": "x", "suffix": "y"}, "suffix: not supported"),
    ],
)
def test_a_bad_completion_is_refused(body, message, live) -> None:
    response = live.client.post(PLAIN, json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (b"{", {}, 400, "the body is not valid JSON"),
        (b"", {}, 400, "the body is not valid JSON"),
        (b'{"messages": "\xff"}', {}, 400, "the body is not valid JSON"),
        (b'{"seed": 1e400}', {}, 400, "the body is not valid JSON"),
        (b"[" * 50_000, {}, 400, "the body is nested too deeply."),
        (b"[1]", {}, 400, "the body: expected a JSON object, got list."),
        (b"{}", {"content-type": "text/plain"}, 415, "expected application/json, got text/plain"),
        (b" " * 100_001, {}, 413, "larger than the limit of 100,000 bytes"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(content, headers, status, message, live) -> None:
    headers = {"content-type": "application/json", **headers}
    response = live.client.post(CHAT, content=content, headers=headers)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_a_body_without_a_length_is_cut_off_too(live) -> None:
    def endless():
        for _ in range(200):
            yield b" " * 1000

    headers = {"content-type": "application/json"}
    assert live.client.post(CHAT, content=endless(), headers=headers).status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v2/nothing", 404, "no_such_route"),
        ("GET", CHAT, 405, "no_such_route"),
        ("GET", "/v1/models/gpt", 404, "model_not_found"),
        ("GET", "/ui/../app.py", 404, "no_such_route"),
    ],
)
def test_what_is_not_there_is_said_in_the_same_shape(method, path, status, code, live) -> None:
    response = live.client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code


def test_another_models_name_is_refused(live) -> None:
    response = live.client.post(CHAT, json=hello(model="gpt-4"))
    assert response.status_code == 404
    assert "'gpt-4' is not served here; this server has 'tiny'" in response.text


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    body = b"""{"messages": [], "n": 1, "tools": [], "tool_choice": "auto", "logprobs": false,
               "response_format": {"type": "text"}, "functions": null, "temperature": null}"""
    request, ignored = read_body(body, ChatRequest)
    assert request.temperature is None
    assert ignored == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*ChatRequest.__struct_fields__, "prompt", "tools", "n", "user", "x"])


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from([ChatRequest, CompletionRequest]),
       raw=st.dictionaries(FIELDS, JSON, max_size=5))  # fmt: skip
def test_any_object_is_read_or_refused_with_a_place(kind, raw) -> None:
    try:
        request, _ = read_body(msgspec.json.encode(raw), kind)
    except ApiError as error:
        refusal = error
    else:
        assert isinstance(request, kind)
        return
    assert refusal.status == 400
    assert refusal.param
    assert str(refusal).startswith(refusal.param)


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=60))
def test_any_bytes_are_refused_or_read(body) -> None:
    with pytest.raises(ApiError):
        read_body(body, ChatRequest)


ID = st.sampled_from([0, 1, 7, 300, 399, 511])
VALUES = {
    "temperature": st.sampled_from([0, 1e-300, 1e-9, 0.5, 1, 99.9]),
    "top_p": st.sampled_from([1e-300, 1e-9, 0.5, 1]),
    "min_p": st.sampled_from([0, 1e-300, 0.5, 1]),
    "presence_penalty": st.sampled_from([-2, 0, 1e-300, 2]),
    "frequency_penalty": st.sampled_from([-2, 0, 1e-300, 2]),
    "repetition_penalty": st.sampled_from([1e-300, 0.5, 1, 99.9]),
    "top_k": st.sampled_from([-1, 0, 1, 511, 10**6, 2**63, 2**70]),
    "seed": st.sampled_from([-(2**70), -1, 0, 2**32, 2**63, 2**70]),
    "min_tokens": st.sampled_from([0, 1, 2]),
    "ignore_eos": st.booleans(),
    "max_tokens": st.sampled_from([2, 3]),
    "stop": st.lists(st.text(min_size=1, max_size=2), max_size=3),
    "stop_token_ids": st.lists(ID, max_size=3),
    "logit_bias": st.dictionaries(ID.map(str), st.sampled_from([-100, 1e-300, 100]), max_size=3),
}  # fmt: skip
PROMPT = st.text(min_size=1, max_size=5) | st.lists(ID, min_size=1, max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=st.fixed_dictionaries({"prompt": PROMPT}, optional=VALUES))
def test_no_values_bring_the_engine_down(body, live) -> None:
    """The extremes of what is allowed are answered, and the engine lives on."""
    response = live.client.post(PLAIN, json={"max_tokens": 2, **body})
    assert response.status_code == 200, response.text
    assert live.worker.is_alive


# -- the socket ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("0.0.0.0", "127.0.0.1")],
)
def test_the_banner_names_an_address_that_works(host, shown, alone, capsys) -> None:
    with listen(host, 0) as listener:
        port = listener.getsockname()[1]
        text = banner(alone, listener)
        assert text.startswith(f"qnext serves tiny at http://{shown}:{port}\n")
        assert address(listener) == f"http://{shown}:{port}"
        assert "kernels" in text
        warned = "reachable from other machines" in capsys.readouterr().err
        assert warned == (host == "0.0.0.0")


def test_the_command_serves_until_it_is_interrupted(tiny_folder) -> None:
    command = [sys.executable, "-m", "qnext", "serve", str(tiny_folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    url = re.search(r"http://\S+", line).group()
    assert httpx.get(f"{url}/health", timeout=60).json()["status"] == "ok"
    body = hello(max_tokens=3, temperature=0, ignore_eos=True)
    answer = httpx.post(f"{url}{CHAT}", json=body, timeout=60)
    assert answer.status_code == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    template, request = (json.loads(line) for line in process.stderr)
    assert "no chat template" in template["message"]
    assert (request["path"], request["status"]) == (CHAT, 200)
    assert request["completion_tokens"] == 3
    assert "hi" not in request.values()
    process.stdout.close()
    process.stderr.close()
