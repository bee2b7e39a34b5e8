"""The page in a headless Chromium, served by a live server of the embedded model."""

import json
from collections.abc import Iterator

import pytest
from browser_steps import until
from live_server import Live, running
from tools.chromium import REMEDY, NoChromium, launch

from qnext import LLM

# Greedy, so that an answer is always the same.
SETTINGS = {"temperature": 0, "thinking": True}


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    """A browser, for one file: while it runs, no other event loop can run in this thread."""
    sync_api = pytest.importorskip("playwright.sync_api", reason=f"needs playwright; {REMEDY}")
    with sync_api.sync_playwright() as playwright:
        try:
            browser = launch(playwright)
        except NoChromium as error:
            pytest.skip(str(error))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def site() -> Iterator[Live]:
    with running(LLM("qnext-mini", speculative_tokens=2, memory="64MiB")) as live:
        yield live


@pytest.fixture
def slow_site(site) -> Iterator[Live]:
    """The same server, writing slowly enough to be stopped in the middle."""
    with site.slowed(0.05):
        yield site


@pytest.fixture
def visit(chromium, site):
    """Opens the page in a browser of its own; every error in its console fails the test."""
    contexts, errors = [], []

    def open_page(
        path: str = "/", settings: dict | None = SETTINGS, at: Live | None = None, **options
    ):
        context = chromium.new_context(viewport={"width": 1200, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda message: errors.append(message.text) if message.type == "error" else None,
        )
        if settings is not None:
            text = json.dumps(json.dumps(settings))
            page.add_init_script(
                "if (!localStorage.getItem('qnext.settings')) "
                f"localStorage.setItem('qnext.settings', {text})"
            )
        page.goto((at or site).url + path)
        until(page, "document.title !== 'qnext'")
        page.errors = errors
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
