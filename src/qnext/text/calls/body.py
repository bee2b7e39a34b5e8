"""What the readers of one call have in common; each format is a subclass."""

from abc import ABC, abstractmethod
from typing import Literal

from qnext.text.calls.parts import CallArguments, CallStart, Part


class Body(ABC):
    """Reads what stands between ``<tool_call>`` and ``</tool_call>``, in pieces of any size.

    What it has found is added to ``parts``; ending or dropping the call is up to its owner.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self.has_started = False
        """Whether the call was announced."""
        self.status: Literal["more", "complete", "failed"] = "more"
        self.parts: list[Part] = []

    @abstractmethod
    def push(self, text: str) -> str:
        """Take in text. Once ``status`` is not ``more``, returns what was not read of it (and of
        what was held back before); until then nothing."""

    def take_parts(self) -> list[Part]:
        """What was found since the last time."""
        taken, self.parts = self.parts, []
        return taken

    def _start(self, name: str) -> None:
        self.has_started = True
        self.parts.append(CallStart(self._index, name))

    def _argue(self, text: str) -> None:
        if text:
            self.parts.append(CallArguments(self._index, text))
