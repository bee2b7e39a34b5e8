"""Calls written as XML: ``<function=NAME>`` with ``<parameter=KEY>`` blocks in ``<tool_call>``.

Used by Qwen3-Coder, Qwen3-Coder-Next and Qwen3.5. Values are plain text there; the arguments given
out are JSON, converted by the types in the tool's schema. Strings go out as they come, values of
other types when their end is known.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qnext.text.calls.body import Body
from qnext.text.calls.schema import as_json, declared, parameters_of, types_of
from qnext.text.parse import held_length

FUNCTION = "<function="
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
_END_FUNCTION, _OPEN, _CLOSE = "</function>", "<tool_call>", "</tool_call>"
_SPACE = " \t\n\r"
_NAME = re.compile(r"[^<>\n]{1,256}")
MAX_NAME_LENGTH = 256


class CoderBody(Body):
    """One function block.

    Tolerated, because models do it: a missing ``</parameter>`` before the next parameter that the
    tool declares, and a missing ``</function>`` before ``</tool_call>`` or another call.
    """

    def __init__(
        self, index: int, tools: Sequence[Mapping[str, Any]] | None, *, is_open: bool
    ) -> None:
        """``is_open``: ``<function=`` has been read already."""
        super().__init__(index)
        self._tools = tools
        self._state = "name" if is_open else "function"
        self._held = ""
        self._schema: Mapping[str, Any] = {}
        self._seen: set[str] = set()
        self._types: frozenset[str] = frozenset()
        self._value = ""
        """What was read of a value that waits for its end."""
        self._is_first = False
        """Whether nothing of the value was read yet: a newline there belongs to the tag."""
        self._is_streaming = False

    def push(self, text: str) -> str:
        self._held += text
        steps = {
            "function": self._read_function, "name": self._read_name, "between": self._between,
            "key": self._read_key, "value": self._read_value,
        }  # fmt: skip
        while self.status == "more" and steps[self._state]():
            pass
        return "" if self.status == "more" else self._held

    # Every step returns whether there may be more to read in what is held.

    def _read_function(self) -> bool:
        return self._tag({FUNCTION: "name"})

    def _read_name(self) -> bool:
        name = self._until_bracket()
        if name is None:
            return False
        self._schema = parameters_of(self._tools, name)
        self._state = "between"
        self._start(name)
        self._argue("{")
        return True

    def _between(self) -> bool:
        ends = {_END_FUNCTION: "end", _CLOSE: "other", _OPEN: "other", FUNCTION: "other"}
        if not self._tag({_PARAMETER: "key", **ends}):
            return False
        if self._state in ("end", "other"):
            self._argue("}")
            self.status = "complete"
            return False
        return True

    def _read_key(self) -> bool:
        key = self._until_bracket()
        if key is None:
            return False
        self._begin_value(key)
        return self.status == "more"

    def _read_value(self) -> bool:
        if self._is_first and self._held:
            self._held = self._held.removeprefix("\n")
            self._is_first = False
        end = self._held.find(_END_PARAMETER)
        following = self._held.find("\n" + _PARAMETER, 0, end if end >= 0 else None)
        if following >= 0:
            return self._read_before_parameter(following)
        if end >= 0:
            self._take(self._held[:end].removesuffix("\n"))
            self._held = self._held[end + len(_END_PARAMETER) :]
            self._end_value()
            return True
        wanted = ("\n" + _END_PARAMETER, _END_PARAMETER, "\n" + _PARAMETER)
        sure = len(self._held) - held_length(self._held, wanted)
        self._take(self._held[:sure])
        self._held = self._held[sure:]
        return False

    def _read_before_parameter(self, at: int) -> bool:
        """A line begins with a parameter tag: the next parameter if there is one of that name."""
        tag_end = at + 1 + len(_PARAMETER)
        key, bracket, rest = self._held[tag_end:].partition(">")
        known = declared(self._schema) - self._seen
        if bracket and key in known:
            self._take(self._held[:at])
            self._end_value()
            self._held = rest
            self._begin_value(key)
            return self.status == "more"
        if not bracket and any(name.startswith(key) for name in known):
            self._take(self._held[:at])
            self._held = self._held[at:]
            return False
        self._take(self._held[:tag_end])
        self._held = self._held[tag_end:]
        return True

    def _begin_value(self, key: str) -> None:
        if key in self._seen:
            self.status = "failed"
            return
        separator = ", " if self._seen else ""
        self._seen.add(key)
        self._types = types_of(self._schema, key)
        self._argue(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        self._state, self._is_first, self._value = "value", True, ""
        self._is_streaming = False

    def _take(self, text: str) -> None:
        """A stretch of the value."""
        if self._is_streaming:
            self._argue(_escaped(text))
            return
        self._value += text
        if self._types == {"string"}:
            is_sure = bool(self._value)
        elif self._types == {"string", "null"}:
            is_sure = not _may_be_null(self._value)
        else:
            is_sure = False
        if is_sure:
            self._is_streaming = True
            self._argue('"' + _escaped(self._value))

    def _end_value(self) -> None:
        self._argue('"' if self._is_streaming else as_json(self._value, self._types))
        self._state = "between"

    def _tag(self, following: Mapping[str, str]) -> bool:
        """Read one of these tags, after spaces; the state becomes what it stands for.

        A state of ``other`` leaves the tag where it is. Fails when no tag can come any more.
        """
        self._held = self._held.lstrip(_SPACE)
        for tag, state in following.items():
            if self._held.startswith(tag):
                self._state = state
                self._held = self._held if state == "other" else self._held[len(tag) :]
                return True
        if not any(tag.startswith(self._held) for tag in following):
            self.status = "failed"
        return False

    def _until_bracket(self) -> str | None:
        """The name in a tag; None when more is needed, or it is no name and the call fails."""
        name, bracket, rest = self._held.partition(">")
        is_name = _NAME.fullmatch(name) is not None and name.isprintable()
        if bracket and is_name:
            self._held = rest
            return name
        if bracket or (name and not is_name):
            self.status = "failed"
        return None


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _may_be_null(text: str) -> bool:
    word = text.strip()
    return any(null.startswith(word) for null in ("null", "None"))
