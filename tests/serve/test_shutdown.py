"""A server that is told to stop lets answers end, or tells everybody who waits for one."""

import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

BODY = {"prompt": "a", "max_tokens": 400, "ignore_eos": True}


@pytest.mark.parametrize("drain_s", [0, 60])
def test_answers_in_flight_end_with_the_reason(drain_s, tiny_folder):
    # What is to be cut off must be more than a quick machine writes before the signal arrives.
    choices = 8 if drain_s == 0 else 1
    command = [sys.executable, "-m", "qnext", "serve", str(tiny_folder), "--port", "0"]
    command += ["--drain", str(drain_s)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        url = run.stdout.readline().split()[-1]
        found = {}

        def ask(name: str, **more: object) -> None:
            body = {**BODY, "n": choices, **more}
            reply = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
            found[name] = (reply.status_code, reply.text)

        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{url}/health", timeout=60)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        several = [
            threading.Thread(target=ask, args=(f"{kind} {n}",), kwargs={"stream": kind == "stream"})
            for n in range(8)
            for kind in ("stream", "whole")
        ]
        for thread in several:
            thread.start()
        while httpx.get(f"{url}/health", timeout=60).json()["running"] == 0:
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        for thread in several:
            thread.join()
        _, errors = run.communicate(timeout=60)
    assert "Traceback" not in errors
    assert len(found) == 16
    for status, text in found.values():
        if "server_stopping" in text:
            assert status == 503  # it came too late
            continue
        assert status == 200
        ended = re.findall(r'"finish_reason":"(\w+)"', text)
        assert len(ended) == choices, text
        assert set(ended) <= {"length", "cancelled"}
    cut_off = sum('"cancelled"' in text for _, text in found.values())
    assert (cut_off > 0) == (drain_s == 0)
