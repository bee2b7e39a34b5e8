"""The recipe of qnext-mini: its data, its licences, its lessons."""

import json
import lzma
from pathlib import Path
from random import Random

import pytest
from recipes.mini import corpora, documents, lessons, model_card, sources

from qnext.config import ModelConfig
from qnext.cost import parameters
from qnext.data.chats import ChatEncoder
from qnext.data.generate.exercise import is_held_out
from qnext.data.prepare import checked_sources
from qnext.errors import DataError
from qnext.text.chat import ChatTemplate
from qnext.text.parse import STOP_THINKING
from qnext.text.tokenizer import Tokenizer
from qnext.weights.folder import resolve_model
from recipes import qnext_mini

RECIPE = qnext_mini.recipe()


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    folder = resolve_model("qnext-mini")
    return ChatEncoder(ChatTemplate.from_folder(folder), Tokenizer.from_folder(folder))


def test_every_stage_draws_on_prepared_sources() -> None:
    names = {source.name for source in corpora.plan(Path("nowhere")).sources}
    for stage in RECIPE.stages:
        assert set(stage.data.shares) <= names, stage.name
        lessons_in = {name for name in stage.data.shares if name in lessons.LESSONS}
        assert lessons_in <= set(stage.data.whole)


def test_licences_are_within_the_policy_and_not_within_a_narrower_one() -> None:
    sources = corpora.plan(Path("nowhere")).sources
    checked_sources(sources, "+cdla")
    with pytest.raises(DataError, match="tinystories"):
        checked_sources(sources, "permissive")
    assert all(source.licence.attribution for source in sources)


def test_share_alike_and_unclear_sources_are_not_read() -> None:
    for entry in (*sources.SOURCES, *corpora.EXTRA.values()):
        assert "SA" not in entry.licence.replace("CDLA-Sharing", "")
        assert not any(
            word in entry.file for word in ("sgd", "trivia", "dolly", "wikipedia", "gpteacher")
        )
        assert not entry.file.startswith("evals")


def test_a_missing_corpus_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tinystories_sample.jsonl.xz is not there.*--data"):
        sources.read_rows(sources.source("tinystories"), tmp_path)


def test_validation_stories_are_never_read(tmp_path: Path) -> None:
    entry = sources.source("tinystories")
    path = tmp_path / entry.file
    path.parent.mkdir(parents=True)
    rows = [{"id": "tinystories-v2/1", "text": "a"}, {"id": "tinystories-val/1", "text": "b"}]
    with lzma.open(path, "wt", encoding="utf-8") as lines:
        lines.write("\n".join(map(json.dumps, rows)))
    assert [row["id"] for row in sources.read_rows(entry, tmp_path)] == ["tinystories-v2/1"]


def test_a_story_is_held_out_with_all_its_parts() -> None:
    names = [f"tinystories-v2/{i}" for i in range(2000)]
    out = [name for name in names if documents.is_held_out(name)]
    assert 5 <= len(out) <= 40
    assert all(documents.is_held_out(f"{name}#{part}") for name in out for part in range(3))


def test_the_model_fits_into_forty_megabytes_at_eight_bits() -> None:
    counted = parameters(ModelConfig.from_dict(qnext_mini.MODEL))
    assert counted.total + counted.mtp < 38e6


@pytest.mark.parametrize("name", sorted(lessons.LESSONS))
def test_lessons_teach_something_and_are_the_same_for_a_seed(
    name: str, encoder: ChatEncoder
) -> None:
    make, _ = lessons.LESSONS[name]
    made = [make(Random(n)) for n in range(40)]
    assert made == [make(Random(n)) for n in range(40)]
    for chat in made:
        for sample in encoder.samples(chat):
            assert sample.judged
            kept = [t for t, w in zip(sample.ids, sample.weights, strict=True) if w]
            assert encoder.tokenizer.decode(kept).endswith("<|im_end|>")


