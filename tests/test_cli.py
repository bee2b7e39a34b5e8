"""The command line: what each command prints, and how it fails."""

import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qnext import LLM, SamplingParams, save_model
from qnext.cli import build_parser, main
from qnext.config import ModelConfig
from qnext.engine.request import Usage
from qnext.errors import QnextError
from qnext.llm import Delta
from qnext.model.model import CausalLM, initialise
from qnext.terminal_chat import TerminalChat
from qnext.terminal_screen import Screen
from qnext.weights.folder import embedded_models
from typist import Typist

OFFICIAL = {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "vocab_size": 151936,
    "hidden_size": 2048, "num_hidden_layers": 48, "intermediate_size": 5120,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": 512,
    "num_experts_per_tok": 10, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "max_position_embeddings": 262144,
}  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*arguments: str, **options) -> subprocess.Popen:
    """The command in a process of its own."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
               "text": True, "env": ENVIRONMENT, **options}  # fmt: skip
    return subprocess.Popen([sys.executable, "-m", "qnext", *arguments], **options)


@pytest.fixture
def official(tmp_path: Path) -> str:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(OFFICIAL))
    return str(file)


# -- the whole command ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["serve"], ["info"], ["doctor"]])
def test_help_does_not_import_torch(command: list[str]) -> None:
    program = (
        "import sys\nfrom qnext.cli import main\n"
        f"try:\n    main({[*command, '--help']!r})\n"
        "except SystemExit as end:\n    sys.exit(end.code or ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: qnext")


def test_without_a_command_the_help_is_shown(capsys) -> None:
    assert main([]) == 2
    assert "generate" in capsys.readouterr().err


def test_the_embedded_model_is_the_default() -> None:
    for command in (["generate", "--prompt", "x"], ["chat"], ["serve"], ["info"]):
        assert build_parser().parse_args(command).model == "qnext-mini"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        (json.dumps({**OFFICIAL, "linear_num_value_heads": 33}),
         "linear_num_value_heads (33) is not a multiple of linear_num_key_heads (16)"),
    ],
)  # fmt: skip
def test_an_error_is_its_message_alone(content, message, tmp_path, capsys, monkeypatch) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    assert main(["info", str(file)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    monkeypatch.setenv("QNEXT_TRACEBACK", "1")
    with pytest.raises(ValueError, match=re.escape(message)):
        main(["info", str(file)])


def test_an_unknown_model_is_named(capsys) -> None:
    assert main(["generate", "no-such-model", "--prompt", "x"]) == 2
    assert "no model 'no-such-model'" in capsys.readouterr().err


def test_a_pickle_is_refused(tmp_path, official, capsys) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for command in (["info", str(tmp_path)], ["generate", str(tmp_path), "--prompt", "x"]):
        assert main(command) == 2
        assert "pickle" in capsys.readouterr().err


def test_a_closed_pipe_ends_quietly(official) -> None:
    process = start("info", official)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""
    process.stdin.close()
    process.stderr.close()


def test_ctrl_c_ends_with_status_130(tiny_folder) -> None:
    process = start("chat", str(tiny_folder), "--max-tokens", "4", "--temperature", "0")
    process.stdin.write("hello\n")
    process.stdin.flush()
    process.stdout.readline()  # the answer: now it waits for the next turn
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "Traceback" not in process.stderr.read()
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()


# -- info ----------------------------------------------------------------------------------------


def test_info_gives_the_published_figures_of_a_bare_config(official, capsys) -> None:
    assert main(["info", official, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total_parameters"] == 79_674_391_296
    assert found["active_parameters"] == 3_563_764_480
    assert found["mtp_parameters"] == 1_650_471_424
    assert found["kv_bytes_per_token"] == 24_576
    assert found["mtp_kv_bytes_per_token"] == 2_048
    assert found["state_bytes_per_sequence"] == 75_497_472
    assert found["conv_bytes_per_sequence"] == 1_769_472
    assert found["stored"] is None
    assert sum(found["parameters"].values()) == 81_324_862_720
    at_4k = found["bytes_per_token"][0]
    assert at_4k["context"] == 4096
    assert at_4k["total"] == at_4k["weights"] + at_4k["kv"] + at_4k["state"]


def test_info_counts_bytes_for_the_dtype_asked_for(official, capsys) -> None:
    sizes = {}
    for dtype in ("bfloat16", "float32", "fp8"):
        assert main(["info", official, "--json", "--dtype", dtype]) == 0
        sizes[dtype] = json.loads(capsys.readouterr().out)
    assert sizes["float32"]["weight_bytes"] == 2 * sizes["bfloat16"]["weight_bytes"]
    assert sizes["float32"]["kv_bytes_per_token"] == 2 * 24_576
    assert round(sizes["fp8"]["weight_bytes"] / 2**30, 1) == 76.4
    assert sizes["fp8"]["kv_bytes_per_token"] == 24_576


def test_info_prints_aligned_tables(official, capsys) -> None:
    assert main(["info", official]) == 0
    text = capsys.readouterr().out
    rows = re.findall(r"^  [\w ,-]+?  +[\d,]+ +[\d.]+ %$", text, re.MULTILINE)
    assert len(rows) == 9  # every component that the model has
    assert len({row.index("%") for row in rows}) == 1
    for figure in ("79,674,391,296", "3,563,764,480", "24 KiB", "72 MiB", "151.5 GiB", "7.125 GF"):
        assert figure in text


def test_info_of_a_folder_counts_the_mtp_head_that_is_there(tmp_path, tiny_config, capsys) -> None:
    """A config that is silent about MTP says nothing about the tensors; the tensors do."""
    sizes = {}
    for layers in (0, 1):
        config = ModelConfig.from_dict({**tiny_config.source, "num_nextn_predict_layers": layers})
        model = CausalLM(config)
        initialise(model, seed=0)
        folder = tmp_path / str(layers)
        save_model(model, folder)
        raw = json.loads((folder / "config.json").read_text())
        raw.pop("num_nextn_predict_layers", None)
        (folder / "config.json").write_text(json.dumps(raw))
        assert main(["info", str(folder), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["total_parameters"] + found["mtp_parameters"] == sum(
            parameter.numel() for parameter in model.parameters()
        )
        assert found["stored"]["tensors"] > 0
        sizes[layers] = found["mtp_parameters"]
        assert main(["info", str(folder / "config.json"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["mtp_parameters"] > 0
    assert sizes[0] == 0
    assert sizes[1] > 0
    assert main(["info", str(tmp_path / "0")]) == 0
    assert re.search(r"MTP head +none", capsys.readouterr().out)


# -- doctor --------------------------------------------------------------------------------------


def test_doctor_reports_and_its_status_says_whether_all_is_well(capsys) -> None:
    status = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    by_name = {check["name"]: check for check in found["checks"]}
    assert found["ok"] == all(check["status"] != "problem" for check in found["checks"])
    assert status == (0 if embedded_models() else 1)
    assert by_name["torch"]["found"] == torch.__version__
    assert by_name["self-test"]["status"] == "ok"
    assert by_name["kernel experts"]["found"].startswith("torch")
    for name in ("Python", "processor", "cores", "memory", "threads", "CUDA", "native code"):
        assert by_name[name]["found"]


def test_doctor_names_a_remedy_for_every_problem(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setenv("QNEXT_OPS", "experts=abacus")
    monkeypatch.setattr("qnext.weights.folder._EMBEDDED", tmp_path)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "experts=abacus: no such backend" in text
    assert "! kernels: Correct or unset QNEXT_OPS." in text
    assert "! embedded model: " in text
    assert text.endswith("2 problem(s) found.\n")


# -- generate ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tiny_folder) -> LLM:
    return LLM(tiny_folder)


def test_generate_prints_one_json_object(llm, tiny_folder, capsys) -> None:
    arguments = ["--prompt", "The fox", "--max-tokens", "9", "--temperature", "0", "--json"]
    assert main(["generate", str(tiny_folder), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    [expected] = llm.generate("The fox", SamplingParams(temperature=0.0, max_tokens=9))
    assert found == {
        "text": expected.text,
        "token_ids": list(expected.token_ids),
        "finish_reason": expected.finish_reason,
        "usage": expected.usage.as_dict(),
    }
    assert found["usage"]["completion_tokens"] == len(found["token_ids"])


def test_generate_streams_the_same_text(llm, tiny_folder, capsys) -> None:
    arguments = ["--prompt", "The fox", "--max-tokens", "9", "--temperature", "0"]
    assert main(["generate", str(tiny_folder), *arguments]) == 0
    [expected] = llm.generate("The fox", SamplingParams(temperature=0.0, max_tokens=9))
    assert capsys.readouterr().out == expected.text + "\n"


def test_sampling_options_reach_the_sampler(llm, tiny_folder, capsys) -> None:
    arguments = [
        "--prompt", "The fox", "--max-tokens", "12", "--temperature", "0.9", "--top-p", "0.8",
        "--top-k", "30", "--min-p", "0.01", "--seed", "5", "--json",
    ]  # fmt: skip
    params = SamplingParams(temperature=0.9, top_p=0.8, top_k=30, min_p=0.01, seed=5, max_tokens=12)
    assert main(["generate", str(tiny_folder), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    [expected] = llm.generate("The fox", params)
    assert found["text"] == expected.text
    stop = next(c for c in expected.text[1:] if expected.text.index(c) > 0)
    assert main(["generate", str(tiny_folder), *arguments, "--stop", stop]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == expected.text[: expected.text.index(stop)]
    assert found["finish_reason"] == "stop"


@pytest.mark.parametrize("how", ["file", "dash", "file-dash"])
def test_the_prompt_may_come_from_a_file_or_a_pipe(
    how, llm, tiny_folder, tmp_path, capsys, monkeypatch
) -> None:
    text = "The fox\nsat by the rivér"
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    source = {
        "file": ["--prompt-file", str(tmp_path / "prompt.txt")],
        "dash": ["--prompt", "-"],
        "file-dash": ["--prompt-file", "-"],
    }[how]
    arguments = [*source, "--max-tokens", "5", "--temperature", "0", "--json"]
    assert main(["generate", str(tiny_folder), *arguments]) == 0
    [expected] = llm.generate(text, SamplingParams(temperature=0.0, max_tokens=5))
    assert json.loads(capsys.readouterr().out)["text"] == expected.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x" * 4000], "the context holds 512"),
        (["--prompt", "x", "--temperature", "-1"], "temperature: expected at least 0"),
        (["--prompt", "x", "--memory", "lots"], "memory: expected an amount such as 2GiB"),
        (["--prompt-file", "nowhere.txt"], "--prompt-file nowhere.txt: No such file"),
    ],
)
def test_generate_refuses_bad_input_in_one_line(arguments, message, tiny_folder, capsys) -> None:
    assert main(["generate", str(tiny_folder), *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1


def test_a_prompt_that_is_not_text_is_refused(tiny_folder, tmp_path, capsys) -> None:
    (tmp_path / "prompt.bin").write_bytes(b"\xff\xfe")
    assert main(["generate", str(tiny_folder), "--prompt-file", str(tmp_path / "prompt.bin")]) == 2
    assert "not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["--prompt", "x", "--prompt-file", "y"], ["--prompt", "x", "--max-tokens", "0"]],
)
def test_contradictory_arguments_end_with_status_2(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["generate", *arguments])
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


# -- chat ----------------------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def say(llm, lines: str, **options) -> tuple[str, TerminalChat]:
    out = io.StringIO()
    talk = TerminalChat(llm, GREEDY, **options)
    assert talk.run(io.StringIO(lines), out) == 0
    return out.getvalue(), talk


def test_piped_lines_are_turns_of_one_conversation(llm) -> None:
    said, talk = say(llm, "hello\n\nand then?\n")
    first = llm.chat([{"role": "user", "content": "hello"}], GREEDY)
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "and then?"},
    ]
    second = llm.chat(messages, GREEDY)
    assert said == f"{first.text}\n{second.text}\n"
    assert talk.turns == [*messages, {"role": "assistant", "content": second.text}]


def test_a_backslash_continues_the_line(llm) -> None:
    _, talk = say(llm, "one \\\ntwo\n")
    assert talk.turns[0] == {"role": "user", "content": "one \ntwo"}


def test_commands_change_the_conversation(llm) -> None:
    said, talk = say(llm, "hello\n/reset\nhi\n/quit\nnever said\n")
    fresh = llm.chat([{"role": "user", "content": "hi"}], GREEDY)
    assert said.endswith(f"the conversation is forgotten\n{fresh.text}\n")
    assert [turn["content"] for turn in talk.turns] == ["hi", fresh.text]

    said, _ = say(llm, "/system Be a fox.\nhi\n")
    messages = [{"role": "system", "content": "Be a fox."}, {"role": "user", "content": "hi"}]
    assert said.endswith(llm.chat(messages, GREEDY).text + "\n")
    assert say(llm, "hi\n", system="Be a fox.")[0] == llm.chat(messages, GREEDY).text + "\n"

    hi = [{"role": "user", "content": "hi"}]
    for command, thinks in (("/no_think", False), ("/think", True)):
        expected = llm.chat(hi, GREEDY, enable_thinking=thinks).text
        assert say(llm, f"{command} hi\n")[0].splitlines()[1:] == expected.splitlines()
    assert "there is no command /dance" in say(llm, "/dance\n")[0]
    assert "/reset" in say(llm, "/help\n")[0]


def test_a_question_is_answered_again_or_taken_back(llm) -> None:
    said, talk = say(llm, "hello\n/retry\n")
    answer = llm.chat([{"role": "user", "content": "hello"}], GREEDY).text
    assert said == f"{answer}\n{answer}\n"
    assert [turn["content"] for turn in talk.turns] == ["hello", answer]
    said, talk = say(llm, "hello\n/undo\n/retry\n")
    assert "0 questions are left\nthere is nothing to answer again" in said
    assert talk.turns == []


def test_settings_change_the_answer(llm) -> None:
    said, _ = say(llm, "/set max_tokens 3\nhello\n")
    short = llm.chat([{"role": "user", "content": "hello"}], replace(GREEDY, max_tokens=3)).text
    assert said.endswith(f"max_tokens 3, seed None\n{short}\n")
    for line, message in (
        ("/set colour 3", "expected one of temperature"),
        ("/set seed x", "expected a number, found 'x'"),
        ("/set top_p 7", "top_p: expected more than 0 and at most 1"),
        ("/load nowhere.json", "No such file"),
    ):
        with pytest.raises(QnextError, match=message):
            say(llm, line + "\n")


def test_a_conversation_is_saved_and_gone_on_with(llm, tmp_path) -> None:
    file = tmp_path / "talk.json"
    said, talk = say(llm, f"hello\n/save {file}\n", system="Be a fox.")
    assert f"2 messages are in {file}" in said
    said, later = say(llm, f"/load {file}\n/history\nand then?\n")
    assert later.turns[:2] == talk.turns
    assert "user: hello" in said
    messages = [{"role": "system", "content": "Be a fox."}, *talk.turns,
                {"role": "user", "content": "and then?"}]  # fmt: skip
    assert later.turns[-1]["content"] == llm.chat(messages, GREEDY).text
    for wrong in ("[]", "{}", '{"messages": [{"role": "user", "content": "x"}]}', "x"):
        file.write_text(wrong)
        with pytest.raises(QnextError, match=r"/load .*: (expected a file|it is not JSON)"):
            say(llm, f"/load {file}\n")


def test_lines_between_quotes_are_one_turn(llm) -> None:
    _, talk = say(llm, 'before\n"""\none\n\n  two\n"""\nafter\n')
    assert [turn["content"] for turn in talk.turns[::2]] == ["before", "one\n\n  two", "after"]


class Script:
    """Stands for an LLM whose answer is known; only ``stream`` and ``name`` are used."""

    name = "script"

    def stream(self, messages, params, *, enable_thinking=None):
        usage = Usage(prompt_tokens=1, completion_tokens=2)
        for reasoning, text in (("Hm,\nw", ""), ("ell.", ""), ("", "Yes"), ("", "!")):
            yield Delta(
                text=text, reasoning=reasoning, token_ids=(1,), finish_reason=None, usage=usage
            )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_reasoning_is_set_apart_from_the_answer(monkeypatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain, coloured = io.StringIO(), Terminal()
    for out in (plain, coloured):
        TerminalChat(Script(), GREEDY).run(io.StringIO("hello\n"), out)
    assert plain.getvalue() == "| Hm,\n| well.\n\nYes!\n"
    folded = io.StringIO()
    screen = Screen(folded, folds=True)
    for delta in Script().stream([], GREEDY):
        screen.show(delta)
    screen.end_of_answer()
    assert folded.getvalue() == "thinking ...\nthought in 2 words; /thoughts shows them\nYes!\n"
    assert screen.thoughts == "Hm,\nwell."
    assert coloured.getvalue() == "\033[2mHm,\nwell.\033[0m\n\nYes!\n"


def test_a_failed_turn_over_a_pipe_ends_with_an_error(tiny_folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 2000 + "\n"))
    assert main(["chat", str(tiny_folder)]) == 2
    assert "the context holds 512" in capsys.readouterr().err


def test_chat_in_a_terminal(tiny_folder, tmp_path) -> None:
    here, there = pty.openpty()
    process = start(
        "chat", str(tiny_folder), "--max-tokens", "5", "--temperature", "0",
        stdin=there, stdout=there, stderr=there,
        text=False, env={**ENVIRONMENT, "TERM": "dumb", "XDG_STATE_HOME": str(tmp_path)},
    )  # fmt: skip
    os.close(there)
    typist = Typist(here)
    assert "/help lists the commands" in typist.read_until("> ")
    typist.type("hello")
    assert "5 tokens, first after" in typist.read_until("is reached")
    typist.read_until("> ")
    typist.type("word " * 700)
    assert "the context holds 512" in typist.read_until("/reset forgets")  # and the chat goes on
    typist.read_until("> ")
    typist.type("/quit")
    assert process.wait(60) == 0
    os.close(here)
    typed = (tmp_path / "qnext" / "chat_history").read_text().splitlines()
    assert typed == ["hello", "word " * 700, "/quit"]


# -- serve ---------------------------------------------------------------------------------------


def test_a_port_in_use_is_said_at_once(capsys) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert main(["serve", "no-such-model", "--port", port]) == 2
    assert f"port {port} on 127.0.0.1 is in use by another program" in capsys.readouterr().err


def test_an_impossible_host_is_named(capsys) -> None:
    assert main(["serve", "no-such-model", "--host", "no such host"]) == 2
    assert "--host no such host: " in capsys.readouterr().err


def test_serve_names_the_package_that_is_missing(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "qnext.serve.server", None)
    assert main(["serve"]) == 2
    assert "pip install 'qnext[serve]'" in capsys.readouterr().err
