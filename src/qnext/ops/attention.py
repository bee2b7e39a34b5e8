"""Causal softmax attention over packed sequences, and over keys and values that live in pages."""

import torch
from torch import Tensor
from torch.nn import functional as F

from qnext.ops.contracts import Impl, only_for_gradients
from qnext.ops.elementwise import elementwise_invariant
from qnext.ops.gather import take_rows
from qnext.ops.linear import ROW_BLOCK, only_some_dtypes
from qnext.ops.segments import Segments


def attention_weights(*, q: Tensor, k: Tensor, scale: float, before: int) -> Tensor:
    """Softmax weights of one sequence, float32 [N, T, S]; query t sees keys 0 ... before + t.

    q [T, N, H], k [S, G, H]. Also what ``output_attentions`` returns.
    """
    group = q.shape[1] // k.shape[1]
    k_SNH = k.repeat_interleave(group, dim=1)
    scores_NTS = torch.einsum("tnh,snh->nts", q.float(), k_SNH.float()) * scale
    seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device).tril(before)
    return scores_NTS.masked_fill(~seen, float("-inf")).softmax(-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, before: int) -> Tensor:
    weights_NTS = attention_weights(q=q, k=k, scale=scale, before=before)
    v_SNH = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("nts,snh->tnh", weights_NTS, v_SNH.float()).to(q.dtype)


def attention_reference(
    *, q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments
) -> Tensor:
    """Explicit scores, mask and softmax, one sequence at a time."""
    borders = zip(segments.starts, segments.starts[1:], strict=False)
    return torch.cat([_attend(q[a:b], k[a:b], v[a:b], scale, 0) for a, b in borders])


def attention_torch(*, q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments) -> Tensor:
    """The library's fused attention, one call per sequence: no score matrix is kept."""
    borders = zip(segments.starts, segments.starts[1:], strict=False)
    return torch.cat([_fused(q[a:b], k[a:b], v[a:b], scale, 0) for a, b in borders])


def attention_training(
    *, q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments
) -> Tensor:
    """The library's fused attention, one call per length instead of one per sequence."""
    lengths = tuple(sorted({length for length in segments.lengths if length}))
    if len(lengths) == 1:
        return _rectangle(q, k, v, scale, lengths[0])
    if not lengths:
        return q.new_zeros(q.shape)

    def build() -> tuple[list[Tensor], Tensor]:
        starts = torch.tensor(segments.starts[:-1])
        sizes = torch.tensor(segments.lengths)
        by_length = [
            (starts[sizes == length][:, None] + torch.arange(length)).flatten()
            for length in lengths
        ]
        inverse = torch.empty(segments.total, dtype=torch.int64)
        inverse[torch.cat(by_length)] = torch.arange(segments.total)
        device = segments.device
        return [rows.to(device) for rows in by_length], inverse.to(device)

    by_length, inverse = segments.remember("by length", build)
    pieces = []
    for length, rows in zip(lengths, by_length, strict=True):
        q_n, k_n, v_n = (take_rows(x, rows) for x in (q, k, v))
        pieces.append(_rectangle(q_n, k_n, v_n, scale, length))
    return take_rows(torch.cat(pieces), inverse)


def _rectangle(q: Tensor, k: Tensor, v: Tensor, scale: float, length: int) -> Tensor:
    """Sequences of one length: q [B * T, N, H] over k and v [B * T, G, H]."""
    group = q.shape[1] // k.shape[1]
    q_BNTH, k_BGTH, v_BGTH = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    k_BNTH, v_BNTH = (x.repeat_interleave(group, dim=1) for x in (k_BGTH, v_BGTH))
    out_BNTH = F.scaled_dot_product_attention(
        q_BNTH, k_BNTH, v_BNTH, is_causal=length > 1, scale=scale
    )
    return out_BNTH.transpose(1, 2).flatten(0, 1)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, before: int) -> Tensor:
    """One sequence: q [T, N, H] over k and v [S, G, H]."""
    group = q.shape[1] // k.shape[1]
    k_SNH, v_SNH = (x.repeat_interleave(group, dim=1) for x in (k, v))
    mask = None
    if q.shape[0] > 1 and before > 0:
        mask = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device).tril(before)
    out_NTH = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k_SNH.transpose(0, 1)[None],
        v_SNH.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None and q.shape[0] > 1,
        scale=scale,
    )[0]
    return out_NTH.transpose(0, 1)


