"""From the bytes of a body to a checked request, or to an error that names the place.

Every field of a body is one of four kinds. *Supported*: the attributes of the request's type.
*Ignored*: without influence on the answer; named in a response header and in the log. *Refused*:
known to the interface and not available here, accepted only with a value that asks for nothing.
Anything else is *unknown* and refused too: a misspelt option that silently does nothing is worse
than an error. Errors name the place: ``messages[2].content: expected str | array, got int``.
"""

import difflib
import functools
import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, TypeVar

import msgspec
from msgspec import inspect

from qnext.serve.refusals import ApiError


class RequestBody(msgspec.Struct, kw_only=True):
    """What the bodies of all interfaces have: a model's name, and tables of further fields."""

    IGNORED: ClassVar[frozenset[str]] = frozenset()
    REFUSED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Field -> the values, beside null, that ask for nothing."""
    LABORIOUS: ClassVar[frozenset[str]] = frozenset()
    """Supported fields that can take long to prepare, however short they are."""

    model: str | None = None

    def is_laborious(self) -> bool:
        """Whether preparing it may take long although it is short."""
        return any(getattr(self, name) is not None for name in self.LABORIOUS)


Body = TypeVar("Body", bound=RequestBody)


def read_body(body: bytes, kind: type[Body]) -> tuple[Body, list[str]]:
    """Parse and check a body; returns the request and the names of the ignored fields.

    Raises ApiError (400) naming the place.
    """
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}.", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply.", code="invalid_json") from None
    if not isinstance(raw, dict):
        found = type(raw).__name__
        raise ApiError(400, f"the body: expected a JSON object, got {found}.", code="invalid_json")
    known = _names(kind)
    for name, value in raw.items():
        if name not in known and name not in kind.IGNORED:
            _refuse(name, value, known, kind.REFUSED)
    ignored = sorted(name for name in kind.IGNORED & raw.keys() if raw[name] is not None)
    fields = {name: value for name, value in raw.items() if name in known}
    try:
        return msgspec.convert(fields, kind), ignored
    except msgspec.ValidationError as error:
        raise _named(error, fields, kind) from None


@functools.cache
def _names(kind: type[RequestBody]) -> frozenset[str]:
    """The supported fields; finding them takes as long as half of an answer's other bookkeeping."""
    return frozenset(field.encode_name for field in msgspec.structs.fields(kind))


def _refuse(
    name: str, value: Any, known: Collection[str], refused: Mapping[str, tuple[Any, ...]]
) -> None:
    if name in refused:
        # True equals 1, and is not what was meant.
        if value is None or any(value == one and type(value) is type(one) for one in refused[name]):
            return
        neutral = " or ".join(["null", *(repr(item) for item in refused[name])])
        raise ApiError(
            400,
            f"{name}: not supported by this server; leave it out (or send {neutral}).",
            param=name,
            code="unsupported_parameter",
        )
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ApiError(
        400, f"{name}: unknown field.{hint}", param=name, code="unknown_parameter"
    )  # fmt: skip


def _named(error: msgspec.ValidationError, fields: dict[str, Any], kind: type) -> ApiError:
    """msgspec says ``Expected `str`, got `int` - at `$.stop[0]```; the place belongs first."""
    text, _, place = str(error).partition(" - at `$")
    text = text.replace("`", "")
    place = place.rstrip("`").lstrip(".")
    missing = re.fullmatch(r"Object missing required field (\w+)", text)
    if missing:
        place = f"{place}.{missing.group(1)}".lstrip(".")
        text = "required and missing"
    unknown = re.fullmatch(r"Object contains unknown field (\S+)", text)
    if unknown:
        place = f"{place}.{unknown.group(1)}".lstrip(".")
        text = "unknown field"
    choice = re.fullmatch(r"Invalid (?:enum )?value (.+)", text)
    if choice:
        allowed = _choices(kind, place)
        text = f"expected {allowed}, got {choice.group(1)}" if allowed else text
    return ApiError(400, f"{place}: {text[0].lower()}{text[1:]}.", param=place)


def _choices(kind: type, place: str) -> str:
    """The words allowed at a place of a type, for messages; empty where they are not known."""
    found = [inspect.type_info(kind)]
    for name in re.findall(r"\w+|\[\.\.\.\]", re.sub(r"\[\d+\]", "[...]", place)):
        found = [inner for one in found for inner in _within(one, name)]
    words: dict[str, None] = {}
    for one in _flat(found):
        if isinstance(one, inspect.LiteralType):
            words.update(dict.fromkeys(repr(value) for value in one.values))
    return (("one of " if len(words) > 1 else "") + ", ".join(words)) if words else ""


def _flat(kinds: list[inspect.Type]) -> list[inspect.Type]:
    found = []
    for one in kinds:
        inner = list(one.types) if isinstance(one, inspect.UnionType) else [one]
        found += inner
    return found


def _within(kind: inspect.Type, name: str) -> list[inspect.Type]:
    """Types of a field, or of a list's items."""
    found: list[inspect.Type] = []
    for one in _flat([kind]):
        if name == "[...]" and isinstance(one, inspect.ListType):
            found.append(one.item_type)
        elif isinstance(one, inspect.StructType):
            if name == one.tag_field:
                found.append(inspect.LiteralType((one.tag,)))
            found += [field.type for field in one.fields if field.encode_name == name]
    return found
