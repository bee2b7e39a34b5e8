"""The optimiser does what torch's do, to exactly the parameters it should."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from qnext.config import ModelConfig
from qnext.model.model import CausalLM, initialise
from qnext.train.optim import OptimiserState, decay_of, family, matrices, orthogonal, rate_at
from qnext.train.recipe import Optimiser, Schedule

POOL = ThreadPoolExecutor(1)
STEPS = 7
RATE = 0.03


class Matrices(nn.Module):
    """Four maps the optimiser treats as they are, wide, tall and square, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {
            "k_proj": (6, 10), "o_proj": (12, 5), "down_proj": (8, 8), "norm": (9,)
        }.items():  # fmt: skip
            holder = nn.Module()
            holder.weight = nn.Parameter(torch.randn(shape, generator=generator))
            setattr(self, name, holder)


def gradients(model: nn.Module, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


def run(model: nn.Module, settings: Optimiser, config: ModelConfig) -> None:
    state = OptimiserState(model, settings, config)
    for step in range(STEPS):
        state.update(gradients(model, step), 1.0, RATE, POOL)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.8, 0.999)])
def test_adamw_is_that_of_torch(tiny_config: ModelConfig, betas) -> None:
    ours, theirs = Matrices(), Matrices()
    settings = Optimiser(kind="adamw", betas=betas, clip_norm=0, weight_decay=0.2)
    run(ours, settings, tiny_config)
    oracle = torch.optim.AdamW(
        theirs.parameters(), lr=RATE, betas=betas, eps=1e-8, weight_decay=0.2
    )
    for step in range(STEPS):
        for parameter, grad in zip(theirs.parameters(), gradients(theirs, step), strict=True):
            parameter.grad = grad
        oracle.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_muon_is_that_of_torch(tiny_config: ModelConfig) -> None:
    ours, theirs = Matrices(), Matrices()
    run(ours, Optimiser(clip_norm=0, weight_decay=0.2), tiny_config)
    two_d = [p for p in theirs.parameters() if p.ndim == 2]
    oracle = torch.optim.Muon(
        two_d, lr=RATE, weight_decay=0.2, momentum=0.95, nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    for step in range(STEPS):
        for parameter, grad in zip(theirs.parameters(), gradients(theirs, step), strict=True):
            parameter.grad = grad
        oracle.step()
    mine = [p for p in ours.parameters() if p.ndim == 2]
    for left, right in zip(mine, two_d, strict=True):
        # Both iterate in bfloat16, in products of different order.
        difference = (left - right).norm() / (STEPS * RATE * 0.2 * right.numel() ** 0.5)
        assert difference < 0.02, difference


def test_stacked_experts_are_orthogonalised_one_by_one(tiny_config: ModelConfig) -> None:
    generator = torch.Generator().manual_seed(3)
    stacked = torch.randn(5, 16, 32, generator=generator)
    [whole] = matrices("model.layers.0.mlp.experts.gate_up_proj", stacked, tiny_config)
    assert whole.shape == (10, 8, 32)
    batched = orthogonal(whole)
    for number in range(10):
        gate_or_up = stacked[number // 2, (number % 2) * 8 : (number % 2 + 1) * 8]
        alone = orthogonal(gate_or_up[None])[0]
        torch.testing.assert_close(batched[number], alone, rtol=0.02, atol=0.01)


def test_singular_values_come_close_to_one() -> None:
    x = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonal(x).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_zero_gradient_gives_a_zero_update(tiny_config: ModelConfig) -> None:
    model = CausalLM(tiny_config)
    initialise(model, 1)
    state = OptimiserState(model, Optimiser(weight_decay=0.0), tiny_config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    state.update([torch.zeros_like(p) for p in model.parameters()], 0.0, RATE, POOL)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_one_expert_without_tokens_does_not_move(tiny_config: ModelConfig) -> None:
    model = CausalLM(tiny_config)
    initialise(model, 1)
    state = OptimiserState(model, Optimiser(weight_decay=0.0), tiny_config)
    experts = model.model.layers[0].mlp.experts.down_proj
    before = experts.clone()
    grads = [torch.ones_like(p) for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    grads[names.index("model.layers.0.mlp.experts.down_proj")][2] = 0
    state.update(grads, 1.0, RATE, POOL)
    moved = (experts - before).flatten(1).norm(dim=1)
    assert moved[2] == 0
    assert (moved[[0, 1, 3, 4, 5]] > 0).all()


def test_parts_of_a_fused_matrix_are_all_of_it_and_taken_apart(tiny_config: ModelConfig) -> None:
    model = CausalLM(tiny_config)
    D = tiny_config.hidden_size
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name.endswith(("conv1d.weight",)):
            continue
        marked = torch.zeros_like(parameter)
        parts = matrices(name, marked, tiny_config)
        for number, part in enumerate(parts, start=1):
            part.add_(number)
        assert (marked > 0).all(), name
        assert marked.max() == len(parts), name
    numbers = torch.arange(128 * D, dtype=torch.float32).view(-1, D)
    q, k, v, z = matrices("x.linear_attn.in_proj_qkvz.weight", numbers, tiny_config)
    assert [part.flatten(1, -2).shape[1] for part in (q, k, v, z)] == [16, 16, 48, 48]
    # Key head 1 begins after 64 rows of head 0.
    assert k.flatten(1, -2)[0, 8, 0] == (64 + 8) * D
    query, gate = matrices(
        "x.self_attn.q_proj.weight", torch.arange(128.0)[:, None].expand(-1, D), tiny_config
    )
    assert query.flatten(1, -2)[0, 16:18, 0].tolist() == [32, 33]
    assert gate.flatten(1, -2)[0, :2, 0].tolist() == [16, 17]


LAYER = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight",
         "mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight",
         "mlp.shared_expert.down_proj.weight")  # fmt: skip
LAYER_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
DELTA = ("linear_attn.in_proj_qkvz.weight", "linear_attn.out_proj.weight")
ATTENTION = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
             "self_attn.o_proj.weight")  # fmt: skip
QK = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


def golden(norm_decay: str) -> set[str]:
    """Every decayed parameter of the tiny model, written out."""
    names: set[str] = set()
    for layer in range(3):
        names |= {f"model.layers.{layer}.{n}" for n in DELTA + LAYER}
    for prefix in ("model.layers.3", "mtp.layers.0"):
        names |= {f"{prefix}.{n}" for n in ATTENTION + LAYER}
        if norm_decay != "none":
            names |= {f"{prefix}.{n}" for n in QK}
        if norm_decay == "all":
            names |= {f"{prefix}.{n}" for n in LAYER_NORMS}
    names.add("mtp.fc.weight")
    if norm_decay == "all":
        for layer in range(3):
            names |= {f"model.layers.{layer}.{n}" for n in LAYER_NORMS}
        names |= {"model.norm.weight", "mtp.norm.weight", "mtp.pre_fc_norm_embedding.weight",
                  "mtp.pre_fc_norm_hidden.weight"}  # fmt: skip
    return names


@pytest.mark.parametrize("norm_decay", ["all", "qk", "none"])
def test_exactly_the_listed_parameters_decay(tiny_config: ModelConfig, norm_decay) -> None:
    settings = Optimiser(norm_decay=norm_decay)
    found = {
        name
        for name, p in CausalLM(tiny_config).named_parameters()
        if decay_of(name, p, settings, tiny_config)
    }
    assert found == golden(norm_decay)


def test_norms_that_are_not_zero_centred_never_decay(tiny_config: ModelConfig) -> None:
    dense = replace(
        tiny_config, model_type="qwen3", layer_types=("full_attention",) * 4, num_experts=0,
        num_mtp_layers=0,
    )  # fmt: skip
    for name, parameter in CausalLM(dense).named_parameters():
        if parameter.ndim == 1:
            assert decay_of(name, parameter, Optimiser(), dense) == 0, name


def test_every_parameter_belongs_to_a_family(tiny_config: ModelConfig) -> None:
    families = {family(name) for name, _ in CausalLM(tiny_config).named_parameters()}
    assert families == {
        "embedding", "head", "mtp", "norms", "decay", "conv", "delta_in", "delta_out",
        "attention_in", "attention_out", "router", "experts", "shared",
    }  # fmt: skip


def test_small_updates_survive_in_the_masters(tiny_config: ModelConfig) -> None:
    model = Matrices()
    with torch.no_grad():
        model.k_proj.weight.fill_(1.0)
    state = OptimiserState(model, Optimiser(kind="adamw", weight_decay=0), tiny_config)
    state.cast_working(torch.bfloat16)
    for _ in range(1000):
        grads = [torch.ones(p.shape) for p in model.parameters()]
        state.update(grads, 0.0, 1e-5, POOL)
    # One update of 1e-5 is far below what bfloat16 can tell from 1.
    assert model.k_proj.weight.dtype == torch.bfloat16
    torch.testing.assert_close(state.slots[0].master, torch.full((6, 10), 0.99), atol=1e-4, rtol=0)
    assert (model.k_proj.weight < 0.993).all()


def test_the_whole_gradient_is_clipped(tiny_config: ModelConfig) -> None:
    model = Matrices()
    settings = Optimiser(kind="adamw", weight_decay=0, clip_norm=1.0, epsilon=1.0)
    state = OptimiserState(model, settings, tiny_config)
    grads = gradients(model, 0)
    total = state.norms(grads).total
    assert total > 2
    expected = [g / (total + 1e-6) for g in grads]
    state.update(grads, total, RATE, POOL)
    for slot, want in zip(state.slots, expected, strict=True):
        torch.testing.assert_close(slot.moments[0], 0.1 * want)


def test_a_gradient_that_is_not_finite_is_named(tiny_config: ModelConfig) -> None:
    model = Matrices()
    grads = gradients(model, 0)
    grads[2][0, 0] = float("inf")
    assert OptimiserState(model, Optimiser(), tiny_config).norms(grads).first_bad == (
        "down_proj.weight"
    )


def test_parameters_without_gradient_stay(tiny_config: ModelConfig) -> None:
    model = Matrices()
    before = model.k_proj.weight.clone()
    state = OptimiserState(model, Optimiser(), tiny_config)
    state.update([None, *gradients(model, 0)[1:]], 1.0, RATE, POOL)
    assert torch.equal(model.k_proj.weight, before)
    assert state.ages() == {
        "k_proj.weight": 0, "o_proj.weight": 1, "down_proj.weight": 1, "norm.weight": 1
    }  # fmt: skip


def test_momenta_stay_when_only_numbers_change(tiny_config: ModelConfig) -> None:
    model = Matrices()
    state = OptimiserState(model, Optimiser(), tiny_config)
    state.update(gradients(model, 0), 1.0, RATE, POOL)
    kept = state.slots[0].moments[0].clone()
    state.change(Optimiser(weight_decay=0.0))
    assert torch.equal(state.slots[0].moments[0], kept)
    assert state.slots[0].decay == 0
    state.change(Optimiser(kind="adamw"))
    assert [m.abs().sum().item() for m in state.slots[0].moments] == [0, 0]
    assert state.slots[0].age == 0


def test_rates_of_the_schedules() -> None:
    wsd = Schedule(peak=2.0, warmup=0.1, start=0.1, shape="linear", decay_from=0.6, final=0.05)
    shares = (0.0, 0.05, 0.1, 0.6, 0.8, 1.0)
    assert [round(rate_at(wsd, s), 9) for s in shares] == [0.2, 1.1, 2.0, 2.0, 1.05, 0.1]
    cosine = Schedule(peak=1.0, shape="cosine", final=0.1)
    assert [round(rate_at(cosine, s), 9) for s in (0, 0.5, 1)] == [1.0, 0.55, 0.1]
    root = Schedule(peak=1.0, shape="sqrt")
    assert [round(rate_at(root, s), 9) for s in (0, 0.25, 1)] == [1.0, 0.5, 0.0]
    assert rate_at(Schedule(peak=3.0), 1.0) == 3.0
