"""Tool calls in streamed text: any cut gives what the whole gives, and nothing is lost."""

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qnext.text.calls.parts import (
    CallArguments,
    CallDropped,
    CallEnd,
    CallStart,
    Piece,
    assemble,
    merged,
)
from qnext.text.calls.scan import MAX_DEPTH, is_json
from qnext.text.calls.schema import as_json, types_of
from qnext.text.chat import ChatTemplate
from qnext.text.output import OutputParser, parse_output, tool_format

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "s": {"type": "string"},
                    "o": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "i": {"type": "integer"},
                    "b": {"type": "boolean"},
                    "a": {"type": "array", "items": {"type": "integer"}},
                    "d": {"type": "object"},
                    "r": {"$ref": "#/$defs/Level"},
                },
                "$defs": {"Level": {"enum": [1, 2, "high"]}},
            },
        },
    }
]

PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>", "\n", "a", " ", "<", '"', "é☂"]
HERMES = ['{"name": "f", "arguments": {', '"arguments": ', '{"name": ', '"f"', '{"a": [1, -2.5e3]}',
          '"x": "y\\n\\u00e9\\"</tool_call>"', "}", "}}\n</tool_call>", ", ", ": ", "null", "1",
          "\\",
          '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>']  # fmt: skip
XML = ["<function=f>", "\n<function=f>\n", "<function=g>", "<parameter=s>\n", "\n<parameter=i>\n",
       "<parameter=o>", "<parameter=zzz>", "\n</parameter>\n", "</parameter>", "</function>\n",
       "3", "null", "True", "[1, 2]", "['x']", "<parameter=", ">", "<func",
       "<tool_call>\n<function=f>\n<parameter=s>\nx\n</parameter>\n</function>\n</tool_call>",
]  # fmt: skip
POINTS = st.lists(st.integers(0, 400), max_size=12)


def texts(pool):
    return st.lists(st.sampled_from(pool), max_size=14).map("".join)


ANSWERS = st.one_of(
    st.tuples(st.just("hermes"), texts(PLAIN + HERMES)),
    st.tuples(st.just("xml"), texts(PLAIN + XML)),
    st.tuples(st.sampled_from(["hermes", "xml"]), st.text(max_size=40)),
)


