"""Our 4-bit weights are no worse than llama.cpp's, on a trained and on a random model."""

import pytest
import torch

pytest.importorskip("gguf")

from benchmarks.quantization import measure, ours, theirs, unpacked

from qnext.config import read_json
from qnext.weights.synth import cut_config, synthesise


@pytest.mark.slow
@pytest.mark.parametrize("trained", [True, False], ids=["qnext-mini", "random"])
def test_int4_diverges_less_than_q4_0(tmp_path, trained: bool) -> None:
    folder = unpacked(tmp_path / "qnext-mini")
    if not trained:
        raw = cut_config(read_json(folder), layers=4)
        folder = synthesise(raw, tmp_path / "random", 16, progress=False)
    mine = measure(folder, "model", "q4", ours("q4"))
    other = measure(folder, "model", "Q4_0", theirs("Q4_0"))
    assert mine.kl_mean < other.kl_mean
    assert mine.relative_error < 0.9 * other.relative_error


@pytest.mark.parametrize("shape", [(64, 2048), (96, 512)])
def test_the_error_of_the_weights_is_smaller_at_equal_bits(shape) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (mine, my_bytes), (other, other_bytes) = (
        rounding("", weight) for rounding in (ours("q4"), theirs("Q4_0"))
    )
    # A float32 for each row comes on top of the 4.5 bits that both have.
    assert my_bytes == other_bytes + 4 * shape[0]
    assert (mine - weight).norm() < 0.88 * (other - weight).norm()