def _gathered(pages: Tensor, page_table_row: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the first ``length`` positions of one sequence, each [S, G, H]."""
    page_size = pages.shape[2]
    used = page_table_row[: -(-length // page_size)]
    kv = pages[used].transpose(0, 1).flatten(1, 2)[:, :length]
    return kv[0], kv[1]


def _paged(one, q, pages, page_table, before, first, scale, segments):  # type: ignore[no-untyped-def]
    outs = []
    starts = segments.starts
    for b, past in enumerate(before):
        if segments.lengths[b]:
            hidden = 0 if first is None else first[b]
            k, v = _gathered(pages, page_table[b], past + segments.lengths[b])
            queries = q[starts[b] : starts[b + 1]]
            outs.append(one(queries, k[hidden:], v[hidden:], scale, past - hidden))
    return torch.cat(outs) if outs else q.new_zeros(q.shape)


def attention_paged_reference(
    *,
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    before: tuple[int, ...],
    first: tuple[int, ...] | None = None,
    scale: float,
    segments: Segments,
) -> Tensor:
    """Pages are copied together, then attended with explicit scores."""
    return _paged(_attend, q, pages, page_table, before, first, scale, segments)


def attention_paged_torch(
    *,
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    before: tuple[int, ...],
    first: tuple[int, ...] | None = None,
    scale: float,
    segments: Segments,
) -> Tensor:
    """Pages are copied together, then the library's fused attention runs per sequence."""
    return _paged(_fused, q, pages, page_table, before, first, scale, segments)


BLOCK = 64
"""Keys of one block of the invariant form; blocks start at position 0."""


def _blocked(q: Tensor, k: Tensor, v: Tensor, scale: float, before: int) -> Tensor:
    """Attention in blocks of keys that are merged in order, each query by itself.

    A query's result depends on the keys it sees and on nothing else: rows are padded as in
    ``linear_invariant``, blocks lie on a fixed grid, and a block that a query does not see adds an
    exact zero.
    """
    tokens, heads = q.shape[:2]
    group = heads // k.shape[1]
    rows = tokens + -tokens % ROW_BLOCK
    blocks = -(-k.shape[0] // BLOCK)
    q_NTH = F.pad(q, (0, 0, 0, 0, 0, rows - tokens)).transpose(0, 1).float() * scale

    def by_block(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, 0, 0, blocks * BLOCK - x.shape[0]))
        split = padded.unflatten(0, (blocks, BLOCK)).repeat_interleave(group, dim=2)
        return split.permute(0, 2, 1, 3).float().flatten(0, 1)

    k_cSH, v_cSH = by_block(k), by_block(v)
    q_cTH = q_NTH.repeat(blocks, 1, 1)
    scores = torch.bmm(q_cTH, k_cSH.transpose(1, 2)).unflatten(0, (blocks, heads))
    last_seen = torch.arange(rows, device=q.device) + before
    position = torch.arange(blocks * BLOCK, device=q.device).unflatten(0, (blocks, BLOCK))
    hidden = position[:, None, None, :] > last_seen[None, None, :, None]
    scores = scores.masked_fill(hidden, float("-inf"))
    # The largest score of a row is the same number however many unseen blocks follow.
    top = scores.amax((0, 3), keepdim=True)
    share = elementwise_invariant(function=torch.exp, x=scores - top)
    parts = torch.bmm(share.flatten(0, 1), v_cSH).unflatten(0, (blocks, heads))
    sums = share.sum(-1)
    out, total = parts[0], sums[0]
    for block in range(1, blocks):
        out, total = out + parts[block], total + sums[block]
    return (out / total[..., None])[:, :tokens].transpose(0, 1).to(q.dtype)


def attention_invariant(
    *, q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments
) -> Tensor:
    """Blocks of keys on a fixed grid, one sequence at a time."""
    borders = zip(segments.starts, segments.starts[1:], strict=False)
    pieces = [_blocked(q[a:b], k[a:b], v[a:b], scale, 0) for a, b in borders if b > a]
    return torch.cat(pieces) if pieces else q.new_zeros(q.shape)


def attention_paged_invariant(
    *,
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    before: tuple[int, ...],
    first: tuple[int, ...] | None = None,
    scale: float,
    segments: Segments,
) -> Tensor:
    """Pages are copied together, then attended in blocks of keys on a fixed grid."""
    return _paged(_blocked, q, pages, page_table, before, first, scale, segments)


IMPLS = {
    "attention": (
        Impl(backend="training", load=lambda: attention_training, unfit=only_for_gradients),
        Impl(backend="torch", load=lambda: attention_torch),
        Impl(backend="invariant", load=lambda: attention_invariant, unfit=only_some_dtypes),
        Impl(backend="reference", load=lambda: attention_reference),
    ),
    "attention_paged": (
        Impl(backend="torch", load=lambda: attention_paged_torch),
        Impl(backend="invariant", load=lambda: attention_paged_invariant, unfit=only_some_dtypes),
        Impl(backend="reference", load=lambda: attention_paged_reference),
    ),
}
