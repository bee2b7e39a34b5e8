"""The comparisons of recipes/evidence.py compare what they say."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from recipes.evidence import SHAPES, Ungated, equal_width, measure, model_keys, recall_row, recipe

from qnext.config import ModelConfig
from qnext.cost import parameters
from qnext.model.model import CausalLM
from qnext.train.recipe import Need, Recipe
from qnext.train.trainer import Trainer
from recipes import evidence


def config(shape: str) -> ModelConfig:
    return ModelConfig.from_dict(model_keys(shape, equal_width(shape)))


def test_the_shapes_have_equal_parameters() -> None:
    sizes = [parameters(config(shape)).total for shape in SHAPES]
    assert max(sizes) < 1.01 * min(sizes), sizes


def test_all_runs_see_the_same_batches() -> None:
    need = Need(seed=1, stage=0, row_tokens=512, batch_tokens=8192, micro_tokens=4096,
                vocab_size=448)  # fmt: skip
    data = evidence.TextAndRecall()
    first = data.open(need).micro_batches(7)
    again = data.open(replace(need, stage=1)).micro_batches(7)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.weight_P, b.weight_P)


def test_a_recall_row_asks_for_what_it_has_said() -> None:
    ids, weights = recall_row(np.random.default_rng(0), 24)
    assert len(ids) == 2 * (24 + 16)
    said = dict(zip(ids[:48:2].tolist(), ids[1:48:2].tolist(), strict=True))
    assert len(said) == 24
    asked = np.flatnonzero(weights)
    assert len(asked) == 16
    for at in asked:
        assert said[int(ids[at - 1])] == ids[at]


def test_text_that_is_held_out_is_not_trained() -> None:
    trained, held_out = evidence.library(False), evidence.library(True)
    assert len(trained) > 10 * len(held_out)
    piece = held_out[1000:1100].tobytes()
    assert piece not in trained.tobytes()


def small(shape: str) -> Recipe:
    made = recipe(shape, tokens=2 * 2048, mtp="late")
    stages = [
        replace(stage, batch_tokens=1024, micro_tokens=1024, tokens=1024) for stage in made.stages
    ]
    return replace(made, stages=tuple(stages), workers=1, dtype="float32")


@pytest.mark.parametrize(("shape", "kind"), [("hybrid", Trainer), ("attention", Ungated)])
def test_a_variant_trains_and_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, kind: type[Trainer]
) -> None:
    monkeypatch.setattr(evidence, "TEXT_ROWS", 2)
    monkeypatch.setattr(evidence, "RECALL_ROWS", 2)
    trainer = kind(small(shape), tmp_path)
    assert trainer.run()
    found = measure(trainer.model)
    assert 3 < found["text_bits_per_byte"] < 12
    assert list(found["recall"]) == [str(pairs) for pairs in evidence.PAIRS]
    assert 0 < found["first_token_mass"] < 1
    assert 0 <= found["mtp_acceptance"] <= 1
    gates = [layer.self_attn.gated for layer in trainer.model.model.layers
             if layer.kind == "full_attention"]  # fmt: skip
    assert set(gates) == {kind is Trainer}


def test_without_a_gate_only_the_gates_weights_are_missing(tmp_path: Path) -> None:
    gated, ungated = (kind(small("attention"), tmp_path) for kind in (Trainer, Ungated))
    pair = [trainer.make_model() for trainer in (gated, ungated)]
    assert all(isinstance(model, CausalLM) for model in pair)
    sizes = [sum(p.numel() for p in model.parameters()) for model in pair]
    assert sizes[0] - sizes[1] == 8 * 128 * 128
    for a, b in pairwise(pair):
        queries = a.model.layers[0].self_attn.q_proj.weight.unflatten(0, (4, 2, 32))[:, 0]
        assert torch.equal(b.model.layers[0].self_attn.q_proj.weight, queries.flatten(0, 1))
        assert torch.equal(
            a.model.layers[0].mlp.up_proj.weight, b.model.layers[0].mlp.up_proj.weight
        )
