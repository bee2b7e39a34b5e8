"""What every op promises: shapes, dtypes, what is float32, and how close a kernel must be.

Ops are functions of tensors passed by keyword. They know shapes, not models; they modify nothing
unless their name ends in an underscore; they never read the environment. Sequences lie end to end
in a packed axis P, and ``Segments`` says where they begin. Shape letters: ``docs/notation.md``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qnext import native
from qnext.ops.segments import Segments


class RmsNorm(Protocol):
    """``x / rms(x)`` over the last axis, scaled by a weight.

    Used in two conventions: ``rms_norm_zero_centred`` multiplies by ``1 + weight`` in float32 and
    then casts; ``rms_norm`` casts first and multiplies by ``weight``. Statistics are float32.
    Shapes: x [..., D], weight [D] -> [..., D] in the dtype of x.
    """

    def __call__(self, *, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...


class ResidualNorm(Protocol):
    """``x + added`` and its zero-centred norm; without ``added`` x itself and its norm.

    Shapes: x and added [P, D], weight [D] -> both [P, D] in the dtype of x. None for tensors it
    does not take: then the ops run one after the other.
    """

    def __call__(
        self, *, x: Tensor, added: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor] | None: ...


class GatedRmsNorm(Protocol):
    """``weight * x / rms(x) * silu(gate)``, all in float32 until the cast to the dtype of gate.

    Shapes: x [P, W, M] float32, gate [P, W, M], weight [M] -> [P, W, M].
    """

    def __call__(self, *, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor: ...


class Linear(Protocol):
    """``x weight^T + bias``. Shapes: x [..., in], weight [out, in], bias [out] -> [..., out]."""

    def __call__(self, *, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...


class Elementwise(Protocol):
    """``function`` of every number of x, for functions without parameters. Shapes: any -> same."""

    def __call__(self, *, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor: ...


class ApplyRope(Protocol):
    """Rotate the first Y dimensions of every head, pairing i with i + Y/2.

    Shapes: x [P, N, H], cos and sin [P, Y] in the dtype of x -> [P, N, H]. Y <= H.
    """

    def __call__(self, *, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...


class CausalConv(Protocol):
    """Depthwise causal convolution followed by SiLU, per sequence.

    Shapes: x [P, ch], weight [ch, J] (last tap multiplies the current token), state [B, J-1, ch]
    or None for zeros -> (out [P, ch], new state [B, J-1, ch]): the raw inputs of the last J-1
    tokens, oldest first. Products and sum are float32.
    """

    def __call__(
        self, *, x: Tensor, weight: Tensor, state: Tensor | None, segments: Segments
    ) -> tuple[Tensor, Tensor]: ...


class GatedDelta(Protocol):
    """The gated delta rule, float32 throughout, per sequence and value head.

    ``S <- exp(g) S;  S <- S + k beta (v - k^T S)^T;  out = q^T S`` with q and k already normalised
    and q already scaled. ``gated_delta_step`` walks token by token and is meant for few tokens per
    sequence; ``gated_delta_chunk`` solves whole chunks and is meant for many. Same result to
    float32 rounding.
    Shapes: q, k [P, U, K], v [P, W, M], g, beta [P, W], state [B, W, K, M] or None for zeros ->
    (out [P, W, M] float32, final state [B, W, K, M] float32). Value head w uses key head
    w // (W/U).
    """

    def __call__(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor | None,
        segments: Segments,
    ) -> tuple[Tensor, Tensor]: ...


class GatedDeltaWhole(Protocol):
    """The gated delta rule over whole sequences, which start from nothing and are not continued.

    As ``GatedDelta`` without a state, with queries and keys as they come: both are divided by their
    length here, and queries multiplied by 1/sqrt(K).
    Shapes: q, k [P, U, K], v [P, W, M], g, beta [P, W] -> [P, W, M] float32.
    """

    def __call__(
        self, *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, segments: Segments
    ) -> Tensor: ...


class DeltaLayer(Protocol):
    """All of a delta layer between its projections, over whole sequences from nothing.

    Shapes: qkvz [P, 2UK + 2WM] grouped by key head (query, key, values, gates), ba [P, 2W] grouped
    likewise (write strengths, decays), conv_weight [ch, J], A_log and dt_bias [W], norm_weight [M]
    -> [P, WM], what the output projection reads. None for tensors it does not take: then the ops
    run one after the other.
    """

    def __call__(
        self,
        *,
        qkvz: Tensor,
        ba: Tensor,
        conv_weight: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        norm_weight: Tensor,
        eps: float,
        key_heads: int,
        segments: Segments,
    ) -> Tensor | None: ...


class Attention(Protocol):
    """Causal attention inside each sequence; softmax in float32.

    Shapes: q [P, N, H], k and v [P, G, H] -> [P, N, H]. Query head n uses key/value head
    n // (N/G).
    """

    def __call__(
        self, *, q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments
    ) -> Tensor: ...


class PagedAttention(Protocol):
    """Attention of new tokens over keys and values that live in pages.

    The new tokens' own keys and values are already in the pages. Query t of sequence b sees
    positions first[b] ... before[b] + t; None means 0 for every sequence.
    Shapes: q [P, N, H], pages [pages, 2, page size, G, H] (0 = keys, 1 = values), page_table
    [B, max pages] int64, before: B host integers -> [P, N, H].
    """

    def __call__(
        self,
        *,
        q: Tensor,
        pages: Tensor,
        page_table: Tensor,
        before: tuple[int, ...],
        first: tuple[int, ...] | None,
        scale: float,
        segments: Segments,
    ) -> Tensor: ...


class Experts(Protocol):
    """Routed feed-forward: ``sum_x weight[p, x] * down_e(silu(gate_e h) * up_e h)``, e = ids[p, x].

    Slots of one token are added in their given order. Shapes: h [P, D], ids [P, X] int64, weights
    [P, X] float32, gate_up [E, 2F, D] (gate rows first), down [E, D, F] -> [P, D] in h's dtype.
    """

    def __call__(
        self, *, h: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor: ...


class Route(Protocol):
    """The experts of every token: the ``slots`` largest entries of the softmax, largest first.

    With ``rescale`` the weights of a token are divided by their sum. Shapes: logits [P, E] float32
    -> weights [P, X] float32, ids [P, X] int64.
    """

    def __call__(self, *, logits: Tensor, slots: int, rescale: bool) -> tuple[Tensor, Tensor]: ...


class RouterLoad(NamedTuple):
    """Sums over the rows of a router's logits; the first three are what losses read."""

    counts: Tensor
    """[E] int64: slots that go to each expert."""
    probability: Tensor
    """[E]: sum of the softmax."""
    squares: Tensor
    """Scalar: sum of the squares of the logarithms of the sums of exponentials."""
    entropy: Tensor
    """Scalar without gradient: sum of the entropies of the softmax, in nats."""


