"""Forward and backward passes of training on every instruction set against the plain ones."""

import pytest
import torch
from torch import Tensor

from qnext.ops import Segments
from qnext.ops.adam import AdamStep, adam_, adam_reference_
from qnext.ops.attention import attention_reference, attention_training
from qnext.ops.attention_native import attention_native
from qnext.ops.cross_entropy import cross_entropy_rows_native_, linear_cross_entropy
from qnext.ops.delta_layer import delta_layer_native
from qnext.ops.experts_native import experts_native
from qnext.ops.moe import experts_training
from qnext.ops.norm import rms_norm_zero_centred_training
from qnext.ops.norm_native import residual_norm_native, rms_norm_zero_centred_native
from qnext.ops.route import (
    route_native,
    route_reference,
    router_load_native,
    router_load_reference,
)
from qnext.ops.sparse_layer import sparse_layer_native


def gradients(function, inputs, **fixed) -> dict[str, Tensor]:
    leaves = {
        name: value.detach().clone().requires_grad_() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    out = function(**leaves, **fixed)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.is_floating_point()}
    found = torch.autograd.grad((out.double() * weight).sum(), list(wanted.values()))
    return {"out": out.detach(), **dict(zip(wanted, found, strict=True))}


def as_type(inputs, names, dtype):
    return {k: v.to(dtype) if k in names else v for k, v in inputs.items()}


def assert_near(got, want, bound):
    for name, value in want.items():
        size = value.double().norm().clamp_min(1e-20)
        assert (got[name].double() - value.double()).norm() < bound * size, name


def experts_inputs(tokens, experts, slots, width, inner):
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.randn(tokens, experts, generator=generator)
    weights, ids = scores.softmax(-1).topk(slots, dim=-1)
    return {
        "h": torch.randn(tokens, width, generator=generator),
        "ids": ids,
        "weights": weights,
        "gate_up": torch.randn(experts, 2 * inner, width, generator=generator) * width**-0.5,
        "down": torch.randn(experts, width, inner, generator=generator) * inner**-0.5,
    }


