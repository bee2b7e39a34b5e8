"""Answers with a form: every one validates, whatever is thought and drafted before it."""

import json

import pytest
from schemas import schema

from qnext import LLM, SamplingParams, StructuredOutputs
from qnext.errors import RequestError

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

COUNT = 500
BATCH = 20


@pytest.fixture(scope="module", params=[0, 2], ids=["plain", "drafted"])
def llm(request, tiny_folder):
    with LLM(
        tiny_folder, speculative_tokens=request.param, memory="64MiB", batch_invariant=True,
        threads=1,
    ) as llm:  # fmt: skip
        yield llm


def params_for(llm: LLM, seed: int, budget: int | None) -> SamplingParams:
    # A random model has no reason to close what it has opened.
    closing = {llm.tokenizer.id_of(text): 9.0 for text in ('"', "}", "]", ",")}
    return SamplingParams(
        temperature=1.0, seed=seed, max_tokens=480, logit_bias=closing, thinking_budget=budget,
        structured_outputs=StructuredOutputs(json_schema=schema(seed)),
    )  # fmt: skip


def check(llm: LLM, seeds: range, thinking: bool) -> list[tuple[int, ...]]:
    prompt = "Go on.\n<think>\n" if thinking else "Go on.\n"
    params = [params_for(llm, seed, 6 if thinking else None) for seed in seeds]
    found = llm.generate([prompt] * len(params), params)
    for seed, one in zip(seeds, found, strict=True):
        text = one.text.rpartition("</think>")[2].lstrip("\n") if thinking else one.text
        assert one.finish_reason == "stop", (seed, text)
        jsonschema.validate(json.loads(text), schema(seed))
        assert one.usage.reasoning_was_cut or not thinking or "</think>" in one.text
        assert 0 <= one.usage.accepted_tokens <= one.usage.drafted_tokens
    return [one.token_ids for one in found]


@pytest.mark.parametrize("thinking", [False, True])
def test_answers_validate(llm, thinking):
    check(llm, range(12), thinking)


@pytest.mark.slow
@pytest.mark.parametrize("thinking", [False, True])
def test_answers_to_many_schemas_validate(llm, thinking):
    for start in range(0, COUNT, BATCH):
        check(llm, range(start, start + BATCH), thinking)


def test_drafts_change_no_token_of_an_answer_with_a_form(tiny_folder):
    found = []
    for drafts in (0, 3):
        with LLM(tiny_folder, speculative_tokens=drafts, batch_invariant=True, memory="64MiB",
                 threads=1) as llm:  # fmt: skip
            found.append(check(llm, range(30, 36), True))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [
        ({"regex": "[ab]{3}-[0-9]"}, lambda text: len(text) == 5 and text[3] == "-"),
        ({"choice": ["yes", "no, never", "été\n"]}, lambda text: text in ("no, never", "été\n")),
        ({"grammar": 'start: "x" num\nnum: /[0-9]{2}/'}, lambda text: text[0] == "x"),
        ({"json_schema": '{"const": [1, "two"]}'}, lambda text: json.loads(text) == [1, "two"]),
    ],
)  # fmt: skip
def test_every_kind_of_form(llm, wanted, matches):
    params = SamplingParams(
        temperature=1.0, seed=3, max_tokens=60, n=2, ignore_eos=True, min_tokens=40,
        bad_words=("yes",), structured_outputs=StructuredOutputs(**wanted),
    )  # fmt: skip
    [found] = llm.generate("Go on.", params)
    for one in (found, *found.others):
        assert one.finish_reason == "stop"
        assert one.ended_by == "form"
        assert matches(one.text), one.text


def refused(llm: LLM, **wanted) -> str:
    with pytest.raises(RequestError) as caught:
        llm.prepare_text("x", SamplingParams(structured_outputs=StructuredOutputs(**wanted)))
    assert not llm.engine.has_work
    return str(caught.value)


@pytest.mark.parametrize(
    "keyword",
    ["not", "if", "uniqueItems", "contains", "propertyNames", "dependentRequired",
     "unevaluatedProperties", "$dynamicRef"],
)  # fmt: skip
def test_keywords_that_cannot_be_enforced_are_refused_by_name_and_place(llm, keyword):
    value = True if keyword == "uniqueItems" else "#x" if keyword[0] == "$" else {}
    inner = {"type": ["array", "object"], keyword: value}
    message = refused(llm, json_schema={"type": "object", "properties": {"p": inner}})
    assert f"keyword {keyword} cannot be enforced" in message
    assert f"$.properties.p.{keyword}" in message


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"json_schema": {"type": "strng"}}, "strng"),
        ({"json_schema": {"type": "string", "format": "colour"}}, "Unknown format: colour"),
        ({"json_schema": {"type": "string", "pattern": "(?=a)b"}}, "look-around"),
        ({"json_schema": {"minimum": 3, "maximum": 2, "type": "integer"}}, "Unsatisfiable"),
        ({"json_schema": "{"}, "not valid JSON"),
        ({"json_schema": False}, "accepts nothing"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"grammar": "start: unknown"}, "unknown name"),
        ({"choice": []}, "expected texts"),
    ],
)
def test_what_is_no_form_is_refused(llm, wanted, message):
    assert message in refused(llm, **wanted)


def test_one_form_at_a_time():
    with pytest.raises(RequestError, match="found none"):
        StructuredOutputs()
    with pytest.raises(RequestError, match="found regex and choice"):
        StructuredOutputs(regex="a", choice=["a"])
    with pytest.raises(RequestError, match="expected StructuredOutputs"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


def test_without_the_library_the_error_says_what_to_install(tiny_folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with LLM(tiny_folder, memory="64MiB") as llm:
        assert "pip install 'qnext[structured]'" in refused(llm, regex="a")
        assert llm.generate("x", SamplingParams(max_tokens=2))


@pytest.mark.parametrize(
    "form", [{"regex": "a+"}, {"choice": ["a", "b"]}, {"json_schema": True}, {"grammar": "start: "}]
)
def test_forms_are_fields_of_sampling_parameters_too(form):
    assert SamplingParams(**form).form == StructuredOutputs(**form)
    with pytest.raises(RequestError, match="contradicts"):
        SamplingParams(**form, structured_outputs=StructuredOutputs(json_object=True))
    with pytest.raises(RequestError, match="expected one of"):
        SamplingParams(**{"regex": "b", "choice": ["c"], **form})
