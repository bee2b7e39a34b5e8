"""Tool calls the sampler knows about: required, named, bound to schemas, forbidden, never cut."""

import json

import pytest

from qnext import LLM, SamplingParams, StructuredOutputs
from qnext.errors import RequestError
from qnext.text.chat import ChatTemplate

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

ITEM = {"type": "string", "enum": ["fox", "hen"]}
FIND = {
    "type": "object",
    "properties": {
        "who": {"$ref": "#/$defs/item"},
        "count": {"type": "integer", "minimum": 1, "maximum": 40},
        "note": {"type": "string", "maxLength": 4},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["who", "count"],
    "additionalProperties": False,
    "$defs": {"item": ITEM},
}
SCHEMAS = {
    "find": FIND,
    "wait": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
HERMES = """
{%- for message in messages -%}{{- message.role ~ ": " ~ message.content ~ "\\n" -}}{%- endfor -%}
{{- "<think>\\n" if enable_thinking else "" -}}"""
XML = HERMES + "{#- <tool_call> -#}{{- '' if true else '<function=' -}}"
ASK = [{"role": "user", "content": "Find it."}]


@pytest.fixture(scope="module", params=["hermes", "xml"])
def llm(request, tiny_folder):
    with LLM(tiny_folder, memory="64MiB", speculative_tokens=2, batch_invariant=True,
             threads=1) as llm:  # fmt: skip
        source = XML if request.param == "xml" else HERMES + "{#- <tool_call> -#}"
        llm.template = ChatTemplate(source)
        assert llm.template.tool_format == request.param
        llm.rule_book.form, llm.rule_book.thinks = request.param, False
        yield llm


def params(llm: LLM, **more) -> SamplingParams:
    # A random model has no reason to close what it has opened.
    ends = "</\n" if llm.template.tool_format == "xml" else '"}],'
    closing = {llm.tokenizer.id_of(text): 7.0 for text in ends}
    closing[llm.eos_ids[0]] = 9.0
    return SamplingParams(
        **{"temperature": 1.0, "seed": 1, "max_tokens": 330, "logit_bias": closing, **more}
    )


def calls_of(found) -> list[tuple[str, dict]]:
    assert found.finish_reason == "stop", (found.text, found.tool_calls, found.token_ids)
    return [(call.name, json.loads(call.arguments)) for call in found.tool_calls]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_required_call_fits_its_schema(llm, thinking, seed):
    found = llm.chat(
        ASK, params(llm, seed=seed, thinking_budget=4 if thinking else None), tools=TOOLS,
        enable_thinking=thinking, tool_choice="required",
    )  # fmt: skip
    calls = calls_of(found)
    assert calls
    for name, arguments in calls:
        jsonschema.validate(arguments, SCHEMAS[name])


@pytest.mark.parametrize("choice", [{"name": "find"}, {"type": "function",
                                                       "function": {"name": "find"}}])  # fmt: skip
def test_a_named_call_and_no_other(llm, choice):
    for seed in range(3):
        found = llm.chat(
            ASK, params(llm, seed=seed), tools=TOOLS, tool_choice=choice, parallel_tool_calls=False
        )
        [(name, arguments)] = calls_of(found)
        assert name == "find"
        jsonschema.validate(arguments, FIND)


def test_a_strict_call_the_model_makes_by_itself_fits_too(llm):
    opening = llm.tokenizer.id_of("<tool_call>")
    wanted = params(llm)
    wanted = params(llm, logit_bias={**wanted.logit_bias, opening: 30.0})
    found = llm.chat(ASK, wanted, tools=TOOLS, strict=True, parallel_tool_calls=False)
    assert opening in found.token_ids
    assert found.token_ids.count(opening) == 1
    start = found.token_ids.index(opening)
    end = found.token_ids.index(llm.tokenizer.id_of("</tool_call>"))
    inside = llm.tokenizer.decode(found.token_ids[start + 1 : end])
    assert "find" in inside or "wait" in inside


def test_a_forbidden_call_is_not_begun(llm):
    opening = llm.tokenizer.id_of("<tool_call>")
    wanted = params(llm, logit_bias={opening: 50.0}, max_tokens=12)
    assert opening in llm.chat(ASK, wanted, tools=TOOLS).token_ids
    assert opening not in llm.chat(ASK, wanted, tools=TOOLS, tool_choice="none").token_ids


def test_a_form_of_the_answer_leaves_room_for_a_call_instead(llm):
    opening = llm.tokenizer.id_of("<tool_call>")
    form = StructuredOutputs(choice=["no"])
    found = llm.chat(ASK, params(llm, structured_outputs=form), tools=TOOLS, strict=True)
    likely = params(llm).logit_bias
    called = llm.chat(
        ASK, params(llm, structured_outputs=form, logit_bias={**likely, opening: 40.0}),
        tools=TOOLS, strict=True, parallel_tool_calls=False,
    )  # fmt: skip
    assert called.token_ids[0] == opening
    assert calls_of(called)
    assert found.token_ids[0] == opening or found.text == "no"


def test_no_stop_string_cuts_a_call(llm):
    wanted = {"tools": TOOLS, "tool_choice": {"name": "find"}, "parallel_tool_calls": False}
    whole = llm.chat(ASK, params(llm), **wanted)
    again = llm.chat(ASK, params(llm, stop=("find", "who", "count")), **wanted)
    assert again.token_ids == whole.token_ids
    assert calls_of(again) == calls_of(whole)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": TOOLS, "tool_choice": "perhaps"}, "expected 'auto'"),
        ({"tools": TOOLS, "tool_choice": {"name": "fly"}}, "no tool is called 'fly'"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {
            "type": "object", "properties": {"p": {"type": "array", "uniqueItems": True}}}}}],
          "strict": True}, "uniqueItems cannot be enforced"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused(llm, wanted, message):
    with pytest.raises(RequestError, match=message):
        llm.chat(ASK, params(llm), **wanted)
    assert not llm.engine.has_work


def test_a_required_call_and_a_form_exclude_each_other(llm):
    form = StructuredOutputs(json_object=True)
    with pytest.raises(RequestError, match="cannot be both"):
        llm.chat(ASK, params(llm, structured_outputs=form), tools=TOOLS, tool_choice="required")
