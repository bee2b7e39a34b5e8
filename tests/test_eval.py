"""qnext eval mini: scores are what they claim, and what cannot be measured is said."""

import json
import math
from pathlib import Path
from random import Random

import pytest

from qnext import LLM, SamplingParams, load_model
from qnext.cli import main
from qnext.eval import question_tasks, text_tasks
from qnext.eval.needles import DEPTHS, SEED, NeedleReport, needle_prompt
from qnext.eval.run import Options, evaluate, table
from qnext.eval.scores import share, wilson
from qnext.weights.folder import resolve_model


@pytest.fixture(scope="module")
def llm():  # type: ignore[no-untyped-def]
    with LLM("qnext-mini") as model:
        yield model


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    folder = tmp_path / "held-out"
    folder.mkdir()
    story = "\n\n".join(["Once upon a time there was a little cat who lived in a big house."] * 12)
    rows = [{"id": "1", "text": "The cat sat on the mat."}, {"id": "2", "text": story}]
    (folder / "tinystories.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    lesson = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (folder / "x_chat.jsonl").write_text(json.dumps(lesson) + "\n", encoding="utf-8")
    talk = {**lesson, "learn": "everything"}
    (folder / "talk.jsonl").write_text(json.dumps(talk) + "\n", encoding="utf-8")
    return folder


def test_wilson_intervals() -> None:
    low, high = wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson(0, 0) == (0.0, 1.0)
    assert share([])["share"] is None


def test_bits_per_byte_is_the_score_of_the_text(llm: LLM, held_out: Path) -> None:
    found = text_tasks.bits_per_byte(llm, held_out / "tinystories.jsonl", most_bytes=10)
    text = "The cat sat on the mat."
    end = llm.tokenizer.id_of("<|endoftext|>")
    assert end is not None
    [score] = llm.score([[end, *llm.tokenizer.encode(text), end]])
    assert found["bits_per_byte"] == pytest.approx(-score.total / math.log(2) / len(text), abs=1e-4)
    assert found["documents"] == 1
    names = [path.stem for path in text_tasks.held_out_files(held_out)]
    assert names == ["talk", "tinystories"]


def test_ties_between_minimal_pairs_are_wrong(llm: LLM, tmp_path: Path) -> None:
    rows = [
        {"uid": "a", "field": "f", "good": "The cat sat.", "bad": "The cat sat."},
        {"uid": "a", "field": "f", "good": "The cat was big.", "bad": "Zq cat xx were qv big."},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = text_tasks.minimal_pairs(llm, file, per_paradigm=10)
    assert found["accuracy"]["right"] == 1
    assert found["accuracy"]["of"] == 2


def test_a_budget_cuts_as_an_engine_would(llm: LLM) -> None:
    found = question_tasks.budget_curve(llm, 1)
    assert [point["budget"] for point in found["points"]] == [*question_tasks.BUDGETS, None]
    cuts = [point["cut"] for point in found["points"]]
    assert cuts == sorted(cuts, reverse=True)
    assert cuts[-1] == 0
    assert found["items"] == 4


def test_answers_are_read_after_the_think_block(llm: LLM) -> None:
    [answer] = question_tasks.ask(llm, ["What is 2 + 3?"])
    assert "</think>" in answer.text
    assert "think" not in question_tasks.said(answer)
    assert question_tasks.well_formed(answer, thinks=True)
    assert not question_tasks.well_formed(answer, thinks=False)
    [short] = question_tasks.ask(llm, ["What is 2 + 3?"], tokens=2)
    assert question_tasks.said(short) == ""
    assert not question_tasks.well_formed(short, thinks=True)


def test_needles_fill_the_length_asked_for(llm: LLM) -> None:
    made, prompt = needle_prompt(llm.tokenizer, llm.template, Random(1), 300, 0.5, 2)
    assert 200 < len(prompt) <= 300
    assert made.value in llm.tokenizer.decode(prompt)


def test_drafts_are_counted_by_the_engine() -> None:
    with LLM("qnext-mini", speculative_tokens=1) as drafting:
        end = drafting.tokenizer.id_of("<|endoftext|>")
        prompt = [end, *drafting.tokenizer.encode("Once upon a time, there was a")]
        found = text_tasks.draft_acceptance(drafting, [prompt], tokens=24)
        [answer] = drafting.generate([prompt], SamplingParams(temperature=0.0, max_tokens=24))
    assert found["of"] == answer.usage.drafted_tokens > 0
    assert found["right"] == answer.usage.accepted_tokens


def test_the_command_writes_a_record_and_says_what_it_skipped(
    tmp_path: Path, held_out: Path, capsys, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "record.json"
    arguments = ["eval", "mini", "--tasks", "text,pairs,arithmetic,needles", "--items", "1",
                 "--needles", "1", "--trained-length", "256",
                 "--held-out", str(held_out), "--out", str(out)]  # fmt: skip
    assert main(arguments) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    assert "minimal pairs" in record["skipped"]["pairs"]
    assert set(record["results"]) == {"text", "arithmetic", "needles"}
    assert list(record["results"]["needles"]["yarn"]["lengths"]) == ["1024"]
    assert len(record["results"]["arithmetic"]["by_kind"]) == 9
    assert "bits per byte, tinystories" in capsys.readouterr().out
    assert table(record)
    assert main(["eval", "mini", "--tasks", "nothing"]) == 2
    assert "there are text, pairs" in capsys.readouterr().err


def test_scores_repeat(llm: LLM) -> None:
    options = Options(model=resolve_model("qnext-mini"), tasks=("arithmetic",), items=2)
    one, other = evaluate(options, progress=False), evaluate(options, progress=False)
    assert one["results"] == other["results"]
    assert set(one["results"]["arithmetic"]["by_kind"]) == set(question_tasks.sums(1))


def test_a_report_agrees_with_generation(llm: LLM) -> None:
    folder = resolve_model("qnext-mini")
    figures = NeedleReport(lengths=(200,)).measure(load_model(folder), folder)
    right = []
    for depth in DEPTHS:
        rng = Random(f"{SEED}/report/200/{depth}")
        made, prompt = needle_prompt(llm.tokenizer, llm.template, rng, 200, depth, 0)
        [answer] = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=40))
        right.append(answer.text == made.answer)
    assert figures == {"needles_200": sum(right) / len(right)}