def cut(text, points):
    edges = [0, *sorted(point % (len(text) + 1) for point in points), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def parts_of(pieces, **settings):
    parser = OutputParser(tools=TOOLS, **settings)
    parts = [part for piece in pieces for part in parser.push(piece)]
    return merged([*parts, *parser.finish()])


def call(name, **arguments):
    return (name, arguments)


def calls_of(output):
    return [(one.name, json.loads(one.arguments)) for one in output.tool_calls]


# Any text, any cut.


@given(answer=ANSWERS, points=POINTS, inside=st.booleans())
def test_any_cut_gives_the_parts_of_the_whole(answer, points, inside):
    format, text = answer
    settings = {"format": format, "starts_in_reasoning": inside}
    whole = parts_of([text], **settings)
    assert parts_of(cut(text, points), **settings) == whole
    assert parts_of(list(text), **settings) == whole


@given(answer=ANSWERS)
@example(("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}, "arguments": {}}</tool_call>'))
@example(("xml", "<function=f><parameter=s>a</parameter><parameter=s>b</parameter></function>"))
def test_every_call_is_complete_json_or_dropped_and_unusable(answer):
    format, text = answer
    parts = parts_of([text], format=format, split_reasoning=False)
    arguments, state = {}, {}
    for part in parts:
        if isinstance(part, CallStart):
            assert part.index == len(state), "calls are numbered in order"
            assert all(one != "open" for one in state.values()), "calls do not overlap"
            state[part.index], arguments[part.index] = "open", ""
        elif isinstance(part, CallArguments):
            assert state[part.index] == "open"
            arguments[part.index] += part.text
        elif isinstance(part, CallEnd):
            state[part.index] = "ended"
            assert isinstance(json.loads(arguments[part.index]), dict)
        elif isinstance(part, CallDropped):
            state[part.index] = "dropped"
            assert not is_json(arguments[part.index])
    assert "open" not in state.values()


@given(answer=ANSWERS)
def test_content_and_calls_together_are_the_whole_text(answer):
    """Each part of the text is content or belongs to a call that was understood; in order."""
    format, text = answer
    parts = parts_of([text], format=format, split_reasoning=False)
    at = 0
    for i, part in enumerate(parts):
        if isinstance(part, Piece):
            found = text.find(part.text, at)
            assert found >= 0
            between = text[at:found]
            had_call = any(isinstance(one, CallEnd) for one in parts[:i])
            assert between == "" or had_call
            at = found + len(part.text)
    if not any(isinstance(part, CallEnd) for part in parts):
        assert assemble(parts).content == text
        assert at == len(text)


@given(answer=ANSWERS)
def test_without_a_format_calls_stay_in_the_text(answer):
    _, text = answer
    assert parts_of([text], split_reasoning=False) == ([Piece("content", text)] if text else [])


NAMES = st.text(st.characters(categories=["L", "Nd"], include_characters="_.-"), min_size=1)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
CALLS = st.lists(
    st.tuples(NAMES, st.dictionaries(st.text(), VALUES, max_size=3)), min_size=1, max_size=3
)


@given(calls=CALLS, content=st.text(st.sampled_from("ab <")), ascii=st.booleans())
def test_what_the_hermes_template_writes_is_read_back(calls, content, ascii):
    blocks = [
        f'<tool_call>\n{{"name": "{name}", "arguments": '
        f"{json.dumps(arguments, ensure_ascii=ascii)}}}\n</tool_call>"
        for name, arguments in calls
    ]
    output = parse_output("\n".join([*([content] if content else []), *blocks]), format="hermes")
    assert calls_of(output) == calls
    assert output.content == content


TYPED = st.fixed_dictionaries(
    {},
    optional={
        "s": st.text(st.sampled_from("ab\n<>/=\"\\'{null}é")),
        "o": st.none() | st.text(st.sampled_from("nul \n")).filter(lambda s: s.strip() != "null"),
        "i": st.integers(-(10**20), 10**20),
        "b": st.booleans(),
        "a": st.lists(st.integers(), max_size=3),
        "d": st.dictionaries(st.sampled_from(["k", "l"]), st.text(max_size=3), max_size=2),
        "r": st.sampled_from([1, 2, "high"]),
        "undeclared": st.just("5"),
    },
)


@given(calls=st.lists(TYPED, min_size=1, max_size=3), python=st.booleans())
def test_what_the_coder_template_writes_is_read_back(calls, python):
    """``python``: the older template writes what is no mapping or string as Python would."""
    blocks = []
    for arguments in calls:
        lines = ["<tool_call>", "<function=f>"]
        for key, value in arguments.items():
            plain = isinstance(value, str)
            written = str(value) if plain or python else json.dumps(value)
            lines += [f"<parameter={key}>", written, "</parameter>"]
        blocks.append("\n".join([*lines, "</function>", "</tool_call>"]))
    output = parse_output("Look.\n\n" + "\n".join(blocks), format="xml", tools=TOOLS)
    assert calls_of(output) == [("f", arguments) for arguments in calls]
    assert output.content == "Look."


# Hermes, case by case.

H = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (H, "", [call("f", a=1)]),
        (f"Look.\n{H}\n{H}", "Look.", [call("f", a=1), call("f", a=1)]),
        (f"{H}\n\nDone.", "\n\nDone.", [call("f", a=1)]),
        (f"{H}\n\n", "", [call("f", a=1)]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [call("f", a=1)]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [call("f")]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [call("f")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "",
         [call("f", a=1)]),
        ('<tool_call>{"id": [1], "name": "f", "arguments": {}}</tool_call>', "", [call("f")]),
        ('<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>', "",
         [call("f", a="</tool_call>")]),
        ('<tool_call>\n{"name": "f", "arguments": {}}', "", [call("f")]),
        (f"<tool_call>\n{H}", "<tool_call>\n", [call("f", a=1)]),
        ("A <tool_call> is a tag.", "A <tool_call> is a tag.", []),
        ("<tool_call>\n[1]\n</tool_call>", "<tool_call>\n[1]\n</tool_call>", []),
        (H[:-13], "", [call("f", a=1)]),
        (H[:-14], H[:-14], []),
        ('\n<tool_call>{"name": ""}</tool_call>', '\n<tool_call>{"name": ""}</tool_call>', []),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
        ('<tool_call>{"name": "\\ud800"}', '<tool_call>{"name": "\\ud800"}', []),
        ('<tool_call>{"name": "f", "arguments": 01}', '<tool_call>{"name": "f", "arguments": 01}',
         []),
    ],
)  # fmt: skip
def test_hermes(text, content, calls):
    output = parse_output(text, format="hermes")
    assert (output.content, calls_of(output)) == (content, calls)


def test_arguments_stream_as_they_are_written():
    parser = OutputParser(format="hermes")
    assert parser.push('Look.\n<tool_call>\n{"name": "f", "argu') == [Piece("content", "Look.")]
    assert parser.push('ments": {"city": "Pa') == [
        CallStart(0, "f"),
        CallArguments(0, '{"city": "Pa'),
    ]
    assert parser.push('ris"') == [CallArguments(0, 'ris"')]
    assert parser.push("}") == []
    assert parser.push("}") == [CallArguments(0, "}"), CallEnd(0)]
    assert parser.push("\n</tool_call>") == []
    assert parser.finish() == []


def test_a_call_that_breaks_off_becomes_text_and_leaves_no_usable_arguments():
    text = '<tool_call>\n{"name": "rm", "arguments": {"path": "/tmp"'
    assert parts_of([text], format="hermes") == [
        CallStart(0, "rm"),
        CallArguments(0, '{"path": "/tmp"'),
        CallDropped(0),
        Piece("content", text),
    ]


def test_a_mistake_after_the_arguments_drops_the_call_before_they_are_complete():
    text = '<tool_call>{"name": "f", "arguments": {"a": 1} oops'
    parts = parts_of([text], format="hermes")
    assert parts[:3] == [CallStart(0, "f"), CallArguments(0, '{"a": 1'), CallDropped(0)]
    assert assemble(parts).content == text


def test_reasoning_content_and_calls_come_in_order():
    text = f"I need f.\n</think>\n\nLook.\n{H}\n{H}"
    output = parse_output(text, format="hermes", starts_in_reasoning=True)
    assert (output.reasoning, output.content) == ("I need f.", "Look.")
    assert calls_of(output) == [call("f", a=1)] * 2


def test_a_think_tag_inside_a_call_belongs_to_it():
    text = 'R</think>A</think><tool_call>{"name": "f", "arguments": {"a": "</think>"}}</tool_call>'
    output = parse_output(text + "B</think>", format="hermes", starts_in_reasoning=True)
    assert (output.reasoning, output.content) == ("R", "AB")
    assert calls_of(output) == [call("f", a="</think>")]


def test_nesting_without_end_is_text():
    text = '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 100_000
    assert parse_output(text, format="hermes").content == text
    assert is_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert not is_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


@given(
    st.text() | st.text(st.sampled_from('{}[]",:\\u0123e-.+ truefalsn\n')) | VALUES.map(json.dumps)
)
def test_the_scanner_agrees_with_the_standard_library(text):
    def refuse(word):
        raise ValueError(word)

    try:
        json.loads(text, parse_constant=refuse)
        valid = True
    except ValueError:
        valid = False
    assert is_json(text) == valid


# XML, case by case.


def xml(*parameters, name="f"):
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (xml(), "", [call("f")]),
        (xml(("s", "x"), ("i", "3")), "", [call("f", s="x", i=3)]),
        (xml(("s", "\n x\n")), "", [call("f", s="\n x\n")]),
        (xml(("s", "3")), "", [call("f", s="3")]),
        (xml(("s", "null")), "", [call("f", s="null")]),
        (xml(("o", "null")), "", [call("f", o=None)]),
        (xml(("o", "nullable")), "", [call("f", o="nullable")]),
        (xml(("b", "True")), "", [call("f", b=True)]),
        (xml(("a", "[1, 2]")), "", [call("f", a=[1, 2])]),
        (xml(("d", "{'k': None}")), "", [call("f", d={"k": None})]),
        (xml(("i", "three")), "", [call("f", i="three")]),
        (xml(("r", "high")), "", [call("f", r="high")]),
        (xml(("r", "2")), "", [call("f", r=2)]),
        (xml(("x", "3"), name="undeclared"), "", [call("undeclared", x="3")]),
        (xml(("s", "<b></function></tool_call>")), "",
         [call("f", s="<b></function></tool_call>")]),
        (xml(("s", "a\n<parameter=zzz>\nb")), "", [call("f", s="a\n<parameter=zzz>\nb")]),
        ("Look.\n\n" + xml(("i", "1")) + "\n" + xml(("i", "2")), "Look.",
         [call("f", i=1), call("f", i=2)]),
        ("<function=f>\n<parameter=i>\n3\n</parameter>\n</function>", "", [call("f", i=3)]),
        ("<function=f><parameter=i>3</parameter></function></tool_call>A", "A", [call("f", i=3)]),
        ("<tool_call><function=f><parameter=s>x\n<parameter=i>\n3\n</parameter></function>", "",
         [call("f", s="x", i=3)]),
        ("<tool_call><function=f></tool_call>A", "A", [call("f")]),
        ("<tool_call><function=f>\n" + xml(("i", "1")), "", [call("f"), call("f", i=1)]),
        ("A <function= tag", "A <function= tag", []),
        ("<tool_call>\nname", "<tool_call>\nname", []),
        (xml(("s", "x"))[:40], xml(("s", "x"))[:40], []),
        ("<function=f><parameter=i>1</parameter><parameter=i>2</parameter></function>",
         "<function=f><parameter=i>1</parameter><parameter=i>2</parameter></function>", []),
    ],
)  # fmt: skip
def test_xml(text, content, calls):
    output = parse_output(text, format="xml", tools=TOOLS)
    assert (output.content, calls_of(output)) == (content, calls)


