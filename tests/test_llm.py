"""LLM: text in, text out, from a folder on disk."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qnext import LLM, SamplingParams, load_model, save_model
from qnext.answers import Conversation, Delta
from qnext.engine.request import Event, Request, TokenLogprobs, Usage
from qnext.errors import RequestError, TokenizerError
from qnext.llm import TextReader, parse_bytes
from qnext.text.calls.parts import merged
from qnext.text.tokenizer import Tokenizer

SENTENCES = [
    "The fox sat by the river and thought about the moon.",
    "Ünïcödé, 日本語 and 🦊🌊.",
] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """A complete model folder: weights, tokenizer, generation settings; built-in template."""
    path = tmp_path_factory.mktemp("tiny")
    save_model(tiny_model, path)
    Tokenizer.train(SENTENCES, vocab_size=400).save(path)
    settings = {"do_sample": True, "temperature": 0.5, "top_k": 7, "eos_token_id": [1, 2]}
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, max_num_seqs=4)


GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def test_one_prompt_gives_one_completion(llm, folder):
    [found] = llm.generate("The fox", GREEDY)
    prompt = llm.tokenizer.encode("The fox")
    ids, model = list(prompt), load_model(folder)
    for _ in range(12):
        logits = model(torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits[: llm.tokenizer.vocab_size].argmax()))
        if ids[-1] in llm.eos_ids:
            break
    assert list(found.token_ids) == ids[len(prompt) :]
    assert found.usage.prompt_tokens == len(prompt)
    assert found.usage.completion_tokens == len(found.token_ids)
    assert found.reasoning is None


def test_prompts_may_be_texts_or_ids_and_keep_their_order(llm):
    texts = ["The fox", "A", "moon river moon"]
    several = llm.generate(texts, GREEDY)
    assert [one.text for one in several] == [llm.generate(t, GREEDY)[0].text for t in texts]
    ids = [llm.tokenizer.encode(text) for text in texts]
    assert [one.text for one in llm.generate(ids, GREEDY)] == [one.text for one in several]
    assert llm.generate(ids[0], GREEDY)[0].text == several[0].text


def test_each_prompt_may_have_its_own_params(llm):
    params = [replace(GREEDY, max_tokens=n, ignore_eos=True) for n in (3, 5)]
    lengths = [len(one.token_ids) for one in llm.generate(["The", "A"], params)]
    assert lengths == [3, 5]
    with pytest.raises(RequestError, match=r"one per prompt \(2\), found 1"):
        llm.generate(["The", "A"], params[:1])


def test_the_stream_adds_up_to_the_whole(llm):
    messages = [{"role": "user", "content": "Tell me about the fox."}]
    whole = llm.chat(messages, replace(GREEDY, max_tokens=40))
    pieces = list(llm.stream(messages, replace(GREEDY, max_tokens=40)))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert "".join(piece.reasoning for piece in pieces) == (whole.reasoning or "")
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == whole.finish_reason
    # All but where the prompt came from: the first answer left something to start from.
    usage = pieces[-1].usage
    assert usage.cached_tokens == usage.prompt_tokens - 1
    reused = {"cache": whole.usage.cache, "cached_tokens": whole.usage.cached_tokens}
    assert replace(usage, **reused) == whole.usage


def test_two_streams_may_be_read_in_turn(llm):
    alone = [llm.generate(text, GREEDY)[0].text for text in ("The fox", "river")]
    first, second = llm.stream("The fox", GREEDY), llm.stream("river", GREEDY)
    texts = ["", ""]
    for one, two in zip(first, second, strict=False):
        texts[0] += one.text
        texts[1] += two.text
    texts[0] += "".join(piece.text for piece in first)
    texts[1] += "".join(piece.text for piece in second)
    assert texts == alone


def test_closing_a_stream_ends_its_request(llm):
    stream = llm.stream("The fox", replace(GREEDY, max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    llm.generate("A", GREEDY)
    assert not llm.engine.has_work
    assert llm.engine.runner.cache.slots_free == 4


def test_control_tokens_typed_by_a_user_are_plain_text(llm):
    ids = llm.prepare_chat([{"role": "user", "content": "<|im_end|>"}], GREEDY)[0].prompt_ids
    end = llm.tokenizer.id_of("<|im_end|>")
    assert ids.count(end) == 1


def test_default_params_come_from_the_checkpoint(llm):
    params = llm.default_params(max_tokens=3)
    assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 7, 3)
    assert {1, 2, llm.tokenizer.eos_id} <= set(llm.eos_ids)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, tiny_model):
    save_model(tiny_model, tmp_path)
    Tokenizer.train(
        SENTENCES * 5 + ["".join(map(chr, range(0x4E00, 0x5200)))], vocab_size=900
    ).save(tmp_path)
    with pytest.raises(TokenizerError, match=r"defines \d+ ids and the model's vocabulary has 512"):
        LLM(tmp_path)


def reader_for(llm, *, stop=(), chat=False, inside=False) -> TextReader:
    request = Request(id="x", prompt_ids=(1,), params=SamplingParams(stop=stop))
    regions = llm.rule_book.regions("<think>" if inside else "", chat=False, plain=True)
    return TextReader(llm.tokenizer, request, split_reasoning=chat, regions=regions)


def feed(reader: TextReader, ids: list[int]):
    """Push ids one by one; returns (text, reasoning, last delta)."""
    text = reasoning = ""
    last = None
    for number, token in enumerate(ids):
        reason = "length" if number == len(ids) - 1 else None
        usage = Usage(prompt_tokens=1, completion_tokens=number + 1)
        event = Event(request_id="x", token_ids=(token,), finish_reason=reason, usage=usage)
        delta = reader.push(event)
        if delta is not None:
            text, reasoning, last = text + delta.text, reasoning + delta.reasoning, delta
        if reader.stopped:
            break
    return text, reasoning, last


def test_characters_of_several_tokens_arrive_whole(llm):
    written = "🦊 日本語 ünï"
    assert feed(reader_for(llm), llm.tokenizer.encode(written))[0] == written


def test_a_stop_string_over_several_tokens_never_leaks(llm):
    ids = llm.tokenizer.encode("The fox sat by the river and thought")
    text, _, last = feed(reader_for(llm, stop=("r and th",)), ids)
    assert text == "The fox sat by the rive"
    assert last.finish_reason == "stop"


def test_thinking_is_split_off_and_counted(llm):
    think, answer = llm.tokenizer.encode("the moon"), llm.tokenizer.encode("A fox.")
    tags = [llm.tokenizer.encode(tag) for tag in ("<think>", "</think>")]
    ids = [*tags[0], *llm.tokenizer.encode("\n"), *think, *llm.tokenizer.encode("\n"), *tags[1]]
    ids += [*llm.tokenizer.encode("\n\n"), *answer]
    text, reasoning, last = feed(reader_for(llm, chat=True), ids)
    assert (text, reasoning) == ("A fox.", "the moon")
    newlines = 2 * len(llm.tokenizer.encode("\n"))
    assert last.usage.reasoning_tokens == len(think) + newlines


def test_tool_calls_are_parts_of_the_answer(llm):
    request = Request(id="x", prompt_ids=(1,), params=SamplingParams())
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    reader = TextReader(
        llm.tokenizer,
        request,
        split_reasoning=True,
        regions=llm.rule_book.regions("", chat=True),
        conversation=Conversation(messages=(), options={}),
        tool_format=llm.template.tool_format,
        tools=tools,
    )
    call = '{"name": "find", "arguments": {"who": "a fox"}}'
    written = f"Let me see.\n<tool_call>\n{call}\n</tool_call>"
    text, _, last = feed(reader, llm.tokenizer.encode(written))
    assert text == "Let me see."
    assert last.text == ""
    function = {"name": "find", "arguments": '{"who": "a fox"}'}
    assert reader.answer() == {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [{"type": "function", "function": function}],
    }
    # Without tools in the request, the same text is content.
    assert feed(reader_for(llm, chat=True), llm.tokenizer.encode(written))[0] == written


def test_calls_are_looked_for_when_the_request_has_tools(llm):
    messages = [{"role": "user", "content": "Find it."}]
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    for options, expected in (
        ({"tools": tools}, "hermes"),
        ({"tools": tools, "parse_tools": False}, None),
        ({}, None),
    ):
        _, reader = llm.prepare_chat(messages, SamplingParams(), **options)
        text, _, _ = feed(reader, llm.tokenizer.encode('<tool_call>{"name": "find"}</tool_call>'))
        assert (text == "") == (expected is not None)


@pytest.mark.parametrize(
    ("amount", "wanted"),
    [("2GiB", 2 << 30), ("500MB", 500_000_000), (7, 7), ("1.5 KiB", 1536), ("64", 64)],
)
def test_amounts_of_memory(amount, wanted):
    assert parse_bytes(amount) == wanted


@pytest.mark.parametrize("amount", ["much", "", "5XB", "GiB"])
def test_wrong_amounts_of_memory_are_refused(amount):
    with pytest.raises(RequestError, match="expected an amount such as 2GiB"):
        parse_bytes(amount)


def test_several_answers_to_one_prompt(llm):
    params = SamplingParams(temperature=1.5, seed=3, n=3, max_tokens=12, ignore_eos=True)
    [found] = llm.generate("The fox", params)
    texts = [one.text for one in (found, *found.others)]
    assert len(set(texts)) == 3
    [again] = llm.generate("The fox", params)
    assert [one.token_ids for one in (again, *again.others)] == [
        one.token_ids for one in (found, *found.others)
    ]
    assert llm.generate("The fox", replace(params, n=1))[0].text == found.text
    assert found.total_usage.prompt_tokens == found.usage.prompt_tokens
    assert found.total_usage.completion_tokens == 36
    with pytest.raises(RequestError, match="n must be 1, found 3"):
        llm.stream("The fox", params)


def test_scores_are_the_models_log_probabilities(llm, folder):
    model = load_model(folder)
    texts = ["The fox sat by the river.", "moon"]
    for text, score in zip(texts, llm.score(texts), strict=True):
        ids = llm.tokenizer.encode(text)
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = [float(logprobs[t, ids[t + 1]]) for t in range(len(ids) - 1)]
        assert score.token_ids == tuple(ids)
        assert score.logprobs == pytest.approx(wanted, abs=1e-4)
        assert score.total == pytest.approx(sum(wanted), abs=1e-3)


def test_banned_words_do_not_appear(llm):
    plain = llm.generate("The fox", GREEDY)[0].token_ids
    words = {token: llm.tokenizer.decode([token]) for token in plain}
    token, word = next(
        (token, word)
        for token, word in words.items()
        if llm.tokenizer.encode(word, allow_added=False) == [token]
    )
    assert token not in llm.generate("The fox", replace(GREEDY, bad_words=(word,)))[0].token_ids


@pytest.mark.parametrize("thinking", [True, False])
def test_the_next_turn_starts_where_this_one_will_not_change(folder, thinking):
    llm = LLM(folder)
    messages = [
        {"role": "system", "content": "The moon. " * 20},
        {"role": "user", "content": "Tell me about the fox and the river."},
    ]
    params = replace(GREEDY, max_tokens=5)
    request, _ = llm.prepare_chat(messages, params, enable_thinking=thinking)
    hints = {why: length for length, why in request.hints}
    first = llm.chat(messages, params, enable_thinking=thinking)
    later = [
        *messages,
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And the moon?"},
    ]
    second = llm.chat(later, params, enable_thinking=thinking)
    assert second.usage.cached_tokens >= hints["stable"]
    other = [messages[0], {"role": "user", "content": "Something else."}]
    assert llm.chat(other, params, enable_thinking=thinking).usage.cached_tokens == hints["system"]
    cold = LLM(folder, prefix_cache=False)
    assert cold.chat(later, params, enable_thinking=thinking).text == second.text


def test_a_stream_that_is_dropped_unread_leaves_nothing(llm):
    stream = llm.stream("The fox", replace(GREEDY, max_tokens=200, ignore_eos=True))
    stream.close()
    llm.stream("river", replace(GREEDY, max_tokens=200, ignore_eos=True))
    llm.generate("A", GREEDY)
    assert not llm.engine.has_work
    assert not llm._inbox


def test_a_refused_prompt_takes_the_others_of_its_call_along(llm):
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate(["The fox", "", "river"], GREEDY)
    llm.generate("A", GREEDY)
    assert not llm.engine.has_work
    assert not llm._inbox


@pytest.mark.parametrize("amount", ["inf", "1e400GiB", "-5MiB", "1_0MiB", "nan"])
def test_amounts_that_are_no_amounts_are_refused(amount):
    with pytest.raises(RequestError, match="expected an amount such as 2GiB"):
        parse_bytes(amount)


def test_a_seed_is_a_whole_number():
    with pytest.raises(RequestError, match=r"seed: expected a whole number, found 1\.5"):
        SamplingParams(seed=1.5)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    import re
    from pathlib import Path

    text = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out
    assert (tmp_path / "folder" / "model.safetensors").is_file()


@pytest.mark.parametrize("thinking", [True, False])
def test_what_spare_time_prepares_the_next_turn_does_not_run(folder, thinking):
    llm, cold = LLM(folder), LLM(folder, prefix_cache=False)
    messages = [{"role": "user", "content": "Tell me about the fox and the river."}]
    params = replace(GREEDY, max_tokens=60, ignore_eos=True)
    first = llm.chat(messages, params, enable_thinking=thinking)
    assert llm.unprepared == 1
    assert llm.idle(max_tokens=1) > 0
    llm.idle()
    assert llm.unprepared == llm.idle() == 0
    answer = {"role": "assistant", "content": first.text}
    if first.reasoning:
        answer["reasoning_content"] = first.reasoning
    later = [*messages, answer, {"role": "user", "content": "And the moon?"}]
    begins = llm.tokenizer.decode(
        llm.prepare_chat(later, params, enable_thinking=thinking)[0].prompt_ids
    ).rindex("And the moon?")
    second = llm.chat(later, GREEDY, enable_thinking=thinking)
    ids = llm.prepare_chat(later, params, enable_thinking=thinking)[0].prompt_ids
    assert len(llm.tokenizer.decode(ids[: second.usage.cached_tokens])) == begins
    assert second.text == cold.chat(later, GREEDY, enable_thinking=thinking).text


def test_spare_time_is_not_taken_from_an_answer_that_is_being_written(folder):
    llm = LLM(folder)
    messages = [{"role": "user", "content": "Tell me about the fox and the river."}]
    llm.chat(messages, replace(GREEDY, max_tokens=40, ignore_eos=True))
    stream = llm.stream("The fox", replace(GREEDY, ignore_eos=True))
    next(stream)
    assert llm.idle() == 0
    assert len(list(stream)) > 0
    assert llm.idle() > 0


def test_nothing_is_prepared_without_cause(folder):
    long = replace(GREEDY, max_tokens=40, ignore_eos=True)
    messages = [{"role": "user", "content": "Tell me about the fox and the river."}]
    for llm in (LLM(folder, background_prefill=False), LLM(folder, prefix_cache=False)):
        llm.chat(messages, long)
        assert llm.unprepared == llm.idle() == 0
    llm = LLM(folder)
    llm.generate("The fox", long)  # no conversation
    llm.stream(messages, long).close()  # nobody has read the answer
    assert llm.unprepared == llm.idle() == 0


def test_a_pending_call_of_a_tool_prepares_nothing(folder):
    llm = LLM(folder)
    request, reader = llm.prepare_chat([{"role": "user", "content": "Where is the fox?"}], GREEDY)
    text = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    usage = Usage(prompt_tokens=len(request.prompt_ids), completion_tokens=0)
    ids = tuple(llm.tokenizer.encode(text, allow_added=False))
    reader.push(Event(request_id=request.id, token_ids=ids, finish_reason="length", usage=usage))
    assert reader.answer() == {"role": "assistant", "content": text}
    llm.ended(reader, "length")
    assert llm.unprepared == 0


def test_conversations_answered_together_are_answered_as_alone(llm):
    asked = [[{"role": "user", "content": text}] for text in ("Hello", "Tell me a story")]
    params = [SamplingParams(temperature=0.0, max_tokens=5 + number) for number in range(2)]
    together = llm.chat(asked, params)
    alone = [llm.chat(one, own) for one, own in zip(asked, params, strict=True)]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [len(one.token_ids) for one in together] == [5, 6]
    with pytest.raises(RequestError, match="one per prompt"):
        llm.chat(asked, params[:1])


@given(cuts=st.sets(st.integers(0, 40)))
def test_joined_deltas_say_what_the_single_ones_say(llm, cuts):
    params = SamplingParams(temperature=0.0, max_tokens=30, logprobs=1)
    deltas = list(llm.stream("Once upon a time", params))
    places = [0, *sorted(cut for cut in cuts if 0 < cut < len(deltas)), len(deltas)]
    fewer = [Delta.joined(deltas[a:b]) for a, b in pairwise(places)]
    assert "".join(one.text for one in fewer) == "".join(one.text for one in deltas)
    for name in ("token_ids", "logprobs"):
        together = [item for one in fewer for item in getattr(one, name)]
        assert together == [item for one in deltas for item in getattr(one, name)], name
    parts = merged(part for one in fewer for part in one.parts)
    assert parts == merged(part for one in deltas for part in one.parts)
    assert [one.finish_reason for one in fewer] == [None] * (len(fewer) - 1) + ["length"]
    assert fewer[-1].usage == deltas[-1].usage


WRITTEN = (
    "The fox 🦊 sat.",
    'Hm, the river\n</think>\n\n<tool_call>\n{"name": "look", "arguments": {"at": "日本"}}\n'
    "</tool_call>\nand so on",
    "<think>\nthe moon",
)


@given(
    cuts=st.lists(st.integers(0, 120), max_size=9),
    text=st.sampled_from(WRITTEN),
    stop=st.sampled_from([(), ("moon",), ("r\n", "look")]),
    end=st.sampled_from(["length", "stop", "cancelled"]),
    inside=st.booleans(),
    forced=st.sets(st.integers(0, 120)),
    ties=st.sets(st.integers(0, 120)),
    cut_at=st.none() | st.integers(0, 120),
)
def test_events_read_together_say_what_they_say_one_by_one(
    llm, cuts, text, stop, end, inside, forced, ties, cut_at
):
    ids = [*llm.tokenizer.encode(text, allow_added=True), llm.eos_ids[0]]
    logprobs = [TokenLogprobs(token_id=token, logprob=-0.5, top=()) for token in ids]
    places = [0, *sorted(cut for cut in cuts if 0 < cut < len(ids)), len(ids)]
    accepted = set()
    for a, b in pairwise(places):
        # A step chooses one token behind the drafts that it accepts.
        accepted |= set([i for i in range(a, b) if i not in forced][:-1])
    events = [
        Event(request_id="x", token_ids=(token,), finish_reason=None, logprobs=(one,),
              forced_at=(i,) if i in forced else (), ties_at=(i,) if i in ties else (),
              cut_at=cut_at,
              usage=Usage(prompt_tokens=1, completion_tokens=i + 1,
                          accepted_tokens=sum(place <= i for place in accepted)))
        for i, (token, one) in enumerate(zip(ids, logprobs, strict=True))
    ]  # fmt: skip
    if end == "cancelled":
        last = replace(events[-1], token_ids=(), logprobs=(), forced_at=(), ties_at=())
        events.append(replace(last, finish_reason=end))
        places.append(len(events))
    else:
        events[-1] = replace(events[-1], finish_reason=end)
    found = []
    for pieces in (pairwise(range(len(events) + 1)), pairwise(places)):
        request = Request(id="x", prompt_ids=(1,), params=SamplingParams(stop=stop))
        regions = llm.rule_book.regions("<think>" if inside else "", chat=True, plain=False)
        reader = TextReader(
            llm.tokenizer, request, split_reasoning=True, regions=regions, tool_format="hermes"
        )
        deltas = [delta for a, b in pieces for delta in reader.push_all(events[a:b])]
        assert reader.must_read_at_once == bool(stop)
        found.append((Delta.joined(deltas), reader.stopped, reader._state))
    assert found[0] == found[1]
    # What was found behind a stop string is not counted.
    usage, told = found[0][0].usage, range(len(found[0][0].token_ids))
    assert usage.forced_tokens == len(forced.intersection(told))
    assert usage.near_ties == len(ties.intersection(told))
    assert usage.accepted_tokens == len(accepted.intersection(told))
    assert usage.reasoning_was_cut == (cut_at in told)
