"""Which message of a conversation a token of its prompt belongs to."""

from collections import Counter
from collections.abc import Sequence

from qnext.text.tokenizer import Tokenizer

_HEAD_TOKENS = 12
"""A turn says whose it is, and whether a tool speaks, within so many tokens."""


def message_places(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[tuple[int, str], ...]:
    """(first token, name) of every turn of a rendered conversation: "system", "user 1", "tool 1".

    Read from the prompt itself: only the template writes the token that opens a turn. Empty for a
    vocabulary without that token.
    """
    opening = tokenizer.id_of("<|im_start|>")
    if opening is None:
        return ()
    found, seen = [], Counter[str]()
    for start, token in enumerate(ids):
        if token != opening:
            continue
        head = tokenizer.decode(ids[start + 1 : start + 1 + _HEAD_TOKENS], skip_special=False)
        role, _, text = head.partition("\n")
        if role == "user" and text.startswith("<tool_response>"):
            role = "tool"
        seen[role] += 1
        found.append((start, role if role == "system" else f"{role} {seen[role]}"))
    return tuple(found)
