"""What a user gets wrong is said early, in the user's words, with what to do about it."""

import io
import json
import logging
import shutil
import socket
import sys
from pathlib import Path

import pytest

from qnext.cli import main
from qnext.engine.request import Event, Request, SamplingParams, Usage
from qnext.errors import ConfigError, RequestError
from qnext.llm import LLM, TextReader
from qnext.weights.checkpoint import load_model, resolve_model, save_model


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(memory="64MiB", max_num_seqs=2)


def changed(tmp_path: Path, name: str, **changes) -> Path:
    """A copy of the embedded model with other settings in one of its files."""
    folder = tmp_path / "model"
    shutil.copytree(resolve_model("qnext-mini"), folder)
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("name", ["max_num_seqs", "max_model_len", "max_batch_tokens"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True])
def test_impossible_counts_are_refused_before_anything_is_loaded(name, value):
    with pytest.raises(RequestError, match=f"{name}: expected a whole number of at least 1"):
        LLM("/nowhere/at/all", **{name: value})


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (5, "prompts: expected a text, or a list of token ids, found 5"),
        (None, "prompts: expected a text"),
        (["fine", 5], "prompt 1: expected a text, or a list of token ids, found 5"),
        ([["a"]], r"prompt 0: expected a text, or a list of token ids, found \['a'\]"),
    ],
)
def test_what_is_no_prompt_is_refused(llm, prompts, message):
    for ask in (llm.generate, llm.score):
        with pytest.raises(RequestError, match=message):
            ask(prompts)
    assert not llm.engine.has_work


def test_prompts_of_all_kinds_are_understood(llm):
    params = SamplingParams(temperature=0.0, max_tokens=2)
    ids = llm.tokenizer.encode("The fox")
    [wanted] = llm.generate("The fox", params)
    for prompts in (["The fox"], ids, [ids], (tuple(ids),), iter(["The fox"])):
        assert [one.text for one in llm.generate(prompts, params)] == [wanted.text]
    assert llm.generate([], params) == []


def test_a_context_that_was_cut_down_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        found = LLM(memory="64MiB", max_num_seqs=2, max_model_len=10**9)
    limit = found.config.max_position_embeddings
    assert found.max_model_len == limit
    said = f"A context of 1,000,000,000 tokens was asked for; the model's holds {limit:,}"
    assert said in caplog.text


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("wrong", [10**6, [1, -1]])
def test_an_end_that_cannot_be_said_is_refused(tmp_path, file, wrong):
    with pytest.raises(ConfigError, match="eos_token_id"):
        LLM(changed(tmp_path, file, eos_token_id=wrong), memory="64MiB")


def test_the_built_in_template_is_announced_once(tmp_path, caplog):
    folder = changed(tmp_path, "generation_config.json")
    (folder / "chat_template.jinja").unlink()
    with caplog.at_level(logging.WARNING):
        found = LLM(folder, memory="64MiB", max_num_seqs=2)
        found.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=1))
    assert caplog.text.count("has no chat template") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        LLM(memory="64MiB", max_num_seqs=2)
    assert "template" not in caplog.text


@pytest.mark.parametrize(
    ("answer", "reasons"),
    [("<think>\n\n</think>\n\nYes.", False), ("<think>\nBecause.\n</think>\n\nYes.", True)],
)
def test_an_empty_think_block_is_no_reasoning(llm, answer, reasons):
    ids = llm.tokenizer.encode(answer)
    request = Request(id="x", prompt_ids=(1,), params=SamplingParams(max_tokens=99))
    regions = llm.rule_book.regions("", chat=True)
    reader = TextReader(llm.tokenizer, request, split_reasoning=True, regions=regions)
    deltas = []
    for number, token in enumerate(ids, 1):
        reason = "length" if number == len(ids) else None
        usage = Usage(prompt_tokens=1, completion_tokens=number)
        deltas.append(
            reader.push(
                Event(request_id="x", token_ids=(token,), finish_reason=reason, usage=usage)
            )
        )
    assert (deltas[-1].usage.reasoning_tokens > 0) == reasons
    assert "".join(delta.text for delta in deltas) == "Yes."


def test_saving_takes_along_what_belongs_to_the_model_and_nothing_else(tmp_path):
    source = changed(tmp_path, "generation_config.json")
    (source / "LICENSE").write_text("free")
    save_model(load_model(source), tmp_path / "saved")
    found = {file.name for file in (tmp_path / "saved").iterdir()}
    assert found == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "generation_config.json", "LICENSE",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said", "unsaid"),
    [
        (["generate", "--memory", "1KiB", "--prompt", "a"], "Raise --memory.", "max_num_seqs"),
        (["serve", "--port", "0", "--memory", "1KiB"], "Raise --memory or lower --max-num-seqs.",
         "max_num_seqs"),
        (["serve", "--port", "0", "--max-batch-tokens", "4"], "--max-batch-tokens (4) must be",
         "max_batch_tokens"),
        (["generate", "--max-context", "8", "--prompt", "word " * 20], "raise --max-context",
         "max_model_len"),
        (["generate", "--backend", "torch", "--dtype", "float16", "--batch-invariant", "--prompt",
          "a"],
         "--batch-invariant needs", "batch_invariant"),
    ],
)  # fmt: skip
def test_remedies_on_the_command_line_are_its_options(capsys, arguments, said, unsaid):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert unsaid not in printed


@pytest.mark.parametrize("command", [["generate", "--prompt", "-"], ["chat"]])
def test_input_that_is_no_text_is_one_clear_message(capsys, monkeypatch, command):
    raw = io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait\n"), encoding="ascii",
                           errors="surrogateescape")  # fmt: skip
    monkeypatch.setattr(sys, "stdin", raw)
    assert main([*command, "--memory", "64MiB", "--max-tokens", "1"]) == 2
    printed = capsys.readouterr().err
    assert "standard input" in printed
    assert "not UTF-8 text" in printed
    assert "Traceback" not in printed


def test_an_argument_that_is_no_text_is_refused(capsys):
    assert main(["generate", "--prompt", "caf\udce9"]) == 2
    assert "--prompt: the text is not UTF-8" in capsys.readouterr().err


def test_an_address_that_cannot_be_had_comes_with_what_to_do():
    from qnext.serve.server import listen

    with pytest.raises(RequestError, match="Give --host an address of this machine"):
        listen("192.0.2.1", 0)
    with pytest.raises(RequestError, match="Give a name or an address of this machine"):
        listen("no.such.host.invalid", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RequestError, match="choose another port with --port"):
            listen("127.0.0.1", taken.getsockname()[1])


def test_doctor_counts_in_the_units_of_info(capsys):
    main(["doctor"])
    printed = capsys.readouterr().out
    assert "MiB)" in printed
    assert " MB" not in printed
