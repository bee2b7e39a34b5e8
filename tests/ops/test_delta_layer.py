"""A delta layer in one native call against its ops one after the other: values and gradients."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qnext import native
from qnext.config import ModelConfig
from qnext.model.deltanet import GatedDeltaNet
from qnext.ops import OpSpec, Segments, select
from qnext.ops.delta_layer import CHUNK

pytestmark = pytest.mark.skipif(
    native.unfit_for_training() is not None, reason=str(native.unfit_for_training())
)

IN_PARTS = {"delta_layer": "reference"}
WIDTH = 24


def layer(
    prefer: dict[str, str] | None = None,
    *,
    heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (8, 12),
    taps: int = 4,
) -> GatedDeltaNet:
    """A layer with drawn weights; ``heads`` are key heads and value heads of each."""
    config = ModelConfig.from_dict(
        {
            "model_type": "qwen3_next", "vocab_size": 32, "hidden_size": WIDTH,
            "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
            "linear_num_key_heads": heads[0], "linear_num_value_heads": heads[0] * heads[1],
            "linear_key_head_dim": dims[0], "linear_value_head_dim": dims[1],
            "linear_conv_kernel_dim": taps,
        }
    )  # fmt: skip
    module = GatedDeltaNet(config, 0, select(OpSpec(grad=True), prefer))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0, 1.0 if name == "A_log" else 0.3, generator=generator)
            if name == "norm.weight":
                parameter.add_(1.0)
    return module


def results(
    module: GatedDeltaNet, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Output and gradients of a random function of it."""
    generator = torch.Generator().manual_seed(sum(lengths))
    h = torch.randn(sum(lengths), WIDTH, generator=generator).to(dtype).requires_grad_()
    if dtype == torch.float64:
        module = module.double()
    if dtype == torch.bfloat16:
        for name, parameter in module.named_parameters():
            if not name.endswith(("A_log", "dt_bias", "norm.weight")):
                parameter.data = parameter.data.bfloat16()
    out = module(h, SimpleNamespace(segments=Segments.of(lengths)), None)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    named = {"h": h, **dict(module.named_parameters())}
    grads = torch.autograd.grad((out.double() * weight).sum(), list(named.values()))
    return {"out": out.detach(), **dict(zip(named, grads, strict=True))}


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-20))


def assert_as_near_as_its_ops(lengths: tuple[int, ...], prepare=None, **shape: object) -> None:
    """As near to the same in float64 as the ops one by one, but for a few roundings.

    Gradients of the decays are sums that cancel; of one token they are zero but for rounding.
    """
    modules = [layer(IN_PARTS, **shape), layer(IN_PARTS, **shape), layer(**shape)]
    for module in modules if prepare else ():
        prepare(module)
    exact = results(modules[0], lengths, torch.float64)
    plain, native_ = (results(module, lengths) for module in modules[1:])
    for name, want in exact.items():
        assert torch.isfinite(native_[name]).all(), name
        usual = distance(plain[name], want)
        assert distance(native_[name], want) < 3 * usual + 1e-5, (name, usual)


@pytest.mark.parametrize(
    "lengths",
    [(1,), (1, 1, 1), (2, 1, 3), (CHUNK,), (CHUNK - 1, CHUNK, CHUNK + 1), (0, 5, 0), (67, 0, 130)],
    ids=str,
)
def test_equals_its_ops(lengths):
    assert_as_near_as_its_ops(lengths)


@pytest.mark.parametrize("heads", [(1, 1), (3, 2), (2, 4)])
@pytest.mark.parametrize("dims", [(8, 12), (16, 4), (5, 7), (1, 1), (64, 64), (96, 20)], ids=str)
def test_heads_and_sizes(heads, dims):
    assert_as_near_as_its_ops((40, 3), heads=heads, dims=dims)


@pytest.mark.parametrize("taps", [2, 3, 6])
def test_taps(taps):
    assert_as_near_as_its_ops((2, 40, 1), taps=taps)


def test_bfloat16_is_as_near_as_its_ops():
    lengths = (100, 31)
    exact = layer(IN_PARTS)
    for parameter in exact.parameters():  # the numbers bfloat16 holds
        parameter.data = parameter.data.bfloat16().float()
    want = results(exact, lengths, torch.float64)
    plain = results(layer(IN_PARTS), lengths, torch.bfloat16)
    for name, got in results(layer(), lengths, torch.bfloat16).items():
        assert got.dtype == plain[name].dtype
        assert distance(got, want[name]) < 1.5 * distance(plain[name], want[name]) + 5e-3, name


def test_documents_do_not_see_each_other():
    """Packed, every document has bit for bit what it has alone, and so have gradients of rows."""
    lengths = (5, 40, 1, 31, 2, 64, 33)
    module = layer()
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(sum(lengths), WIDTH, generator=generator)

    def run(rows: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        leaf = rows.clone().requires_grad_()
        qkvz, ba = module.in_proj_qkvz.weight, module.in_proj_ba.weight
        assert module.ops.delta_layer is not None
        out = module.ops.delta_layer(
            # Products of a library may round by the number of rows: one row at a time here.
            qkvz=torch.stack([qkvz @ row for row in leaf]),
            ba=torch.stack([ba @ row for row in leaf]),
            conv_weight=module.conv1d.weight.squeeze(1), A_log=module.A_log,
            dt_bias=module.dt_bias, norm_weight=module.norm.weight, eps=1e-6, key_heads=2,
            segments=Segments.of(sizes),
        )  # fmt: skip
        assert out is not None
        return out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]

    whole, slopes = run(h, lengths)
    start = 0
    for length in lengths:
        alone, slope = run(h[start : start + length], (length,))
        assert torch.equal(whole[start : start + length], alone)
        assert torch.equal(slopes[start : start + length], slope)
        start += length


def test_decay_that_underflows_stays_finite():
    def forgetful(module: GatedDeltaNet) -> None:
        module.A_log.data.fill_(5.0)
        module.dt_bias.data.fill_(3.0)

    assert_as_near_as_its_ops((70, 3), forgetful)


def test_no_tokens():
    batch = SimpleNamespace(segments=Segments.of((0,)))
    assert layer()(torch.zeros(0, WIDTH), batch, None).shape == (0, WIDTH)
