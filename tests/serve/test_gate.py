"""Who may use a server, how much of it, and what is written down about it."""

import json
import logging
import re
import threading
import time

import httpx
import pytest
from live_server import running

from qnext import LLM
from qnext.errors import RequestError
from qnext.serve.app import Limits
from qnext.serve.gate import Rules, log_to_stderr, read_keys

CHAT = "/v1/chat/completions"
KEYS = ("first-key-1234", "second-key-5678")


def hello(**fields) -> dict:
    """A request whose answer is the same every time."""
    messages = [{"role": "user", "content": "the secret fox"}]
    return {"messages": messages, "max_tokens": 4, "temperature": 0, **fields}


@pytest.fixture(scope="module")
def guarded(tiny_folder):
    """A server that asks for keys, lets one site in, and has room for one request."""
    rules = Rules(keys=KEYS)
    limits = Limits(max_waiting=0)
    llm = LLM(tiny_folder, max_num_seqs=1, backend="torch")
    with running(
        llm, rules=rules, limits=limits, origins=["https://example.org"], names=["fox", "tiny"]
    ) as found:
        found.client.headers["authorization"] = f"Bearer {KEYS[0]}"
        yield found


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": KEYS[0]}, 401),
        ({"authorization": f"Basic {KEYS[0]}"}, 401),
        ({"x-api-key": ""}, 401),
        ({"authorization": f"Bearer {KEYS[0]}"}, 200),
        ({"authorization": f"bearer {KEYS[1]}"}, 200),
        ({"x-api-key": KEYS[1]}, 200),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/models", "/metrics", "/cache/explain"])
def test_every_route_asks_for_one_of_the_keys(path, headers, status, guarded) -> None:
    method = "POST" if path in (CHAT, "/v1/messages") else "GET"
    body = hello() if method == "POST" else None
    answer = httpx.request(method, guarded.url + path, headers=headers, json=body, timeout=60)
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["www-authenticate"] == "Bearer"
        kind = answer.json()["error"]["type"]
        assert kind == "authentication_error"


@pytest.mark.parametrize("path", ["/", "/health", "/ui/app.js"])
def test_the_page_and_the_probe_need_no_key(path, guarded) -> None:
    assert httpx.get(guarded.url + path).status_code == 200


def test_another_site_is_let_in_only_when_named(guarded, live) -> None:
    asks = {"origin": "https://example.org", "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type"}  # fmt: skip
    allowed = httpx.options(guarded.url + CHAT, headers=asks)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://example.org"
    other = httpx.options(guarded.url + CHAT, headers={**asks, "origin": "https://evil.test"})
    assert other.status_code == 400
    plain = live.client.get("/v1/models", headers={"origin": "https://example.org"})
    assert "access-control-allow-origin" not in plain.headers


def test_a_page_that_renamed_this_machine_gets_nothing(tiny_folder) -> None:
    with running(LLM(tiny_folder, backend="torch"), rules=Rules(hosts=["fox.local"])) as live:
        for host, status in (
            ("evil.test", 403), ("evil.test:80", 403), ("", 403), ("localhost", 200),
            ("localhost:8000", 200), ("127.0.0.1:1", 200), ("[::1]:8", 200), ("FOX.local:1", 200),
        ):  # fmt: skip
            answer = live.client.get("/v1/models", headers={"host": host})
            assert answer.status_code == status, host