def test_strings_stream_as_they_are_written_in_xml_too():
    parser = OutputParser(format="xml", tools=TOOLS)
    assert parser.push("<tool_call>\n<function=f>\n") == [CallStart(0, "f"), CallArguments(0, "{")]
    assert parser.push('<parameter=s>\nprint("a')[-1] == CallArguments(0, '"s": "print(\\"a')
    assert parser.push('")\nx') == [CallArguments(0, '\\")\\nx')]
    assert parser.push("\n</para") == []
    assert parser.push("meter>\n<parameter=i>\n1") == [CallArguments(0, '", "i": ')]
    assert parser.push("2\n</parameter>") == [CallArguments(0, "12")]
    assert parser.push("\n</function>") == [CallArguments(0, "}"), CallEnd(0)]
    assert parser.push("\n</tool_call>") == []


@pytest.mark.parametrize(
    ("schema", "text", "json_text"),
    [
        ({"type": "number"}, "1e5", "1e5"),
        ({"type": "integer"}, "1.5", '"1.5"'),
        ({"type": "integer"}, "3.0", "3.0"),
        ({"type": "dict"}, '{"a": NaN}', '"{\\"a\\": NaN}"'),
        ({"type": ["integer", "null"]}, "null", "null"),
        ({"type": "string", "nullable": True}, "null", "null"),
        ({"const": False}, "false", "false"),
        ({"type": "any"}, "[1]", "[1]"),
        ({"allOf": [{"type": "integer"}]}, "1", "1"),
        ({"$ref": "#/nowhere"}, "1", "1"),
        ({"$ref": "#/properties/x"}, "1", "1"),
        ({}, "1", '"1"'),
        ({"type": "array"}, "[1+2j]", '"[1+2j]"'),
        ({"type": "array"}, "[" * 5000, json.dumps("[" * 5000)),
        ({"type": "integer"}, "1" * 5000, json.dumps("1" * 5000)),
    ],
)
def test_values_follow_the_schema(schema, text, json_text):
    assert as_json(text, types_of({"properties": {"x": schema}}, "x")) == json_text


# Which format.


def test_the_template_says_which_format(shared_dir):
    folder = shared_dir / "data" / "qwen_tokenizer" / "chat_templates"
    found = {
        file.stem: ChatTemplate(file.read_text(encoding="utf-8")).tool_format
        for file in folder.glob("*.jinja")
    }
    assert found.pop("qwen3_coder_30b_a3b_instruct") == "xml"
    assert found
    assert set(found.values()) == {"hermes"}


def test_a_template_without_tools_has_no_format():
    assert tool_format("{{ messages[0].content }}") is None
    assert ChatTemplate.builtin().tool_format == "hermes"
