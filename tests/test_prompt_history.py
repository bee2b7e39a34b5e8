"""Lines typed at the prompt of ``qnext chat`` are there in the next run, for their owner alone."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from qnext.cli import build_parser
from qnext.prompt_history import MAX_LINES, PromptHistory, default_file
from typist import Typist

UP, DOWN = "\033[A", "\033[B"
READER = """
import sys
from pathlib import Path
from qnext.prompt_history import PromptHistory
from qnext.terminal_screen import typed_lines
for line in typed_lines(PromptHistory(Path(sys.argv[1]))):
    print(f"[{line}]", flush=True)
"""


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "state" / "qnext" / "chat_history"


def test_lines_are_kept_in_a_private_file(file) -> None:
    before = os.umask(0)
    try:
        history = PromptHistory(file)
        assert history.lines() == []
        for line in ("one", "two", "two", "", "   ", " a secret", "three", "thé"):
            history.add(line)
    finally:
        os.umask(before)
    assert history.trouble is None
    assert file.read_text(encoding="utf-8") == "one\ntwo\nthree\nthé\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    file.chmod(0o644)
    later = PromptHistory(file)
    assert later.lines() == ["one", "two", "three", "thé"]
    assert not later.add("thé")  # the last one of the run before
    assert later.add("four")
    assert file.stat().st_mode & 0o777 == 0o600


def test_two_runs_at_once_keep_each_others(file) -> None:
    one, other = PromptHistory(file), PromptHistory(file)
    for i in range(3):
        one.add(f"one {i}")
        other.add(f"other {i}")
    assert len(PromptHistory(file).lines()) == 6


def test_the_oldest_lines_go(file) -> None:
    file.parent.mkdir(parents=True)
    file.write_text("".join(f"{i}\n" for i in range(2 * MAX_LINES + 1)))
    found = PromptHistory(file).lines()
    assert len(found) == MAX_LINES
    assert found[-1] == str(2 * MAX_LINES)
    assert file.read_text().splitlines() == found
    assert file.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in file.parent.iterdir()] == [file.name]


def test_a_file_that_cannot_be_used_is_no_reason_to_stop(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    history = PromptHistory(tmp_path / "file" / "chat_history")
    assert history.lines() == []
    assert history.add("hello")
    assert history.trouble is not None
    assert "what is typed is not kept" in history.trouble


def test_where_it_is_and_how_it_is_switched_off(monkeypatch) -> None:
    assert default_file({"XDG_STATE_HOME": "/s"}) == Path("/s/qnext/chat_history")
    for wrong in ({}, {"XDG_STATE_HOME": "relative"}):
        assert default_file(wrong) == Path.home() / ".local/state/qnext/chat_history"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert default_file({}) is None
    assert build_parser().parse_args(["chat"]).history
    assert not build_parser().parse_args(["chat", "--no-history"]).history


def test_the_arrow_keys_find_lines_of_the_run_before(file) -> None:
    pytest.importorskip("readline", reason="this platform has no line editing of its own")
    file.parent.mkdir(parents=True)
    file.write_text("the first\nthe second\n")
    here, there = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", READER, str(file)],
        stdin=there, stdout=there, stderr=there, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(there)
    typist = Typist(here)
    typist.read_until("> ")
    for keys, line in (
        (UP, "the second"), (UP + UP + UP, "the first"), ("new", "new"), (UP, "new"),
        (" hidden", " hidden"), (UP + UP + DOWN, "new"),
    ):  # fmt: skip
        typist.type(keys)
        typist.read_until(f"[{line}]")
        typist.read_until("> ")
    os.write(here, b"\x04")
    assert process.wait(60) == 0
    os.close(here)
    assert file.read_text().splitlines() == ["the first", "the second", "the first", "new"]
