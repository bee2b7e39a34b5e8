"""What HTTP costs: the server beside the engine it runs, on the same prompts in turn.

    python -m benchmarks.http_overhead --record

The server is a process of its own, the engine runs in this one; both see the same prompts in the
same order, so that their prefix caches agree. Time to the first token is that of one client; tokens
per second are those of ``--streams`` answers at once, in HTTP from as many connections, from the
question to the end. Answers are long, because what their beginning costs is the first figure.

The engine's own rate makes text of every step as it comes, as ``LLM.stream`` does. The server makes
text of what it hands over together, so it may be the faster of the two.
"""

import argparse
import http.client
import json
import re
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from benchmarks.harness import machine, write_result
from benchmarks.server_process import server_process
from qnext import LLM, SamplingParams
from qnext.llm import parse_bytes

WORDS = ("fox", "moon", "river", "king", "garden", "winter", "ship", "bread")
FIRST_TEXT = re.compile(rb'content":"[^"]')
"""A piece of an answer or of reasoning; the opening chunk has an empty one."""
FIRST_LIMIT_MS, SHARE_LIMIT = 5.0, 0.97


def prompt(number: int) -> list[dict[str, str]]:
    """A conversation unlike the others from its first word on."""
    words = " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(24))
    return [{"role": "user", "content": f"{number}: tell me about {words}."}]


class Client:
    """One connection that is kept."""

    def __init__(self, url: str) -> None:
        self._http = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
        self._http.connect()

    def ask(self, number: int, tokens: int) -> tuple[float, float]:
        """Seconds to the first piece of text and to the end of the stream."""
        body = json.dumps(
            {
                "messages": prompt(number), "stream": True, "temperature": 0,
                "max_tokens": tokens, "ignore_eos": True,
            }
        )  # fmt: skip
        start, first = time.perf_counter(), 0.0
        headers = {"content-type": "application/json"}
        self._http.request("POST", "/v1/chat/completions", body, headers)
        answer = self._http.getresponse()
        assert answer.status == 200, answer.read()
        # As little as possible is done here: on two cores the client's time is the server's.
        while piece := answer.read1(1 << 16):
            if not first and FIRST_TEXT.search(piece):
                first = time.perf_counter() - start
        assert first, "the answer had no text"
        return first, time.perf_counter() - start


def engine_first(llm: LLM, number: int, tokens: int) -> float:
    """Seconds to the first piece of text without a server."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start, first = time.perf_counter(), 0.0
    for delta in llm.stream(prompt(number), params):
        if not first and (delta.text or delta.reasoning):
            first = time.perf_counter() - start
    return first


def engine_rate(llm: LLM, numbers: Sequence[int], tokens: int) -> float:
    """Tokens per second of several answers at once without a server."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    pairs = [llm.prepare_chat(prompt(number), params) for number in numbers]
    readers = {request.id: reader for request, reader in pairs}
    for request, _ in pairs:
        llm.engine.add(request)
    while llm.engine.has_work:
        for event in llm.engine.step():
            readers[event.request_id].push(event)
    return len(numbers) * tokens / (time.perf_counter() - start)


def http_rate(clients: Sequence[Client], numbers: Sequence[int], tokens: int) -> float:
    """The same over as many connections."""
    threads = [
        threading.Thread(target=client.ask, args=(number, tokens))
        for client, number in zip(clients, numbers, strict=True)
    ]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(numbers) * tokens / (time.perf_counter() - start)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Medians of both, and of their differences repetition by repetition."""
    import torch

    torch.set_num_threads(1)
    options = {"model": args.model, "memory": args.memory, "max_num_seqs": 16, "threads": 1,
               "background_prefill": False}  # fmt: skip
    parse_bytes(args.memory)
    firsts: list[tuple[float, float]] = []
    rates: list[tuple[float, float]] = []
    llm = LLM(**options)
    with server_process({**options, "warm_up_ids": llm.tokenizer.encode("The fox ran.")}) as server:
        clients = [Client(server.url) for _ in range(args.streams)]
        number = 0
        for turn in range(args.repetitions + 1):
            first = clients[0].ask(number, 8)[0], engine_first(llm, number, 8)
            number += 1
            several = range(number, number + args.streams)
            number += args.streams
            # Whoever comes second finds the processor warm: they take turns.
            runs = [
                lambda numbers=several: http_rate(clients, numbers, args.tokens),
                lambda numbers=several: engine_rate(llm, numbers, args.tokens),
            ]
            order = (0, 1) if turn % 2 else (1, 0)
            found = {which: runs[which]() for which in order}
            rate = found[0], found[1]
            if turn:  # the first one warms up
                firsts.append(first)
                rates.append(rate)
    return {
        "first_http_ms": 1000 * statistics.median(a for a, _ in firsts),
        "first_engine_ms": 1000 * statistics.median(b for _, b in firsts),
        "first_more_ms": 1000 * statistics.median(a - b for a, b in firsts),
        "rate_http": statistics.median(a for a, _ in rates),
        "rate_engine": statistics.median(b for _, b in rates),
        "rate_share": statistics.median(a / b for a, b in rates),
    }


def main() -> None:
    """Measure, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qnext-mini")
    parser.add_argument("--memory", default="256MiB")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--record", action="store_true", help="write docs/results")
    args = parser.parse_args()
    found = measure(args)
    streams = f"{args.streams} stream{'s' * (args.streams > 1)}"
    rows = [
        {
            "what": "time to the first token, above the engine's own",
            "value": f"{found['first_more_ms']:.1f} ms",
            "conditions": f"{found['first_http_ms']:.1f} ms through HTTP, "
            f"{found['first_engine_ms']:.1f} ms without; one client; goal "
            f"{FIRST_LIMIT_MS:g} ms at most",
        },
        {
            "what": "tokens per second, share of the engine's own",
            "value": f"{100 * found['rate_share']:.1f} %",
            "conditions": f"{found['rate_http']:.0f} through HTTP, {found['rate_engine']:.0f} "
            f"without; {streams} of {args.tokens} tokens; goal {100 * SHARE_LIMIT:g} % at least",
        },
    ]
    for row in rows:
        print(f"{row['what']}: {row['value']} ({row['conditions']})")
    if args.record:
        name = args.model.rstrip("/").rpartition("/")[2]
        title = f"The server beside its engine, {name}, {machine()['processor']}"
        print(write_result("http_overhead", title, rows))


if __name__ == "__main__":
    main()
