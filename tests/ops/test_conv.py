"""The causal convolution sees its own sequence's past, saved or present, and nothing else."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qnext.ops import Segments
from qnext.ops.conv import causal_conv_reference, causal_conv_torch

OP = "causal_conv"
RAGGED = ((1,), (1, 1, 1), (2, 1), (3,), (0, 5, 0), (4, 1, 2, 0, 3), (63, 64, 65))


def draw(
    lengths: tuple[int, ...], taps: int = 4, channels: int = 10, *, with_state: bool = True
) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": normal(sum(lengths), channels),
        "weight": normal(channels, taps),
        "state": normal(len(lengths), taps - 1, channels) if with_state else None,
        "segments": Segments.of(lengths),
    }


@pytest.mark.parametrize("with_state", [False, True], ids=["zero_state", "state"])
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("lengths", RAGGED, ids=str)
def test_equals_reference(backend, lengths, taps, with_state, assert_equals_reference):
    assert_equals_reference(OP, backend, draw(lengths, taps, with_state=with_state))


def test_reference_equals_the_library_convolution():
    inputs = draw((30,))
    x_Pc, weight_cJ, state_1Jc = inputs["x"], inputs["weight"], inputs["state"]
    row = torch.cat((state_1Jc[0], x_Pc)).T[None]
    want = F.silu(F.conv1d(row, weight_cJ[:, None], groups=10))[0].T
    out, state = causal_conv_reference(**inputs)
    assert torch.allclose(out, want, atol=1e-5)
    assert torch.equal(state[0], x_Pc[-3:])


def test_last_tap_multiplies_the_current_token():
    x = torch.tensor([[1.0], [10.0], [100.0]])
    weight = torch.tensor([[0.0, 0.0, 0.5, 2.0]])
    out, _ = causal_conv_torch(x=x, weight=weight, state=None, segments=Segments.of([3]))
    assert torch.allclose(out[:, 0], F.silu(torch.tensor([2.0, 20.5, 205.0])))


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4])
def test_window_after_few_tokens_keeps_a_part_of_the_old_one(backend, length):
    inputs = draw((length,))
    _, state = backend.load()(**inputs)
    assert torch.equal(state[0], torch.cat((inputs["state"][0], inputs["x"]))[-3:])


def test_any_split_equals_one_call(backend):
    inputs = draw((20,))
    whole, final = backend.load()(**inputs)
    for split in range(1, 20):
        run, weight = backend.load(), inputs["weight"]
        first, middle = run(
            x=inputs["x"][:split], weight=weight, state=inputs["state"],
            segments=Segments.of([split]),
        )  # fmt: skip
        second, last = run(
            x=inputs["x"][split:], weight=weight, state=middle, segments=Segments.of([20 - split])
        )
        assert torch.allclose(torch.cat((first, second)), whole, atol=1e-6)
        assert torch.equal(last, final)


def test_neighbours_do_not_leak(backend):
    inputs = draw((5, 7, 6))
    poisoned = inputs["x"].clone()
    poisoned[:5] = float("nan")
    poisoned[12:] = float("nan")
    state = inputs["state"].clone()
    state[[0, 2]] = float("nan")
    want, want_state = backend.load()(**inputs)
    out, new_state = backend.load()(**{**inputs, "x": poisoned, "state": state})
    assert torch.equal(out[5:12], want[5:12])
    assert torch.equal(new_state[1], want_state[1])


def test_half_precision_stays_half_and_sums_in_float32(backend):
    inputs = draw((50, 1))
    half = {
        **inputs,
        **{name: inputs[name].bfloat16() for name in ("x", "weight", "state")},
    }
    exact = {**half, **{name: half[name].float() for name in ("x", "weight", "state")}}
    out, state = backend.load()(**half)
    want, _ = causal_conv_reference(**exact)
    assert out.dtype == state.dtype == torch.bfloat16
    assert (
        torch.equal(out, want.bfloat16())
        or (out.float() - want).abs().max() < 2**-7 * want.abs().max()
    )
