"""Many streams at once, of clients that come and go: everybody gets the own text, nothing leaks."""

import asyncio
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import pytest

from qnext import LLM, SamplingParams

CHAT = "/v1/chat/completions"
TOKENS = 24
HEROES = ("fox", "cat", "bird", "king", "robot", "farmer", "rabbit", "bear")
LEAVES = (1, 1, 2, 4, 8, 16)
"""After how many pieces of an answer those who leave do so; the first piece has no text yet."""
PROMPTS = [
    f"Tell me a story about a {hero} named {name}."
    for hero in HEROES
    for name in ("Max", "Mia", "Tim")
]
MAX_GROWTH = 48 << 20
"""Bytes a server may be larger after the load: buffers of connections, fragments of the heap."""


PROBE = """
import http.client, json, select, sys, time
connection, times = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1])), []
while not select.select([sys.stdin], [], [], 0.05)[0]:
    start = time.perf_counter()
    connection.request("GET", "/health")
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200, answer.status
    times.append(time.perf_counter() - start)
print(json.dumps(times))
"""
"""Asks for the health until its input ends."""


@dataclass
class Tally:
    """What the clients saw."""

    ended: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)


async def visit(port: int, prompt: str, expected: str, leaves_after: int | None, tally: Tally):
    """One stream, over a connection of its own; checks the text as far as it was read."""
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": prompt}], "stream": True, "temperature": 0,
            "max_tokens": TOKENS, "chat_template_kwargs": {"enable_thinking": False},
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ).encode()  # fmt: skip
    head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    text, ties, reason, pieces = "", 0, None, 0
    try:
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            tally.ended[status.split()[1].decode()] += 1
            return
        async for line in reader:
            if line.startswith(b"data: [DONE]"):
                break
            if not line.startswith(b"data: "):
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            ties = chunk["usage"]["completion_tokens_details"]["near_ties"]
            for choice in chunk["choices"]:
                text += choice["delta"].get("content", "")
                reason = choice["finish_reason"] or reason
            pieces += 1
            if pieces == leaves_after:
                break
    finally:
        writer.close()
    whole = leaves_after is None or reason is not None
    tally.ended["whole" if whole else "left"] += 1
    fits = text == expected if whole else expected.startswith(text)
    # Only where rounding decides may the company in a batch change a word.
    if not fits and not ties:
        tally.wrong.append(f"{prompt!r}: {text!r} instead of {expected!r}")
    if whole and reason is None:
        tally.wrong.append(f"{prompt!r}: the stream ended without a reason")


async def visitors(port: int, streams: int, seconds: float, expected: list[str]) -> Tally:
    """So many clients at any time, a third of whom leave early; and one who asks for the health."""
    tally, end, chance = Tally(), time.monotonic() + seconds, random.Random(0)
    visits = itertools.count()

    async def client() -> None:
        while time.monotonic() < end:
            which = chance.randrange(len(PROMPTS))
            number, stays = divmod(next(visits), 3)
            leaves = None if stays else LEAVES[number % len(LEAVES)]
            await visit(port, PROMPTS[which], expected[which], leaves, tally)

    # In a process of its own: here it would wait for the other clients.
    with subprocess.Popen(
        [sys.executable, "-c", PROBE, str(port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as probe:  # fmt: skip
        await asyncio.gather(*(client() for _ in range(streams)))
        written, _ = probe.communicate("")
    tally.health_s = json.loads(written)
    return tally


def gauges(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)}


def idle(url: str) -> dict[str, float]:
    """What the server holds once nothing is left to do."""
    end = time.monotonic() + 60
    while True:
        found = gauges(url)
        if not found["qnext_unfinished_requests"] and not found["qnext_running_requests"]:
            return found
        assert time.monotonic() < end, found
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("streams", "seconds"),
    [pytest.param(60, 4.0, id="short"), pytest.param(300, 60.0, marks=pytest.mark.slow)],
)
def test_everybody_gets_the_own_text_and_nothing_leaks(streams, seconds) -> None:
    alone = LLM(max_num_seqs=1)
    expected = [
        alone.chat(
            [{"role": "user", "content": prompt}],
            SamplingParams(temperature=0, max_tokens=TOKENS),
            enable_thinking=False,
        ).text
        for prompt in PROMPTS
    ]
    assert len(set(expected)) > len(PROMPTS) // 2
    command = [sys.executable, "-m", "qnext", "serve", "--port", "0", "--no-prefix-cache",
               "--max-waiting", "300", "--log-level", "warning"]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        url = server.stdout.readline().split()[-1]
        port = int(url.rpartition(":")[2])
        asyncio.run(visitors(port, streams, 1.0, expected))  # fills buffers and caches
        before = idle(url)
        tally = asyncio.run(visitors(port, streams, seconds, expected))
        after = idle(url)
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=60)
    assert not tally.wrong, tally.wrong[:5]
    assert tally.ended["whole"] > streams / 2
    assert tally.ended["left"] > 5
    assert set(tally.ended) <= {"whole", "left", "429"}
    assert after["qnext_cache_pages_free"] == before["qnext_cache_pages_free"]
    grown = after["process_resident_memory_bytes"] - before["process_resident_memory_bytes"]
    assert grown < MAX_GROWTH
    assert "Traceback" not in errors
    slowest = sorted(tally.health_s)[int(0.99 * len(tally.health_s))]
    print(f"{dict(tally.ended)}, health p99 {1000 * slowest:.1f} ms, {grown / 2**20:.1f} MiB more")
    if seconds >= 60:
        assert slowest < 0.1