def test_modes_are_mixed(encoder: ChatEncoder) -> None:
    make, _ = lessons.LESSONS["sums_thinking_chat"]
    made = [make(Random(n)) for n in range(400)]
    cut = [chat for chat in made if chat.cut_thinking is not None]
    assert 0.02 < len(cut) / len(made) < 0.09
    for chat in cut:
        [sample] = encoder.samples(chat)
        assert STOP_THINKING not in sample.judged
    asked = " ".join(str(chat.messages[-2]["content"]) for chat in made)
    assert "/think" in asked
    direct, _ = lessons.LESSONS["sums_direct_chat"]
    chats = [direct(Random(n)) for n in range(200)]
    assert all(not chat.messages[-1].get("reasoning_content") for chat in chats)
    assert any("/no_think" in str(chat.messages[-2]["content"]) for chat in chats)


def test_tools_of_the_evaluation_are_never_trained() -> None:
    make, _ = lessons.LESSONS["tools_chat"]
    for n in range(300):
        for message in make(Random(n)).messages:
            for call in message.get("tool_calls", ()):
                assert not is_held_out(json.dumps(call["function"]["arguments"]))


def test_held_out_text_is_not_in_the_long_documents(shared_dir: Path) -> None:
    [source] = [
        s for s in corpora.plan(shared_dir / "data").sources if s.name == "children_classics"
    ]
    held, kept = [], []
    for document in source.documents():
        assert isinstance(document.item, str)
        (held if document.held_out else kept).append(document.item)
        if len(kept) > 60 and held:
            break
    whole = "\n\n".join(kept)
    assert held
    assert all(piece not in whole for piece in held)
    assert max(map(len, kept)) > 10_000


def test_the_card_is_written_from_files(tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    run.mkdir()
    data.mkdir()
    (run / "recipe.json").write_text(json.dumps(RECIPE.as_dict()), encoding="utf-8")
    lines: list[dict[str, object]] = [{"event": "stage", "step": 0, "stage": "S1"}]
    for n in range(1, 5):
        lines.append({"step": n, "stage": "S1" if n < 3 else "SFT", "tokens": 100 * n,
                      "loss": 5.0 - n, "seconds": {"data": 1.0, "gradients": 59.0}})  # fmt: skip
    (run / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    row = {"text": "CC0 1.0", "attribution": "somebody", "tokens": 7, "contaminated": 2}
    summary = {"policy": "+cdla", "evaluation_files": ["blimp"], "evaluation_texts": 9,
               "evaluation_texts_too_short": 1, "sources": {"factbook": row}}  # fmt: skip
    (data / "prepared.json").write_text(json.dumps(summary), encoding="utf-8")
    record = {"model": "m", "date": "2026-11-21", "machine": "x", "seconds": 3, "skipped": {},
              "items_per_cell": 5, "results": {"samples": {"answers": [
                  {"prompt": "Hi", "text": "Hello!", "finish_reason": "stop"}]}}}  # fmt: skip
    (tmp_path / "record.json").write_text(json.dumps(record), encoding="utf-8")
    model = resolve_model("qnext-mini")
    trained = model_card.history(run, None)
    text = model_card.card(model, trained, data, tmp_path / "record.json")
    assert "| factbook | CC0 1.0 | 7 | S1-text 1.0 %" in text
    assert "| SFT | 2 | 200 | 2 | 1.000 |" in text
    assert "> Hello!" in text
    with pytest.raises(DataError, match="qnext data prepare"):
        model_card.card(model, trained, tmp_path, tmp_path / "record.json")
    # A run that starts from this model adds its own stage, and what is to be told of it.
    (tmp_path / "training.json").write_text(json.dumps(trained), encoding="utf-8")
    (run / "recipe.json").write_text(json.dumps(qnext_mini.extension().as_dict()), encoding="utf-8")
    (run / "log.jsonl").write_text(json.dumps(lines[-1] | {"stage": "LONG"}), encoding="utf-8")
    (run / "notes.txt").write_text("One.\n\nTwo.\n", encoding="utf-8")
    longer = model_card.history(run, tmp_path / "training.json")
    assert longer["notes"] == ["One.", "Two."]
    text = model_card.card(model, longer, data, tmp_path / "record.json")
    assert "| SFT | 2 | 200 | 2 | 1.000 |\n| LONG | 1 | 400 | 1 | 1.000 |" in text
    assert "| all | 5 | 800 | 5 |  |" in text
