"""Exported folders: transformers reads them, qnext serves them, the numbers are the masters."""

import json
from pathlib import Path

import pytest
import torch
from tests.train.test_trainer import stopped
from tests.train.tiny_runs import losses, tiny_recipe

import qnext
from qnext.errors import TrainingError
from qnext.train.export import export_run
from qnext.train.recipe import changed
from qnext.train.report import write_report
from qnext.train.telemetry import read_log
from qnext.train.trainer import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A finished run with a tokenizer."""
    folder = tmp_path_factory.mktemp("runs") / "named"
    recipe = changed(
        tiny_recipe(tokenizer=str(tiny_folder), generation={"temperature": 0.6, "top_k": 20}),
        ["model.vocab_size=448"],
    )
    assert Trainer(recipe, folder).run()
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    said: list[str] = []
    out = export_run(
        run, tmp_path_factory.mktemp("models") / "out", dtype="float32", say=said.append
    )
    assert not said
    return out


def test_transformers_computes_the_same(exported: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    ours = qnext.load_model(exported)
    ids = torch.arange(30)[None] % 48
    with torch.no_grad():
        expected = theirs(ids).logits
        found = ours(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # The second stage's rope is what it was exported with.
    assert theirs.config.rope_parameters["rope_theta"] == 50000.0
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_mtp_head_is_in_the_folder(exported: Path) -> None:
    assert qnext.load_model(exported).has_mtp
    raw = json.loads((exported / "config.json").read_text())
    assert raw["num_nextn_predict_layers"] == 1
    assert raw["max_position_embeddings"] == 128


def test_the_folder_generates_with_its_own_settings(exported: Path) -> None:
    raw = json.loads((exported / "generation_config.json").read_text())
    config = json.loads((exported / "config.json").read_text())
    assert raw["temperature"] == 0.6
    assert raw["eos_token_id"] == [config["eos_token_id"], config["pad_token_id"]]
    with qnext.LLM(str(exported)) as llm:
        [answer] = llm.generate("The fox", qnext.SamplingParams(max_tokens=4, temperature=0.0))
    assert len(answer.token_ids) <= 4


def test_bfloat16_is_the_masters_rounded(run: Path, exported: Path, tmp_path: Path) -> None:
    out = export_run(run, tmp_path / "out", say=print)
    wide, narrow = qnext.load_model(exported), qnext.load_model(out)
    for (name, a), b in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        if name.endswith(("A_log", "dt_bias")):
            assert b.dtype == torch.float32
            assert torch.equal(a, b), name
        else:
            assert torch.equal(a.bfloat16(), b), name


def test_an_unfinished_run_is_exported_and_said_to_be(tmp_path: Path) -> None:
    stopped(tiny_recipe(), tmp_path / "run", 7)
    said: list[str] = []
    export_run(tmp_path / "run", tmp_path / "out", say=said.append)
    assert said == ["the run is not finished: exporting step 7 of 12."]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no checkpoint"):
        export_run(tmp_path, tmp_path / "out", say=print)
    assert not (tmp_path / "out").exists()
    with pytest.raises(TrainingError, match="is not there"):
        write_report(tmp_path)


# -- the page --------------------------------------------------------------------------------------


def test_the_page_has_every_curve_and_nothing_from_elsewhere(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    assert page.count("<img") >= 14
    assert page.count("src=") == page.count('src="data:image/png;base64,')
    assert "http" not in page
    for words in ("Attention to the first token", "Right first guesses", "Dead experts", "S2"):
        assert words in page


def test_a_picture_alone(run: Path, tmp_path: Path) -> None:
    file = write_report(run, tmp_path / "curves.png")
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_line_cut_short_is_passed_over(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    whole = (run / "log.jsonl").read_bytes()
    (copy / "log.jsonl").write_bytes(whole[:-20])
    assert len(list(read_log(copy))) == len(list(read_log(run))) - 1
    assert len(losses(copy)) == 12