@pytest.mark.parametrize("sizes", [(1, 4, 2, 8, 6), (31, 6, 6, 70, 36), (130, 3, 2, 66, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(kernels, sizes, dtype):
    inputs = experts_inputs(*sizes)
    numbers = ("h", "gate_up", "down")
    rounded = as_type(as_type(inputs, numbers, dtype), numbers, torch.float64)
    want = gradients(experts_training, rounded)
    got = gradients(experts_native, as_type(inputs, numbers, dtype))
    assert_near(got, want, 1e-5 if dtype == torch.float32 else 8e-3)


def test_experts_refuse_numbers_of_experts_that_do_not_exist(kernels):
    inputs = experts_inputs(3, 4, 2, 8, 6)
    with pytest.raises(IndexError, match="from 0 to 3; found 9"):
        experts_native(**{**inputs, "ids": torch.full_like(inputs["ids"], 9)})


def plain_sparse_layer(h, residual, router, gate_up, down, *shared, slots, rescale):
    """The ops one after the other, in the type of their inputs."""
    logits = h @ router.T
    weights, ids = route_reference(logits=logits, slots=slots, rescale=rescale)
    y = residual + experts_training(h=h, ids=ids, weights=weights, gate_up=gate_up, down=down)
    if shared:
        gate, up, way_down, opening = shared
        inner = torch.nn.functional.silu(h @ gate.T) * (h @ up.T)
        y = y + (h @ opening.T).sigmoid() * (inner @ way_down.T)
    return y, logits


@pytest.mark.parametrize(
    "sizes",
    [(1, 4, 2, 8, 6, 0), (31, 6, 6, 70, 36, 10), (530, 3, 2, 66, 34, 40), (70, 140, 3, 20, 8, 24)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rescale", [True, False])
def test_sparse_layer(kernels, sizes, dtype, rescale):
    *most, shared_inner = sizes
    tokens, experts, slots, width, _ = most
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    inputs = experts_inputs(*most)
    leaves = [inputs["h"].to(dtype), normal(tokens, width).to(dtype), normal(experts, width) * 2]
    leaves += [inputs["gate_up"].to(dtype), inputs["down"].to(dtype)]
    if shared_inner:
        shapes = [(shared_inner, width)] * 2 + [(width, shared_inner), (1, width)]
        leaves += [normal(*shape).to(dtype) for shape in shapes]
    weights = [normal(tokens, width).double(), normal(tokens, experts).double()]

    def run(function, leaves, both=True) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in leaves]
        found = function(*leaves)
        used = list(zip(found, weights, strict=True))[: 1 + both]
        total = sum((x.double() * weight).sum() for x, weight in used)
        return [x.detach() for x in found] + list(torch.autograd.grad(total, leaves))

    def native_form(h, residual, router, gate_up, down, *shared):
        found = sparse_layer_native(
            h=h, residual=residual, router=router, gate_up=gate_up, down=down,
            shared=shared or None, slots=slots, rescale=rescale,
        )  # fmt: skip
        assert found is not None
        return found

    def plain_form(*leaves):
        return plain_sparse_layer(*leaves, slots=slots, rescale=rescale)

    doubled = [x.double() for x in leaves]
    for both in (True, False):
        got, want = run(native_form, leaves, both), run(plain_form, doubled, both)
        for number, (mine, exact) in enumerate(zip(got, want, strict=True)):
            size = exact.norm().clamp_min(1e-20)
            bound = 1e-5 if dtype == torch.float32 else 8e-3
            assert (mine.double() - exact).norm() < bound * size, number


def test_sparse_layer_without_a_residual(kernels):
    inputs = experts_inputs(9, 4, 2, 8, 6)
    router = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    given = {"h": inputs["h"], "router": router, "gate_up": inputs["gate_up"]}
    given |= {"down": inputs["down"], "shared": None, "slots": 2, "rescale": True}
    with_zeros = sparse_layer_native(residual=torch.zeros(9, 8), **given)
    without = sparse_layer_native(residual=None, **given)
    assert with_zeros is not None
    assert without is not None
    assert torch.equal(without[0], with_zeros[0])


@pytest.mark.parametrize("change", [{"h": torch.float64}, {"residual": torch.bfloat16}])
def test_sparse_layer_leaves_other_types_to_the_ops(kernels, change):
    inputs = experts_inputs(3, 4, 2, 8, 6)
    given = {"h": inputs["h"], "residual": inputs["h"]}
    given = {name: x.to(change.get(name, x.dtype)) for name, x in given.items()}
    assert sparse_layer_native(
        **given, router=torch.ones(4, 8), gate_up=inputs["gate_up"], down=inputs["down"],
        shared=None, slots=2, rescale=True,
    ) is None  # fmt: skip


@pytest.mark.parametrize(
    ("heads", "lengths"),
    [((2, 1, 8), (5,)), ((6, 2, 64), (130, 1, 2, 64, 3)), ((2, 2, 72), (65, 0, 63)),
     ((3, 1, 10), (1, 1, 70))],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(kernels, heads, lengths, dtype):
    N, G, H = heads
    generator = torch.Generator().manual_seed(N)
    inputs = {
        name: (torch.randn(sum(lengths), count, H, generator=generator) * 2).to(dtype)
        for name, count in (("q", N), ("k", G), ("v", G))
    }
    fixed = {"scale": H**-0.5, "segments": Segments.of(lengths)}
    doubled = {name: x.double() for name, x in inputs.items()}
    plain = attention_reference if dtype == torch.float32 else attention_training
    want = gradients(attention_training, doubled, **fixed)
    got = gradients(attention_native, inputs, **fixed)
    reference = gradients(plain, inputs, **fixed)
    for name, exact in want.items():
        size = exact.norm().clamp_min(1e-20)
        error, usual = ((x[name].double() - exact).norm() / size for x in (got, reference))
        assert error < 1.5 * usual + 1e-5, (name, float(error), float(usual))


@pytest.mark.parametrize("dims", [(2, 2, 8, 12), (1, 2, 64, 64), (1, 1, 96, 20), (2, 1, 5, 7)])
def test_delta_layer_equals_the_scalar_kernels(kernels, dims):
    """tests/ops/test_delta_layer.py compares the best instruction set with the plain ops."""
    U, r, K, M = dims
    lengths, W = (40, 1, 67), U * r
    generator = torch.Generator().manual_seed(K)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    P = sum(lengths)
    inputs = {
        "qkvz": normal(P, 2 * U * K + 2 * W * M), "ba": normal(P, 2 * W),
        "conv_weight": normal(2 * U * K + W * M, 4) * 0.5, "A_log": normal(W),
        "dt_bias": normal(W), "norm_weight": 1 + 0.3 * normal(M),
    }  # fmt: skip
    fixed = {"eps": 1e-6, "key_heads": U, "segments": Segments.of(lengths)}
    got = gradients(delta_layer_native, inputs, **fixed)
    kernels.set_isa("scalar")
    # Sums over all tokens cancel: those of the decays keep fewer digits.
    assert_near(got, gradients(delta_layer_native, inputs, **fixed), 2e-4)


@pytest.mark.parametrize("shape", [(3, 5), (70, 96), (9, 4, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(kernels, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    # Half of a wider tensor: rows that do not follow each other.
    x = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype)[..., : shape[-1]]
    inputs = {"x": x, "weight": torch.randn(shape[-1], generator=generator) * 0.1}
    doubled = {name: value.double() for name, value in inputs.items()}
    want = gradients(rms_norm_zero_centred_training, doubled, eps=1e-6)
    got = gradients(rms_norm_zero_centred_native, inputs, eps=1e-6)
    assert_near(got, want, 2e-6 if dtype == torch.float32 else 8e-3)
    assert torch.equal(
        rms_norm_zero_centred_native(x=x, weight=inputs["weight"], eps=1e-6), got["out"]
    )


@pytest.mark.parametrize("used", ["both", "sum", "normed"])
@pytest.mark.parametrize("with_added", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_norm(kernels, dtype, with_added, used):
    generator = torch.Generator().manual_seed(0)
    x, added = (torch.randn(70, 37, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(37, generator=generator) * 0.1
    slopes = [torch.randn(70, 37, generator=generator, dtype=torch.float64) for _ in range(2)]

    def plain(*, x, added, weight, eps):
        total = x if added is None else x + added
        return total, rms_norm_zero_centred_training(x=total, weight=weight, eps=eps)

    def run(function, leaves):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        more = leaves[2] if with_added else None
        found = function(x=leaves[0], added=more, weight=leaves[1], eps=1e-6)
        parts = [(out.double() * slope).sum() for out, slope in zip(found, slopes, strict=True)]
        loss = {"both": sum(parts), "sum": parts[0], "normed": parts[1]}[used]
        wanted = leaves if with_added else leaves[:2]
        return [*(out.detach() for out in found),
                *torch.autograd.grad(loss, wanted, materialize_grads=True)]  # fmt: skip

    leaves = [x, weight, added]
    want = run(plain, [leaf.double() for leaf in leaves])
    got = run(residual_norm_native, leaves)
    bound = 2e-6 if dtype == torch.float32 else 8e-3
    for mine, exact in zip(got, want, strict=True):
        assert (mine.double() - exact).norm() <= bound * exact.norm()
    assert torch.equal(x, leaves[0])


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(("experts", "slots"), [(64, 4), (5, 5), (1, 1), (512, 10)])
def test_route(kernels, experts, slots, rescale):
    logits = torch.randn(40, experts, generator=torch.Generator().manual_seed(experts)) * 2
    fixed = {"slots": slots, "rescale": rescale}
    assert torch.equal(
        route_native(logits=logits, **fixed)[1], route_reference(logits=logits, **fixed)[1]
    )

    def weights(op):
        return lambda logits: op(logits=logits, **fixed)[0]

    want = gradients(weights(route_reference), {"logits": logits.double()})
    got = gradients(weights(route_native), {"logits": logits})
    for name, value in want.items():
        assert (got[name] - value).abs().max() < 2e-6, name


@pytest.mark.parametrize("experts", [9, 40, 100, 200])
def test_equal_logits_go_to_the_lower_number(kernels, experts):
    logits = torch.zeros(2, experts)
    logits[1, [3, 7]] = 1.0
    _, ids = route_native(logits=logits, slots=4, rescale=True)
    assert ids.tolist() == [[0, 1, 2, 3], [3, 7, 0, 1]]


@pytest.mark.parametrize("experts", [9, 40, 100, 200])
def test_experts_that_are_shut_out_are_chosen_last_and_once(kernels, experts):
    logits = torch.full((1, experts), float("-inf"))
    logits[0, 8] = 2.0
    _, ids = route_native(logits=logits, slots=3, rescale=True)
    assert ids.tolist() == [[8, 0, 1]]


@pytest.mark.parametrize(("rows", "experts", "slots"), [(1, 4, 2), (130, 64, 4), (70, 21, 3)])
def test_router_load(kernels, rows, experts, slots):
    logits = torch.randn(rows, experts, generator=torch.Generator().manual_seed(rows)) * 2
    weight = torch.randn(experts, generator=torch.Generator().manual_seed(1)).double()

    def run(function, logits: Tensor, parts: int) -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        found = function(logits=leaf, slots=slots)
        total = (found.probability.double() * weight).sum() if parts & 1 else 0.0
        total = total + (0.3 * found.squares.double() if parts & 2 else 0.0)
        assert not found.entropy.requires_grad
        return [*(x.detach() for x in found), *torch.autograd.grad(total, [leaf])]

    for parts in (1, 2, 3):
        got = run(router_load_native, logits, parts)
        want = run(router_load_reference, logits.double(), parts)
        assert torch.equal(got[0], want[0])
        for number, (mine, exact) in enumerate(zip(got[1:], want[1:], strict=True)):
            assert (mine - exact).norm() < 3e-6 * exact.norm(), (parts, number)


@pytest.mark.parametrize("vocabulary", [7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy(kernels, vocabulary, dtype):
    generator = torch.Generator().manual_seed(vocabulary)
    x = torch.randn(30, 16, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, 16, generator=generator).to(dtype)
    labels = torch.randint(0, vocabulary, (30,), generator=generator)
    weights = torch.rand(30, generator=generator)

    def run(x: Tensor, weight: Tensor, rows_op=None) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        found = linear_cross_entropy(*leaves, labels, weights, rows_op=rows_op)
        assert not found.loss.isnan().any()
        slopes = torch.autograd.grad(found.loss_sum, leaves)
        return [found.loss_sum.detach(), found.loss, found.lse, found.hits.float(), *slopes]

    want = run(x.double(), weight.double())
    plain = run(x, weight)
    got = run(x, weight, cross_entropy_rows_native_)
    for mine, usual, exact in zip(got, plain, want, strict=True):
        allowed = 1.5 * (usual - exact).norm() + 2e-6 * exact.norm()
        assert (mine - exact).norm() <= allowed


def test_cross_entropy_refuses_labels_that_do_not_exist(kernels):
    with pytest.raises(IndexError, match="from 0 to 4, found 5"):
        cross_entropy_rows_native_(
            logits=torch.zeros(1, 5), labels=torch.tensor([5]), weights=torch.ones(1), slopes=False
        )


@pytest.mark.parametrize("working", [torch.float32, torch.bfloat16])
def test_adam(kernels, working):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1003, generator=generator) for _ in range(4)]
    step = AdamStep(scale=0.3, rate=1e-2, decay=0.1, betas=(0.9, 0.95), epsilon=1e-8, age=7)
    found = []
    for update in (adam_reference_, adam_):
        master, first, second, grad = (x.clone() for x in drawn)
        second.abs_()
        copy = master if working == torch.float32 else master.to(working)
        update(master=master, first=first, second=second, grad=grad, working=copy, step=step)
        found.append((master, first, second, copy))
    for want, got in zip(*found, strict=True):
        assert torch.allclose(
            got, want, rtol=1e-2 if got.dtype == torch.bfloat16 else 1e-6, atol=1e-6
        )
    assert torch.equal(found[1][3].float(), found[1][0].to(working).float())
