"""What a model costs: published figures from published configurations, counts of real models."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from qnext import cost
from qnext.config import ModelConfig
from qnext.errors import ConfigError
from qnext.model.model import CausalLM

GIB = 2**30

# config.json of the published models, the keys a cost depends on.
NEXT_80B = ModelConfig.from_dict(
    {
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next",
        "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
        "intermediate_size": 5120, "hidden_act": "silu", "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
        "partial_rotary_factor": 0.25, "rope_theta": 10000000, "rope_scaling": None,
        "full_attention_interval": 4, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "num_experts": 512,
        "num_experts_per_tok": 10, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "norm_topk_prob": True,
    }
)  # fmt: skip
DENSE_32B = ModelConfig.from_dict(
    {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
        "hidden_size": 5120, "num_hidden_layers": 64, "intermediate_size": 25600,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": False, "rope_theta": 1000000, "max_position_embeddings": 40960,
        "torch_dtype": "bfloat16",
    }
)  # fmt: skip
MOE_30B = ModelConfig.from_dict(
    {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
        "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "tie_word_embeddings": False,
        "rope_theta": 1000000, "max_position_embeddings": 40960, "torch_dtype": "bfloat16",
    }
)  # fmt: skip
PUBLISHED = (NEXT_80B, DENSE_32B, MOE_30B)


def tiny(**changes: object) -> ModelConfig:
    """A small configuration with no two sizes alike, so that a swapped shape cannot hide."""
    raw: dict[str, object] = {
        "model_type": "qwen3_next", "vocab_size": 131, "hidden_size": 24, "num_hidden_layers": 4,
        "intermediate_size": 37, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 16, "linear_num_key_heads": 3, "linear_num_value_heads": 6,
        "linear_key_head_dim": 5, "linear_value_head_dim": 7, "linear_conv_kernel_dim": 4,
        "num_experts": 9, "num_experts_per_tok": 2, "moe_intermediate_size": 11,
        "shared_expert_intermediate_size": 13,
    }  # fmt: skip
    return ModelConfig.from_dict({**raw, **changes})


VARIED = {
    "next": tiny(),
    "next without mtp": tiny(num_nextn_predict_layers=0),
    "next tied": tiny(tie_word_embeddings=True),
    "next with dense layers": tiny(num_hidden_layers=6, mlp_only_layers=[1, 3]),
    "next, every second layer sparse": tiny(decoder_sparse_step=2),
    "next without experts": tiny(num_experts=0, num_experts_per_tok=0),
    "next, attention only": tiny(full_attention_interval=1),
    "next, equal delta heads": tiny(linear_num_value_heads=3, linear_conv_kernel_dim=2),
    "next with biases": tiny(attention_bias=True),
    "dense": tiny(model_type="qwen3", num_experts=0, num_experts_per_tok=0),
    "dense, tied, with biases": tiny(
        model_type="qwen3", tie_word_embeddings=True, attention_bias=True
    ),
    "moe": tiny(model_type="qwen3_moe"),
    "moe, tied, with a dense layer": tiny(
        model_type="qwen3_moe", tie_word_embeddings=True, mlp_only_layers=[0]
    ),
}


def component_of(name: str) -> str:
    """The component a parameter of a real model belongs to, from its published name."""
    places = (
        ("mtp.", "mtp"),
        ("model.embed_tokens.", "embedding"),
        ("lm_head.", "lm_head"),
        (".linear_attn.", "delta_layers"),
        (".self_attn.", "attention_layers"),
        (".mlp.experts.", "routed_experts"),
        (".mlp.shared_expert.", "shared_experts"),
        (".mlp.shared_expert_gate.", "shared_gates"),
        (".mlp.gate.", "routers"),
        (".mlp.", "dense_mlps"),
        ("norm.weight", "norms"),
    )
    return next(component for place, component in places if place in name)


@pytest.mark.parametrize("config", VARIED.values(), ids=VARIED.keys())
def test_every_component_counts_the_parameters_of_a_real_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = CausalLM(config)
    counted = dict.fromkeys(cost.parameters(config).as_dict(), 0)
    for name, parameter in model.named_parameters():
        counted[component_of(name)] += parameter.numel()
    assert cost.parameters(config).as_dict() == counted


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: config.model_type)
def test_published_sizes_count_the_parameters_of_a_real_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = CausalLM(config)
    found = cost.parameters(config)
    assert found.total + found.mtp == sum(p.numel() for p in model.parameters())


def test_parameters_of_the_80b_model_are_the_published_ones() -> None:
    found = cost.parameters(NEXT_80B)
    assert found.as_dict() == {
        "embedding": 311_164_928,
        "lm_head": 311_164_928,
        "delta_layers": 1_213_864_704,
        "attention_layers": 327_161_856,
        "routed_experts": 77_309_411_328,
        "shared_experts": 150_994_944,
        "routers": 50_331_648,
        "shared_gates": 98_304,
        "dense_mlps": 0,
        "norms": 198_656,
        "mtp": 1_650_471_424,
    }
    assert found.total == 79_674_391_296
    assert found.total + found.mtp == 81_324_862_720


def test_active_parameters_of_the_80b_model_in_every_published_convention() -> None:
    assert cost.active_parameters(NEXT_80B) == 3_563_764_480
    assert cost.active_parameters(NEXT_80B, lm_head=False) == 3_252_599_552
    assert cost.active_parameters(NEXT_80B, embedding=True) == 3_874_929_408
    assert cost.mtp_active_parameters(NEXT_80B) == 71_315_968


def test_baselines_have_their_published_sizes() -> None:
    assert cost.parameters(DENSE_32B).total == 32_762_123_264
    assert cost.parameters(MOE_30B).total == 30_532_122_624
    assert cost.active_parameters(DENSE_32B) == pytest.approx(31.98e9, abs=5e6)
    assert cost.active_parameters(MOE_30B) == pytest.approx(3.04e9, abs=5e6)


def test_a_dense_model_uses_all_it_stores_but_the_embedding() -> None:
    found = cost.parameters(DENSE_32B)
    assert cost.active_parameters(DENSE_32B) == found.total - found.embedding
    assert cost.active_parameters(DENSE_32B, embedding=True) == found.total


def test_a_tied_matrix_is_counted_once_and_multiplied_with_all_the_same() -> None:
    tied, untied = tiny(tie_word_embeddings=True), tiny()
    matrix = 131 * 24
    assert cost.parameters(tied).total == cost.parameters(untied).total - matrix
    assert cost.active_parameters(tied) == cost.active_parameters(untied)
    assert cost.active_parameters(tied, embedding=True) == cost.active_parameters(tied)
    assert cost.active_parameters(tied, embedding=True, lm_head=False) == (
        cost.active_parameters(tied)
    )
    assert cost.matmul_flops(tied) == cost.matmul_flops(untied)


@pytest.mark.parametrize(
    ("config", "matmul", "attention", "delta", "delta_chunked", "totals"),
    [
        (NEXT_80B, 7.125, 196_608, 0.132, 0.212, (8.06, 13.7, 33.0, 58.8, 213)),
        (DENSE_32B, 63.967, 2_097_152, 0, 0, (72.6, 133, 339, 614, 2263)),
        (MOE_30B, 6.083, 786_432, 0, 0, (9.30, 31.9, 109, 212, 831)),
    ],
    ids=["next", "dense", "moe"],
)
def test_flops_per_token_are_the_published_ones(
    config: ModelConfig,
    matmul: float,
    attention: int,
    delta: float,
    delta_chunked: float,
    totals: tuple[float, ...],
) -> None:
    assert cost.matmul_flops(config) / 1e9 == pytest.approx(matmul, abs=5e-4)
    assert cost.attention_flops(config) == attention
    assert cost.delta_flops(config) / 1e9 == pytest.approx(delta, abs=5e-4)
    assert cost.delta_flops(config, chunked=True) / 1e9 == pytest.approx(delta_chunked, abs=5e-4)
    for thousands, total in zip((4, 32, 128, 256, 1024), totals, strict=True):
        found = cost.decode_flops(config, 1024 * thousands) / 1e9
        assert float(f"{found:.3g}" if total < 1000 else f"{found:.0f}") == total, thousands


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: config.model_type)
def test_prefill_sees_half_of_the_context_on_average(config: ModelConfig) -> None:
    n = 4096
    constant = cost.matmul_flops(config) + cost.delta_flops(config, chunked=True)
    attention = cost.prefill_flops(config, n) / n - constant
    assert attention == pytest.approx(cost.attention_flops(config) * n / 2, rel=1e-3)


def test_matrix_flops_are_two_for_every_multiplied_weight() -> None:
    """Against the shapes of a real model: every weight with two or more axes but conv1d."""
    config = tiny(mlp_only_layers=[0])
    with torch.device("meta"):
        model = CausalLM(config)
    expected = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name.startswith("mtp.") or "conv1d" in name or "embed" in name:
            continue
        share = 2 / 9 if ".experts." in name else 1
        expected += 2 * parameter.numel() * share
    assert cost.matmul_flops(config) == pytest.approx(expected, rel=1e-12)


def test_memory_of_the_cache_is_the_published_one() -> None:
    for config, per_token, at_256k in (
        (NEXT_80B, 24_576, 6.0),
        (DENSE_32B, 262_144, 64.0),
        (MOE_30B, 98_304, 24.0),
    ):
        assert cost.kv_bytes_per_token(config) == per_token
        assert cost.kv_bytes_per_token(config) * 262_144 == at_256k * GIB
        assert cost.kv_bytes_per_token(config, "float32") == 2 * per_token
    assert cost.mtp_kv_bytes_per_token(NEXT_80B) == 2_048
    assert cost.mtp_kv_bytes_per_token(DENSE_32B) == 0
    assert cost.mtp_kv_bytes_per_token(replace(NEXT_80B, num_mtp_layers=0)) == 0


def test_state_of_a_sequence_is_the_published_one() -> None:
    assert cost.state_bytes_per_sequence(NEXT_80B) == 75_497_472 == 72 * 2**20
    assert cost.state_bytes_per_sequence(NEXT_80B, "bfloat16") == 36 * 2**20
    assert cost.conv_bytes_per_sequence(NEXT_80B) == 1_769_472
    # It equals the keys and values of about three thousand tokens.
    assert cost.state_bytes_per_sequence(NEXT_80B) == 3_072 * cost.kv_bytes_per_token(NEXT_80B)
    for config in (DENSE_32B, MOE_30B):
        assert cost.state_bytes_per_sequence(config) == 0
        assert cost.conv_bytes_per_sequence(config) == 0


def test_weights_take_the_published_space() -> None:
    assert cost.weight_bytes(NEXT_80B) == 2 * 81_324_862_720
    assert round(cost.weight_bytes(NEXT_80B) / GIB, 1) == 151.5
    assert round(cost.weight_bytes(DENSE_32B) / GIB, 1) == 61.0
    assert round(cost.weight_bytes(MOE_30B) / GIB, 1) == 56.9
    assert round(cost.weight_bytes(NEXT_80B, "fp8") / GIB, 1) == 76.4
    assert cost.weight_bytes(NEXT_80B, mtp=False) == 2 * 79_674_391_296
    assert cost.weight_bytes(NEXT_80B, "float32") == 2 * cost.weight_bytes(NEXT_80B)


def test_fp8_checkpoint_has_the_published_number_of_scaled_matrices() -> None:
    scaled = sum(w.stored for w in cost.inventory(NEXT_80B) if w.has_fp8)
    mtp = sum(w.stored for w in cost.inventory(NEXT_80B) if w.has_fp8 and w.component == "mtp")
    assert (scaled, scaled - mtp, mtp) == (75_535, 73_992, 1_543)


def test_checkpoint_has_the_published_number_of_tensors() -> None:
    assert sum(w.stored for w in cost.inventory(NEXT_80B)) == 75_944
    assert sum(w.stored for w in cost.inventory(DENSE_32B)) == 707


def test_decoding_reads_active_weights_context_and_state() -> None:
    found = cost.decode_bytes(NEXT_80B, context=4096)
    assert found.weights == 2 * (3_563_764_480 + 2_048)
    assert found.kv == 4096 * 24_576
    assert found.state == 2 * (75_497_472 + 1_769_472)
    assert found.total == found.weights + found.kv + found.state
    eight_bits = cost.decode_bytes(NEXT_80B, "fp8", context=4096)
    assert (eight_bits.kv, eight_bits.state) == (found.kv, found.state)
    assert found.weights / 2 < eight_bits.weights < found.weights
    assert cost.decode_bytes(DENSE_32B, context=0).state == 0


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(ConfigError, match="dtype 'int3' is not known; expected one of float32"):
        cost.weight_bytes(NEXT_80B, "int3")


def test_cost_does_not_import_torch() -> None:
    program = "import sys, qnext.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
