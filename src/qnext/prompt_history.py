"""What was typed at the prompt of ``qnext chat``, from one run to the next.

A text file with one line per entry, which only its owner can read. Every line is appended as it is
typed, so that chats that run side by side keep each other's.
"""

import os
from collections.abc import Mapping
from pathlib import Path

MAX_LINES = 1000
"""Lines that are kept; the file may grow to twice as many before the oldest go."""


def default_file(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file in the user's folder for state, as the XDG base directories have it.

    None for a user without a home.
    """
    folder = Path(environment.get("XDG_STATE_HOME", ""))
    if not folder.is_absolute():  # unset, or invalid and to be ignored
        try:
            folder = Path.home() / ".local" / "state"
        except RuntimeError:
            return None
    return folder / "qnext" / "chat_history"


class PromptHistory:
    """The lines of one file. Where it cannot be read or written, ``trouble`` says why."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._last = ""
        self.trouble: str | None = None

    def lines(self) -> list[str]:
        """The lines so far, the oldest first; shortens a file that has become long."""
        try:
            found = self._file.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            self._fail(error)
            return []
        kept = found[-MAX_LINES:]
        if len(found) > 2 * MAX_LINES:
            self._rewrite(kept)
        self._last = kept[-1] if kept else ""
        return kept

    def add(self, line: str) -> bool:
        """Keep a line, unless it is empty, begins with a space or was the last one as well."""
        if not line.strip() or line.startswith(" ") or line == self._last:
            return False
        self._last = line
        if self.trouble is None:
            try:
                self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._write(self._file, [line], os.O_APPEND)
            except OSError as error:
                self._fail(error)
        return True

    def _rewrite(self, lines: list[str]) -> None:
        beside = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        try:
            self._write(beside, lines, os.O_TRUNC)
            beside.replace(self._file)
        except OSError as error:
            self._fail(error)

    @staticmethod
    def _write(file: Path, lines: list[str], how: int) -> None:
        # Private from its first byte on, and again if somebody has opened it to others.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | how, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            if hasattr(os, "fchmod"):
                os.fchmod(descriptor, 0o600)
            out.write("".join(f"{line}\n" for line in lines).encode("utf-8", errors="replace"))

    def _fail(self, error: OSError) -> None:
        self.trouble = f"{self._file}: {error.strerror}; what is typed is not kept"
