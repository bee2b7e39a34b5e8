"""What a person does on the page, for several tests."""

import time

TIMEOUT_S = 60.0


def until(page, script: str, timeout_s: float = TIMEOUT_S) -> None:
    """Wait until an expression holds on the page, whose policy forbids waiting inside it."""
    end = time.monotonic() + timeout_s
    while not page.evaluate(script):
        assert time.monotonic() < end, f"never came true: {script}"
        page.wait_for_timeout(20)


def ask(page, text: str) -> None:
    """Send a message and wait for the end of its answer."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    wait_for_answer(page)


def wait_for_answer(page) -> None:
    """Wait until the last answer has ended."""
    page.wait_for_selector("article.model:last-child .remark:not(:empty)", timeout=60_000)
