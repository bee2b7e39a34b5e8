"""The gated delta rule: every form equals the recurrence, the recurrence the published numbers."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qnext.ops import Segments
from qnext.ops.contracts import BOUNDS
from qnext.ops.gated_delta import (
    CHUNK,
    gated_delta_chunk_torch,
    gated_delta_reference,
    gated_delta_step_torch,
    l2_normalise,
)

FORMS = {
    "reference": gated_delta_reference,
    "step": gated_delta_step_torch,
    "chunk": gated_delta_chunk_torch,
}
RAGGED = ((1,), (1, 1, 1), (2, 1), (13,), (0, 5, 0), (63,), (64,), (65,), (3, 0, 64, 1, 67, 0))


def draw(
    lengths: tuple[int, ...],
    *,
    key_heads: int = 2,
    group: int = 2,
    K: int = 8,
    M: int = 12,
    with_state: bool = True,
    seed: int = 0,
) -> dict[str, object]:
    """Random arguments as a delta layer makes them: unit keys, scaled queries, g <= 0, beta < 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    P, W = sum(lengths), key_heads * group
    return {
        "q": l2_normalise(normal(P, key_heads, K)) * K**-0.5,
        "k": l2_normalise(normal(P, key_heads, K)),
        "v": normal(P, W, M),
        "g": -torch.exp(normal(1, W)) * F.softplus(normal(P, W)) * 0.2,
        "beta": torch.sigmoid(normal(P, W)),
        "state": normal(len(lengths), W, K, M) if with_state else None,
        "segments": Segments.of(lengths),
    }


class EqualsReference:
    """Forward and gradients of one op; subclasses name it."""

    @pytest.mark.parametrize("with_state", [False, True], ids=["zero_state", "state"])
    @pytest.mark.parametrize("lengths", RAGGED, ids=str)
    def test_ragged_batches(self, backend, lengths, with_state, assert_equals_reference):
        assert_equals_reference(self.OP, backend, draw(lengths, with_state=with_state))

    @pytest.mark.parametrize("group", [1, 2, 4])
    @pytest.mark.parametrize(("K", "M"), [(8, 12), (16, 4), (5, 5), (1, 1)])
    def test_head_ratios_and_sizes(self, backend, group, K, M, assert_equals_reference):
        inputs = draw((70, 3), key_heads=3, group=group, K=K, M=M)
        assert_equals_reference(self.OP, backend, inputs)

    def test_half_precision_inputs_give_float32(self, backend, assert_within_bound):
        inputs = draw((9, 70))
        half = {**inputs, "v": inputs["v"].bfloat16()}
        out, state = backend.load()(**half)
        want, want_state = gated_delta_reference(**{**inputs, "v": half["v"].float()})
        assert out.dtype == state.dtype == torch.float32
        assert_within_bound(self.OP, out, want)
        assert_within_bound(self.OP, state, want_state)

    def test_any_split_equals_one_call(self, backend):
        """The final state carries everything: two calls in a row equal one."""
        inputs = draw((150,))
        names = ("q", "k", "v", "g", "beta")
        whole, final = gated_delta_reference(**inputs)
        for split in (1, 2, 3, 16, 63, 64, 65, 128, 149):
            first = {name: inputs[name][:split] for name in names}
            second = {name: inputs[name][split:] for name in names}
            run = backend.load()
            out_1, middle = run(**first, state=inputs["state"], segments=Segments.of([split]))
            out_2, last = run(**second, state=middle, segments=Segments.of([150 - split]))
            assert torch.allclose(torch.cat((out_1, out_2)), whole, atol=2e-6)
            assert torch.allclose(last, final, atol=2e-6)

    def test_strong_decay_is_finite(self, backend):
        """g = -30 at every token: nothing is remembered, nothing overflows, gradients included."""
        inputs = draw((130, 65))
        inputs["g"] = torch.full_like(inputs["g"], -30.0)
        leaves = {
            name: inputs[name].clone().requires_grad_()
            for name in ("q", "k", "v", "g", "beta", "state")
        }
        out, state = backend.load()(**leaves, segments=inputs["segments"])
        want, want_state = gated_delta_reference(**inputs)
        assert torch.allclose(out, want, atol=1e-6)
        assert torch.allclose(state, want_state, atol=1e-6)
        grads = torch.autograd.grad(out.sum() + state.sum(), list(leaves.values()))
        assert all(torch.isfinite(grad).all() for grad in grads)

    def test_no_tokens_at_all(self, backend):
        inputs = draw((0, 0))
        out, state = backend.load()(**inputs)
        assert out.shape == (0, 4, 12)
        assert torch.equal(state, inputs["state"])

    def test_padding_values_never_enter(self, backend):
        """A sequence gives the same numbers whatever its neighbours are, NaN included."""
        inputs = draw((20, 40, 5))
        start, end = 20, 60
        names = ("q", "k", "v", "g", "beta")
        alone = {name: inputs[name][start:end] for name in names}
        want, want_state = backend.load()(
            **alone, state=inputs["state"][1:2], segments=Segments.of([40])
        )
        poisoned = {name: inputs[name].clone() for name in names}
        for x in poisoned.values():
            x[:start] = float("nan")
            x[end:] = float("nan")
        out, state = backend.load()(**poisoned, state=inputs["state"], segments=inputs["segments"])
        assert torch.allclose(out[start:end], want, atol=1e-6)
        assert torch.allclose(state[1:2], want_state, atol=1e-6)


