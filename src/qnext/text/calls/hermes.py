"""Calls written as JSON: ``{"name": NAME, "arguments": {...}}`` between ``<tool_call>`` tags.

Used by Qwen3-Next Instruct and Thinking and by the Qwen3 family before it.
"""

import json
import re

from qnext.text.calls.body import Body
from qnext.text.calls.scan import JsonScanner, is_json

_SPACE = " \t\n\r"
_SURROGATE = re.compile("[\ud800-\udfff]")


class HermesBody(Body):
    """The object of one call.

    Keys may come in any order; keys other than ``name`` and ``arguments`` are read over. Missing
    arguments, or null, mean none. Arguments given as a string that holds an object are unpacked.
    The last brace of the arguments waits until the whole object is complete.
    """

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._state = "open"
        self._scanner = JsonScanner()
        self._text = ""
        """Of the key or value that is being read."""
        self._key = ""
        self._seen: set[str] = set()
        self._name = ""
        self._is_streaming = False
        """Whether the arguments are an object, which goes out as it comes."""
        self._pending = ""
        """Text of the arguments that has not gone out."""

    def push(self, text: str) -> str:
        at = 0
        while at < len(text) and self.status == "more":
            if self._state in ("key", "value"):
                at = self._scan(text, at)
            elif text[at] in _SPACE or self._expect(text[at]):
                at += 1
        self._send()
        return "" if self.status == "more" else text[at:]

    def _expect(self, character: str) -> bool:
        """One character between keys and values; False when it is left for what comes next."""
        state = self._state
        if state == "before value":
            self._begin("value")
            if self._key == "arguments":
                self._is_streaming = character == "{"
            return False
        if character == '"' and state in ("first key", "next key"):
            self._begin("key")
            return False
        if character == "}" and state in ("first key", "comma"):
            self._end()
            return self.status == "complete"
        following = {("open", "{"): "first key", ("colon", ":"): "before value"}
        following["comma", ","] = "next key"
        if (state, character) not in following:
            self.status = "failed"
            return False
        self._state = following[state, character]
        return True

    def _begin(self, state: str) -> None:
        self._state, self._scanner, self._text = state, JsonScanner(), ""

    def _scan(self, text: str, at: int) -> int:
        end = self._scanner.push(text, at)
        if self._state == "value" and self._key == "arguments" and self._is_streaming:
            self._pending += text[at:end]
        else:
            self._text += text[at:end]
        if self._scanner.status == "bad" or (self._scanner.status == "done" and not self._take()):
            self.status = "failed"
        return end

    def _take(self) -> bool:
        """Keep a key or value that is complete; False where it cannot be part of a call."""
        if self._state == "key":
            self._key, self._state = json.loads(self._text), "colon"
            is_new = self._key not in self._seen
            self._seen.add(self._key)
            return is_new or self._key not in ("name", "arguments")
        self._state = "comma"
        if self._key == "name":
            name = json.loads(self._text)
            self._name = name if isinstance(name, str) and name.isprintable() else ""
            return bool(self._name)
        if self._key == "arguments" and not self._is_streaming:
            return self._unpack(json.loads(self._text))
        return True

    def _unpack(self, arguments: object) -> bool:
        if arguments is None:
            arguments = "{}"
        if not isinstance(arguments, str) or not arguments.lstrip(_SPACE).startswith("{"):
            return False
        self._pending = arguments.strip(_SPACE)
        return is_json(arguments) and not _SURROGATE.search(arguments)

    def _end(self) -> None:
        if not self._name:
            self.status = "failed"
            return
        if "arguments" not in self._seen:
            self._pending = "{}"
        self.status = "complete"

    def _send(self) -> None:
        """Give out what is certain; the same however the text was cut."""
        is_complete = self.status == "complete"
        if not self._name or not (self._is_streaming or is_complete):
            return
        if not self.has_started:
            self._start(self._name)
        inside = self._state == "value" and self._key == "arguments"
        end = len(self._pending) if inside or is_complete else len(self._pending) - 1
        if end > 0:
            self._argue(self._pending[:end])
            self._pending = self._pending[end:]
