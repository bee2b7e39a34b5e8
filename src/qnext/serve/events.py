"""Server-sent events as bytes."""

from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"
"""How OpenAI's completions end a stream."""

_encoder = msgspec.json.Encoder()


def event(value: Any) -> bytes:
    """An event without a name."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


def named_event(name: str, value: Any) -> bytes:
    """An event with a name."""
    return b"event: " + name.encode() + b"\ndata: " + _encoder.encode(value) + b"\n\n"
