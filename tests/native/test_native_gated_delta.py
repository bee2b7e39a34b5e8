"""The native delta layer equals its plain parts; stepping, verifying and keeping agree in bits."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qnext.ops import Segments
from qnext.ops.conv import causal_conv_reference
from qnext.ops.gated_delta import gated_delta_chunk_torch, gated_delta_reference, l2_normalise
from qnext.ops.norm import rms_norm_gated_reference

NAN = float("nan")


@dataclass
class Delta:
    """One delta layer with random weights, and slots with random states."""

    U: int = 2
    group: int = 2
    K: int = 8
    M: int = 12
    J: int = 4
    dtype: torch.dtype = torch.float32
    slots: int = 6
    capacity: int = 16
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.W = self.U * self.group
        self.channels = 2 * self.U * self.K + self.W * self.M
        self.conv_weight = self.normal(self.channels, self.J) * 0.5
        self.a_log, self.dt_bias = self.normal(self.W), self.normal(self.W)
        self.norm_weight = self.normal(self.M)
        self.state = self.normal(self.slots, self.W, self.K, self.M)
        self.window = self.normal(self.slots, self.J - 1, self.channels).to(self.dtype)
        floats = self.U * self.K + self.W * self.M + self.W
        self.pending = torch.full((self.slots, self.capacity, floats), NAN)
        shape = (self.slots, self.capacity, self.channels)
        self.pending_window = torch.full(shape, NAN, dtype=self.dtype)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def inputs(self, rows: int) -> tuple[Tensor, Tensor]:
        """qkvz and ba of so many tokens."""
        return self.normal(rows, self.channels + self.W * self.M), self.normal(rows, 2 * self.W)

    def copy(self) -> "Delta":
        """The same layer with slots of its own."""
        twin = Delta(
            self.U, self.group, self.K, self.M, self.J, self.dtype, self.slots, self.capacity,
            self.seed,
        )  # fmt: skip
        for name in ("state", "window", "pending", "pending_window"):
            setattr(twin, name, getattr(self, name).clone())
        return twin

    def run(
        self,
        kernels,
        inputs: tuple[Tensor, Tensor],
        lengths,
        *,
        slots=None,
        speculative=(),
        kept=None,
        captures=(),
    ) -> Tensor:
        """y [P, W M] of packed tokens; the slots move on."""
        slots = list(range(len(lengths))) if slots is None else slots
        kept = [0] * len(lengths) if kept is None else kept
        starts = Segments.of(lengths).starts
        plan = [
            (slot, start, length, int(b in speculative), count)
            for b, (slot, start, length, count) in enumerate(
                zip(slots, starts[:-1], lengths, kept, strict=True)
            )
        ]
        y = torch.full((inputs[0].shape[0], self.W * self.M), NAN)
        kernels.gated_delta(
            *inputs, self.conv_weight.T.contiguous(), self.a_log, self.dt_bias, self.norm_weight,
            1e-6, self.state, self.window, self.pending, self.pending_window,
            torch.tensor(plan, dtype=torch.int64).reshape(-1, 5),
            torch.tensor(list(captures), dtype=torch.int64).reshape(-1, 3), y,
        )  # fmt: skip
        return y

    def delta_inputs(self, inputs, lengths, window) -> tuple[dict[str, Any], Tensor, Tensor]:
        """q, k, v, g, beta and z as the PyTorch layer makes them, and the new window."""
        qkvz, ba = inputs
        U, K, M, rM = self.U, self.K, self.M, self.group * self.M
        q, k, v, z = qkvz.unflatten(-1, (U, -1)).split((K, K, rM, rM), dim=-1)
        b, a = ba.unflatten(-1, (U, -1)).chunk(2, dim=-1)
        x = torch.cat([part.flatten(-2) for part in (q, k, v)], dim=-1).to(self.dtype)
        c, window = causal_conv_reference(
            x=x.float(),
            weight=self.conv_weight,
            state=window.float(),
            segments=Segments.of(lengths),
        )
        q, k, v = c.split((U * K, U * K, self.W * M), dim=-1)
        parts = {
            "q": l2_normalise(q.unflatten(-1, (U, K))) * K**-0.5,
            "k": l2_normalise(k.unflatten(-1, (U, K))),
            "v": v.unflatten(-1, (self.W, M)),
            "g": -self.a_log.exp() * F.softplus(a.flatten(-2) + self.dt_bias),
            "beta": torch.sigmoid(b.flatten(-2)),
        }
        return parts, z.reshape(-1, self.W, M), window.to(self.dtype)

    def want(self, inputs, lengths, *, slots=None) -> tuple[Tensor, Tensor, Tensor]:
        """y, states and windows from the plain references; nothing is changed."""
        slots = list(range(len(lengths))) if slots is None else slots
        parts, z, window = self.delta_inputs(inputs, lengths, self.window[slots])
        out, state = gated_delta_reference(
            **parts, state=self.state[slots], segments=Segments.of(lengths)
        )
        y = rms_norm_gated_reference(x=out, gate=z, weight=self.norm_weight, eps=1e-6)
        return y.flatten(-2), state, window


def close(found: Tensor, want: Tensor, bound: float = 2e-5) -> None:
    """Every element within ``bound`` of the largest."""
    assert found.dtype == want.dtype
    assert not found.isnan().any()
    assert (found - want).abs().max() <= bound * want.abs().max().clamp(min=1.0)


def rows(inputs: tuple[Tensor, Tensor], start: int, end: int) -> tuple[Tensor, Tensor]:
    """Some of the tokens."""
    qkvz, ba = inputs
    return qkvz[start:end].contiguous(), ba[start:end].contiguous()


def check(kernels, layer: Delta, lengths, **how) -> None:
    inputs = layer.inputs(sum(lengths))
    want_y, want_state, want_window = layer.want(inputs, lengths)
    untouched = layer.state[len(lengths) :].clone()
    y = layer.run(kernels, inputs, lengths, **how)
    close(y, want_y, 5e-5)
    close(layer.state[: len(lengths)], want_state)
    assert torch.equal(layer.window[: len(lengths)], want_window)
    assert torch.equal(layer.state[len(lengths) :], untouched)


LENGTHS = (1, 2, 3, 5, 16, 17, 63, 64, 65, 130)


class TestReference:
    @pytest.mark.parametrize("length", LENGTHS)
    def test_lengths(self, kernels, length):
        check(kernels, Delta(seed=length), [length])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
    @pytest.mark.parametrize("group", [1, 2, 4])
    @pytest.mark.parametrize(
        ("K", "M"), [(8, 12), (16, 4), (5, 5), (1, 1), (32, 64), (20, 70), (17, 131)]
    )
    def test_head_ratios_and_sizes(self, kernels, K, M, group, dtype):
        layer = Delta(U=3, group=group, K=K, M=M, dtype=dtype, seed=K + M)
        check(kernels, layer, [3, 70, 1])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
    def test_the_shape_of_the_large_model(self, kernels, dtype):
        check(kernels, Delta(K=128, M=128, dtype=dtype), [1, 4, 70])

    @pytest.mark.parametrize("taps", [1, 2, 3, 7])
    def test_taps(self, kernels, taps):
        check(kernels, Delta(J=taps), [1, 2, 20, 66])

    @pytest.mark.parametrize(
        "lengths", [[1, 1, 1], [2, 1], [0, 5, 0], [3, 0, 64, 1, 67, 0], [130, 16, 17]], ids=str
    )
    def test_ragged_batches(self, kernels, lengths):
        check(kernels, Delta(), lengths)

    def test_no_tokens_change_nothing(self, kernels):
        layer = Delta()
        before = layer.copy()
        layer.run(kernels, layer.inputs(0), [0, 0])
        assert torch.equal(layer.state, before.state)
        assert torch.equal(layer.window, before.window)

    def test_strong_decay_and_saturated_gates(self, kernels):
        layer = Delta()
        layer.a_log.fill_(4.0)
        inputs = layer.inputs(70)
        inputs[1][::2] *= 30.0
        want_y, want_state, _ = layer.want(inputs, [70])
        y = layer.run(kernels, inputs, [70])
        close(y, want_y, 5e-5)
        close(layer.state[:1], want_state)

    def test_neighbours_never_enter(self, kernels):
        """NaN in one sequence stays there; in one token it reaches the later ones only."""
        layer = Delta()
        inputs = layer.inputs(40)
        alone = layer.copy()
        want = alone.run(kernels, rows(inputs, 10, 30), [20], slots=[1])
        for x in inputs:
            x[:10] = NAN
            x[30:] = NAN
        y = layer.run(kernels, inputs, [10, 20, 10])
        assert torch.equal(y[10:30], want)
        assert torch.equal(layer.state[1], alone.state[1])
        assert y[:10].isnan().all()
        assert layer.state[0].isnan().all()
        late = Delta()
        inputs = late.inputs(70)
        want = late.copy().run(kernels, inputs, [70])
        inputs[1][50] = NAN
        y = late.run(kernels, inputs, [70])
        assert torch.equal(y[:50], want[:50])
        assert y[50:].isnan().all()


class TestBits:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
    def test_any_split_into_steps_gives_the_same_bits(self, kernels, dtype):
        whole = Delta(dtype=dtype)
        parts = whole.copy()
        inputs = whole.inputs(190)
        want = whole.run(kernels, inputs, [190])
        done = 0
        for length in (1, 2, 1, 3, 16, 5, 62, 17, 65, 18):
            y = parts.run(kernels, rows(inputs, done, done + length), [length])
            assert torch.equal(y, want[done : done + length])
            done += length
        assert torch.equal(parts.state, whole.state)
        assert torch.equal(parts.window, whole.window)

    @pytest.mark.parametrize("lengths", [[1], [3, 1], [70, 1, 2, 20, 0]], ids=str)
    def test_the_number_of_threads_changes_no_bit(self, kernels, lengths):
        layer = Delta(U=3, K=20, M=70)
        inputs, found = layer.inputs(sum(lengths)), []
        for threads in (1, 2, 3, 5):
            kernels.set_threads(threads)
            twin = layer.copy()
            found.append((twin.run(kernels, inputs, lengths), twin.state, twin.window))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))

    @pytest.mark.parametrize("length", [3, 16, 40, 130])
    def test_company_changes_no_bit(self, kernels, length):
        alone = Delta()
        batch = alone.copy()
        inputs = alone.inputs(25 + length)
        want = alone.run(kernels, rows(inputs, 25, 25 + length), [length], slots=[3])
        y = batch.run(kernels, inputs, [1, 24, length], slots=[0, 5, 3])
        assert torch.equal(y[25:], want)
        assert torch.equal(batch.state[3], alone.state[3])


class TestCaptures:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
    @pytest.mark.parametrize(
        ("length", "counts"), [(5, (2, 5)), (16, (1,)), (130, (128, 64)), (90, (1, 3, 70, 90))]
    )
    def test_a_capture_is_the_state_after_so_many_tokens(self, kernels, length, counts, dtype):
        layer = Delta(dtype=dtype)
        inputs = layer.inputs(3 + length)
        captures = [(1, count, 2 + i) for i, count in enumerate(counts)]
        before = layer.copy()
        want_y, want_state, want_window = before.want(inputs, [3, length])
        y = layer.run(kernels, inputs, [3, length], captures=captures)
        close(y, want_y, 5e-5)
        close(layer.state[:2], want_state)
        assert torch.equal(layer.window[:2], want_window)
        for _, count, slot in captures:
            some = rows(inputs, 3, 3 + count)
            _, state, window = before.want(some, [count], slots=[1])
            close(layer.state[slot : slot + 1], state)
            assert torch.equal(layer.window[slot : slot + 1], window)
            twin = before.copy()
            twin.run(kernels, some, [count], slots=[1])
            assert torch.equal(layer.state[slot], twin.state[1])
            assert torch.equal(layer.window[slot], twin.window[1])


def stepped(kernels, layer: Delta, inputs, slot: int) -> list[Tensor]:
    """y of every token fed alone to the slot."""
    count = inputs[0].shape[0]
    return [layer.run(kernels, rows(inputs, t, t + 1), [1], slots=[slot]) for t in range(count)]


class TestPending:
    """A speculative step, then any number of its tokens kept: the bits of stepping."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
    @pytest.mark.parametrize(
        ("tokens", "accepted"),
        [(n, m) for n in range(1, 6) for m in range(n + 1)] + [(16, m) for m in (0, 1, 9, 16)],
    )
    @pytest.mark.parametrize("then", ["settle", "step", "verify", "prefill"])
    def test_every_acceptance_count(self, kernels, tokens, accepted, then, dtype):
        layer = Delta(M=70, dtype=dtype)
        plain, before = layer.copy(), layer.copy()
        draft = layer.inputs(tokens)
        y = layer.run(kernels, draft, [tokens], slots=[2], speculative=[0])
        assert torch.equal(layer.state, before.state)
        assert torch.equal(layer.window, before.window)
        kept = stepped(kernels, plain, rows(draft, 0, accepted), 2)
        for t in range(accepted):
            assert torch.equal(y[t : t + 1], kept[t])
        # What was not kept must never be read again.
        layer.pending[2, accepted:] = NAN
        layer.pending_window[2, accepted:] = NAN
        more = layer.inputs(40)
        if then == "settle":
            layer.run(kernels, rows(more, 0, 0), [0], slots=[2], kept=[accepted])
        elif then == "step":
            y = layer.run(kernels, rows(more, 0, 3), [3], slots=[2], kept=[accepted])
            assert torch.equal(y, torch.cat(stepped(kernels, plain, rows(more, 0, 3), 2)))
        elif then == "prefill":
            y = layer.run(kernels, more, [40], slots=[2], kept=[accepted])
            assert torch.equal(y, torch.cat(stepped(kernels, plain, more, 2)))
        else:
            y = layer.run(
                kernels, rows(more, 0, 4), [4], slots=[2], kept=[accepted], speculative=[0]
            )
            assert torch.equal(layer.state, plain.state)
            assert torch.equal(layer.window, plain.window)
            layer.run(kernels, rows(more, 0, 0), [0], slots=[2], kept=[2])
            want = stepped(kernels, plain, rows(more, 0, 4), 2)
            assert torch.equal(y, torch.cat(want))
            plain = before.copy()
            stepped(kernels, plain, rows(draft, 0, accepted), 2)
            stepped(kernels, plain, rows(more, 0, 2), 2)
        assert torch.equal(layer.state, plain.state)
        assert torch.equal(layer.window, plain.window)

    def test_long_mixed_run(self, kernels):
        """Sequences that speculate, step and prefill side by side, every count in between."""
        layer = Delta(K=20, M=20)
        plain = layer.copy()
        kept = [0, 0, 0, 0]
        generator = torch.Generator().manual_seed(1)
        for round_number in range(12):
            lengths = torch.randint(1, 6, (4,), generator=generator).tolist()
            lengths[3] = 30 if round_number % 4 == 0 else 1
            guessing = [b for b in range(4) if (b + round_number) % 3]
            if lengths[3] == 30 and 3 in guessing:
                guessing.remove(3)
            inputs = layer.inputs(sum(lengths))
            y = layer.run(kernels, inputs, lengths, kept=kept, speculative=guessing)
            starts = Segments.of(lengths).starts
            for b, length in enumerate(lengths):
                own = rows(inputs, starts[b], starts[b + 1])
                count = length
                if b in guessing:
                    count = int(torch.randint(0, length + 1, (1,), generator=generator))
                kept[b] = count if b in guessing else 0
                layer.pending[b, kept[b] :] = NAN
                layer.pending_window[b, kept[b] :] = NAN
                if count:
                    want = torch.cat(stepped(kernels, plain, rows(own, 0, count), b))
                else:
                    continue
                assert torch.equal(y[starts[b] : starts[b] + count], want)
        layer.run(kernels, layer.inputs(0), [0] * 4, kept=kept)
        assert torch.equal(layer.state, plain.state)
        assert torch.equal(layer.window, plain.window)


