"""The files of the page, and what the server tells its inspect view. In a browser: see browser/."""

import math
import re
from pathlib import Path

import httpx
import pytest

import qnext.serve

UI = Path(qnext.serve.__file__).parent / "ui"
CHAT = "/v1/chat/completions"
MAX_LINES = 350


def test_the_page_and_its_parts_are_served_with_a_strict_policy(live) -> None:
    page = live.client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    parts = re.findall(r'(?:href|src)="(/[^"]*)"', page.text)
    assert "/ui/app.js" in parts
    for path in ("/", *(f"/ui/{file.name}" for file in UI.iterdir() if file.suffix != ".html")):
        response = live.client.get(path)
        assert response.status_code == 200, path
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "require-trusted-types-for 'script'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    assert live.client.get("/ui/app.js").headers["content-type"].startswith("text/javascript")
    assert set(parts) <= {f"/ui/{file.name}" for file in UI.iterdir()}


def test_what_scripts_import_is_there() -> None:
    for file in UI.glob("*.js"):
        for name in re.findall(r'from "\./([^"]+)"', file.read_text()):
            assert (UI / name).is_file(), f"{file.name} imports {name}"


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for file in UI.iterdir():
        links = re.findall(r"https?://[\w.]+", file.read_text())
        assert [link for link in links if "www.w3.org" not in link] == [], file.name


def test_the_page_never_makes_html_of_text() -> None:
    for file in UI.glob("*.js"):
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                    "DOMParser", "setHTML", "Function(", "createContextualFragment"):  # fmt: skip
            assert way not in file.read_text(), f"{file.name}: {way}"
    html = (UI / "index.html").read_text()
    assert not re.search(r"\son\w+=|javascript:|<style|style=", html)
    assert len(re.findall(r"<script", html)) == 1


def test_every_element_the_scripts_ask_for_is_there() -> None:
    scripts = "".join(file.read_text() for file in UI.glob("*.js"))
    there = set(re.findall(r'id="([\w-]+)"', (UI / "index.html").read_text()))
    made = set(re.findall(r'id: "([\w-]+)"', scripts))
    for name in re.findall(r'byId\("([\w-]+)"\)', scripts):
        assert name in there | made, name


@pytest.mark.parametrize("file", sorted(UI.iterdir()), ids=lambda file: file.name)
def test_the_parts_are_short(file) -> None:
    assert len(file.read_text().splitlines()) <= MAX_LINES


# -- GET /inspect/ID -----------------------------------------------------------------------------


def asked(live, **fields) -> dict:
    body = {
        "messages": [{"role": "user", "content": "The fox"}],
        "max_tokens": 12,
        "ignore_eos": True,
        "temperature": 0,
        "qnext": {"inspect": True},
        **fields,
    }
    return live.client.post(CHAT, json=body).json()


def test_an_inspection_agrees_with_the_log_probabilities_of_the_answer(live) -> None:
    answer = asked(live, logprobs=True, top_logprobs=3)
    found = live.client.get(f"/inspect/{answer['id']}").json()
    config = live.llm.config
    said = answer["choices"][0]["logprobs"]["content"]
    assert found["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert len(found["tokens"]) == found["completion_tokens"] == 12 == len(said)
    for token, entry in zip(found["tokens"], said, strict=True):
        assert math.isclose(token["logprob"], entry["logprob"], abs_tol=1e-4)
        best = [one["logprob"] for one in token["top"][:3]]
        assert best == pytest.approx([one["logprob"] for one in entry["top_logprobs"]], abs=1e-4)
        assert token["draft"] is None
        assert token["accepted"] is None
    assert [layer["kind"] for layer in found["layers"]] == list(config.layer_types)
    assert len(found["routes"]) == 12
    for route in found["routes"]:
        assert len(route) == sum(layer["sparse"] for layer in found["layers"])
        for experts in route:
            assert len(set(experts)) == config.num_experts_per_tok == found["experts_per_token"]
            assert all(0 <= expert < found["num_experts"] for expert in experts)
    assert found["memory"]["state_bytes"] > 0
    assert found["memory"]["kv_bytes_per_token"] > 0
    # What was found is remembered with the answer.
    assert live.client.get(f"/inspect/{answer['id']}").json() == found


def test_only_the_last_answers_that_asked_for_it_are_remembered(live) -> None:
    from qnext.serve.inspecting import MAX_REMEMBERED

    plain = asked(live, qnext={})
    old = asked(live, max_tokens=1)
    for _ in range(MAX_REMEMBERED):
        asked(live, max_tokens=1)
    for answer in (plain, old):
        response = live.client.get(f"/inspect/{answer['id']}")
        assert response.status_code == 404
        error = response.json()["error"]
        assert error["code"] == "answer_not_found"
        assert "let the model answer again" in error["message"]


def test_an_inspection_leaves_nothing_behind(live) -> None:
    answer = asked(live)
    assert live.client.get(f"/inspect/{answer['id']}").status_code == 200
    live.check_that_nothing_is_held()


def test_streamed_answers_can_be_inspected_and_count_as_they_grow(live) -> None:
    def generated() -> float:
        text = live.client.get("/metrics").text
        return float(re.search(r"^qnext_generated_tokens_total (\S+)", text, re.M).group(1))

    before = generated()
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 20,
            "ignore_eos": True, "qnext": {"inspect": True}}  # fmt: skip
    with httpx.stream("POST", live.url + CHAT, json=body, timeout=60) as response:
        text = "".join(response.iter_text())
    name = re.search(r'"id":"(chatcmpl-\w+)"', text).group(1)
    found = live.client.get(f"/inspect/{name}").json()
    assert len(found["tokens"]) == 20
    assert generated() >= before + 20
