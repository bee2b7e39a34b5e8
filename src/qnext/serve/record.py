"""What is known of one request at its end: for the log and for the metrics."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qnext.answers import Delta
from qnext.engine.request import Usage


@dataclass(slots=True)
class Record:
    """One request of a client."""

    id: str
    route: str = ""
    """The path as the application knows it."""
    owner: bytes = b""
    """Digest of the key it came with; empty where the server asks for none."""
    answer: str | None = None
    """Id of the answer."""
    stream: bool = False
    begun: float = field(default_factory=time.monotonic)
    submitted: float | None = None
    """When the engine had accepted it."""
    first: float | None = None
    """When the first token was there."""
    last: float | None = None
    usages: dict[int, Usage] = field(default_factory=dict)
    per_prompt: int = 1
    """Choices of each prompt."""
    reasons: Counter[str] = field(default_factory=Counter)
    body_bytes: int = 0
    """Size of what was asked."""
    ignored: Sequence[str] = ()
    code: str | None = None
    """Of the error, where there was one."""
    asked: Any = None
    """What was asked, for a log that shows it."""

    def note(self, batch: Sequence[tuple[int, Delta]]) -> None:
        """Take in what the engine has produced."""
        now = time.monotonic()
        self.first = self.first or now
        self.last = now
        for index, delta in batch:
            self.usages[index] = delta.usage
            if delta.finish_reason is not None:
                self.reasons[delta.finish_reason] += 1

    def tokens(self, name: str, *, of_prompt: bool = False) -> int:
        """Sum of one count of the usage over the choices, or over the prompts."""
        used = [usage for _, usage in sorted(self.usages.items())]
        if of_prompt:
            used = used[:: self.per_prompt]
        return sum(getattr(usage, name) for usage in used)

    def as_dict(self, status: int, now: float) -> dict[str, Any]:
        """What a line of the log says of it."""
        found: dict[str, Any] = {"request": self.id, "status": status}
        found["ms"] = round(1000 * (now - self.begun), 1)
        if self.answer is not None:
            found["answer"] = self.answer
        if self.first is not None:
            found["first_token_ms"] = round(1000 * (self.first - self.begun), 1)
        if self.usages:
            found |= {
                "prompt_tokens": self.tokens("prompt_tokens", of_prompt=True),
                "cached_tokens": self.tokens("cached_tokens", of_prompt=True),
                "completion_tokens": self.tokens("completion_tokens"),
                "finish": dict(self.reasons),
            }
        if self.stream:
            found["stream"] = True
        if self.code is not None:
            found["error"] = self.code
        if self.ignored:
            found["ignored"] = list(self.ignored)
        if self.asked is not None:
            found["asked"] = self.asked
        return found
