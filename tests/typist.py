"""The person at a pseudo-terminal."""

import os
import select
import time


class Typist:
    """The person at a pseudo-terminal: reads what is printed, types lines."""

    def __init__(self, terminal: int) -> None:
        self.terminal, self.unread = terminal, ""

    def read_until(self, wanted: str, timeout_s: float = 60.0) -> str:
        """Everything up to and with ``wanted``; the rest stays for the next call."""
        end = time.monotonic() + timeout_s
        while wanted not in self.unread:
            left = max(0.0, end - time.monotonic())
            ready, _, _ = select.select([self.terminal], [], [], left)
            assert ready, f"{wanted!r} did not come; there was {self.unread!r}"
            self.unread += os.read(self.terminal, 4096).decode(errors="replace")
        text, _, self.unread = self.unread.partition(wanted)
        return text + wanted

    def type(self, line: str) -> None:
        os.write(self.terminal, (line + "\n").encode())
