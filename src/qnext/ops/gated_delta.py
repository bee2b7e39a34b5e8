"""The gated delta rule: a linear attention whose state forgets (g) and corrects itself (beta).

Reference: Yang, Kautz and Hatamizadeh 2024 (arXiv 2412.06464). Per value head the state S is a
[K, M] matrix of associations: ``S <- exp(g) S``, then the value that S predicts for the key is
moved towards the true value by the share beta, then the query reads S. Everything is float32: a
state in half precision drifts within a few hundred tokens.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qnext.ops.contracts import Elementwise, GatedDelta, Impl, only_for_gradients
from qnext.ops.delta_training import gated_delta_whole_training
from qnext.ops.elementwise import elementwise_invariant, elementwise_torch
from qnext.ops.segments import ChunkTable, Segments

CHUNK = 64
"""Tokens solved at once; the grid starts at the first token of each sequence."""


def l2_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last axis, float32; the sum, not the mean."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps)


def gated_delta_reference(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    segments: Segments,
) -> tuple[Tensor, Tensor]:
    """One loop over sequences and tokens, written like the equations."""
    group = v.shape[1] // k.shape[1]
    q_PWK = q.float().repeat_interleave(group, dim=1)
    k_PWK = k.float().repeat_interleave(group, dim=1)
    v_PWM, g_PW, beta_PW = v.float(), g.float(), beta.float()
    outs, states = [], []
    for b, (start, end) in enumerate(zip(segments.starts, segments.starts[1:], strict=False)):
        if state is None:
            S_WKM = q_PWK.new_zeros(v.shape[1], k.shape[2], v.shape[2])
        else:
            S_WKM = state[b].float()
        for t in range(start, end):
            S_WKM = S_WKM * g_PW[t].exp()[:, None, None]
            predicted_WM = torch.einsum("wk,wkm->wm", k_PWK[t], S_WKM)
            delta_WM = beta_PW[t][:, None] * (v_PWM[t] - predicted_WM)
            S_WKM = S_WKM + torch.einsum("wk,wm->wkm", k_PWK[t], delta_WM)
            outs.append(torch.einsum("wk,wkm->wm", q_PWK[t], S_WKM))
        states.append(S_WKM)
    out = torch.stack(outs) if outs else v_PWM.new_zeros(v.shape)
    return out, torch.stack(states)


def gated_delta_step_torch(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    segments: Segments,
    elementwise: Elementwise = elementwise_torch,
    passed: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token like the reference, but all sequences and heads in one product per token.

    Sequences that are already finished are carried along with beta = 0 and g = 0, which neither
    decays nor writes. The state after each token is appended to ``passed``.
    """
    batch, group = segments.count, v.shape[1] // k.shape[1]
    if state is None:
        S_BWKM = q.new_zeros(batch, v.shape[1], k.shape[2], v.shape[2], dtype=torch.float32)
    else:
        S_BWKM = state.float()
    if not segments.total:
        return v.float().new_zeros(v.shape), S_BWKM
    q_PWK = q.float().repeat_interleave(group, dim=1)
    k_PWK = k.float().repeat_interleave(group, dim=1)
    inputs = _by_step((q_PWK, k_PWK, v.float(), g.float(), beta.float()), segments)
    outs = []
    for q_BWK, k_BWK, v_BWM, g_BW, beta_BW in inputs:
        decay_BW = elementwise(function=torch.exp, x=g_BW)
        S_BWKM = S_BWKM * decay_BW[..., None, None]
        predicted_BWM = (k_BWK[..., None] * S_BWKM).sum(-2)
        delta_BWM = beta_BW[..., None] * (v_BWM - predicted_BWM)
        S_BWKM = S_BWKM + k_BWK[..., None] * delta_BWM[..., None, :]
        outs.append((q_BWK[..., None] * S_BWKM).sum(-2))
        if passed is not None:
            passed.append(S_BWKM)
    if len(outs) == 1 and segments.total == batch:
        return outs[0], S_BWKM
    out_BTWM = torch.stack(outs, dim=1)
    if segments.total == batch * segments.longest:
        return out_BTWM.flatten(0, 1), S_BWKM
    return out_BTWM[segments.ids(), segments.offsets()], S_BWKM


