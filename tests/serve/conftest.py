"""A live server in a thread, and the same model without a server to compare with."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn

from qnext import LLM
from qnext.serve.app import create_app
from qnext.serve.server import address, listen
from qnext.serve.worker import Worker

# Ends in an open think block, so that answers begin as reasoning.
THINKING_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor -%}"
    "<|im_start|>assistant\n<think>\n"
)


@dataclass(frozen=True)
class Live:
    """A running server: a client for it, and its parts for a look inside."""

    client: httpx.Client
    url: str
    llm: LLM
    worker: Worker

    def busy(self) -> int:
        """Requests that run or wait, as the server reports them."""
        health = self.client.get("/health").json()
        return health["running"] + health["waiting"]

    def wait_until(self, *, busy: int, timeout_s: float = 20.0) -> None:
        """Return when so many requests are in the engine; fails when that does not happen."""
        end = time.monotonic() + timeout_s
        while (found := self.busy()) != busy:
            assert time.monotonic() < end, f"{found} requests in the engine, not {busy}"
            time.sleep(0.02)

    def check_that_nothing_is_held(self) -> None:
        """Wait until the engine is idle; then every page and slot must be back."""
        self.wait_until(busy=0)
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
            yield Live(client, url, llm, app.state.worker)
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def alone(tiny_folder) -> LLM:
    """The served model, for the answers it gives without a server."""
    return LLM(tiny_folder)


@pytest.fixture(scope="session")
def live(tiny_folder) -> Iterator[Live]:
    """A server of the tiny model, with room for eight requests at a time."""
    with running(LLM(tiny_folder, max_num_seqs=8), max_body_bytes=100_000) as found:
        yield found


@pytest.fixture(scope="session")
def thinking_folder(tiny_folder, tmp_path_factory) -> Path:
    """The tiny model with a template that lets it think."""
    folder = tmp_path_factory.mktemp("models") / "thinker"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(THINKING_TEMPLATE)
    return folder
