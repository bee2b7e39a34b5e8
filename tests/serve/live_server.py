"""A server that runs in a thread of the test, on a free port."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import uvicorn
from starlette.applications import Starlette

from qnext import LLM
from qnext.serve.app import create_app
from qnext.serve.server import address, listen
from qnext.serve.worker import Worker


@dataclass(frozen=True)
class Live:
    """A running server: a client for it, and its parts for a look inside."""

    client: httpx.Client
    url: str
    llm: LLM
    worker: Worker
    app: Starlette

    def busy(self) -> int:
        """Requests that run or wait, as the server reports them."""
        health = self.client.get("/health").json()
        return health["running"] + health["waiting"]

    @contextmanager
    def slowed(self, step_s: float = 0.02) -> Iterator[None]:
        """Every step takes at least so long, so that answers are long ones on any machine."""
        engine = self.llm.engine
        step = engine.step

        def slowly():
            time.sleep(step_s)
            return step()

        engine.step = slowly
        try:
            yield
        finally:
            engine.step = step

    def wait_until(self, *, busy: int, timeout_s: float = 60.0) -> None:
        """Return when so many requests are in the engine; fails when that does not happen."""
        end = time.monotonic() + timeout_s
        while (found := self.busy()) != busy:
            assert time.monotonic() < end, f"{found} requests in the engine, not {busy}"
            time.sleep(0.02)

    def wait_until_prepared(self, timeout_s: float = 60.0) -> dict[str, int]:
        """Return when no later turn is left to prepare: what the server says it prepared."""
        end = time.monotonic() + timeout_s
        while (found := self.client.get("/health").json()["background_prefill"])["pending"]:
            assert time.monotonic() < end, found
            time.sleep(0.02)
        return found

    def check_that_nothing_is_held(self) -> None:
        """Wait until the engine is idle; then every page and slot must be back."""
        self.wait_until(busy=0)
        self.wait_until_prepared()
        engine = self.llm.engine
        assert not engine.has_work
        assert not self.worker._jobs
        engine.prefix.clear()  # what is kept for later prompts on purpose
        assert engine.pool.free == engine.pool.num_pages
        assert engine.runner.cache.slots_free == engine.scheduler.num_slots


@contextmanager
def running(llm: LLM, **options) -> Iterator[Live]:
    """Serve a model on a free port until the block ends."""
    app = create_app(llm, **options)
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = address(listener)
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Live(client, url, llm, app.state.worker, app)
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()
