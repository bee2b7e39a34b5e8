"""A headless Chromium for the screenshots and for the tests of the page.

Playwright's own is used (``playwright install chromium``), or else one that the system has.
"""

import shutil
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REMEDY = "run `playwright install chromium`, or install a chromium package of the system"


class NoChromium(RuntimeError):
    """There is no browser to drive; the text says how to get one."""


def launch(playwright: Any) -> Any:
    """A running browser of a ``sync_playwright`` context. Raises NoChromium."""
    from playwright.sync_api import Error

    found = [shutil.which(name) for name in NAMES]
    reasons = []
    for path in (None, *(path for path in found if path)):
        # The pages come from this machine's own server: the sandbox, which containers often forbid,
        # is not needed.
        try:
            return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            reasons.append(str(error).strip().splitlines()[0])
    raise NoChromium(f"no Chromium starts here; {REMEDY} ({reasons[0]})")
