"""A server that is told to stop tells everybody who waits for an answer."""

import signal
import subprocess
import sys
import threading
import time

import httpx

BODY = {"prompt": "a", "max_tokens": 400, "ignore_eos": True}


def test_answers_in_flight_end_with_the_reason(tiny_folder):
    command = [sys.executable, "-m", "qnext", "serve", str(tiny_folder), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        url = run.stdout.readline().split()[-1]
        found = {}

        def ask(name: str, **more: object) -> None:
            reply = httpx.post(f"{url}/v1/completions", json={**BODY, **more}, timeout=60)
            found[name] = (reply.status_code, reply.text)

        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{url}/health", timeout=5)
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
        while httpx.get(f"{url}/health", timeout=5).json()["running"] == 0:
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        for thread in several:
            thread.join()
        _, errors = run.communicate(timeout=60)
    assert "Traceback" not in errors
    for name, (status, text) in found.items():
        if "engine_stopped" in text:
            assert status == (200 if name.startswith("stream") else 503)
        else:
            assert status == 200  # this one was done before
            assert '"finish_reason"' in text
    assert any("engine_stopped" in text for _, text in found.values())
