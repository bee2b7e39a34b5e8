"""The gated delta rule for training: whole documents, packed without padding, gradients by hand.

Differs from the chunk form in ``gated_delta.py`` in three ways. Several short documents share a
lane, and borders may fall inside a chunk: masks made from document numbers cut every product that
would cross one, so that nothing leaks, exactly. The triangle of a chunk is inverted by small
products, not by a LAPACK call per chunk. And backward is written out: it keeps the inputs and the
states that enter the chunks, and computes the rest again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qnext.ops.segments import Segments

CHUNK, WIDE_CHUNK = 32, 64
"""Tokens solved at once, for heads of at most 64 dimensions and for wider ones. The work inside a
chunk grows with its size, the work on states falls, and that grows with the square of a head."""
LANE = 256
"""Tokens that documents of a batch of short ones share; more would be steps with little to do."""
EPSILON = 1e-6
"""Of the norm of queries and keys, as in ``l2_normalise``."""


@dataclass(frozen=True)
class LaneTable:
    """Documents laid into lanes, lanes cut into chunks of C tokens, ordered by chunk number.

    Lanes are ordered longest first: chunk number j is present in the first ``active[j]`` of them.
    """

    index: Tensor
    """[n, C] int64: packed position of each token; padding repeats position 0."""
    inverse: Tensor
    """[P] int64: where packed token p stands in the flattened ``index``."""
    active: tuple[int, ...]
    """Lanes that have a chunk number j; the sum is the number of chunks n."""
    lanes: int | None
    """Number of lanes if they are equally long, without padding and in packed order: then the
    chunks are a mere view of the packed tokens."""
    real: Tensor | None
    """[n, C] float32: 0 at padding; None if there is none."""
    same: Tensor
    """[n, C, C] or [1, C, C] float32: 1 where token i sees token j: not later, same document."""
    reads: Tensor | None
    """[n, C] float32: 1 where a token is of the document that the previous chunk ended with. This
    and the next two are None when every lane holds one document."""
    writes: Tensor | None
    """[n, C] float32: 1 where a token is of the document this chunk ends with."""
    keeps: Tensor | None
    """[n] float32: 1 where both are the same document."""


def lane_table(segments: Segments, chunk: int) -> LaneTable:
    """The table of a batch, built once."""
    return segments.remember(("lanes", chunk), lambda: _build(segments, chunk))


def _deal(lengths: tuple[int, ...], chunk: int) -> list[list[int]]:
    """Documents of each lane, longest lane first.

    The longest document decides how many steps there are. Others share lanes of that length, but
    for those that fill whole chunks of their own.
    """
    order = sorted((b for b, n in enumerate(lengths) if n), key=lambda b: (-lengths[b], b))
    room = max(lengths[order[0]], LANE)
    lanes: list[tuple[int, list[int]]] = []
    for b in order:
        best = None
        if lengths[b] % chunk:
            fitting = [lane for lane in lanes if lane[0] + lengths[b] <= room]
            best = max(fitting, key=lambda lane: lane[0], default=None)
        if best is None:
            lanes.append((lengths[b], [b]))
        else:
            lanes.remove(best)
            lanes.append((best[0] + lengths[b], [*best[1], b]))
    lanes.sort(key=lambda lane: -lane[0])
    return [documents for _, documents in lanes]


def _build(segments: Segments, chunk: int) -> LaneTable:
    lengths, starts, device = segments.lengths, segments.starts, segments.device
    dealt = _deal(lengths, chunk)
    sizes = [sum(lengths[b] for b in documents) for documents in dealt]
    steps = [-(-size // chunk) for size in sizes]
    index = torch.zeros(len(dealt), steps[0] * chunk, dtype=torch.int64)
    document = torch.zeros(len(dealt), steps[0] * chunk, dtype=torch.int64)
    real = torch.zeros(len(dealt), steps[0] * chunk)
    for lane, documents in enumerate(dealt):
        at = 0
        for b in documents:
            index[lane, at : at + lengths[b]] = torch.arange(starts[b], starts[b + 1])
            document[lane, at : at + lengths[b]] = b
            at += lengths[b]
        document[lane, at:] = documents[-1]
        real[lane, :at] = 1.0
    present = torch.tensor(steps)[None, :] > torch.arange(steps[0])[:, None]

    def chunks(x: Tensor) -> Tensor:
        """[lanes, steps * C] -> [n, C], chunk number first, absent chunks left out."""
        return x.unflatten(1, (-1, chunk)).transpose(0, 1)[present]

    index_nC, document_nC, real_nC = chunks(index), chunks(document), chunks(real)
    n = index_nC.shape[0]
    places = torch.arange(n * chunk).unflatten(0, (n, chunk))
    inverse = torch.empty(segments.total, dtype=torch.int64)
    inverse[index_nC[real_nC > 0]] = places[real_nC > 0]
    lower = torch.ones(chunk, chunk).tril()
    mixed = any(len(documents) > 1 for documents in dealt)
    same = lower[None]
    reads = writes = keeps = None
    if mixed:
        same = lower * (document_nC[:, :, None] == document_nC[:, None, :])
        before = torch.full_like(document, -1)
        before[:, chunk:] = (
            document[:, :-chunk]
            .unflatten(1, (-1, chunk))[..., -1:]
            .expand(-1, -1, chunk)
            .flatten(1)
        )
        entering_nC = chunks(before)
        reads = (document_nC == entering_nC).float().to(device)
        writes = (document_nC == document_nC[:, -1:]).float().to(device)
        keeps = (document_nC[:, -1] == entering_nC[:, -1]).float().to(device)
    whole = bool(real_nC.all())
    rectangle = (
        whole
        and len(set(steps)) == 1
        and torch.equal(index.flatten(), torch.arange(segments.total))
    )
    return LaneTable(
        index=index_nC.to(device),
        inverse=inverse.to(device),
        active=tuple(present.sum(1).tolist()),
        lanes=len(dealt) if rectangle else None,
        real=None if whole else real_nC.to(device),
        same=same.to(device),
        reads=reads,
        writes=writes,
        keeps=keeps,
    )


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + A)^-1 of strictly lower triangular A [..., C, C], C a multiple of 8 by a power of two.

    Blocks of 8 by (I - A)(I + A^2)(I + A^4), exact since A^8 = 0 there, then merged by pairs: the
    lower left part of an inverse is -(L22^-1 A21 L11^-1). Products of wider powers would lose
    digits when keys repeat; within 8 they cannot grow that far.
    """
    size, width = lower.shape[-1], min(8, lower.shape[-1])
    batch = lower.shape[:-2]
    flat = lower.reshape(-1, size, size)

    def diagonal(blocks: int) -> Tensor:
        """The diagonal blocks [batch * size / blocks, blocks, blocks]."""
        cut = flat.view(-1, size // blocks, blocks, size // blocks, blocks)
        return cut.diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(-1, blocks, blocks)

    eye = torch.eye(width, dtype=lower.dtype, device=lower.device)
    block = diagonal(width)
    square = torch.bmm(block, block)
    inverse = torch.bmm(eye - block, eye + square)
    inverse = torch.baddbmm(inverse, inverse, torch.bmm(square, square))
    while width < size:
        corner = diagonal(2 * width)[:, width:, :width]
        first, second = inverse[0::2], inverse[1::2]
        merged = inverse.new_zeros(first.shape[0], 2 * width, 2 * width)
        merged[:, :width, :width] = first
        merged[:, width:, width:] = second
        merged[:, width:, :width] = torch.bmm(torch.bmm(second, corner), first).neg_()
        inverse = merged
        width *= 2
    return inverse.view(*batch, size, size)


def _to_chunks(x: Tensor, table: LaneTable, wide: torch.dtype) -> Tensor:
    """[P, heads, ...] -> [n, heads, C, ...] in ``wide``, zeros at padding."""
    C = table.index.shape[1]
    if table.lanes is not None:
        cut = x.unflatten(0, (table.lanes, -1, C)).transpose(0, 1).transpose(2, 3)
        cut = cut.to(wide, memory_format=torch.contiguous_format)
        return cut.reshape(-1, *cut.shape[2:])
    cut = x.index_select(0, table.index.flatten()).unflatten(0, table.index.shape).transpose(1, 2)
    cut = cut.to(wide, memory_format=torch.contiguous_format)
    if table.real is not None:
        cut.mul_(table.real.view(-1, 1, C, *[1] * (cut.ndim - 3)))
    return cut


def _from_chunks(x: Tensor, table: LaneTable, dtype: torch.dtype) -> Tensor:
    """The inverse of ``_to_chunks``."""
    if table.lanes is not None:
        back = x.unflatten(0, (-1, table.lanes)).transpose(0, 1).transpose(2, 3)
        back = back.to(dtype, memory_format=torch.contiguous_format)
        return back.reshape(-1, *back.shape[3:])
    back = x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)
    return back.flatten(0, 1).index_select(0, table.inverse)