def test_all_names_of_the_model_are_known(guarded) -> None:
    listed = guarded.client.get("/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["fox", "tiny"]
    assert guarded.client.post(CHAT, json=hello(model="tiny")).json()["model"] == "tiny"
    assert guarded.client.post(CHAT, json=hello()).json()["model"] == "fox"


def test_a_full_queue_is_refused_with_a_time_to_come_back(guarded) -> None:
    long = hello(max_tokens=400, ignore_eos=True, stream=True)
    with guarded.slowed(), guarded.client.stream("POST", CHAT, json=long) as one:
        lines = one.iter_lines()  # kept, because dropping it would close the stream
        next(lines)
        refused = guarded.client.post(CHAT, json=hello())
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
    guarded.check_that_nothing_is_held()
    assert guarded.client.post(CHAT, json=hello()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_ended(stream, tiny_folder) -> None:
    llm = LLM(tiny_folder, backend="torch")
    with running(llm, limits=Limits(timeout_s=0.05)) as live, live.slowed():
        body = hello(max_tokens=480, ignore_eos=True, stream=stream)
        answer = live.client.post(CHAT, json=body)
        assert answer.status_code == (200 if stream else 504)
        assert "request_timeout" in answer.text
        assert "did not end within 0.05 s" in answer.text
        live.check_that_nothing_is_held()


def test_ids_go_through_and_back(live) -> None:
    for given, kept in (("abc-1", True), ("a b", False), ("x" * 200, False)):
        found = live.client.get("/v1/models", headers={"x-request-id": given}).headers
        assert (found["x-request-id"] == given) == kept
        assert re.fullmatch(r"[\w.:-]+", found["x-request-id"])
        assert found["request-id"] == found["x-request-id"]


@pytest.mark.parametrize("shows", [False, True])
def test_the_log_has_a_line_per_request_and_text_only_when_asked(
    shows, tiny_folder, caplog
) -> None:
    caplog.set_level(logging.INFO, "qnext.serve.requests")
    rules = Rules(log_prompts=shows)
    with running(LLM(tiny_folder, backend="torch"), rules=rules) as live:
        body = hello(user="me", ignore_eos=True)
        live.client.post(CHAT, json=body, headers={"x-request-id": "mine"})
        live.client.post(CHAT, json={"messages": 3})
        live.client.get("/health")
    fine, refused = (record.fields for record in caplog.records if hasattr(record, "fields"))
    assert (fine["request"], fine["status"], fine["path"]) == ("mine", 200, CHAT)
    assert fine["completion_tokens"] == 4
    assert fine["finish"] == {"length": 1}
    assert fine["ignored"] == ["user"]
    assert fine["ms"] >= fine["first_token_ms"] > 0
    assert refused["status"] == 400
    assert ("secret fox" in str(fine)) == shows


@pytest.mark.parametrize("form", ["json", "text"])
def test_lines_of_the_log_stay_lines(form, capsys) -> None:
    names = ("qnext", "uvicorn")
    before = {n: (logging.getLogger(n).handlers[:], logging.getLogger(n).propagate) for n in names}
    try:
        log_to_stderr(form)
        fields = {"path": "/a\nFORGED line", "status": 200}
        logging.getLogger("qnext.serve.requests").info("request", extra={"fields": fields})
    finally:
        for name, (handlers, propagates) in before.items():
            logger = logging.getLogger(name)
            logger.handlers[:], logger.propagate = handlers, propagates
            logger.setLevel(logging.NOTSET)
    written = capsys.readouterr().err
    assert written.count("\n") == 1
    if form == "json":
        assert json.loads(written)["path"] == "/a\nFORGED line"
    else:
        assert r'path="/a\nFORGED line" status=200' in written


def test_metrics_add_up(tiny_folder) -> None:
    with running(LLM(tiny_folder, backend="torch")) as live:
        body = hello(n=2, temperature=1, seed=0, ignore_eos=True)  # each of the four is 4 tokens
        usages = [live.client.post(CHAT, json=body).json()["usage"] for _ in range(2)]
        live.client.post(CHAT, json={"messages": 3})
        live.wait_until(busy=0)
        page = live.client.get("/metrics")
        assert page.headers["content-type"].startswith("text/plain")
        counts = dict(re.findall(r"^(qnext_\S+) (\S+)$", page.text, re.MULTILINE))

    def count(name: str) -> float:
        return float(counts[name])

    assert count(f'qnext_requests_total{{route="{CHAT}",status="200"}}') == 2
    assert count(f'qnext_requests_total{{route="{CHAT}",status="400"}}') == 1
    for kind in ("prompt", "completion"):
        expected = sum(usage[f"{kind}_tokens"] for usage in usages)
        assert count(f'qnext_tokens_total{{kind="{kind}"}}') == expected
    assert count('qnext_ended_requests_total{way="length"}') == 4
    assert count(f'qnext_first_token_seconds_count{{route="{CHAT}"}}') == 2
    assert count("qnext_up") == 1
    assert count("qnext_unfinished_requests") == 0
    assert count("qnext_steps_total") > 4
    assert 0 < count("qnext_cache_pages_free") <= count("qnext_cache_pages")


def test_a_draining_server_takes_nothing_new(tiny_folder) -> None:
    with running(LLM(tiny_folder, backend="torch")) as live:
        body = hello(max_tokens=300, ignore_eos=True)
        found = []
        thread = threading.Thread(
            target=lambda: found.append(live.client.post(CHAT, json=body).json())
        )
        thread.start()
        while not live.worker.unfinished:
            time.sleep(0.01)
        live.worker.draining = True
        refused = live.client.post(CHAT, json=hello())
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_stopping"
        assert "retry-after" in refused.headers
        health = live.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        thread.join(60)
        assert found[0]["usage"]["completion_tokens"] == 300


def test_keys_come_from_a_file_and_the_environment(tmp_path) -> None:
    file = tmp_path / "keys"
    file.write_text("# mine\nalpha-key-1  # laptop\n\nbeta-key-22\n")
    file.chmod(0o600)
    environment = {"QNEXT_API_KEYS": "gamma-key-3, alpha-key-1"}
    assert read_keys(str(file), environment) == ("alpha-key-1", "beta-key-22", "gamma-key-3")
    assert read_keys(None, {}) == ()
    file.chmod(0o644)
    with pytest.raises(RequestError, match="other users of this machine can read it"):
        read_keys(str(file), {})
    file.chmod(0o600)
    file.write_text("# nothing\n")
    with pytest.raises(RequestError, match="holds no key"):
        read_keys(str(file), {})
    with pytest.raises(RequestError, match="cannot be read"):
        read_keys(str(tmp_path / "none"), {})
    with pytest.raises(RequestError, match="at least 8 printable"):
        read_keys(None, {"QNEXT_API_KEYS": "short"})
