"""The ops qnext-mini trains with on a CPU: same results as the package's own, gradients by hand.

Differences, all for speed on short documents: the delta rule works on chunks of 32 tokens,
inverts its triangles by small matrix products instead of a LAPACK call per chunk, and keeps what
its backward needs; gathers know their inverse, so that no gradient is scattered with
accumulation. The tests compare outputs and gradients with the reference ops.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from qnext.ops import Ops, OpSpec, Segments, select
from qnext.ops.segments import ChunkTable

CHUNK = 32


def training_ops() -> Ops:
    """The package's ops with the three replacements of this file."""
    return replace(
        select(OpSpec()),
        gated_delta_chunk=gated_delta_chunk,
        gated_delta_step=gated_delta_chunk,
        causal_conv=causal_conv,
        experts=experts,
    )


# ---------------------------------------------------------------- gated delta rule


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + A)^-1 of strictly lower triangular A [..., 32, 32].

    Blocks of 8 by (I - A)(I + A^2)(I + A^4), exact since A^8 = 0 there, then merged by pairs: the
    lower left part of an inverse is -(L22^-1 A21 L11^-1). Products of whole 32-wide powers would
    lose digits when keys repeat; within 8 they cannot grow that far.
    """
    size = lower.shape[-1]
    width = 8
    blocks = lower.unflatten(-1, (-1, width)).unflatten(-3, (-1, width))
    # [..., block row, width, block column, width] -> the diagonal blocks [..., block, width, width]
    diagonal = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    eye = torch.eye(width)
    square = diagonal @ diagonal
    inverse = (eye - diagonal) @ (eye + square) @ (eye + square @ square)
    while width < size:
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        pairs = lower.unflatten(-1, (-1, 2 * width)).unflatten(-3, (-1, 2 * width))
        corner = pairs.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., width:, :width]
        left = -(second @ corner @ first)
        top = torch.cat((first, torch.zeros_like(first)), dim=-1)
        inverse = torch.cat((top, torch.cat((left, second), dim=-1)), dim=-2)
        width *= 2
    return inverse.squeeze(-3)


def _to_chunks(x: Tensor, table: ChunkTable) -> Tensor:
    """[P, heads, ...] -> float32 [chunks, heads, C, ...], zeros where a chunk has no token."""
    padded = F.pad(x.float(), (0, 0) * (x.ndim - 1) + (0, 1))
    return padded[table.index].transpose(1, 2).contiguous()


def _from_chunks(x: Tensor, table: ChunkTable) -> Tensor:
    """The inverse of ``_to_chunks``."""
    return x.transpose(1, 2).flatten(0, 1)[table.inverse]


class _GatedDelta(torch.autograd.Function):
    """Chunked gated delta rule from a zero state.

    In the notation of the package's chunked op, with T = (I + A)^-1 and, for every chunk, S the
    state entering and S' the one leaving. Every G_i scales the query and erasing roles of row i by
    exp(G_i) and its writing role by exp(-G_i), so the gradient of G is a difference of three dot
    products.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, table, group):  # type: ignore[no-untyped-def, override]
        q_nWCK = _to_chunks(q, table).repeat_interleave(group, dim=1)
        k_nUCK = _to_chunks(k, table)
        k_nWCK = k_nUCK.repeat_interleave(group, dim=1)
        v_nWCM = _to_chunks(v, table)
        G_nWC = _to_chunks(g, table).cumsum(-1)
        beta_nWC1 = _to_chunks(beta, table)[..., None]
        C = G_nWC.shape[-1]
        upper = torch.ones(C, C, dtype=torch.bool).triu(1)
        gap_nWCC = G_nWC[..., :, None] - G_nWC[..., None, :]
        D_nWCC = gap_nWCC.masked_fill_(upper, float("-inf")).exp_()
        read_nWC1 = G_nWC.exp()[..., None]
        keep_nWC1 = (G_nWC[..., -1:] - G_nWC).exp()[..., None]
        total_nW11 = read_nWC1[:, :, -1:]
        kk_nWCC = (k_nUCK @ k_nUCK.transpose(-1, -2)).repeat_interleave(group, dim=1)
        T_nWCC = unit_lower_inverse((kk_nWCC * D_nWCC).tril_(-1).mul_(beta_nWC1))
        P_nWCC = (q_nWCK @ k_nWCK.transpose(-1, -2)).mul_(D_nWCC)
        U_nWCM = T_nWCC @ (beta_nWC1 * v_nWCM)
        Wk_nWCK = T_nWCC @ (beta_nWC1 * read_nWC1 * k_nWCK)
        kept_nWKC = (k_nWCK * keep_nWC1).transpose(-1, -2).contiguous()
        S = v_nWCM.new_zeros(table.active[0], *v_nWCM.shape[1:2], q.shape[-1], v.shape[-1])
        entering, leaving, written = [], [], []
        start = 0
        for lanes in table.active:
            piece = slice(start, start + lanes)
            S = S[:lanes]
            Vn = U_nWCM[piece] - Wk_nWCK[piece] @ S
            entering.append(S)
            written.append(Vn)
            S = total_nW11[piece] * S + kept_nWKC[piece] @ Vn
            leaving.append(S)
            start += lanes
        S_nWKM, Vn_nWCM = torch.cat(entering), torch.cat(written)
        out_nWCM = (read_nWC1 * q_nWCK) @ S_nWKM + P_nWCC @ Vn_nWCM
        ctx.save_for_backward(
            q_nWCK, k_nWCK, beta_nWC1, D_nWCC, read_nWC1, keep_nWC1, T_nWCC, P_nWCC, Wk_nWCK,
            kept_nWKC, S_nWKM, torch.cat(leaving), Vn_nWCM,
        )  # fmt: skip
        ctx.table, ctx.group, ctx.value_dtype = table, group, v.dtype
        return _from_chunks(out_nWCM, table)

    @staticmethod
    def backward(ctx, d_out):  # type: ignore[no-untyped-def, override]
        (q, k, beta, D, read, keep, T, P, Wk, kept, S_in, S_out, Vn) = ctx.saved_tensors
        table, group = ctx.table, ctx.group
        d_o = _to_chunks(d_out, table)
        local_dVn = P.transpose(-1, -2) @ d_o
        read_do = read * d_o
        local_dS = q.transpose(-1, -2) @ read_do
        total = read[:, :, -1:]
        kept_k = kept.transpose(-1, -2)
        d_vn, d_leaving = [], []
        stop = P.shape[0]
        dS = P.new_zeros(0, *S_in.shape[1:])
        for lanes in reversed(table.active):
            piece = slice(stop - lanes, stop)
            if dS.shape[0] < lanes:
                dS = torch.cat((dS, dS.new_zeros(lanes - dS.shape[0], *dS.shape[1:])))
            d_leaving.append(dS)
            dVn = local_dVn[piece] + kept_k[piece] @ dS
            d_vn.append(dVn)
            dS = total[piece] * dS + local_dS[piece] - Wk[piece].transpose(-1, -2) @ dVn
            stop -= lanes
        dVn, dS_out = torch.cat(d_vn[::-1]), torch.cat(d_leaving[::-1])
        dX = T.transpose(-1, -2) @ dVn
        dP = (d_o @ Vn.transpose(-1, -2)).mul_(D)
        M = (dX @ Vn.transpose(-1, -2)).mul_(D).tril_(-1).mul_(-beta)
        dR = beta * dX
        S_t = S_in.transpose(-1, -2)
        dq = dP @ k + read_do @ S_t
        dk_erase = M @ k - (read * dR) @ S_t
        dk_write = M.transpose(-1, -2) @ k + dP.transpose(-1, -2) @ q
        dk_write += (keep * Vn) @ dS_out.transpose(-1, -2)
        d_beta = (dX * Vn).sum(-1) / beta[..., 0].clamp_min(1e-12)
        dG = (q * dq).sum(-1) + (k * (dk_erase - dk_write)).sum(-1)
        dG[..., -1] += (dS_out * S_out).sum((-1, -2))
        dg = dG.flip(-1).cumsum(-1).flip(-1)
        dk = dk_erase + dk_write
        if group > 1:
            dq, dk = (x.unflatten(1, (-1, group)).sum(2) for x in (dq, dk))
        dq, dk, dv, dg, d_beta = (_from_chunks(x, table) for x in (dq, dk, dR, dg, d_beta))
        return dq, dk, dv.to(ctx.value_dtype), dg, d_beta, None, None