def _per_head(x: Tensor, group: int) -> Tensor:
    """[n, U, ...] -> [n, W, ...]: each key head once per value head of its group."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


@dataclass(slots=True)
class _Chunks:
    """Everything of a batch's chunks that does not depend on the states."""

    q: Tensor
    """[n, U, C, K], normalised and scaled."""
    q_inverse_size: Tensor
    """[n, U, C, 1]: what a raw query was multiplied by to normalise it."""
    k: Tensor
    k_inverse_size: Tensor
    v: Tensor
    """[n, W, C, M]."""
    beta: Tensor
    """[n, W, C]."""
    decay: Tensor
    """[n, W, C, C]: exp(G_i - G_j) where i sees j, else 0."""
    read: Tensor
    """[n, W, C]: exp(G_i), the decay of the entering state at token i; 0 for another document."""
    keep: Tensor
    """[n, W, C]: exp(G_C - G_j), what is left of a token's writing at the end of the chunk."""
    total: Tensor
    """[n, W, 1, 1]: exp(G_C), what is left of the entering state at the end."""
    inverse: Tensor
    """[n, W, C, C]: (I + A)^-1."""
    qk: Tensor
    """[n, W, C, C]: query-key products times decay."""
    kept_k: Tensor
    """[n, W, C, K]: keep * k."""
    erase: Tensor
    """[n, W, C, K]: (I + A)^-1 beta read k, times which S is subtracted from the values."""
    fresh: Tensor
    """[n, W, C, M]: (I + A)^-1 beta v."""