class RouterLoads(Protocol):
    """The load that rows of logits make. Shapes: logits [n, E] float32."""

    def __call__(self, *, logits: Tensor, slots: int) -> RouterLoad: ...


SharedWeights = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of a shared expert: gate and up [F, D], down [D, F], and the row of its own gate [1, D]."""


class SparseLayer(Protocol):
    """``residual + experts(h) + sigmoid(opening h) * shared(h)``, and the router's logits.

    Shapes: h and residual [P, D], router [E, D], gate_up [E, 2F, D], down [E, D, F] -> ([P, D] in
    h's dtype, logits [P, E] float32). None for tensors it does not take: then the ops run one after
    the other.
    """

    def __call__(
        self,
        *,
        h: Tensor,
        residual: Tensor | None,
        router: Tensor,
        gate_up: Tensor,
        down: Tensor,
        shared: SharedWeights | None,
        slots: int,
        rescale: bool,
    ) -> tuple[Tensor, Tensor] | None: ...


class CrossEntropyRows(Protocol):
    """Loss and logarithm of the mass of rows of logits, and whether the label is the likeliest.

    With ``slopes`` the logits are overwritten by ``weight * (softmax - label)``, rounded to their
    dtype; everything else is float32 (or wider). Shapes: logits [B, V], labels [B] int64, weights
    [B] -> loss [B], lse [B], hits [B] bool.
    """

    def __call__(
        self, *, logits: Tensor, labels: Tensor, weights: Tensor, slopes: bool
    ) -> tuple[Tensor, Tensor, Tensor]: ...


BOUNDS: Mapping[str, float] = {
    "rms_norm": 1e-5,
    "rms_norm_zero_centred": 1e-5,
    "residual_norm": 1e-5,
    "rms_norm_gated": 1e-5,
    "linear": 1e-5,
    "elementwise": 1e-6,
    "apply_rope": 1e-5,
    "causal_conv": 1e-5,
    "gated_delta_step": 1e-5,
    "gated_delta_verify": 1e-5,
    "gated_delta_chunk": 2e-5,
    "gated_delta_whole": 2e-5,
    "delta_layer": 2e-5,
    "attention": 1e-5,
    "attention_paged": 1e-5,
    "experts": 1e-5,
    "sparse_layer": 1e-5,
    "route": 1e-5,
    "router_load": 1e-5,
    "cross_entropy_rows_": 1e-5,
}
"""Largest difference to the reference, relative to the reference's RMS, for float32 inputs."""


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """What the ops will be used for; a backend says from this whether it fits."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    grad: bool = False


def only_for_gradients(spec: OpSpec) -> str | None:
    """Why an implementation with a backward of its own does not fit, if so."""
    return None if spec.grad else "no gradients are asked for."


def native_for_gradients(spec: OpSpec) -> str | None:
    """Why a native forward and backward pass does not fit, if so."""
    if not spec.grad:
        return "no gradients are asked for."
    if spec.device != "cpu":
        return f"it was made for the CPU, not for {spec.device}."
    return native.unfit_for_training()


@dataclass(frozen=True, kw_only=True)
class Impl:
    """One implementation of an op: its backend's name, how to get it, and when it does not fit."""

    backend: str
    load: Callable[[], Callable[..., object] | None]
    """The function; None for an op that merely joins others, where they run one by one."""
    unfit: Callable[[OpSpec], str | None] = field(default=lambda spec: None)
    """None, or one English sentence that says why this backend cannot serve the spec."""


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The chosen implementations, one function per op, and why each was chosen."""

    rms_norm: RmsNorm
    rms_norm_zero_centred: RmsNorm
    residual_norm: ResidualNorm | None
    """None where sum and norm run one after the other."""
    rms_norm_gated: GatedRmsNorm
    linear: Linear
    elementwise: Elementwise
    apply_rope: ApplyRope
    causal_conv: CausalConv
    gated_delta_step: GatedDelta
    gated_delta_verify: GatedDelta
    """Like ``gated_delta_step``, but returns the states after every token, float32 [T, B, W, K, M]
    with T the longest length; a finished sequence keeps its last one."""
    gated_delta_chunk: GatedDelta
    gated_delta_whole: GatedDeltaWhole
    delta_layer: DeltaLayer | None
    """None where the layer's ops run one after the other."""
    attention: Attention
    attention_paged: PagedAttention
    experts: Experts
    sparse_layer: SparseLayer | None
    """None where the layer's ops run one after the other."""
    route: Route
    router_load: RouterLoads
    cross_entropy_rows_: CrossEntropyRows
    report: tuple[str, ...]
    """One line per op: the backend that runs and why the preferred ones do not."""
