"""TrainBatch: borders, weights and targets at every prediction distance."""

import numpy as np
import pytest
import torch

from qnext.train.batch import TrainBatch


def brute_force(lengths: list[int], weights: np.ndarray, depth: int) -> list[tuple[int, int]]:
    """(row, target position) of every term, enumerated document by document."""
    found, start = [], 0
    for length in lengths:
        for t in range(length - 1 - depth):
            if weights[start + t + depth + 1]:
                found.append((start + t, start + t + depth + 1))
        start += length
    return found


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_targets_equal_an_enumeration_per_document(depth: int) -> None:
    rng = np.random.default_rng(depth)
    for _ in range(20):
        lengths = [int(n) for n in rng.integers(1, 6, size=rng.integers(1, 7))]
        documents = [
            (rng.integers(1, 99, n), rng.integers(0, 2, n).astype(np.float32)) for n in lengths
        ]
        batch = TrainBatch.pack(documents, length=sum(lengths) + 3)
        weights = np.concatenate([w for _, w in documents])
        for start in np.cumsum([0, *lengths[:-1]]):
            weights[start] = 0
        expected = brute_force(lengths, weights, depth)
        targets = batch.targets(depth)
        assert targets.rows.tolist() == [row for row, _ in expected]
        assert targets.labels.tolist() == [int(batch.ids[at]) for _, at in expected]
        assert targets.inputs.tolist() == [int(batch.ids[at - 1]) for _, at in expected]
        shifted = batch.shifted_ids(depth) if depth else batch.ids
        assert shifted[targets.rows].tolist() == targets.inputs.tolist()


def test_padding_is_a_last_segment_without_weight() -> None:
    batch = TrainBatch.pack([(np.arange(1, 4), np.ones(3)), (np.arange(4), np.ones(4))], length=10)
    assert batch.cu_seqlens == (0, 3, 7, 10)
    assert batch.documents == 2
    assert batch.real_tokens == 7
    assert batch.loss_tokens == 5
    assert batch.weight_P.tolist() == [0, 1, 1, 0, 1, 1, 1, 0, 0, 0]
    assert batch.cu_seqlens_tensor.dtype == torch.int32