def gated_delta_chunk(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    segments: Segments,
) -> tuple[Tensor, Tensor]:
    """The contract of ``GatedDelta`` for a zero state; the returned state is empty, nobody reads
    it.
    """
    assert state is None, "training starts every document from nothing"
    table = segments.chunks(CHUNK)
    out = _GatedDelta.apply(q, k, v, g, beta, table, v.shape[1] // k.shape[1])
    return out, out.new_empty(0)


# ---------------------------------------------------------------- convolution


class _CausalConv(torch.autograd.Function):
    """Shifted, masked multiply-adds and SiLU; the pre-activation is computed again in backward."""

    @staticmethod
    def forward(ctx, x, weight, offsets):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x, weight, offsets)
        return F.silu(_CausalConv.mixed(x, weight, offsets)).to(x.dtype)

    @staticmethod
    def mixed(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """Float32 [P, ch] before the activation."""
        J = weight.shape[1]
        out = x * weight[:, J - 1].float()
        for back in range(1, J):
            tap = weight[:, J - 1 - back].float()
            seen = (offsets[back:] >= back)[:, None]
            out[back:].addcmul_(x[:-back] * seen, tap)
        return out

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[no-untyped-def, override]
        x, weight, offsets = ctx.saved_tensors
        J = weight.shape[1]
        mixed = _CausalConv.mixed(x, weight, offsets)
        d_mixed = torch.ops.aten.silu_backward(d_y.float(), mixed)
        d_x = d_mixed * weight[:, J - 1].float()
        d_weight = torch.empty_like(weight)
        d_weight[:, J - 1] = (d_mixed * x).sum(0)
        for back in range(1, J):
            seen = (offsets[back:] >= back)[:, None]
            slope = d_mixed[back:] * seen
            d_x[:-back].addcmul_(slope, weight[:, J - 1 - back].float())
            d_weight[:, J - 1 - back] = (slope * x[:-back]).sum(0)
        return d_x.to(x.dtype), d_weight, None


def causal_conv(
    *, x: Tensor, weight: Tensor, state: Tensor | None, segments: Segments
) -> tuple[Tensor, Tensor]:
    """The contract of ``CausalConv`` for documents without history; the returned state is empty."""
    assert state is None, "training starts every document from nothing"
    return _CausalConv.apply(x, weight, segments.offsets()), x.new_empty(0)


# ---------------------------------------------------------------- experts


class _Gather(torch.autograd.Function):
    """``x[rows]`` where every row of x is taken ``times`` times, at places ``back`` [rows of x,
    times].
    """

    @staticmethod
    def forward(ctx, x, rows, back):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(back)
        return x[rows]

    @staticmethod
    def backward(ctx, d_out):  # type: ignore[no-untyped-def, override]
        (back,) = ctx.saved_tensors
        gathered = d_out[back]
        return (gathered[:, 0] if gathered.shape[1] == 1 else gathered.sum(1)), None, None


def experts(*, h: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The contract of ``Experts``: rows sorted by expert, one product per expert, gathered back."""
    slots = ids.shape[1]
    order = torch.argsort(ids.flatten(), stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    counts = torch.bincount(ids.flatten(), minlength=gate_up.shape[0]).tolist()
    sorted_h = _Gather.apply(h, order // slots, inverse.view(-1, slots))
    pieces = []
    parts = zip(sorted_h.split(counts), gate_up.unbind(0), down.unbind(0), strict=True)
    for rows, gate_up_e, down_e in parts:
        gate, up = F.linear(rows, gate_up_e).chunk(2, dim=-1)
        pieces.append(F.linear(F.silu(gate) * up, down_e))
    back = _Gather.apply(torch.cat(pieces), inverse, order[:, None]).unflatten(0, ids.shape)
    return (back.float() * weights.float()[..., None]).sum(1).to(h.dtype)
