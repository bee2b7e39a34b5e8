"""The replay of traffic: traces, prompts made for them, both targets, and the figures."""

import json
import lzma
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import uvicorn
from benchmarks.figures import summary, table
from benchmarks.replay import Look, Outcome, Replay
from benchmarks.serve import main
from benchmarks.traces import (
    KNOWN,
    TracedRequest,
    find_trace,
    fitting_scale,
    read_trace,
    scaled,
    write_prompts,
)

from qnext import LLM
from qnext.errors import DataError
from qnext.serve.app import create_app
from qnext.serve.server import address, listen

COUNT = 20


def azure(lengths: list[tuple[int, int]]) -> str:
    """An Azure trace with a request every 40 ms."""
    rows = [
        f"2023-11-16 18:15:{46 + i // 25:02d}.{i % 25 * 400_000:07d},{prompt},{output}"
        for i, (prompt, output) in enumerate(lengths)
    ]
    return "\r\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, ""])


def mooncake(requests: list[tuple[int, list[int]]], output: int = 6) -> str:
    """A Mooncake trace: (tokens of the prompt, blocks) of each request, 30 ms apart."""
    rows = [
        {"timestamp": 30 * i, "input_length": n, "output_length": output, "hash_ids": blocks}
        for i, (n, blocks) in enumerate(requests)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def trace(tmp_path) -> Path:
    """Twenty requests of Azure's kind."""
    file = tmp_path / "some.csv"
    file.write_text(azure([(5 + 7 * i % 90, 1 + i % 9) for i in range(COUNT)]), newline="")
    return file


@pytest.fixture
def conversations(tmp_path) -> Path:
    """Twenty requests of Mooncake's kind: four conversations that grow, all with one beginning."""
    requests = []
    for turn in range(5):
        for talk in range(4):
            blocks = [0, *(100 * (talk + 1) + block for block in range(turn + 1))]
            requests.append((512 * (turn + 2) - 40 * talk - 1, blocks))
    # An id stands for a whole prefix, so a block that was cut short has an id of its own.
    requests = [(n, [*blocks[:-1], 10_000 + i]) for i, (n, blocks) in enumerate(requests)]
    file = tmp_path / "some.jsonl.xz"
    file.write_bytes(lzma.compress(mooncake(requests).encode()))
    return file


# -- traces ----------------------------------------------------------------------------------------


def test_both_formats_are_read(trace, conversations):
    found = read_trace(trace, COUNT)
    assert [one.arrival_s for one in found] == pytest.approx([0.04 * i for i in range(COUNT)])
    assert (found[3].prompt_tokens, found[3].output_tokens, found[3].blocks) == (26, 4, ())
    found = read_trace(conversations, 6)
    assert [one.arrival_s for one in found] == pytest.approx([0.03 * i for i in range(6)])
    assert found[4] == TracedRequest(
        arrival_s=found[4].arrival_s,
        prompt_tokens=3 * 512 - 1,
        output_tokens=6,
        blocks=(0, 100, 10_004),
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "TIME,A,B\n", r"expected the columns TIMESTAMP,.*, found TIME,A,B"),
        ("a.csv", "", "found nothing"),
        ("a.csv", azure([(5, 1)]).replace(",5,", ",five,"), r"a.csv, line 2: expected a time and"),
        ("a.csv", azure([(5, 1)]).replace("2023-", "never-"), r"line 2: expected a time and"),
        ("a.csv", azure([(5, 1)]).replace(",1", ""), r"line 2: expected a time and"),
        ("a.csv", azure([(5, 1), (0, 1)]), r"line 3: expected at least one token .*found 0 and 1"),
        ("a.csv", azure([(5, 1)]), r"--requests 2 are more than the 1"),
        ("a.jsonl", "{}\n", r"line 1: expected a JSON object with .*KeyError\('timestamp'\)"),
        ("a.jsonl", "x\n", r"line 1: expected a JSON object"),
        ("a.jsonl", mooncake([(513, [1])]), r"513 tokens are 2 blocks of 512, found 1 hash_ids"),
        ("a.jsonl", mooncake([(600, [1, 2]), (600, [3, 2])]), r"line 2: hash id 2 follows another"),
        ("a.jsonl", mooncake([(9, [1]), (9, [1])]).replace("30", "-30"), "line 2: earlier than"),
        ("a.csv.xz", "not compressed", "damaged or not a text file"),
        ("a.parquet", "", "expected a trace that ends in .csv or .jsonl"),
    ],
)
def test_a_trace_that_cannot_be_used_is_refused_with_the_place(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_trace(file, 2)


def test_a_trace_that_is_not_there_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(DataError, match="Name the folder of the traces with --data"):
        find_trace("mooncake", tmp_path)
    with pytest.raises(DataError, match="expected one of azure-conv"):
        find_trace("munchcake", tmp_path)


@pytest.mark.parametrize("name", KNOWN)
def test_the_published_traces_are_found_and_read(shared_dir, name):
    requests = read_trace(find_trace(name, shared_dir / "data" / "serving_traces"), 200)
    jobs = write_prompts(requests, range(50_000), scale=8.0, seed=0)
    assert [len(job.prompt_ids) for job in jobs] == [scaled(one, 8.0)[0] for one in requests]
    assert any(job.reusable_tokens for job in jobs) == (name == "mooncake")


@pytest.mark.parametrize("context", [4096, 500, 33, 5])
def test_the_scale_is_the_least_that_fits(context):
    requests = [
        TracedRequest(arrival_s=0.0, prompt_tokens=n, output_tokens=m)
        for n, m in [(100, 1), (3000, 40), (7, 900), (1, 1)]
    ]
    scale = fitting_scale(requests, context)
    assert max(sum(scaled(one, scale)) for one in requests) <= context
    if scale > 1.0:
        longest = 3040 / (scale - 0.02)
        assert (
            longest > context or max(sum(scaled(one, scale - 0.01)) for one in requests) > context
        )
    else:
        assert context == 4096


# -- prompts ---------------------------------------------------------------------------------------


def shared_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    at = 0
    while at < min(len(a), len(b)) and a[at] == b[at]:
        at += 1
    return at


@pytest.mark.parametrize("scale", [1.0, 3.7, 30.0, 600.0])
def test_prompts_share_what_the_trace_says_and_no_more(conversations, scale):
    requests = read_trace(conversations, COUNT)
    # So many words that two of them are hardly ever the same by chance.
    jobs = write_prompts(requests, range(1_000_000), scale=scale, seed=5)
    for i, job in enumerate(jobs):
        others = [shared_prefix(job.prompt_ids, other.prompt_ids) for other in jobs[:i]]
        assert job.reusable_tokens == min(max(others, default=0), len(job.prompt_ids) - 1)
    if scale < 100:
        assert sum(job.reusable_tokens for job in jobs) > 0


def test_prompts_are_the_same_for_the_same_seed(trace):
    requests = read_trace(trace, COUNT)
    first = write_prompts(requests, range(300), scale=1.0, seed=1)
    assert first == write_prompts(requests, range(300), scale=1.0, seed=1)
    other = write_prompts(requests, range(300), scale=1.0, seed=2)
    assert all(a.prompt_ids != b.prompt_ids for a, b in zip(first, other, strict=True))
    assert len({job.prompt_ids for job in first}) == COUNT
    assert len({job.seed for job in (*first, *other)}) == 2 * COUNT


# -- replays ---------------------------------------------------------------------------------------


def replay(*arguments: object) -> tuple[int, dict]:
    """Run the command; its exit status, and what it wrote with --out."""
    words = [str(argument) for argument in arguments]
    out = Path(words[words.index("--out") + 1])
    return main(words), json.loads(out.read_text())


def check_complete(found: dict, count: int = COUNT) -> None:
    """Every request was answered with as many tokens as the trace has."""
    assert found["requests"]["completed"] == found["requests"]["sent"] == count
    outcomes = found["outcomes"]
    assert sorted(one["index"] for one in outcomes) == list(range(count))
    for one in outcomes:
        assert one["completion_tokens"] == one["asked_tokens"]
        assert one["due_s"] <= one["pieces_s"][0] <= one["pieces_s"][-1] <= one["end_s"]
    produced = sum(one["asked_tokens"] for one in outcomes)
    rate = found["throughput"]
    assert rate["output_tokens"] == produced
    assert rate["output_tokens_per_s"] == pytest.approx(produced / found["seconds"])
    assert found["looks"]


@pytest.fixture
def base(tiny_folder, tmp_path) -> list[object]:
    """Arguments that all replays here share."""
    return ["--model", tiny_folder, "--requests", COUNT, "--memory", "8MiB", "--quiet",
            "--max-num-seqs", 4, "--out", tmp_path / "out.json"]  # fmt: skip


@pytest.mark.parametrize("drafts", ["0", "2", "auto"])
def test_a_trace_against_the_model_in_this_process(base, trace, drafts, tmp_path):
    picture = tmp_path / "picture.png"
    status, found = replay(
        *base, "--trace", trace, "--speed", 10, "--speculative", drafts, "--plot", picture
    )
    assert status == 0
    check_complete(found)
    memory = found["memory"]
    assert 0 < memory["cache_bytes"] <= memory["budget_bytes"] == 8 << 20
    assert 0 < memory["most_pages_held"] <= memory["pages"]
    assert found["queue"]["most_running"] <= 4
    speculation = found["speculation"]
    if drafts != "auto":  # which may find that drafting does not pay
        assert (speculation["drafted"] > 0) == (drafts == "2")
    assert 0 <= speculation["accepted"] <= speculation["drafted"]
    assert (speculation["acceptance_by_position"][0] is None) == (speculation["drafted"] == 0)
    # Token times count from when the trace wanted the request sent.
    assert [one["due_s"] for one in found["outcomes"]] == pytest.approx(
        [0.004 * i for i in range(COUNT)]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_closed_loop_keeps_so_many_under_way(base, conversations):
    status, found = replay(*base, "--trace", conversations, "--closed-loop", 3, "--scale", 8)
    assert status == 0
    check_complete(found)
    spans = [(one["due_s"], one["end_s"]) for one in found["outcomes"]]
    together = [sum(a <= start < b for a, b in spans) for start, _ in spans]
    assert max(together) == 3
    assert found["queue"]["most_running"] <= 3


def test_shared_beginnings_are_found_in_the_cache(base, conversations):
    arguments = [*base, "--trace", conversations, "--closed-loop", 1, "--scale", 8]
    _, found = replay(*arguments)
    cache = found["prefix_cache"]
    assert 0 < cache["cached_tokens"] <= cache["reusable_tokens"]
    for one in found["outcomes"]:
        assert one["cached_tokens"] <= one["reusable_tokens"]
    _, found = replay(*arguments, "--no-prefix-cache")
    assert found["prefix_cache"]["cached_tokens"] == 0


def test_what_does_not_fit_is_refused_with_the_reason(base, tmp_path, capsys):
    file = tmp_path / "long.csv"
    file.write_text(azure([(40, 3), (600, 3), (500, 40)]))
    base[base.index(COUNT)] = 3
    status, found = replay(*base, "--trace", file, "--scale", 1)
    assert status == 0
    assert found["requests"] == {
        "sent": 3, "completed": 2, "refused": 1, "failed": 0, "cut_by_the_context": 1,
        "failures": {}, "refusals": found["requests"]["refusals"],
    }  # fmt: skip
    [(reason, count)] = found["requests"]["refusals"].items()
    assert count == 1
    assert reason.startswith("the prompt has N tokens and the context holds N")
    assert "prompt has 600 tokens and the context holds 512" in found["outcomes"][1]["refusal"]


def test_what_has_not_ended_by_the_deadline_has_failed(base, trace, capsys):
    status, found = replay(*base, "--trace", trace, "--speed", 0.001, "--deadline", 0.2)
    assert status == 1
    requests = found["requests"]
    assert requests["failed"] == COUNT - requests["completed"] > 0
    assert sum(requests["failures"].values()) == requests["failed"]
    assert "requests failed: was never sent: had not ended after" in capsys.readouterr().err


def test_mistakes_in_the_command_are_messages(tiny_folder, trace, capsys):
    arguments = ["--model", str(tiny_folder), "--trace", str(trace)]
    assert main([*arguments, "--requests", "21"]) == 2
    assert "--requests 21 are more than the 20" in capsys.readouterr().err
    assert main([*arguments, "--speed", "2", "--closed-loop", "2"]) == 2
    assert "--closed-loop has no speed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--scale", "0"])
    assert "expected a number above 0" in capsys.readouterr().err


