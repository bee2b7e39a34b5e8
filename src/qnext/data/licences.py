"""Which texts may go into a model: licences by kind, and policies that draw the line."""

from dataclasses import dataclass

from qnext.errors import DataError

POLICIES = ("permissive", "+cdla", "+sharealike", "research")
"""Each allows what the one before it allows, and more."""

_KINDS = {
    "own": 0,
    "public domain": 0,
    "CC0": 0,
    "CC BY": 0,
    "Apache-2.0": 0,
    "MIT": 0,
    "BSD": 0,
    "CDLA": 1,
    "CC BY-SA": 2,
    "research": 3,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Licence:
    """The terms of one source."""

    kind: str
    """One of own, public domain, CC0, CC BY, Apache-2.0, MIT, BSD, CDLA, CC BY-SA, research
    (anything else, non-commercial and unknown terms included)."""
    text: str
    """As its publisher states it."""
    attribution: str
    """The line the licence asks for, or where the text comes from."""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise DataError(
                f"licence kind {self.kind!r} is not known. Expected one of {', '.join(_KINDS)}; "
                "unclear terms are 'research'."
            )

    def allowed(self, policy: str) -> bool:
        """Whether ``policy`` lets this source in. Raises DataError for an unknown policy."""
        if policy not in POLICIES:
            raise DataError(f"policy {policy!r} is not known. Expected {', '.join(POLICIES)}.")
        return _KINDS[self.kind] <= POLICIES.index(policy)
