"""A server of its own process for ``benchmarks.serve``: the same application as ``qnext serve``.

    python -m benchmarks.server_process '{"model": "qnext-mini", "memory": "1GiB"}'

The argument holds the options of ``LLM`` as JSON, and ``threads``. The first line on stdout is JSON
with the address and what the engine is; the server runs until stdin is closed, and the last line is
JSON with what the engine counted. It listens on this machine alone, on a free port.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import ROOT
from qnext.errors import QnextError, RequestError


def main() -> int:
    """Serve until stdin ends; returns the exit status."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    threads = options.pop("threads", None)
    token_ids = options.pop("warm_up_ids")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    try:
        _serve(options, token_ids)
    except QnextError as error:
        _say({"error": str(error)})
        return 2
    return 0


def _serve(options: dict[str, Any], token_ids: Sequence[int]) -> None:
    import uvicorn

    from benchmarks import replay
    from qnext import LLM
    from qnext.llm import parse_bytes
    from qnext.serve.app import create_app
    from qnext.serve.server import address, listen

    llm = LLM(**options)
    replay.warm_up(llm, token_ids)
    before = replay.totals(llm)
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        create_app(llm),
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        if not server.started:
            raise RequestError("the server ended before it answered; its messages are above.")
        _say({"url": address(listener), **replay.facts(llm, parse_bytes(options["memory"]))})
        sys.stdin.read()
    finally:
        # Its thread would keep the process alive, and whoever reads stdout waiting.
        server.should_exit = True
        thread.join()
    _say(replay.since(before, replay.totals(llm)))


def _say(value: Mapping[str, Any]) -> None:
    print(json.dumps(value), flush=True)


@dataclass(kw_only=True, slots=True)
class ServerProcess:
    """A running server."""

    url: str
    process: int
    facts: dict[str, Any]
    totals: dict[str, Any] = field(default_factory=dict)
    """What the engine counted; filled when the server has ended."""


@contextmanager
def server_process(options: Mapping[str, Any]) -> Iterator[ServerProcess]:
    """Start the server, wait until it answers, end it after the block.

    Raises RequestError when it does not start, with what it said.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.server_process", json.dumps(dict(options))],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Ctrl-C is for the replay; the server ends when its stdin does.
        start_new_session=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        found = json.loads(child.stdout.readline() or '{"error": "the server did not start."}')
        if "error" in found:
            raise RequestError(found["error"])
        running = ServerProcess(url=found.pop("url"), process=child.pid, facts=found)
        try:
            yield running
        finally:
            child.stdin.close()
            running.totals.update(json.loads(child.stdout.readline() or "{}"))


if __name__ == "__main__":
    sys.exit(main())