gated_delta_step_invariant = partial(gated_delta_step_torch, elementwise=elementwise_invariant)
"""The step form with an exponential that does not depend on the number of rows.

It also serves long pieces in place of the chunk form: token by token, a token's result cannot
depend on where a chunk began.
"""


def gated_delta_verify_reference(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    segments: Segments,
) -> tuple[Tensor, Tensor]:
    """The plain loop, run once for every number of leading tokens."""
    tensors, starts = (q, k, v, g, beta), segments.starts
    out, states = None, []
    for tokens in range(1, segments.longest + 1):
        lengths = [min(tokens, length) for length in segments.lengths]
        rows = [torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=False)]
        some = [x[torch.cat(rows)] for x in tensors]
        out, final = gated_delta_reference(
            q=some[0], k=some[1], v=some[2], g=some[3], beta=some[4], state=state,
            segments=Segments.of(lengths, segments.device),
        )  # fmt: skip
        states.append(final)
    assert out is not None, "no token to verify"
    return out, torch.stack(states)


def gated_delta_verify_torch(
    *, elementwise: Elementwise = elementwise_torch, **inputs: Any
) -> tuple[Tensor, Tensor]:
    """The step form, which passes through every one of those states anyway."""
    states: list[Tensor] = []
    out, _ = gated_delta_step_torch(**inputs, elementwise=elementwise, passed=states)
    return out, torch.stack(states)


gated_delta_verify_invariant = partial(gated_delta_verify_torch, elementwise=elementwise_invariant)
"""The invariant step form and the states it passes through."""


def _by_step(tensors: tuple[Tensor, ...], segments: Segments) -> list[tuple[Tensor, ...]]:
    """Row t of every sequence for each t; zeros where a sequence has no token t."""
    batch, longest = segments.count, segments.longest
    if segments.total == batch * longest:
        # All equally long: the packed tokens are a rectangle already.
        split = [x.unflatten(0, (batch, longest)).unbind(1) for x in tensors]
        return list(zip(*split, strict=True))
    table = segments.chunks(longest)
    rows = table.index.new_full((batch, longest), tensors[0].shape[0])
    rows[table.order[: table.active[0]]] = table.index
    padded = [torch.cat((x, x.new_zeros(1, *x.shape[1:]))) for x in tensors]
    return [tuple(x[rows[:, t]] for x in padded) for t in range(longest)]


