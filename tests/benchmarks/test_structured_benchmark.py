"""The benchmark of structured output and path independence."""

import argparse
import threading

import pytest

from benchmarks import structured
from qnext import LLM, native
from qnext.engine.guide import Guide

pytest.importorskip("llguidance")


@pytest.fixture
def args(tiny_folder) -> argparse.Namespace:
    return argparse.Namespace(
        model=str(tiny_folder),
        dtype="auto",
        batches=[1, 4],
        rounds=1,
        tokens=8,
        seed=0,
        about="",
        seconds=0.0,
    )


def test_every_part_is_measured(tiny_folder, args, monkeypatch):
    monkeypatch.setattr(structured, "SETTINGS", (0, "auto"))
    before = Guide._find_mask
    llm = LLM(tiny_folder, memory="8MiB", max_num_seqs=1)
    masks, speed = structured.mask_rows(llm, args), structured.speed_rows(llm, args)
    assert [row["what"] for row in masks] == [
        *(f"Masks, batch {batch}{way}" for batch in (1, 4) for way in structured.WAYS),
        *(f"Masks, batch {batch}, PyTorch" for batch in (1, 4) if native.unfit() is None),
    ]
    assert {row["met"] for row in masks + speed} <= {"yes", "no"}
    assert [row["what"] for row in speed] == [
        "With a grammar, batch 1, auto", "With a grammar, batch 4, auto",
    ]  # fmt: skip
    assert Guide._find_mask is before
    args.batches = [1]
    for row in structured.price_rows(args):
        assert row["what"].startswith("Path-independent")
        assert "tokens/s" in row["value"]


def test_the_stopwatch_counts_its_own_thread_unless_told_otherwise():
    class Work:
        def outer(self):
            self.inner()

        def inner(self):
            threading.Event().wait(0.002)

    for everywhere in (False, True):
        watch = structured.Stopwatch((Work, "outer"), (Work, "inner"), everywhere=everywhere)
        with watch.running():
            Work().outer()
            here = watch.seconds
            other = threading.Thread(target=Work().outer)
            other.start()
            other.join()
        assert here > 0.0015
        assert (watch.seconds > here) == everywhere


def test_impossible_numbers_are_refused(capsys):
    with pytest.raises(SystemExit):
        structured.main(["--rounds", "0"])
    assert "expected at least 1" in capsys.readouterr().err
