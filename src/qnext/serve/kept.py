"""Answers of ``/v1/responses`` that a later request may go on from, for a while, in memory.

Bounded three ways: by number, by bytes (each counts with its whole conversation, as JSON), by age.
The oldest go first. Nothing is written to disk, and a restart forgets them all.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from qnext.serve.api.responses import InputItem
from qnext.serve.refusals import ApiError

MAX_KEPT = 1000
MAX_KEPT_BYTES = 64 * 2**20
KEPT_S = 24 * 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    """One answer."""

    body: bytes
    """The response, as it was sent."""
    items: bytes
    """JSON of the conversation's items, its own output included."""
    owner: bytes
    """Digest of the key it was asked with; nobody else gets it."""
    until: float

    @property
    def size(self) -> int:
        return len(self.body) + len(self.items)


class KeptResponses:
    """The latest answers by id; used by one thread."""

    def __init__(
        self,
        *,
        count: int = MAX_KEPT,
        num_bytes: int = MAX_KEPT_BYTES,
        lifetime_s: float = KEPT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count, self._num_bytes, self._lifetime_s = count, num_bytes, lifetime_s
        self._clock = clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, body: dict[str, Any], items: Sequence[InputItem], owner: bytes) -> None:
        """Keep a response; ``items`` are those it answered. One larger than the room is not."""
        output = msgspec.convert(body["output"], list[InputItem])
        now = self._clock()
        one = _Kept(
            body=msgspec.json.encode(body),
            items=msgspec.json.encode([*items, *output]),
            owner=owner,
            until=now + self._lifetime_s,
        )
        self._kept[body["id"]] = one
        self._size += one.size
        self._make_room(now)

    def response(self, name: str, owner: bytes) -> bytes:
        """A response as JSON. Raises ApiError (404)."""
        return self._find(name, owner, "response_id").body

    def items(self, name: str, owner: bytes) -> list[InputItem]:
        """The conversation up to and with a response. Raises ApiError (404)."""
        found = self._find(name, owner, "previous_response_id")
        return msgspec.json.decode(found.items, type=list[InputItem])

    def forget(self, name: str, owner: bytes) -> None:
        """Remove a response. Raises ApiError (404)."""
        self._size -= self._find(name, owner, "response_id").size
        del self._kept[name]

    def _make_room(self, now: float) -> None:
        while self._kept and (
            len(self._kept) > self._count
            or self._size > self._num_bytes
            or next(iter(self._kept.values())).until <= now
        ):
            _, gone = self._kept.popitem(last=False)
            self._size -= gone.size

    def _find(self, name: str, owner: bytes, param: str) -> _Kept:
        self._make_room(self._clock())
        found = self._kept.get(name)
        if found is not None and found.owner == owner:
            return found
        rules = (
            f"The server keeps the last {self._count:,} responses for "
            f"{self._lifetime_s / 3600:g} h, as long as they fit into "
            f"{self._num_bytes / 2**20:g} MiB, and none that was asked for with store: false"
        )
        raise ApiError(
            404,
            f"{param}: {name!r} is not kept here. "
            f"{rules if self._count else 'This server keeps no responses'}. "
            "Send the items of the conversation instead.",
            param=param,
            code=f"{param.removesuffix('_id')}_not_found",
        )
