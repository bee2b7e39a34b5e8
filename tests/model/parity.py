"""Pairs of models with equal weights: one built by transformers, one by qnext, from one config.

``CASES`` names every configuration the parity tests run over, so that a failure names its cause.
``build`` draws the weights. No parameter keeps its starting value: a norm weight of zero or a gate
bias of one would hide a wrong convention.
"""

import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from qnext.config import ModelConfig
from qnext.model.model import CausalLM, initialise

BOUND = 2e-4
"""Largest difference of two float32 logits of the same tokens."""

OTHER_LENGTHS = (1, 17, 67)
"""Lengths of the sequences that share a batch with a case's own."""

NEXT: Mapping[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    # Their own cache refuses models without attention layers; every comparison is with a plain
    # forward.
    "use_cache": False,
}
DENSE: Mapping[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MOE: Mapping[str, Any] = {
    **DENSE,
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
YARN: Mapping[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR, FULL = "linear_attention", "full_attention"
CLASSES = {
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}


@dataclass(frozen=True)
class Case:
    """One configuration and the length of its own sequence."""

    name: str
    tokens: int
    changes: Mapping[str, Any] = field(hash=False, compare=False)
    base: Mapping[str, Any] = field(default_factory=lambda: NEXT, hash=False, compare=False)

    @property
    def raw(self) -> dict[str, Any]:
        """The keys of its ``config.json``."""
        return {**self.base, **self.changes}


def _next(name: str, tokens: int, **changes: Any) -> Case:
    return Case(name, tokens, changes)


def _dense(name: str, tokens: int, **changes: Any) -> Case:
    return Case(f"qwen3_{name}", tokens, changes, DENSE)


def _moe(name: str, tokens: int, **changes: Any) -> Case:
    return Case(f"qwen3_moe_{name}", tokens, changes, MOE)


CASES = (
    # Layer counts and patterns.
    _next("one_delta_layer", 65, num_hidden_layers=1),
    _next("one_attention_layer", 64, num_hidden_layers=1, full_attention_interval=1),
    _next("two_layers_interval_2", 1, num_hidden_layers=2, full_attention_interval=2),
    _next("three_attention_layers", 66, num_hidden_layers=3, layer_types=[FULL] * 3),
    _next("three_to_one", 130),
    _next("five_delta_layers", 127, num_hidden_layers=5, full_attention_interval=6),
    _next("six_layers_interval_3", 63, num_hidden_layers=6, full_attention_interval=3),
    _next(
        "explicit_layer_types", 150, num_hidden_layers=5,
        layer_types=[FULL, LINEAR, LINEAR, FULL, LINEAR],
    ),
    _next("layer_types_win", 3, full_attention_interval=1, layer_types=[FULL] + [LINEAR] * 3),
    # Head ratios and sizes.
    _next("delta_ratio_1", 64, linear_num_key_heads=3, linear_num_value_heads=3),
    _next("delta_ratio_2", 2, linear_num_key_heads=3, linear_num_value_heads=6),
    _next("delta_ratio_4", 129, linear_num_key_heads=2, linear_num_value_heads=8),
    _next("attention_ratio_1", 31, num_attention_heads=3, num_key_value_heads=3),
    _next("attention_ratio_4", 65, num_attention_heads=8, num_key_value_heads=2),
    _next("wide_delta_keys", 65, linear_key_head_dim=20, linear_value_head_dim=6),
    _next("wide_delta_values", 63, linear_key_head_dim=5, linear_value_head_dim=24),
    _next("wider_model", 64, hidden_size=64, head_dim=32, num_experts=16, num_experts_per_tok=5),
    # Convolution widths.
    _next("conv_2_taps", 64, linear_conv_kernel_dim=2),
    _next("conv_3_taps", 67, linear_conv_kernel_dim=3),
    _next("conv_4_taps_2_tokens", 2, linear_conv_kernel_dim=4),
    # Feed-forward.
    _next("raw_topk_probabilities", 65, norm_topk_prob=False),
    _next("one_expert_per_token", 40, num_experts_per_tok=1, norm_topk_prob=False),
    _next("all_experts_per_token", 20, num_experts=4, num_experts_per_tok=4),
    _next("some_dense_layers", 65, mlp_only_layers=[0, 2]),
    _next("sparse_step_2", 63, decoder_sparse_step=2),
    _next("no_experts", 33, num_experts=0),
    # Head, biases, constants.
    _next("tied_head", 64, tie_word_embeddings=True),
    _next("attention_bias", 65, attention_bias=True, full_attention_interval=2),
    _next("large_norm_epsilon", 19, rms_norm_eps=0.05),
    # Positions.
    _next("yarn_4", 150, rope_scaling=YARN, head_dim=32, partial_rotary_factor=0.5),
    _next("yarn_old_key", 65, rope_scaling={"type": "yarn", "factor": 2.5}, head_dim=64),
    _next(
        "yarn_mscales", 64, partial_rotary_factor=1.0, rope_theta=5e6,
        rope_scaling={**YARN, "factor": 8.0, "mscale": 1.3, "mscale_all_dim": 0.6},
    ),
    _next(
        "yarn_not_truncated", 130, full_attention_interval=2, partial_rotary_factor=1.0,
        rope_scaling={**YARN, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
    ),
    _next(
        "yarn_attention_factor", 65, full_attention_interval=2,
        rope_parameters={
            **YARN, "factor": 16.0, "attention_factor": 1.7, "rope_theta": 1e7,
            "partial_rotary_factor": 1.0,
        },
    ),
    _next("linear_rope", 65, rope_scaling={"rope_type": "linear", "factor": 3.0}),
    _next("rotary_half", 66, partial_rotary_factor=0.5, full_attention_interval=2),
    _next("rotary_whole", 64, partial_rotary_factor=1.0, full_attention_interval=2),
    # The dense and the sparse family without delta layers.
    _dense("plain", 65),
    _dense("tied_ratio_4", 64, tie_word_embeddings=True, num_attention_heads=8),
    _dense("yarn", 130, rope_scaling=YARN),
    _dense("bias_linear_rope", 3, attention_bias=True,
           rope_scaling={"rope_type": "linear", "factor": 2.0}),
    _dense("one_layer_ratio_1", 1, num_hidden_layers=1, num_key_value_heads=4),
    _moe("plain", 65),
    _moe("raw_probabilities", 64, norm_topk_prob=False, num_experts_per_tok=2),
    _moe("some_dense_layers", 130, mlp_only_layers=[1], tie_word_embeddings=True),
    _moe("sparse_step_2_yarn", 63, decoder_sparse_step=2, num_hidden_layers=4, rope_scaling=YARN),
    _moe("bias_ratio_4", 2, attention_bias=True, num_attention_heads=8),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both models of a case, in float32, and the sequences to run them on."""

    case: Case
    config: ModelConfig
    theirs: PreTrainedModel
    ours: CausalLM
    sequences: tuple[Tensor, ...]
    """The case's own sequence, then one of each of OTHER_LENGTHS; int64 [T] each."""
    labels: tuple[Tensor, ...]
    """Random targets of every token, for losses."""
    wanted: tuple[Tensor, ...]
    """Logits [T, V] by transformers, of every sequence alone."""

    @property
    def ids(self) -> Tensor:
        """The case's own sequence [T]."""
        return self.sequences[0]

    @property
    def want(self) -> Tensor:
        """Logits [T, V] of the case's own sequence."""
        return self.wanted[0]


@functools.cache
def build(case: Case) -> Pair:
    """Both models with the same random weights; the same for every call and every run."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    config_class, model_class = CLASSES[case.raw["model_type"]]
    # Their constructor edits the rotary dictionary it is given.
    raw = {key: dict(v) if isinstance(v, dict) else v for key, v in case.raw.items()}
    their_config = config_class(**raw, attn_implementation="eager", experts_implementation="eager")
    theirs = model_class(their_config).eval()
    config = ModelConfig.from_dict(case.raw)
    ours = CausalLM(config)
    initialise(ours, seed=0)
    perturb(theirs, generator)
    if config.tie_word_embeddings:
        _shrink_final_norm(theirs, config)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert all(name.startswith("mtp.") for name in missing), missing
    assert unexpected == (["lm_head.weight"] if config.tie_word_embeddings else []), unexpected
    if ours.mtp is not None:
        perturb(ours.mtp, generator)
    lengths = (case.tokens, *OTHER_LENGTHS)
    sequences = _draw_sequences(theirs, lengths, config, generator)
    labels = tuple(
        torch.randint(config.vocab_size, (length,), generator=generator) for length in lengths
    )
    with torch.no_grad():
        wanted = tuple(theirs(ids[None]).logits[0] for ids in sequences)
    return Pair(
        case=case,
        config=config,
        theirs=theirs,
        ours=ours,
        sequences=sequences,
        labels=labels,
        wanted=wanted,
    )


@torch.no_grad()
def perturb(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Give every parameter a random value, such that activations and logits are of order one.

    Norm weights, gates and biases are drawn around their starting values; decays such that heads
    remember between about one token and a few hundred. The residual stream begins at order one:
    were it smaller than what the layers add, the norm of a delta layer would divide by numbers so
    small that float32 forwards of one program in two orders differ by more than the bound.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("A_log"):
            parameter.copy_(torch.empty_like(parameter).uniform_(-6.0, 1.0, generator=generator))
        elif name.endswith("embed_tokens.weight"):
            parameter.copy_(noise)
        elif parameter.ndim > 1:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(noise * 0.3)


@torch.no_grad()
def _shrink_final_norm(theirs: PreTrainedModel, config: ModelConfig) -> None:
    """Make logits of order one although the head is an embedding of order one."""
    weight, stored_around = theirs.model.norm.weight, 1.0 if config.is_hybrid else 0.0
    weight.copy_((weight + stored_around) * config.hidden_size**-0.5 - stored_around)


def _draw_sequences(
    theirs: PreTrainedModel,
    lengths: tuple[int, ...],
    config: ModelConfig,
    generator: torch.Generator,
) -> tuple[Tensor, ...]:
    """Random ids on which a float32 forward has an answer that two programs can agree on.

    There are two reasons for it not to. The choice of experts is a step function: where the last
    chosen and the first rejected expert are equal to rounding, correct programs take different
    turns. And the norm of a delta layer divides by the size of its output, which the cancellation
    of a query and a key can make very small. Both are judged by transformers alone.
    """
    sequences = []
    for length in lengths:
        while True:
            ids = torch.randint(config.vocab_size, (length,), generator=generator)
            if (
                _smallest_routing_gap(theirs, ids, config) > 2e-5
                and _effect_of_rounding(theirs, ids, generator) < 5e-5
            ):
                break
        sequences.append(ids)
    return tuple(sequences)


@torch.no_grad()
def _smallest_routing_gap(theirs: PreTrainedModel, ids: Tensor, config: ModelConfig) -> float:
    chosen = config.num_experts_per_tok
    if not any(map(config.is_sparse, range(config.num_hidden_layers))):
        return float("inf")
    if chosen == config.num_experts:
        return float("inf")
    logits = torch.stack(theirs(ids[None], output_router_logits=True).router_logits)
    ranked = logits.float().sort(-1, descending=True).values
    return float((ranked[..., chosen - 1] - ranked[..., chosen]).min())


@torch.no_grad()
def _effect_of_rounding(theirs: PreTrainedModel, ids: Tensor, generator: torch.Generator) -> float:
    """How far their logits move when the embeddings move by a few units in the last place."""
    exact = theirs.model.embed_tokens(ids)[None]
    noise = torch.randn(exact.shape, generator=generator)
    nearby = exact * (1 + 3e-7 * noise)
    moved = theirs(inputs_embeds=nearby).logits - theirs(inputs_embeds=exact).logits
    return float(moved.abs().max())