# -- over HTTP -------------------------------------------------------------------------------------


@pytest.fixture
def server(tiny_folder) -> Iterator[str]:
    """The address of a server of the tiny model in a thread of this process."""
    llm = LLM(tiny_folder, max_num_seqs=4, memory="8MiB")
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(create_app(llm), log_config=None, timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    yield address(listener)
    running.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def test_a_trace_against_a_running_server(base, conversations, server):
    status, found = replay(
        *base, "--url", server, "--trace", conversations, "--closed-loop", 3, "--scale", 8
    )
    assert status == 0
    check_complete(found)
    assert 0 < found["prefix_cache"]["cached_tokens"] <= found["prefix_cache"]["reusable_tokens"]
    assert found["target"] == server


def test_a_server_refuses_what_does_not_fit(base, server, tmp_path):
    file = tmp_path / "long.csv"
    file.write_text(azure([(40, 3), (600, 3)]))
    base[base.index(COUNT)] = 2
    status, found = replay(*base, "--url", server, "--trace", file, "--scale", 1)
    assert status == 0
    assert (found["requests"]["completed"], found["requests"]["refused"]) == (1, 1)


def test_a_server_is_started_and_asked_for_its_counts(base, trace):
    status, found = replay(*base, "--target", "http", "--trace", trace, "--speculative", 2)
    assert status == 0
    check_complete(found)
    assert found["engine"]["speculative_tokens"] == 2
    assert found["speculation"]["acceptance_by_position"][0] is not None
    assert found["memory"]["peak_rss_bytes"] > found["memory"]["cache_bytes"] > 0


def test_a_server_that_does_not_start_says_why(base, trace, capsys):
    base[base.index("8MiB")] = "1KiB"
    words = [str(argument) for argument in base]
    assert main([*words, "--target", "http", "--trace", str(trace)]) == 2
    assert "memory: 1,024 bytes do not hold the state" in capsys.readouterr().err


@contextmanager
def odd_server(status: int, body: bytes) -> Iterator[str]:
    """A server that answers every completion the same wrong way."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer(200, b'{"data": [{"max_model_len": 512}]}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.answer(status, body)

        def log_message(self, *words: object) -> None:
            """Stay silent."""

    class Server(ThreadingHTTPServer):
        # The default of 5 turns away connections that come at once on a busy machine.
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


PIECE = b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'


@pytest.mark.parametrize(
    ("status", "body", "exit_status", "reason"),
    [
        (200, PIECE, 1, "the answer broke off without a finish reason"),
        (200, PIECE.replace(b"null", b'"cancelled"'), 1, "ended as 'cancelled'"),
        (200, b'data: {"error": {"message": "it broke"}}\n\n', 1, "it broke"),
        (200, b"data: {\n\n", 1, "JSONDecodeError"),
        (200, b"data: {}\n\n", 1, "KeyError: 'choices'"),
        (200, PIECE.replace(b"null", b'"length"'), 1, "the stream ended without usage"),
        (500, b"oh", 1, "status N: oh"),
        (429, b'{"error": {"message": "too many"}}', 0, "too many"),
    ],
)
def test_only_an_answer_or_a_refusal_is_an_end(base, trace, status, body, exit_status, reason):
    with odd_server(status, body) as url:
        found_status, found = replay(*base, "--url", url, "--trace", trace, "--speed", 100)
    assert found_status == exit_status
    kind = "failures" if exit_status else "refusals"
    [(text, count)] = found["requests"][kind].items()
    assert reason in text
    assert count == COUNT


def test_no_server_at_all_is_a_message(base, trace, capsys):
    words = [str(argument) for argument in base]
    with listen("127.0.0.1", 0) as taken:
        url = address(taken)
    assert main([*words, "--url", url, "--trace", str(trace)]) == 2
    assert "no server answers there" in capsys.readouterr().err


# -- figures ---------------------------------------------------------------------------------------


def outcome(index: int, **fields) -> Outcome:
    blank = {"prompt_tokens": 10, "asked_tokens": 5, "reusable_tokens": 4, "due_s": 1.0}
    return Outcome(index=index, **{**blank, **fields})


def answered(index: int, first_s: float, each_s: float, tokens: int = 5) -> Outcome:
    pieces = [1.0 + first_s + each_s * i for i in range(tokens)]
    return outcome(
        index, pieces_s=pieces, end_s=pieces[-1], completion_tokens=tokens, finish_reason="length",
        cached_tokens=3,
    )  # fmt: skip


def test_figures_of_a_made_up_replay():
    outcomes = [
        answered(0, 0.5, 0.1),
        answered(1, 0.5, 0.3),
        answered(2, 3.0, 0.1),
        answered(3, 1.0, 0.0, tokens=1),
        outcome(4, refusal="prompt of 7,000 tokens"),
        outcome(5, refusal="prompt of 9 tokens"),
        outcome(6, failure="gone"),
    ]
    looks = [Look(at_s=t, running=r, waiting=w, rss_bytes=None)
             for t, r, w in [(0.0, 2, 0), (1.0, 4, 6), (2.0, 1, 0)]]  # fmt: skip
    made = Replay(outcomes=outcomes, looks=looks, seconds=8.0)
    counted = {"drafts_tried": [10, 4, 0, 0], "drafts_taken": [8, 1, 0, 0]}
    found = summary(made, {}, counted, slo_ttft_s=2.0, slo_tpot_s=0.2)
    assert found["requests"]["refusals"] == {"prompt of N tokens": 2}
    assert found["requests"]["failures"] == {"gone": 1}
    assert found["ttft_s"]["p50"] == pytest.approx(0.75)
    assert found["ttft_s"]["max"] == pytest.approx(3.0)
    assert found["tpot_s"]["mean"] == pytest.approx((0.1 + 0.3 + 0.1) / 3)
    assert found["latency_s"]["max"] == pytest.approx(3.4)
    assert found["throughput"]["output_tokens_per_s"] == pytest.approx(16 / 8)
    assert found["throughput"]["total_tokens_per_s"] == pytest.approx((16 + 40) / 8)
    # The first and the one of a single token; refused and failed ones count as bad.
    assert found["goodput"]["share"] == pytest.approx(2 / 7)
    # The last look holds for six seconds.
    assert found["queue"]["mean_running"] == pytest.approx((2 + 4 + 6 * 1) / 8)
    assert found["queue"]["mean_waiting"] == pytest.approx(6 / 8)
    assert found["prefix_cache"]["share_of_prompts"] == pytest.approx(12 / 40)
    assert found["speculation"]["acceptance_by_position"] == [0.8, 0.25, None, None]


def test_the_table_shows_every_figure(base, trace, tmp_path, capsys):
    base.remove("--quiet")
    started = time.perf_counter()
    status, found = replay(*base, "--trace", trace, "--speed", 10, "--speculative", 1)
    assert status == 0
    assert found["seconds"] <= time.perf_counter() - started
    shown = capsys.readouterr().out
    assert table(found) in shown
    assert "lengths as in the trace" in shown
    for word in ("time to first token, s", "p99", "goodput", "in the engine", "prefix cache",
                 "speculation", "8 MiB", "20 completed, 0 refused, 0 failed of 20"):  # fmt: skip
        assert word in shown
