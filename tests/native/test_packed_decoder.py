"""The native decoder on packed folders, held against PyTorch on the same weights unpacked."""

import pytest
import torch

from qnext.engine.native_runner import NativeRunner
from qnext.engine.runner import Runner, Work
from qnext.weights.decoder import load_decoder
from qnext.weights.synth import synthesise

RAW = {
    "model_type": "qwen3", "vocab_size": 97, "hidden_size": 600, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
"""Rows of 600 columns: two whole blocks of an activation scale, and a part of one, padded."""
ROUNDING = 0.03
"""What activations in 8 bits may change of the logits, relative."""


@pytest.fixture(scope="module", params=[4, 8])
def folder(request, tmp_path_factory):
    target = tmp_path_factory.mktemp("packed") / f"int{request.param}"
    return synthesise(RAW, target, request.param, progress=False)


def _logits(runner: Runner, ids: list[int]) -> torch.Tensor:
    work = Work(slot=runner.open(), pages=[0, 1], start=0, ids=ids, rows=range(len(ids)))
    return runner.forward([work]).float()


def test_logits_of_every_token_are_those_of_the_unpacked_weights(kernels, folder):
    sizes = {"num_slots": 1, "num_pages": 2, "track_mtp": False}
    ids = list(range(RAW["vocab_size"]))
    want = _logits(Runner(load_decoder(folder, backend="torch", dtype="float32"), **sizes), ids)
    native = load_decoder(folder, backend="native", dtype="float32")
    found = []
    for threads in (2, 1, 3):
        kernels.set_threads(threads)
        found.append(_logits(NativeRunner(native, **sizes), ids))
    gap = (found[0] - want).norm(dim=-1) / want.norm(dim=-1)
    assert gap.max() < ROUNDING
    assert all(torch.equal(found[0], other) for other in found[1:])
