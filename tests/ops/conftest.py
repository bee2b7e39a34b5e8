"""What the op tests share: the bounds of the contracts, and how a backend is held to them."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext.ops.contracts import BOUNDS, Impl, OpSpec
from qnext.ops.select import IMPLS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``backend`` runs over every implementation of the op named by the module's ``OP``."""
    if "backend" in metafunc.fixturenames:
        op = getattr(metafunc.cls, "OP", None) or metafunc.module.OP
        fitting = [impl for impl in IMPLS[op] if impl.unfit(OpSpec(grad=True)) is None]
        metafunc.parametrize("backend", fitting, ids=[impl.backend for impl in fitting])


@pytest.fixture
def assert_within_bound() -> Callable[..., None]:
    """``(op, got, want)``: no entry is off by more than the op's bound times the RMS of ``want``.

    ``at_least`` stands in for the RMS where it is larger.
    """

    def check(op: str, got: Tensor, want: Tensor, at_least: float = 0.0) -> None:
        assert got.shape == want.shape, (op, got.shape, want.shape)
        assert got.dtype == want.dtype, (op, got.dtype, want.dtype)
        if not want.numel():
            return
        largest = float((got.double() - want.double()).abs().max())
        size = max(rms(want), at_least)
        assert largest <= BOUNDS[op] * size, f"{op}: off by {largest:.1e} of RMS {size:.1e}"

    return check


def rms(x: Tensor) -> float:
    """Root mean square of all entries."""
    return float(x.double().pow(2).mean().sqrt()) if x.numel() else 0.0


@pytest.fixture
def assert_equals_reference(
    assert_within_bound: Callable[..., None],
) -> Callable[..., None]:
    """``(op, impl, inputs)``: outputs and gradients equal the reference's, inputs stay untouched.

    ``inputs`` are keyword arguments. Gradients are taken of a random linear function of all
    outputs, with respect to every floating point tensor among the inputs.
    """

    def check(op: str, impl: Impl, inputs: Mapping[str, Any]) -> None:
        reference = IMPLS[op][-1]
        assert reference.backend == "reference"
        copies = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
        want, want_grads = run(reference, inputs)
        got, got_grads = run(impl, inputs)
        for name, copy in copies.items():
            assert torch.equal(inputs[name], copy), f"{op} modified {name}"
        for x, y in zip(got, want, strict=True):
            assert_within_bound(op, x, y)
        # A gradient may be zero in exact arithmetic, where a ratio means nothing.
        at_least = 0.3 * max(map(rms, want_grads.values()))
        for name, grad in want_grads.items():
            assert_within_bound(op, got_grads[name], grad, at_least)

    return check


def run(impl: Impl, inputs: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of one implementation, and the gradient of each input."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    result = impl.load()(**{**inputs, **leaves})
    outputs = list(result) if isinstance(result, tuple) else [result]
    generator = torch.Generator().manual_seed(5)
    loss = sum((x.float() * torch.randn(x.shape, generator=generator)).sum() for x in outputs)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    by_name = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    return [x.detach() for x in outputs], by_name