def recurrence_in_double(parts: dict[str, Any], state: Tensor) -> Tensor:
    """Outputs [P, W, M] float64 of one sequence."""
    group = parts["v"].shape[1] // parts["k"].shape[1]
    q, k = (parts[name].double().repeat_interleave(group, dim=1) for name in "qk")
    v, g, beta = (parts[name].double() for name in ("v", "g", "beta"))
    S, outs = state.double(), []
    for t in range(v.shape[0]):
        S = S * g[t].exp()[:, None, None]
        d = beta[t][:, None] * (v[t] - torch.einsum("wk,wkm->wm", k[t], S))
        S = S + torch.einsum("wk,wm->wkm", k[t], d)
        outs.append(torch.einsum("wk,wkm->wm", q[t], S))
    return torch.stack(outs)


def test_steps_are_as_exact_as_the_chunks_of_pytorch(kernels):
    """Error against float64 over 512 tokens, relative to the largest output before the norm.

    The gated norm has weight 1 and a constant gate here, and a large eps: it scales by one factor.
    """
    layer = Delta(K=32, M=32)
    layer.a_log -= 3.0
    layer.norm_weight.fill_(1.0)
    inputs = layer.inputs(512)
    parts, z, _ = layer.delta_inputs(inputs, [512], layer.window[:1])
    exact = recurrence_in_double(parts, layer.state[0])
    torch_out, _ = gated_delta_chunk_torch(
        **parts, state=layer.state[:1], segments=Segments.of([512])
    )

    def normed(out: Tensor) -> Tensor:
        out = out.double()
        return out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-6) * F.silu(z.double())

    want = normed(exact).flatten(-2)
    y = layer.run(kernels, inputs, [512])
    mine = (y - want).norm() / want.norm()
    theirs = (normed(torch_out).flatten(-2) - want).norm() / want.norm()
    assert mine <= 1.2 * theirs + 2e-7


def test_bad_arguments_are_refused(kernels):
    layer = Delta()
    inputs = layer.inputs(3)
    with pytest.raises(ValueError, match="expected a slot below 6, found 9"):
        layer.run(kernels, inputs, [3], slots=[9])
    with pytest.raises(ValueError, match="expected at most 16 kept"):
        layer.run(kernels, inputs, [3], kept=[17])
    with pytest.raises(ValueError, match="expected at most 16 kept or speculative"):
        layer.run(kernels, layer.inputs(17), [17], speculative=[0])
    with pytest.raises(ValueError, match="expected rows of qkvz"):
        layer.run(kernels, inputs, [4])
    with pytest.raises(ValueError, match="within the tokens of a settled sequence"):
        layer.run(kernels, inputs, [3], captures=[(0, 4, 1)])
    with pytest.raises(ValueError, match="ba: expected the shape"):
        layer.run(kernels, (inputs[0], inputs[1][:2].contiguous()), [3])
    layer.window = layer.window.double()
    with pytest.raises(ValueError, match="window: expected float32 or bfloat16"):
        layer.run(kernels, inputs, [3])
