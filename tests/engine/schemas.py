"""JSON schemas from a seed: nested, enums, patterns, references, numbers, arrays, unions."""

import random
from typing import Any

PATTERNS = ("^[a-c]{1,4}$", "^[A-Z][a-z]{0,3}$", "^\\d{2}-\\d{2}$", "^(yes|no)$")
FORMATS = ("date", "uuid", "ipv4")


def schema(seed: int) -> dict[str, Any]:
    """One schema whose shortest answers are short; every feature appears in some."""
    generator = random.Random(seed)
    root = _object(generator, depth=2)
    root["$defs"] = {
        "leaf": _leaf(generator),
        "node": {
            "type": "object",
            "properties": {"v": {"type": "boolean"}, "next": {"$ref": "#/$defs/node"}},
            "required": ["v"],
            "additionalProperties": False,
        },
    }
    return root


def _any(generator: random.Random, depth: int) -> Any:
    kinds = [_leaf, _leaf, _reference, _union]
    if depth > 0:
        kinds += [lambda g: _object(g, depth - 1), lambda g: _array(g, depth - 1)]
    return generator.choice(kinds)(generator)


def _object(generator: random.Random, depth: int) -> dict[str, Any]:
    names = generator.sample(["a", "b2", "name", "x y", "é", "long_name"], generator.randint(1, 3))
    some = {name: _any(generator, depth) for name in names}
    required = [name for name in names if generator.random() < 0.7]
    return {
        "type": "object",
        "properties": some,
        "required": required,
        "additionalProperties": False,
    }


def _array(generator: random.Random, depth: int) -> dict[str, Any]:
    if generator.random() < 0.3:
        return {
            "type": "array",
            "prefixItems": [_leaf(generator), _leaf(generator)],
            "items": False,
            "minItems": 2,
        }
    least = generator.randint(0, 2)
    return {
        "type": "array",
        "items": _any(generator, depth),
        "minItems": least,
        "maxItems": least + generator.randint(0, 2),
    }


def _reference(generator: random.Random) -> dict[str, Any]:
    return {"$ref": generator.choice(["#/$defs/leaf", "#/$defs/node"])}


def _union(generator: random.Random) -> dict[str, Any]:
    some = [_leaf(generator) for _ in range(generator.randint(2, 3))]
    return {"anyOf": some} if generator.random() < 0.7 else {"type": ["boolean", "null"]}


def _leaf(generator: random.Random) -> dict[str, Any]:
    low = generator.randint(-50, 50)
    return generator.choice(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"enum": generator.sample([1, "a", None, "b\n", True, [1, 2], {"k": 0}, -2.5], 3)},
            {"const": generator.choice(["fixed", 7, None])},
            {"type": "integer", "minimum": low, "maximum": low + generator.randint(0, 500)},
            {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 12},
            {"type": "integer", "minimum": 0, "maximum": 90, "multipleOf": 5},
            {"type": "number", "minimum": -1, "maximum": 1},
            {"type": "string", "maxLength": generator.randint(1, 6)},
            {"type": "string", "minLength": 1, "maxLength": 5},
            {"type": "string", "pattern": generator.choice(PATTERNS)},
            {"type": "string", "format": generator.choice(FORMATS)},
        ]
    )