class TestStep(EqualsReference):
    OP = "gated_delta_step"


class TestChunk(EqualsReference):
    OP = "gated_delta_chunk"

    @pytest.mark.parametrize("chunk", [1, 2, 7, 16, 64, 128])
    def test_any_chunk_length(self, chunk):
        inputs = draw((150, 31, 1))
        want, want_state = gated_delta_reference(**inputs)
        out, state = gated_delta_chunk_torch(**inputs, chunk=chunk)
        assert torch.allclose(out, want, atol=2e-6)
        assert torch.allclose(state, want_state, atol=2e-6)


class TestPublishedNumbers:
    """Three tokens of one head with K = M = 2, worked out by hand: inputs as after convolution."""

    Q = ((1.0, 2.0), (0.0, 1.0), (2.0, -1.0))
    K = ((1.0, 0.0), (1.0, 1.0), (0.5, -2.0))
    V = ((1.0, -1.0), (2.0, 0.5), (-1.0, 3.0))
    A, B = (0.0, -1.0, 0.5), (0.0, 1.0, -2.0)
    G = (-2.6265234, -1.3862944, -3.4028266)
    BETA = (0.5, 0.7310586, 0.1192029)
    OUT = ((0.1581138, -0.1581138), (0.6987495, 0.2150730), (-0.0405671, 0.1655933))
    STATES = (
        ((0.4999998, -0.4999998), (0.0, 0.0)),
        ((1.1131815, 0.1791594), (0.9881816, 0.3041593)),
        ((0.0087973, 0.0929372), (0.1458791, -0.3377777)),
    )

    def arguments(self, tokens: int) -> dict[str, object]:
        A_log, dt_bias = math.log(2.0), 1.0
        g = -math.exp(A_log) * F.softplus(torch.tensor(self.A) + dt_bias)
        beta = torch.sigmoid(torch.tensor(self.B))
        return {
            "q": (l2_normalise(torch.tensor(self.Q)) * 2**-0.5)[:tokens, None],
            "k": l2_normalise(torch.tensor(self.K))[:tokens, None],
            "v": torch.tensor(self.V)[:tokens, None],
            "g": g[:tokens, None],
            "beta": beta[:tokens, None],
            "state": None,
            "segments": Segments.of([tokens]),
        }

    def test_gates(self):
        arguments = self.arguments(3)
        assert torch.allclose(arguments["g"][:, 0], torch.tensor(self.G), atol=5e-7, rtol=0)
        assert torch.allclose(arguments["beta"][:, 0], torch.tensor(self.BETA), atol=1e-7, rtol=0)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("tokens", [1, 2, 3])
    def test_outputs_and_states(self, form, tokens):
        out, state = FORMS[form](**self.arguments(tokens))
        want = torch.tensor(self.OUT[:tokens])
        assert torch.allclose(out[:, 0], want, atol=2e-7, rtol=0)
        assert torch.allclose(state[0, 0], torch.tensor(self.STATES[tokens - 1]), atol=2e-7, rtol=0)

    def test_in_a_chunk_of_64_padded_with_idle_tokens(self):
        """Tokens with k = v = beta = g = 0 change nothing, so the table holds in a full chunk."""
        arguments = self.arguments(3)
        padded = {
            name: F.pad(x, (0, 0) * (x.ndim - 1) + (0, CHUNK - 3))
            for name, x in arguments.items()
            if isinstance(x, Tensor)
        }
        out, state = gated_delta_chunk_torch(**padded, state=None, segments=Segments.of([CHUNK]))
        assert torch.allclose(out[:3, 0], torch.tensor(self.OUT), atol=2e-7, rtol=0)
        assert torch.allclose(state[0, 0], torch.tensor(self.STATES[2]), atol=2e-7, rtol=0)


