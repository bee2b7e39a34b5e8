"""The benchmark of training compares like with like: both sides compute the same gradients."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from benchmarks.train_speed import SHAPE, Side, _joined, _packed, _rows

from benchmarks import train_speed

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
    "head_dim": 16, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 8,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "intermediate_size": 32,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train_speed, "SHAPE", {**SHAPE, **SMALL})


@pytest.mark.parametrize("workers", [1, 2])
def test_both_sides_compute_the_same_step(workers):
    batches = _joined(_rows(4, 33), workers)
    updated = {}
    with ThreadPoolExecutor(workers) as pool:
        for name in ("qnext", "transformers"):
            side = Side(name, "float32")
            names = [slot.name for slot in side.optimiser.slots]
            grads = dict(zip(names, side.gradients(batches, pool), strict=True))
            side.step(batches, pool)
            updated[name] = (grads, {slot.name: slot.master for slot in side.optimiser.slots})
    (ours, our_weights), (theirs, their_weights) = updated["qnext"], updated["transformers"]
    assert set(ours) == set(theirs)
    size = float(torch.stack([grad.norm() for grad in theirs.values()]).norm())
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() < 1e-3 * max(float(grad.norm()), 0.01 * size), name
        assert our_weights[name].shape == their_weights[name].shape


def test_packed_batches_hold_as_many_tokens():
    assert sum(batch.real_tokens for batch in _packed(3000, 2)) == 3000
    assert max(batch.tokens.segments.longest for batch in _packed(3000, 2)) <= 600
