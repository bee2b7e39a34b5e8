"""A JSON value read as it arrives: where it ends, or at which character it stops being JSON.

Strict (RFC 8259): no comments, no trailing commas, no raw line breaks in strings. Depth and the
length of numbers are bounded, so that whoever parses the text later cannot be overrun.
"""

import re
from typing import Literal

MAX_DEPTH = 100
MAX_NUMBER_LENGTH = 400

_SPACE = " \t\n\r"
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_HEX = frozenset("0123456789abcdefABCDEF")

Status = Literal["more", "done", "bad"]


class JsonScanner:
    """Follows one JSON value; ``status`` is ``more`` until it is ``done`` or surely ``bad``."""

    def __init__(self) -> None:
        self.status: Status = "more"
        self._state = "value"
        self._stack: list[str] = []
        """The bracket that closes each open object or array, innermost last."""
        self._word = ""
        """A number so far, or what is left of true, false, null or the hex digits of an escape."""
        self._is_key = False

    def push(self, text: str, start: int = 0) -> int:
        """Read on from ``start``; returns where the value ended, or failed, or the text's length.

        A number outside brackets ends before the character that cannot belong to it; at the end of
        the text ``finish`` says whether it is one.
        """
        at = start
        while at < len(text) and self.status == "more":
            if self._state == "string":
                at = _PLAIN.match(text, at).end()  # type: ignore[union-attr]
                if at == len(text):
                    break
            if self._state == "number" and text[at] not in "0123456789+-.eE":
                self._end_number()
                continue  # the same character comes after the number
            self._read(text[at])
            if self.status != "bad":
                at += 1
        return at

    def finish(self) -> Status:
        """The verdict when nothing more comes."""
        if self._state == "number" and not self._stack and self.status == "more":
            self._end_number()
        return "done" if self.status == "done" else "bad"

    def _read(self, character: str) -> None:
        match self._state:
            case "string":
                self._in_string(character)
            case "escape":
                self._state = "string" if character in '"\\/bfnrt' else "hex"
                self._word = "...." if character == "u" else ""
                if self._state == "hex" and not self._word:
                    self.status = "bad"
            case "hex":
                self._word = self._word[1:]
                if character not in _HEX:
                    self.status = "bad"
                elif not self._word:
                    self._state = "string"
            case "number":
                self._word += character
                if len(self._word) > MAX_NUMBER_LENGTH:
                    self.status = "bad"
            case "literal":
                if character != self._word[0]:
                    self.status = "bad"
                    return
                self._word = self._word[1:]
                if not self._word:
                    self._end_value()
            case _:
                if character not in _SPACE:
                    self._between(character)

    def _in_string(self, character: str) -> None:
        if character == "\\":
            self._state = "escape"
        elif character != '"':
            self.status = "bad"  # a control character
        elif self._is_key:
            self._is_key, self._state = False, "colon"
        else:
            self._end_value()

    def _between(self, character: str) -> None:
        """A character that is no space, outside strings, numbers and words."""
        closing = self._stack[-1] if self._stack else ""
        if self._state in ("value", "first value"):
            if character == "]" and self._state == "first value":
                self._close()
            else:
                self._begin_value(character)
        elif self._state in ("key", "first key"):
            if character == '"':
                self._is_key, self._state = True, "string"
            elif character == "}" and self._state == "first key":
                self._close()
            else:
                self.status = "bad"
        elif self._state == "colon":
            self._state = "value"
            if character != ":":
                self.status = "bad"
        elif character == closing:
            self._close()
        elif character == ",":
            self._state = "key" if closing == "}" else "value"
        else:
            self.status = "bad"

    def _begin_value(self, character: str) -> None:
        if character in "{[":
            self._stack.append("}" if character == "{" else "]")
            self._state = "first key" if character == "{" else "first value"
            if len(self._stack) > MAX_DEPTH:
                self.status = "bad"
        elif character == '"':
            self._state = "string"
        elif character in _LITERALS:
            self._state, self._word = "literal", _LITERALS[character][1:]
        elif character in "-0123456789":
            self._state, self._word = "number", character
        else:
            self.status = "bad"

    def _close(self) -> None:
        self._stack.pop()
        self._end_value()

    def _end_number(self) -> None:
        if _NUMBER.fullmatch(self._word):
            self._end_value()
        else:
            self.status = "bad"

    def _end_value(self) -> None:
        self._state = "after"
        if not self._stack:
            self.status = "done"


def is_json(text: str) -> bool:
    """Whether the text is exactly one JSON value, spaces around it allowed."""
    scanner = JsonScanner()
    end = scanner.push(text)
    return scanner.finish() == "done" and not text[end:].strip(_SPACE)