class TestProperties:
    @pytest.mark.parametrize("form", FORMS)
    def test_associative_recall(self, form):
        """Without decay, with beta = 1 and orthonormal keys, a query returns the stored value."""
        generator = torch.Generator().manual_seed(1)
        K, M = 16, 5
        keys, _ = torch.linalg.qr(torch.randn(K, K, generator=generator))
        values = torch.randn(K, M, generator=generator)
        order = torch.randperm(K, generator=generator)
        idle = torch.zeros(K)
        out, _ = FORMS[form](
            q=torch.cat((keys, keys[order]))[:, None],
            k=torch.cat((keys, keys[order]))[:, None],
            v=torch.cat((values, torch.zeros(K, M)))[:, None],
            g=torch.full((2 * K, 1), -math.exp(-80.0) * math.log(2.0)),
            beta=torch.cat((torch.ones(K), idle))[:, None],
            state=None,
            segments=Segments.of([2 * K]),
        )
        assert torch.allclose(out[:K, 0], values, atol=2e-6, rtol=0)
        assert torch.allclose(out[K:, 0], values[order], atol=2e-6, rtol=0)

    @pytest.mark.parametrize("form", FORMS)
    def test_a_second_write_replaces_the_first(self, form):
        """The delta rule corrects: with beta = 1 the same key holds the last value, not a sum."""
        key = l2_normalise(torch.tensor([[1.0, -2.0, 0.5]]))
        values = torch.tensor([[1.0, 2.0], [-3.0, 0.25]])
        out, _ = FORMS[form](
            q=key.expand(2, 3)[:, None],
            k=key.expand(2, 3)[:, None],
            v=values[:, None],
            g=torch.zeros(2, 1),
            beta=torch.ones(2, 1),
            state=None,
            segments=Segments.of([2]),
        )
        assert torch.allclose(out[:, 0], values, atol=1e-5)

    def test_step_and_chunk_agree_to_rounding(self):
        """150 tokens of both forms; the contract's figure is relative, this one absolute."""
        inputs = draw((150,), with_state=False)
        step, chunk = gated_delta_step_torch(**inputs), gated_delta_chunk_torch(**inputs)
        for x, y in zip(step, chunk, strict=True):
            assert torch.allclose(x, y, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("form", ["step", "chunk"])
    def test_32768_tokens_stay_near_double_precision(self, form):
        """A head that forgets a thousandth per token: rounding neither grows nor builds up."""
        tokens, K, M = 32768, 4, 3
        inputs = draw((tokens,), key_heads=1, group=1, K=K, M=M, with_state=False)
        inputs["g"] = inputs["g"] * 0.005
        q, k, v, g, beta = (inputs[x].double().numpy() for x in ("q", "k", "v", "g", "beta"))
        S_KM = np.zeros((K, M))
        want = np.empty((tokens, M))
        for t in range(tokens):
            S_KM *= np.exp(g[t, 0])
            S_KM += np.outer(k[t, 0], beta[t, 0] * (v[t, 0] - k[t, 0] @ S_KM))
            want[t] = q[t, 0] @ S_KM
        out, state = FORMS[form](**inputs)
        size = np.sqrt((want**2).mean())
        late = slice(-1024, None)
        assert np.abs(out[late, 0].numpy() - want[late]).max() < 2e-5 * size
        assert np.abs(state[0, 0].numpy() - S_KM).max() < 2e-5 * np.abs(S_KM).max()

    def test_transposed_state_would_show(self):
        """K and M differ in these tests, so a state laid out [M, K] cannot pass."""
        _, state = gated_delta_chunk_torch(**draw((3,)))
        assert state.shape == (1, 4, 8, 12)

    @pytest.mark.parametrize(
        ("form", "lengths"), list(itertools.product(("step", "chunk"), ((70, 3), (1, 1))))
    )
    def test_result_does_not_depend_on_the_order_of_sequences(self, form, lengths):
        inputs = draw(lengths)
        a, b = lengths
        names = ("q", "k", "v", "g", "beta")
        swapped = {name: torch.cat((inputs[name][a:], inputs[name][:a])) for name in names}
        out, state = FORMS[form](**inputs)
        out_2, state_2 = FORMS[form](
            **swapped, state=inputs["state"].flip(0), segments=Segments.of([b, a])
        )
        assert torch.allclose(out, torch.cat((out_2[b:], out_2[:b])), atol=1e-6)
        assert torch.allclose(state, state_2.flip(0), atol=1e-6)


class TestNormalise:
    def test_sum_not_mean_and_epsilon_inside(self):
        x = torch.tensor([[3e-4, 4e-4]])
        want = x / math.sqrt(25e-8 + 1e-6)
        assert torch.allclose(l2_normalise(x), want, rtol=1e-6)

    def test_zero_stays_zero_with_a_finite_gradient(self):
        x = torch.zeros(1, 8, requires_grad=True)
        y = l2_normalise(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert (y == 0).all()
        assert torch.isfinite(grad).all()

    def test_half_precision_is_normalised_in_float32(self):
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
        got = l2_normalise(x)
        assert got.dtype == torch.float32
        assert torch.allclose(got.norm(dim=-1), torch.ones(5), atol=1e-6)


def test_bounds_are_stated():
    assert BOUNDS["gated_delta_step"] <= 1e-5
    assert BOUNDS["gated_delta_chunk"] <= 2e-5