def gated_delta_chunk_torch(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    segments: Segments,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Chunks of C tokens at once: the C corrections of a chunk solve one triangular system.

    With G the running sum of g inside a chunk and D_ij = exp(G_i - G_j) for i >= j, the values
    written by a chunk are ``Vn = (I + A)^-1 (beta V - beta exp(G) K S)``, where A is the strict
    lower triangle of ``beta (K K^T) D``; then ``O = exp(G) Q S + ((Q K^T) D) Vn`` and
    ``S' = exp(G_C) S + (exp(G_C - G) K)^T Vn``. Everything that does not contain S is one batched
    product over all chunks; the loop over chunks carries S only. Padding has k = v = beta = g = 0.
    """
    batch, group = segments.count, v.shape[1] // k.shape[1]
    W, K, M = v.shape[1], k.shape[2], v.shape[2]
    if state is None:
        S_BWKM = q.new_zeros(batch, W, K, M, dtype=torch.float32)
    else:
        S_BWKM = state.float()
    if segments.total == 0:
        return v.float().new_zeros(v.shape), S_BWKM
    table = segments.chunks(min(chunk, segments.longest))
    q_nUCK, k_nUCK, v_nWCM = (_to_chunks(x.float(), table) for x in (q, k, v))
    g_nWC, beta_nWC = (_to_chunks(x.float(), table) for x in (g, beta))

    G_nWC = g_nWC.cumsum(-1)
    size = G_nWC.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    # Masked before exp: above the diagonal the exponent is positive and would overflow.
    gap_nWCC = (G_nWC[..., :, None] - G_nWC[..., None, :]).masked_fill(~lower, float("-inf"))
    D_nWCC = gap_nWCC.exp()
    kk_nWCC = (k_nUCK @ k_nUCK.transpose(-1, -2)).repeat_interleave(group, dim=1)
    qk_nWCC = (q_nUCK @ k_nUCK.transpose(-1, -2)).repeat_interleave(group, dim=1)
    A_nWCC = (beta_nWC[..., None] * kk_nWCC * D_nWCC).tril(-1)
    decay_nWC1 = G_nWC.exp()[..., None]
    k_nWCK = k_nUCK.repeat_interleave(group, dim=1)
    right_nWCX = torch.cat((v_nWCM, k_nWCK * decay_nWC1), dim=-1) * beta_nWC[..., None]
    # unitriangular: the solver takes the diagonal as one without it being stored.
    solved_nWCX = torch.linalg.solve_triangular(A_nWCC, right_nWCX, upper=False, unitriangular=True)
    U_nWCM, Wk_nWCK = solved_nWCX.split((M, K), dim=-1)
    last_nW11 = G_nWC[..., -1:, None]
    kw_nWKC = (k_nWCK * (last_nW11 - G_nWC[..., None]).exp()).transpose(-1, -2)
    total_nW11 = last_nW11.exp()

    S = S_BWKM[table.order]
    finished, entering, written = [], [], []
    start = 0
    for lanes in table.active:
        if lanes < S.shape[0]:
            finished.append(S[lanes:])
            S = S[:lanes]
        piece = slice(start, start + lanes)
        Vn = U_nWCM[piece] - Wk_nWCK[piece] @ S
        entering.append(S)
        written.append(Vn)
        S = total_nW11[piece] * S + kw_nWKC[piece] @ Vn
        start += lanes
    finished.append(S)
    S_in_nWKM, Vn_nWCM = torch.cat(entering), torch.cat(written)
    q_nWCK = q_nUCK.repeat_interleave(group, dim=1)
    out_nWCM = (q_nWCK * decay_nWC1) @ S_in_nWKM + (qk_nWCC * D_nWCC) @ Vn_nWCM
    out_PWM = out_nWCM.transpose(1, 2).flatten(0, 1)[table.inverse]
    final_BWKM = torch.cat(finished[::-1])[torch.argsort(table.order)]
    return out_PWM, final_BWKM


def _whole(form: GatedDelta, **inputs: Any) -> Tensor:
    """``GatedDeltaWhole`` by a form that takes normalised vectors and a state."""
    scale = inputs["q"].shape[-1] ** -0.5
    inputs["q"], inputs["k"] = l2_normalise(inputs["q"]) * scale, l2_normalise(inputs["k"])
    out, _ = form(**inputs, state=None)
    return out


gated_delta_whole_reference = partial(_whole, gated_delta_reference)
gated_delta_whole_torch = partial(_whole, gated_delta_chunk_torch)
gated_delta_whole_invariant = partial(_whole, gated_delta_step_invariant)


def _to_chunks(x: Tensor, table: ChunkTable) -> Tensor:
    """[P, heads, ...] -> [chunks, heads, C, ...], zeros where a chunk has no token."""
    padded = F.pad(x, (0, 0) * (x.ndim - 1) + (0, 1))
    return padded[table.index].transpose(1, 2)


IMPLS = {
    "gated_delta_step": (
        Impl(backend="torch", load=lambda: gated_delta_step_torch),
        Impl(backend="invariant", load=lambda: gated_delta_step_invariant),
        Impl(backend="reference", load=lambda: gated_delta_reference),
    ),
    "gated_delta_verify": (
        Impl(backend="torch", load=lambda: gated_delta_verify_torch),
        Impl(backend="invariant", load=lambda: gated_delta_verify_invariant),
        Impl(backend="reference", load=lambda: gated_delta_verify_reference),
    ),
    "gated_delta_chunk": (
        Impl(backend="torch", load=lambda: gated_delta_chunk_torch),
        Impl(backend="invariant", load=lambda: gated_delta_step_invariant),
        Impl(backend="reference", load=lambda: gated_delta_reference),
    ),
    "gated_delta_whole": (
        Impl(
            backend="training",
            load=lambda: gated_delta_whole_training,
            unfit=only_for_gradients,
        ),
        Impl(backend="torch", load=lambda: gated_delta_whole_torch),
        Impl(backend="invariant", load=lambda: gated_delta_whole_invariant),
        Impl(backend="reference", load=lambda: gated_delta_whole_reference),
    ),
}
