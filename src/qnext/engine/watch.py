"""What the engine records of one request for someone who looks inside it.

A request without a ``Watch`` costs nothing. The engine's thread writes it; read it when the request
has ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(eq=False, kw_only=True, slots=True)
class Watch:
    """Drafts and routing of one request."""

    routes_from: int | None = None
    """Position from which on the routed experts are recorded; None for no routing."""
    tokens: list[int] = field(default_factory=list)
    """The answer, up to where it ended for its reader."""
    drafts: dict[int, int] = field(default_factory=dict)
    """Number of a token in the answer -> what the MTP head had drafted in its place. A token has
    none where nothing was drafted, or where the head was wrong about one before."""
    _routes: list[np.ndarray] = field(default_factory=list)

    @property
    def routes(self) -> np.ndarray:
        """Experts [T, L, X] of the recorded positions, int32: for each sparse layer those that ran,
        the one with the largest weight first."""
        if not self._routes:
            return np.zeros((0, 0, 0), dtype=np.int32)
        return np.concatenate(self._routes)

    def note_drafts(self, first: int, drafts: Sequence[int], emitted: int) -> None:
        """A step added so many tokens from number ``first`` on, and had these drafts for them."""
        self.drafts.update(enumerate(drafts[:emitted], start=first))

    def note_routes(self, start: int, routes: np.ndarray) -> None:
        """Experts [T, L, X] of the positions from ``start`` on.

        Positions may come again, when a request had to make room and starts over.
        """
        assert self.routes_from is not None
        known = self.routes_from + sum(map(len, self._routes))
        skip = max(known - start, 0)
        if skip < len(routes):
            self._routes.append(routes[skip:].copy())