def _normalised(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = size.square_().add_(EPSILON).rsqrt_()
    return x * (inverse * scale), inverse


def _prepare(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, table: LaneTable) -> _Chunks:
    wide = torch.promote_types(g.dtype, torch.float32)
    group = v.shape[1] // k.shape[1]
    q_nUCK, q_size = _normalised(_to_chunks(q, table, wide), q.shape[-1] ** -0.5)
    k_nUCK, k_size = _normalised(_to_chunks(k, table, wide), 1.0)
    v_nWCM = _to_chunks(v, table, wide)
    g_nWC, beta_nWC = _to_chunks(g, table, wide), _to_chunks(beta, table, wide)
    same = table.same.to(wide)
    # A sum per document, not one running sum: no document rounds because of another's decay.
    G_nWC = torch.matmul(g_nWC, same.transpose(1, 2))
    hidden = (same == 0)[:, None]
    # Masked before exp: above the diagonal the exponent is positive and would overflow.
    decay_nWCC = (G_nWC[..., :, None] - G_nWC[..., None, :]).masked_fill_(hidden, float("-inf"))
    decay_nWCC.exp_()
    last_nW1 = G_nWC[..., -1:]
    read_nWC, total_nW1 = G_nWC.exp(), last_nW1.exp()
    if table.reads is None:
        keep_nWC = (last_nW1 - G_nWC).exp()
    else:
        assert table.writes is not None
        assert table.keeps is not None
        other = (table.writes == 0)[:, None]
        keep_nWC = (last_nW1 - G_nWC).masked_fill_(other, float("-inf")).exp()
        read_nWC = read_nWC * table.reads[:, None].to(wide)
        total_nW1 = total_nW1 * table.keeps[:, None, None].to(wide)
    k_t = k_nUCK.transpose(-1, -2)
    qk_nWCC = _per_head(q_nUCK @ k_t, group).mul_(decay_nWCC)
    A_nWCC = _per_head(k_nUCK @ k_t, group).mul_(decay_nWCC).mul_(beta_nWC[..., None])
    inverse_nWCC = unit_lower_inverse(A_nWCC.tril_(-1))
    k_nWCK = _per_head(k_nUCK, group)
    right_nWCC = inverse_nWCC * beta_nWC[..., None, :]
    fresh_nWCM = right_nWCC @ v_nWCM
    erase_nWCK = right_nWCC.mul_(read_nWC[..., None, :]) @ k_nWCK
    return _Chunks(
        q=q_nUCK, q_inverse_size=q_size, k=k_nUCK, k_inverse_size=k_size, v=v_nWCM, beta=beta_nWC,
        decay=decay_nWCC, read=read_nWC, keep=keep_nWC, total=total_nW1[..., None],
        inverse=inverse_nWCC, qk=qk_nWCC, kept_k=k_nWCK * keep_nWC[..., None], erase=erase_nWCK,
        fresh=fresh_nWCM,
    )  # fmt: skip


class _GatedDelta(torch.autograd.Function):
    """Whole documents from a zero state; see ``gated_delta_whole_training``.

    With T = (I + A)^-1 and, for every chunk, S the state entering and S' the one leaving. Every G_i
    scales the query and erasing roles of row i by exp(G_i) and its writing role by exp(-G_i), so
    the gradient of G is a difference of three dot products.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, table):  # type: ignore[no-untyped-def, override]
        c = _prepare(q, k, v, g, beta, table)
        n, W, _, M = c.v.shape
        group, K = W // c.k.shape[1], c.k.shape[-1]
        S_nWKM = c.v.new_empty(n, W, K, M)
        S_nWKM[: table.active[0]] = 0.0
        # In place: the values without what the state predicts for their keys.
        written_nWCM = c.fresh
        start = 0
        for lanes, going_on in zip(table.active, (*table.active[1:], 0), strict=True):
            part, next_part = slice(start, start + lanes), slice(start, start + going_on)
            new = written_nWCM[part].flatten(0, 1)
            new.baddbmm_(c.erase[part].flatten(0, 1), S_nWKM[part].flatten(0, 1), alpha=-1)
            start += lanes
            if going_on:
                S = S_nWKM[start : start + going_on]
                torch.mul(c.total[next_part], S_nWKM[next_part], out=S)
                S.flatten(0, 1).baddbmm_(
                    c.kept_k[next_part].flatten(0, 1).transpose(1, 2),
                    written_nWCM[next_part].flatten(0, 1),
                )
        out_nWCM = c.qk @ written_nWCM
        q_nWCK = _per_head(c.q, group) * c.read[..., None]
        out_nWCM.flatten(0, 1).baddbmm_(q_nWCK.flatten(0, 1), S_nWKM.flatten(0, 1))
        ctx.save_for_backward(q, k, v, g, beta, S_nWKM)
        ctx.table = table
        return _from_chunks(out_nWCM, table, out_nWCM.dtype)

    @staticmethod
    def backward(ctx, d_out):  # type: ignore[no-untyped-def, override]
        q, k, v, g, beta, S_nWKM = ctx.saved_tensors
        table: LaneTable = ctx.table
        c = _prepare(q, k, v, g, beta, table)
        n, W = c.v.shape[:2]
        group, K = W // c.k.shape[1], c.k.shape[-1]
        flat_S = S_nWKM.flatten(0, 1)

        def bmm(a: Tensor, b: Tensor) -> Tensor:
            return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, (n, W))

        written = c.fresh
        written.flatten(0, 1).baddbmm_(c.erase.flatten(0, 1), flat_S, alpha=-1)
        d_o = _to_chunks(d_out, table, c.v.dtype)
        k_W, q_W = _per_head(c.k, group), _per_head(c.q, group)
        read_do = d_o * c.read[..., None]
        d_written = bmm(c.qk.transpose(2, 3), d_o)
        local_dS = bmm(q_W.transpose(2, 3), read_do)
        dS_out = torch.empty_like(S_nWKM)
        dS_out[n - table.active[-1] :] = 0.0
        stop = n
        before = (*reversed(table.active[:-1]), 0)
        for lanes, lanes_before in zip(reversed(table.active), before, strict=True):
            part = slice(stop - lanes, stop)
            d_new = d_written[part].flatten(0, 1)
            d_new.baddbmm_(c.kept_k[part].flatten(0, 1), dS_out[part].flatten(0, 1))
            stop -= lanes
            if lanes_before:
                dS = dS_out[stop - lanes_before : stop]
                dS[lanes:] = 0.0
                torch.addcmul(local_dS[part], c.total[part], dS_out[part], out=dS[:lanes])
                dS[:lanes].flatten(0, 1).baddbmm_(
                    c.erase[part].flatten(0, 1).transpose(1, 2), d_new, alpha=-1
                )
        # <dS', S'> = total <dS', S> + <kept_k dS', written>; the second half comes below.
        d_total = _dot(dS_out, S_nWKM) * c.total[..., 0, 0]
        written_t, S_t, dS_t = (x.transpose(2, 3) for x in (written, S_nWKM, dS_out))
        dX = bmm(c.inverse.transpose(2, 3), d_written)
        dP = bmm(d_o, written_t).mul_(c.decay)
        M_nWCC = bmm(dX, written_t).mul_(c.decay).tril_(-1).mul_(c.beta[..., None].neg())
        dR = dX * c.beta[..., None]
        dq = bmm(dP, k_W)
        dq.flatten(0, 1).baddbmm_(read_do.flatten(0, 1), S_t.flatten(0, 1))
        erase = bmm(M_nWCC, k_W)
        erase.flatten(0, 1).baddbmm_(
            (dR * c.read[..., None]).flatten(0, 1), S_t.flatten(0, 1), alpha=-1
        )
        kept = bmm(written, dS_t).mul_(c.keep[..., None])
        d_total = d_total + _dot(kept, k_W)
        write = kept
        write.flatten(0, 1).baddbmm_(M_nWCC.flatten(0, 1).transpose(1, 2), k_W.flatten(0, 1))
        write.flatten(0, 1).baddbmm_(dP.flatten(0, 1).transpose(1, 2), q_W.flatten(0, 1))
        # What beta multiplies is written / beta; where beta is 0 nothing was written.
        d_beta = (dX * written).sum(-1) / c.beta.clamp_min(1e-12)
        dG = (q_W * dq).sum(-1).add_((k_W * (erase - write)).sum(-1))
        dG[..., -1] += d_total
        dg = torch.matmul(dG, table.same.to(dG.dtype))
        dk = erase.add_(write)
        if group > 1:
            dq, dk = (x.unflatten(1, (-1, group)).sum(2) for x in (dq, dk))
        dq = _through_norm(dq, c.q, c.q_inverse_size, K**-0.5)
        dk = _through_norm(dk, c.k, c.k_inverse_size, 1.0)
        return (
            _from_chunks(dq, table, q.dtype),
            _from_chunks(dk, table, k.dtype),
            _from_chunks(dR, table, v.dtype),
            _from_chunks(dg, table, g.dtype),
            _from_chunks(d_beta, table, beta.dtype),
            None,
        )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products over the last two axes: [n, W, x, y] twice -> [n, W]."""
    return (a * b).sum((-1, -2))


def _through_norm(d: Tensor, x: Tensor, inverse_size: Tensor, scale: float) -> Tensor:
    """Gradient of a raw vector from that of ``x = scale * raw * inverse_size``."""
    along = (d * x).sum(-1, keepdim=True) / scale**2
    return (d * scale - x * (along * scale)) * inverse_size


def gated_delta_whole_training(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, segments: Segments
) -> Tensor:
    """The contract of ``GatedDeltaWhole`` with a backward of its own."""
    if not segments.total:
        return v.float() * 0.0
    chunk = CHUNK if max(q.shape[-1], v.shape[-1]) <= 64 else WIDE_CHUNK
    return _GatedDelta.apply(q, k, v, g, beta, lane_table(segments, chunk))
