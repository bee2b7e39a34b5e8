"""Attention is causal inside each sequence, and keys and values may lie in pages of any order."""

import pytest
import torch
from torch import Tensor

from qnext.ops import Segments
from qnext.ops.attention import attention_reference, attention_weights

SCALE = 16**-0.5


def heads(P: int, number: int, dim: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(P, number, dim, generator=generator)


def paged(
    before: tuple[int, ...],
    new: tuple[int, ...],
    *,
    query_heads: int = 4,
    kv_heads: int = 2,
    page_size: int = 8,
    free: float = float("nan"),
) -> tuple[dict[str, object], list[tuple[Tensor, Tensor, Tensor]]]:
    """Arguments of the paged op, and the same per sequence: q [T, N, H], k and v [S, G, H].

    Pages are in random order; whatever no sequence owns, and the rest of a last page, is ``free``.
    """
    generator = torch.Generator().manual_seed(3)
    each = max(-(-(b + n) // page_size) for b, n in zip(before, new, strict=True)) + 1
    number = each * len(new) + 2
    order = torch.randperm(number, generator=generator)
    page_table = order[: each * len(new)].view(len(new), each)
    pages = torch.full((number, 2, page_size, kv_heads, 16), free)
    rows = []
    for b, (past, count) in enumerate(zip(before, new, strict=True)):
        q = heads(count, query_heads, seed=3 * b)
        k, v = (heads(past + count, kv_heads, seed=3 * b + i) for i in (1, 2))
        for position in range(past + count):
            page, offset = page_table[b, position // page_size], position % page_size
            pages[page, 0, offset], pages[page, 1, offset] = k[position], v[position]
        rows.append((q, k, v))
    arguments = {
        "q": torch.cat([q for q, _, _ in rows]),
        "pages": pages,
        "page_table": page_table,
        "before": before,
        "scale": SCALE,
        "segments": Segments.of(new),
    }
    return arguments, rows


class TestAttention:
    OP = "attention"

    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    @pytest.mark.parametrize("lengths", [(1,), (1, 1), (7, 1, 13), (0, 5, 0), (64, 65)], ids=str)
    def test_equals_reference(self, backend, lengths, kv_heads, assert_equals_reference):
        P = sum(lengths)
        inputs = {
            "q": heads(P, 4),
            "k": heads(P, kv_heads, seed=1),
            "v": heads(P, kv_heads, seed=2),
        }
        arguments = {**inputs, "scale": SCALE, "segments": Segments.of(lengths)}
        assert_equals_reference(self.OP, backend, arguments)

    def test_first_token_returns_its_own_value(self, backend):
        q, k, v = heads(9, 4), heads(9, 2, seed=1), heads(9, 2, seed=2)
        out = backend.load()(q=q, k=k, v=v, scale=SCALE, segments=Segments.of([4, 5]))
        for first in (0, 4):
            want = v[first].repeat_interleave(2, dim=0)
            assert torch.allclose(out[first], want, atol=1e-6)

    def test_neighbours_and_the_future_do_not_leak(self, backend):
        q, k, v = heads(12, 4), heads(12, 2, seed=1), heads(12, 2, seed=2)
        segments = Segments.of([3, 5, 4])
        want = backend.load()(q=q, k=k, v=v, scale=SCALE, segments=segments)
        for x in (q, k, v):
            x[:3] = float("nan")
            x[6:8] = 1e4  # later tokens of the same sequence
            x[8:] = float("nan")
        out = backend.load()(q=q, k=k, v=v, scale=SCALE, segments=segments)
        assert torch.allclose(out[3:6], want[3:6], atol=1e-6)

    def test_each_query_head_uses_its_key_head(self, backend):
        """Head n reads key head n // (N / G): with one loud value head, only its heads are loud."""
        q, k, v = heads(5, 6), heads(5, 3, seed=1), torch.zeros(5, 3, 16)
        v[:, 1] = 1.0
        out = backend.load()(q=q, k=k, v=v, scale=SCALE, segments=Segments.of([5]))
        assert torch.allclose(out[:, 2:4], torch.ones(5, 2, 16))
        assert (out[:, [0, 1, 4, 5]] == 0).all()

    def test_large_scores_are_finite(self, backend):
        q, k, v = heads(20, 4) * 300, heads(20, 2, seed=1) * 300, heads(20, 2, seed=2)
        out = backend.load()(q=q, k=k, v=v, scale=SCALE, segments=Segments.of([20]))
        assert torch.isfinite(out).all()
        assert out.abs().max() <= v.abs().max() * 1.00001

    def test_half_precision(self, backend):
        q, k, v = (heads(30, n, seed=n).bfloat16() for n in (4, 2, 1))
        v = v.expand(-1, 2, -1)
        out = backend.load()(q=q, k=k, v=v, scale=SCALE, segments=Segments.of([30]))
        want = attention_reference(
            q=q.float(), k=k.float(), v=v.float(), scale=SCALE, segments=Segments.of([30])
        )
        assert out.dtype == torch.bfloat16
        assert (out.float() - want).abs().max() < 0.02


class TestPagedAttention:
    OP = "attention_paged"

    @pytest.mark.parametrize("page_size", [1, 5, 8, 64])
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    @pytest.mark.parametrize(
        ("before", "new"),
        [
            ((0,), (1,)),
            ((0,), (17,)),
            ((9,), (1,)),
            ((8,), (8,)),
            ((7, 0, 70, 3), (1, 1, 1, 1)),
            ((0, 64, 5), (65, 3, 0)),
        ],
        ids=str,
    )
    def test_equals_plain_attention(
        self, backend, before, new, kv_heads, page_size, assert_within_bound
    ):
        """Against explicit weights of each sequence alone, with NaN in every unused place."""
        arguments, rows = paged(before, new, kv_heads=kv_heads, page_size=page_size)
        out = backend.load()(**arguments)
        want = []
        for past, (q, k, v) in zip(before, rows, strict=True):
            weights_NTS = attention_weights(q=q, k=k, scale=SCALE, before=past)
            v_SNH = v.repeat_interleave(4 // kv_heads, dim=1)
            want.append(torch.einsum("nts,snh->tnh", weights_NTS, v_SNH))
        assert_within_bound(self.OP, out, torch.cat(want))

    def test_equals_reference(self, backend, assert_equals_reference):
        arguments, _ = paged((3, 0, 20), (5, 9, 1), free=0.0)
        assert_equals_reference(self.OP, backend, arguments)

    @pytest.mark.parametrize("first", [(0, 0, 0), (3, 0, 19), (1, 2, 20)])
    def test_positions_before_the_first_are_not_seen(self, backend, first, assert_within_bound):
        before, new = (3, 2, 20), (5, 9, 1)
        arguments, rows = paged(before, new)
        pages, table = arguments["pages"], arguments["page_table"]
        for b, start in enumerate(first):
            for position in range(start):
                pages[table[b, position // 8], :, position % 8] = float("nan")
        out = backend.load()(**arguments, first=first)
        want = []
        for past, start, (q, k, v) in zip(before, first, rows, strict=True):
            weights_NTS = attention_weights(q=q, k=k[start:], scale=SCALE, before=past - start)
            want.append(
                torch.einsum("nts,snh->tnh", weights_NTS, v[start:].repeat_interleave(2, dim=1))
            )
        assert_within_bound(self.OP, out, torch.cat(want))

    def test_empty_step(self, backend):
        arguments, _ = paged((3, 9), (0, 0))
        assert backend.load()(**arguments).shape == (0, 4, 16)

    def test_two_sequences_may_share_a_page(self, backend):
        arguments, rows = paged((16,), (2,))
        q, _, _ = rows[0]
        table = arguments["page_table"]
        both = {
            **arguments,
            "q": torch.cat((q, q)),
            "page_table": torch.cat((table, table)),
            "before": (16, 16),
            "segments": Segments.of([2, 2]),
        }
        single, double = backend.load()(**arguments), backend.load()(**both)
        assert torch.allclose(double, torch.cat((single, single)))


class TestWeights:
    def test_rows_sum_to_one_and_the_future_is_zero(self):
        weights_NTS = attention_weights(q=heads(4, 4), k=heads(9, 2, seed=1), scale=SCALE, before=5)
        assert weights_NTS.shape == (4, 4, 9)
        assert weights_NTS.dtype == torch.float32
        assert torch.allclose(weights_NTS.sum(-1), torch.ones(4, 4))
        for t in range(4):
            assert (weights_NTS[:, t, 6 + t :] == 0).all()
            assert (weights_NTS[:, t, : 6 + t] > 0).all()
