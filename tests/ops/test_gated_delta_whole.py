"""Whole documents through the gated delta rule: values and gradients, wherever borders fall."""

import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qnext.ops import Segments
from qnext.ops.delta_training import (
    CHUNK,
    WIDE_CHUNK,
    gated_delta_whole_training,
    lane_table,
    unit_lower_inverse,
)

OP = "gated_delta_whole"
RAGGED = (
    (1,), (1, 1, 1), (2, 1, 3), (CHUNK,), (CHUNK - 1, CHUNK, CHUNK + 1), (0, 5, 0), (64, 64),
    (3, 0, 64, 1, 67, 0), (30, 1, 1, 33, 95),
)  # fmt: skip


def draw(
    lengths: tuple[int, ...],
    *,
    key_heads: int = 2,
    group: int = 2,
    K: int = 8,
    M: int = 12,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, object]:
    """Random arguments as a delta layer has them before it normalises."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    P, W = sum(lengths), key_heads * group
    return {
        "q": normal(P, key_heads, K) * 3,
        "k": normal(P, key_heads, K) * 0.5,
        "v": normal(P, W, M),
        "g": -torch.exp(normal(1, W)) * F.softplus(normal(P, W)) * 0.2,
        "beta": torch.sigmoid(normal(P, W)),
        "segments": Segments.of(lengths),
    }


def recurrence(q, k, v, g, beta, segments):
    """The rule token by token in the dtype of its inputs, shared with nothing."""
    group = v.shape[1] // k.shape[1]
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q = q / q.shape[-1] ** 0.5
    rows = []
    for start, end in zip(segments.starts, segments.starts[1:], strict=False):
        S = v.new_zeros(v.shape[1], k.shape[2], v.shape[2])
        for t in range(start, end):
            q_WK, k_WK = (x[t].repeat_interleave(group, dim=0) for x in (q, k))
            S = S * g[t].exp()[:, None, None]
            error = v[t] - torch.einsum("wk,wkm->wm", k_WK, S)
            S = S + torch.einsum("wk,wm->wkm", k_WK, beta[t][:, None] * error)
            rows.append(torch.einsum("wk,wkm->wm", q_WK, S))
    return torch.stack(rows)


def gradients(function, inputs, seed: int = 3):
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }
    out = function(**leaves, segments=inputs["segments"])
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    found = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


class TestAgainstReference:
    @pytest.mark.parametrize("lengths", RAGGED, ids=str)
    def test_ragged_batches(self, backend, lengths, assert_equals_reference):
        assert_equals_reference(OP, backend, draw(lengths))

    @pytest.mark.parametrize("group", [1, 2, 4])
    @pytest.mark.parametrize(("K", "M"), [(8, 12), (16, 4), (5, 5), (1, 1)])
    def test_head_ratios_and_sizes(self, backend, group, K, M, assert_equals_reference):
        inputs = draw((40, 3), key_heads=3, group=group, K=K, M=M)
        assert_equals_reference(OP, backend, inputs)

    def test_no_tokens_at_all(self, backend):
        assert backend.load()(**draw((0, 0))).shape == (0, 4, 12)


class TestInDoublePrecision:
    """The hand-written backward is the derivative, not an approximation of it."""

    @pytest.mark.parametrize("lengths", [*RAGGED[:-1], (130, 70, 1)], ids=str)
    def test_gradients_equal_those_of_the_recurrence(self, lengths):
        inputs = draw(lengths, dtype=torch.float64)
        want = gradients(recurrence, inputs)
        for name, got in gradients(gated_delta_whole_training, inputs).items():
            assert (got - want[name]).abs().max() < 1e-12, name

    def test_wide_heads_have_chunks_of_their_own(self):
        inputs = draw((70, 1, 130, 63), key_heads=1, K=96, M=20, dtype=torch.float64)
        want = gradients(recurrence, inputs)
        for name, got in gradients(gated_delta_whole_training, inputs).items():
            assert (got - want[name]).abs().max() < 1e-12, name
        assert ("lanes", WIDE_CHUNK) in inputs["segments"]._tables

    @pytest.mark.parametrize("seed", range(6))
    def test_random_borders(self, seed):
        rng = random.Random(seed)
        lengths = tuple(rng.choice((1, 2, 3, 7, 31, 32, 33, 50)) for _ in range(rng.randint(2, 9)))
        shape = {"key_heads": rng.choice((1, 3)), "group": rng.choice((1, 2)), "K": 6, "M": 9}
        inputs = draw(lengths, seed=seed, dtype=torch.float64, **shape)
        want = gradients(recurrence, inputs)
        for name, got in gradients(gated_delta_whole_training, inputs).items():
            assert (got - want[name]).abs().max() < 1e-12, (name, lengths)

    def test_keys_that_repeat(self):
        """The triangle of a chunk of equal keys is as far from the identity as it can be."""
        inputs = draw((70, 20), dtype=torch.float64)
        inputs["k"] = inputs["k"][:1].expand(90, -1, -1).clone()
        inputs["beta"] = torch.full_like(inputs["beta"], 0.999)
        inputs["g"] = inputs["g"] * 1e-3
        want = gradients(recurrence, inputs)
        for name, got in gradients(gated_delta_whole_training, inputs).items():
            assert (got - want[name]).abs().max() < 1e-9, name


class TestBorders:
    LENGTHS = (5, 40, 1, 31, 2, 64, 33)

    def test_nothing_leaks_into_another_document(self):
        """Gradients of one document's outputs are exactly zero in every other."""
        inputs = draw(self.LENGTHS)
        ids = inputs["segments"].ids()
        assert lane_table(inputs["segments"], CHUNK).reads is not None, (
            "no lane holds two documents"
        )
        for document in range(len(self.LENGTHS)):
            leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if k != "segments"}
            out = gated_delta_whole_training(**leaves, segments=inputs["segments"])
            found = torch.autograd.grad(out[ids == document].square().sum(), list(leaves.values()))
            for grad in found:
                assert (grad[ids != document] == 0).all()
                assert (grad[ids == document] != 0).any() or self.LENGTHS[document] == 1

    def test_a_document_does_not_round_because_of_its_neighbours(self):
        """One that forgets everything at once does not cost the next one its digits."""
        inputs = draw((16, 40))
        alone = {k: v[16:] for k, v in inputs.items() if k != "segments"}
        alone["segments"] = Segments.of((40,))
        inputs["g"][:16] = -80.0
        want = gated_delta_whole_training(**alone)
        got = gated_delta_whole_training(**inputs)[16:]
        assert (got - want).abs().max() < 2e-6

    def test_short_documents_share_lanes(self):
        """A thousand one-token documents are not a thousand lanes of padding."""
        table = lane_table(Segments.of((1,) * 1000), CHUNK)
        assert table.index.shape[0] <= 40

    def test_equal_rows_are_not_gathered(self):
        assert lane_table(Segments.of((64, 64, 64)), CHUNK).lanes == 3
        assert lane_table(Segments.of((64, 63)), CHUNK).lanes is None

    def test_decay_that_underflows_stays_finite(self):
        inputs = draw((70, 3, 33))
        inputs["g"] = torch.full_like(inputs["g"], -30.0)
        want = gradients(recurrence, inputs)
        for name, got in gradients(gated_delta_whole_training, inputs).items():
            assert torch.isfinite(got).all(), name
            assert torch.allclose(got, want[name], atol=2e-5), name


def test_half_precision_inputs_keep_the_gradient_of_the_decay():
    """It is a difference of large numbers: formed from rounded ones it would be noise."""
    inputs = draw((200, 57))
    half = {k: v.bfloat16() if k in ("q", "k", "v") else v for k, v in inputs.items()}
    exact = {k: v.float() if isinstance(v, Tensor) else v for k, v in half.items()}
    want = gradients(gated_delta_whole_training, exact)
    got = gradients(gated_delta_whole_training, half)
    assert got["out"].dtype == got["g"].dtype == torch.float32
    assert (got["g"] - want["g"]).norm() < 1e-5 * want["g"].norm()
    assert (got["q"].float() - want["q"]).norm() < 1e-2 * want["q"].norm()


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_inverse_of_a_unit_lower_triangle(size):
    generator = torch.Generator().manual_seed(size)
    lower = torch.randn(3, 2, size, size, generator=generator, dtype=torch.float64).tril(-1) * 0.3
    inverse = unit_lower_inverse(lower)
    product = inverse @ (torch.eye(size, dtype=torch.float64) + lower)
    assert (product - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-10
