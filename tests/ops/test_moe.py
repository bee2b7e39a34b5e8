"""Routed experts: what a loop over tokens and slots gives, however tokens fall onto experts."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qnext.ops.moe import experts_reference

OP = "experts"


def draw(P: int, E: int = 6, X: int = 2, D: int = 8, width: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(P + 10 * X)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    scores = normal(P, E)
    weights, ids = scores.softmax(-1).topk(X, dim=-1)
    return {
        "h": normal(P, D),
        "ids": ids,
        "weights": weights,
        "gate_up": normal(E, 2 * width, D) * D**-0.5,
        "down": normal(E, D, width) * width**-0.5,
    }


@pytest.mark.parametrize("slots", [1, 2, 6])
@pytest.mark.parametrize("tokens", [1, 2, 3, 31, 64])
def test_equals_reference(backend, tokens, slots, assert_equals_reference):
    assert_equals_reference(OP, backend, draw(tokens, X=slots))


def test_no_tokens(backend):
    assert backend.load()(**draw(0)).shape == (0, 8)


def test_all_tokens_on_one_expert(backend, assert_equals_reference):
    inputs = draw(20, X=1)
    assert_equals_reference(OP, backend, {**inputs, "ids": torch.full((20, 1), 4)})


def test_the_same_expert_twice(backend, assert_equals_reference):
    """Nothing in the contract forbids it; the shares add up."""
    inputs = draw(3)
    ids = torch.tensor([[1, 1], [0, 1], [5, 5]])
    assert_equals_reference(OP, backend, {**inputs, "ids": ids})


def test_gate_rows_come_first(backend):
    """gate_up holds the rows of the gate, then those of the linear part."""
    inputs = draw(1, E=1, X=1, width=3)
    gate, up = inputs["gate_up"][0][:3], inputs["gate_up"][0][3:]
    hidden = F.silu(gate @ inputs["h"][0]) * (up @ inputs["h"][0])
    want = inputs["weights"][0, 0] * (inputs["down"][0] @ hidden)
    assert torch.allclose(backend.load()(**inputs)[0], want, atol=1e-6)


def test_a_token_does_not_see_the_others(backend):
    inputs = draw(9)
    want = backend.load()(**inputs)
    poisoned = inputs["h"].clone()
    poisoned[[0, 1, 2, 3, 5, 6, 7, 8]] = float("nan")
    out = backend.load()(**{**inputs, "h": poisoned})
    assert torch.allclose(out[4], want[4], atol=1e-6)


def test_experts_without_tokens_are_not_read(backend):
    inputs = draw(4)
    unused = [e for e in range(6) if not (inputs["ids"] == e).any()] or [5]
    ids = torch.where(torch.isin(inputs["ids"], torch.tensor(unused)), 0, inputs["ids"])
    want = backend.load()(**{**inputs, "ids": ids})
    gate_up = inputs["gate_up"].clone()
    gate_up[unused] = float("nan")
    assert torch.equal(backend.load()(**{**inputs, "ids": ids, "gate_up": gate_up}), want)


def test_half_precision_weighs_and_sums_in_float32(backend):
    """Eight slots of weight 1/8: in bfloat16 sums the last ones would be rounded away."""
    inputs = draw(50, E=8, X=8, D=16)
    half = {k: v.bfloat16() if k in ("h", "gate_up", "down") else v for k, v in inputs.items()}
    out = backend.load()(**half)
    assert out.dtype == torch.bfloat16
    exact = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    want = experts_reference(**exact)
    assert (out.float() - want).abs().max() < 0.03 * want.abs().max()
