"""The OpenAPI document is true: what it allows never makes the server fail."""

import json

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import running
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from qnext import LLM
from qnext.serve.openapi import OPERATIONS, document

CHECKS = [
    not_a_server_error, content_type_conformance, response_schema_conformance,
    status_code_conformance,
]  # fmt: skip
GENERATING = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]


@pytest.fixture(scope="module")
def short(tiny_folder):
    """A server with a short context, so that no answer is long."""
    with running(LLM(tiny_folder, max_model_len=128, backend="torch")) as found:
        yield found


ALLOWED = {
    found.ok().label: found.ok().as_strategy()
    for found in schemathesis.openapi.from_dict(document()).get_all_operations()
}


@pytest.mark.parametrize("label", ALLOWED)
@settings(
    max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(data=st.data())
def test_no_request_makes_the_server_fail(label, data, short) -> None:
    case = data.draw(ALLOWED[label])
    case.call_and_validate(base_url=short.url, checks=CHECKS, timeout=60)


def test_the_document_names_every_route(short) -> None:
    found = short.client.get("/openapi.json").json()
    assert found == json.loads(msgspec.json.encode(document()))
    assert set(found["paths"]) == set(OPERATIONS)
    routes = {r.path.replace(":path}", "}") for r in short.app.routes}
    pages = {"/openapi.json", "/"}
    assert {path for path in routes if not path.startswith("/ui/")} - pages == set(OPERATIONS)


TEXT = st.text(max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"])},
    optional={
        "content": TEXT | JSON, "reasoning_content": JSON, "tool_calls": JSON,
        "tool_call_id": TEXT,
    },
)  # fmt: skip
ASKING = {
    "/v1/chat/completions": {"messages": st.lists(MESSAGE, max_size=4) | JSON},
    "/v1/completions": {"prompt": TEXT | JSON},
    "/v1/responses": {"input": TEXT | st.lists(MESSAGE, max_size=3) | JSON},
    "/v1/messages": {"messages": st.lists(MESSAGE, max_size=3) | JSON},
}
LIMIT = {"/v1/responses": "max_output_tokens"}


@pytest.mark.parametrize("path", GENERATING)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_body_is_answered_or_refused_with_a_place(path, data, short) -> None:
    names = sorted(field.name for field in msgspec.structs.fields(OPERATIONS[path].body))
    extra = data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=2))
    body = {**extra, **data.draw(st.fixed_dictionaries(ASKING[path]))}
    body[LIMIT.get(path, "max_tokens")] = 3
    content = msgspec.json.encode({**body, "model": None})
    answer = short.client.post(path, content=content, headers={"content-type": "application/json"})
    missing = 404 if body.get("previous_response_id") is not None else 400
    assert answer.status_code in (200, 400, missing), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["message"]
        assert "Traceback" not in answer.text
    assert short.worker.is_alive
