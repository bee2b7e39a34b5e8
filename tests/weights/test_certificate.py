"""The certificate: what it says is true, and what it leaves out it says."""

import json
import math
from pathlib import Path

import pytest
import torch
from tests.weights.tiny_checkpoints import NEXT, random_model

from qnext import cli
from qnext.certificate import compare, read_rows
from qnext.errors import DataError
from qnext.weights.calibrate import calibrate
from qnext.weights.checkpoint import load_model, save_model
from qnext.weights.formats import pack, unpack
from qnext.weights.quantize import PROGRESS_FILE
from qnext.weights.source import SourceReader


@pytest.fixture(scope="module")
def packed(tiny_folder, tmp_path_factory) -> Path:
    """``tiny_folder`` in 4 bits through the command line, with its certificate."""
    target = tmp_path_factory.mktemp("certified") / "packed"
    text = tmp_path_factory.mktemp("texts") / "fox.txt"
    text.write_text("The moon sat by the river. The fox thought about the fox. " * 8)
    arguments = ["quantize", str(tiny_folder), str(target), "--head-bits", "8"]
    assert cli.main([*arguments, "--text", str(text), "--calibrate", str(text)]) == 0
    return target


def test_it_holds_everything_that_was_promised(packed) -> None:
    found = json.loads((packed / "certificate.json").read_text())
    run = found["forward"]
    assert run["tokens"] == found["text"]["tokens"] > 50
    assert found["text"]["name"] == found["calibrated_on"]["name"] == "fox.txt"
    assert 0 < run["kl_median"] <= run["kl_99_percent"] <= run["kl_largest"]
    assert 0 < run["kl_mean"] <= run["kl_largest"]
    assert 0 < run["top_1_agreement"] <= 1
    assert run["perplexity_source"] > 1
    assert run["mtp"]["drift"] == pytest.approx(
        run["mtp"]["accepted_packed"] - run["mtp"]["accepted_source"]
    )
    errors = {entry["name"]: entry for entry in found["weights"]}
    assert errors["lm_head.weight"]["relative_error"] < 0.01
    assert 0.03 < errors["model.layers.0.mlp.experts"]["relative_error"] < 0.1
    assert set(found["files"]) == {path.name for path in packed.glob("*.safetensors")}
    text = (packed / "certificate.md").read_text()
    assert f"{run['perplexity_packed']:.4f}" in text
    assert "MTP drafts accepted" in text
    assert not (packed / PROGRESS_FILE).exists()


def test_its_numbers_are_those_of_the_loaded_folders(packed, tiny_folder) -> None:
    found = json.loads((packed / "certificate.json").read_text())
    before, after = (load_model(path, dtype="float32") for path in (tiny_folder, packed))
    weight = "model.layers.1.linear_attn.out_proj.weight"
    difference = after.get_parameter(weight) - before.get_parameter(weight)
    error = float(difference.norm().detach() / before.get_parameter(weight).norm().detach())
    [entry] = [entry for entry in found["weights"] if entry["name"] == weight]
    assert entry["relative_error"] == pytest.approx(error, rel=1e-4)


@torch.no_grad()
def test_a_comparison_is_the_definition(tmp_path) -> None:
    folder = tmp_path / "model"
    save_model(random_model({**NEXT, "num_nextn_predict_layers": 1}), folder)
    rows, described = read_rows(SourceReader(folder), None)
    assert "there is no tokenizer" in described["name"]
    row = rows[0][:40]

    def change(model) -> None:
        model.lm_head.weight.mul_(0.5)

    found = compare(folder, change, [row])
    model = load_model(folder, dtype="float32")
    logits = model(row[None]).logits[0]
    before, after = logits.log_softmax(-1), (0.5 * logits).log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1)
    assert found["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found["top_1_agreement"] == 1.0
    nll = -after[:-1].gather(-1, row[1:, None]).mean()
    assert found["perplexity_packed"] == pytest.approx(math.exp(nll), rel=1e-4)
    drafts = model.mtp_logits(row[None])[0, :-1].argmax(-1)
    accepted = float((drafts == logits.argmax(-1)[1:-1]).float().mean())
    assert found["mtp"]["accepted_source"] == pytest.approx(accepted)
    assert found["mtp"]["drift"] == 0


def test_what_could_not_run_is_said(tiny_folder, tmp_path, capsys) -> None:
    target = tmp_path / "packed"
    assert cli.main(["quantize", str(tiny_folder), str(target), "--no-forward"]) == 0
    found = json.loads((target / "certificate.json").read_text())
    assert found["forward"] is None
    assert found["weights"]
    assert "KL divergence, top-1 agreement, perplexity" in found["left_out"]
    assert found["left_out"] in capsys.readouterr().out


@torch.no_grad()
def test_calibration_sees_the_inputs_of_every_matrix(tiny_model) -> None:
    ids = torch.randint(0, 512, (60,), generator=torch.Generator().manual_seed(0))
    found = calibrate(tiny_model, [ids])
    last = tiny_model(ids[None], output_hidden_states=True).hidden_states[-1][0]
    head = found["lm_head.weight"]
    assert head.shape == (32,)
    # The MTP head's own rows go through the output head too, so the scale is near, not equal.
    assert torch.corrcoef(torch.stack((head, last.square().mean(0))))[0, 1] > 0.7
    assert found["model.layers.0.mlp.experts.3.down_proj.weight"].shape == (16,)
    experts = [found[f"model.layers.0.mlp.experts.{e}.gate_proj.weight"] for e in range(6)]
    assert not torch.equal(experts[0], experts[1])
    # Weights rounded for these inputs make smaller errors on them.
    weight = tiny_model.get_parameter("lm_head.weight")
    plain, aware = (unpack(pack("q4", weight, h)) - weight for h in (None, head))
    assert (last @ aware.T).norm() < (last @ plain.T).norm()


def test_texts_that_cannot_be_read_are_refused(tiny_folder, tmp_path) -> None:
    reader = SourceReader(tiny_folder)
    with pytest.raises(DataError, match="No such file"):
        read_rows(reader, tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_rows(reader, tmp_path / "latin.txt")
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(DataError, match="a longer text is needed"):
        read_rows(reader, tmp_path / "short.txt")
