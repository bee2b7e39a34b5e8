"""A server tells what it reused and why not more; the command line asks it."""

import json

import pytest
from live_server import running

from qnext import LLM
from qnext.cli import main

ASK = {"max_tokens": 3, "temperature": 0, "qnext": {"explain": True}}


def chat(live, text, **more):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    answer = live.client.post("/v1/chat/completions", json={"messages": messages} | ASK | more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_usage_route_and_command_tell_the_same(live, capsys):
    first, second = (chat(live, text) for text in ("the fox sat", "the fox thought"))
    usage = second["usage"]
    report = usage["qnext"]["cache"]
    assert report["cached"] == usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert report["snapshot"]["why"] == "system"
    assert report["first_unmatched"]["where"] == "user 1"
    parts = ("cached", "matched_not_reused", "unmatched")
    assert sum(report[name] for name in parts) == usage["prompt_tokens"]
    found = live.client.get("/cache/explain", params={"request": second["id"]}).json()
    assert found["requests"] == [{"id": second["id"], "cache": report}]
    newest = live.client.get("/cache/explain", params={"last": 2}).json()["requests"]
    assert [one["id"] for one in newest] == [second["id"], first["id"]]
    assert main(["cache", "explain", "--url", live.url, second["id"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == found["requests"]
    assert main(["cache", "explain", "--url", live.url, second["id"]]) == 0
    shown = capsys.readouterr().out
    assert f"{report['cached']} reused" in shown
    assert "from the system state" in shown
    assert "in user 1" in shown


def test_nobody_is_told_who_did_not_ask(live):
    assert "qnext" not in chat(live, "hello", qnext=None)["usage"]


def test_an_unknown_request_is_refused(live, capsys):
    assert live.client.get("/cache/explain?request=no").status_code == 404
    assert live.client.get("/cache/explain?last=x").status_code == 400
    assert main(["cache", "explain", "--url", live.url, "no"]) == 2
    assert "'no' is not among the last 256 answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "said"),
    [("nowhere", "expected an address"), ("http://127.0.0.1:1", "does not answer")],
)
def test_a_server_that_is_not_there(url, said, capsys):
    assert main(["cache", "explain", "--url", url]) == 2
    assert said in capsys.readouterr().err


def test_a_stopped_server_leaves_its_prefixes_for_the_next(tiny_folder, tmp_path, capsys):
    reports = []
    for _ in range(2):
        with running(LLM(tiny_folder, cache_dir=tmp_path)) as live:
            reports.append(chat(live, "the river and the moon")["usage"]["qnext"]["cache"])
    assert reports[0]["cached"] == 0
    assert reports[1]["cached"] > 0
    assert reports[1]["snapshot"]["tier"] == "disk"
    assert main(["cache", "info", str(tmp_path), "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)
    assert entry["snapshots"] >= 2
    assert entry["damaged"] == 0
    assert main(["cache", "info", str(tmp_path)]) == 0
    assert f"{entry['snapshots']} snapshots" in capsys.readouterr().out
    assert main(["cache", "info", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_a_damaged_file_of_prefixes_is_reported_and_left_aside(tiny_folder, tmp_path, caplog):
    with running(LLM(tiny_folder, cache_dir=tmp_path)) as live:
        first = chat(live, "the river and the moon")
    for file in (file for file in tmp_path.rglob("*") if file.is_file()):
        content = bytearray(file.read_bytes())
        for at in range(len(content) // 3, len(content), 97):
            content[at] ^= 0xFF
        file.write_bytes(content)
    with running(LLM(tiny_folder, cache_dir=tmp_path)) as live:
        second = chat(live, "the river and the moon")
        assert live.client.get("/health").json()["status"] == "ok"
    assert second["choices"] == first["choices"]
    assert second["usage"]["qnext"]["cache"]["cached"] == 0
    assert any(
        record.levelname == "WARNING" and str(tmp_path) in record.getMessage()
        for record in caplog.records
    ), caplog.text
