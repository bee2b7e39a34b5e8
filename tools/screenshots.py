"""Makes the pictures of the page in docs/images: ``python -m tools.screenshots``.

The embedded model is served on a free port, and a headless Chromium uses the page as a person
would. Needs ``playwright`` and a Chromium (``playwright install chromium``). Files above 250 KB are
refused.
"""

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn
from playwright.sync_api import Page, sync_playwright
from tools.chromium import launch

from qnext import LLM
from qnext.serve.app import create_app
from qnext.serve.server import address, listen

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
MAX_BYTES = 250_000
WATCH_MS = 10_000
"""How long the dashboard watches before its picture is taken."""
SIZE = {"width": 1200, "height": 780}
TALL = {"width": 1200, "height": 1150}
SETTINGS = '{"temperature": 0, "seed": 1}'
STORY = "Tell me a short story about a fox and the moon."
EARLIER = ("What is 3 + 4?", "Who are you?")


@contextmanager
def served() -> Iterator[str]:
    """The address of a server of the embedded model."""
    app = create_app(LLM("qnext-mini", speculative_tokens=2, memory="128MiB"))
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield address(listener)
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def talking(url: str, clients: int = 4) -> Iterator[None]:
    """Clients that hold conversations until the block ends, so that there is something to see."""
    done = threading.Event()

    def talk(seed: int) -> None:
        messages: list[dict[str, str]] = []
        while not done.is_set():
            if len(messages) > 6:
                messages = []
            messages.append({"role": "user", "content": STORY})
            body = {"messages": messages, "max_tokens": 120, "seed": seed}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
            messages.append(answer["choices"][0]["message"])
            time.sleep(0.2 * seed)

    threads = [threading.Thread(target=talk, args=(seed,)) for seed in range(1, clients + 1)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def ask(page: Page, text: str) -> None:
    """Send a message and wait for the end of its answer."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    page.wait_for_selector("article.model[aria-busy=true]", state="detached")
    page.wait_for_selector("article.model:last-child .remark:not(:empty)")


def take(page: Page, folder: Path, name: str) -> None:
    """Write one picture."""
    page.wait_for_timeout(400)
    file = folder / f"{name}.png"
    page.screenshot(path=file)
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise SystemExit(f"{file}: {size:,} bytes, more than {MAX_BYTES:,}.")
    print(f"{file} ({size:,} bytes)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    with served() as url, sync_playwright() as playwright:
        browser = launch(playwright)
        for scheme in ("light", "dark"):
            context = browser.new_context(
                viewport=SIZE, color_scheme=scheme, reduced_motion="reduce"
            )
            page = context.new_page()
            page.add_init_script(f"localStorage.setItem('qnext.settings', '{SETTINGS}')")
            page.goto(url)
            for text in EARLIER if scheme == "light" else ():
                ask(page, text)
                page.get_by_role("button", name="Conversations", exact=True).click()
                page.get_by_role("button", name="New chat").click()
                page.get_by_role("button", name="Conversations", exact=True).click()
            ask(page, STORY)
            if scheme == "light":
                page.get_by_role("button", name="Conversations", exact=True).click()
                page.get_by_role("button", name="Settings").click()
                take(page, folder, "chat")
                page.get_by_role("button", name="Conversations", exact=True).click()
                page.get_by_role("button", name="Settings", exact=True).click()
            page.get_by_role("link", name="Inspect").click()
            page.locator(".heat").wait_for()
            if scheme == "dark":
                page.set_viewport_size(TALL)
                take(page, folder, "inspect")
            page.get_by_role("link", name="Dashboard").click()
            page.locator(".cards").get_by_text("Throughput").wait_for()
            if scheme == "light":
                with talking(url):
                    page.wait_for_timeout(WATCH_MS)
                    take(page, folder, "dashboard")
            context.close()
        browser.close()


if __name__ == "__main__":
    main()
