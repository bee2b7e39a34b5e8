"""Names of the published files, and the layouts other writers use: FP8 blocks, stacked experts."""

import math

import pytest
import torch
from tiny_checkpoints import (
    DENSE,
    MOE,
    NEXT,
    Tensors,
    assert_same_bits,
    random_model,
    read_tensors,
    write_folder,
)

from qnext.config import ModelConfig
from qnext.errors import CheckpointError
from qnext.weights.checkpoint import expected_shapes, load_model, save_model

OFFICIAL = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "intermediate_size": 5120,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000,
    "rope_scaling": None,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
}


def official_tensors() -> dict[str, tuple[int, ...]]:
    """The published list of the 80B model, written out from its description."""
    attention = {
        "self_attn.q_proj.weight": (8192, 2048),
        "self_attn.k_proj.weight": (512, 2048),
        "self_attn.v_proj.weight": (512, 2048),
        "self_attn.o_proj.weight": (2048, 4096),
        "self_attn.q_norm.weight": (256,),
        "self_attn.k_norm.weight": (256,),
    }
    delta = {
        "linear_attn.in_proj_qkvz.weight": (12288, 2048),
        "linear_attn.in_proj_ba.weight": (64, 2048),
        "linear_attn.conv1d.weight": (8192, 1, 4),
        "linear_attn.A_log": (32,),
        "linear_attn.dt_bias": (32,),
        "linear_attn.norm.weight": (128,),
        "linear_attn.out_proj.weight": (2048, 4096),
    }
    every = {
        "input_layernorm.weight": (2048,),
        "post_attention_layernorm.weight": (2048,),
        "mlp.gate.weight": (512, 2048),
        "mlp.shared_expert.gate_proj.weight": (512, 2048),
        "mlp.shared_expert.up_proj.weight": (512, 2048),
        "mlp.shared_expert.down_proj.weight": (2048, 512),
        "mlp.shared_expert_gate.weight": (1, 2048),
    }
    for e in range(512):
        every[f"mlp.experts.{e}.gate_proj.weight"] = (512, 2048)
        every[f"mlp.experts.{e}.up_proj.weight"] = (512, 2048)
        every[f"mlp.experts.{e}.down_proj.weight"] = (2048, 512)
    out = {
        "model.embed_tokens.weight": (151936, 2048),
        "model.norm.weight": (2048,),
        "lm_head.weight": (151936, 2048),
        "mtp.fc.weight": (2048, 4096),
        "mtp.pre_fc_norm_embedding.weight": (2048,),
        "mtp.pre_fc_norm_hidden.weight": (2048,),
        "mtp.norm.weight": (2048,),
    }
    for n in range(48):
        mixer = attention if n % 4 == 3 else delta
        out.update({f"model.layers.{n}.{k}": v for k, v in {**mixer, **every}.items()})
    out.update({f"mtp.layers.0.{k}": v for k, v in {**attention, **every}.items()})
    return out


def test_the_official_model_has_the_published_names_and_shapes():
    shapes = expected_shapes(ModelConfig.from_dict(OFFICIAL))
    assert shapes == official_tensors()
    assert len(shapes) == 75_944
    assert sum(name.startswith("mtp.") for name in shapes) == 1_553
    assert sum(map(math.prod, shapes.values())) == 81_324_862_720


def test_the_dense_and_moe_baselines_have_the_published_counts():
    dense = {
        **DENSE, "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600,
        "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 128,
    }  # fmt: skip
    shapes = expected_shapes(ModelConfig.from_dict(dense))
    assert len(shapes) == 707
    assert sum(map(math.prod, shapes.values())) == 32_762_123_264
    moe = {
        **MOE, "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }  # fmt: skip
    shapes = expected_shapes(ModelConfig.from_dict(moe))
    assert sum(map(math.prod, shapes.values())) == 30_532_122_624


# -- FP8 ---------------------------------------------------------------------------------------

FP8_RAW = {
    **NEXT,
    "hidden_size": 160,  # 2 blocks, the second one ragged
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 40,
    "moe_intermediate_size": 136,
    "num_experts": 2,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "mlp_only_layers": [],
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def quantise(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference: (FP8 weight, scales, what they mean), one element and one block at a time."""
    rows, columns = weight.shape
    scale = torch.empty(math.ceil(rows / block), math.ceil(columns / block))
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    meaning = torch.empty(weight.shape)
    for r in range(scale.shape[0]):
        for c in range(scale.shape[1]):
            place = (slice(r * block, (r + 1) * block), slice(c * block, (c + 1) * block))
            scale[r, c] = weight[place].abs().max() / 448
            stored[place] = (weight[place] / scale[r, c]).to(torch.float8_e4m3fn)
            meaning[place] = stored[place].float() * scale[r, c]
    return stored, scale, meaning


def quantised_folder_content(tensors: Tensors, block: int = 128) -> tuple[Tensors, Tensors]:
    """Stored tensors with some linears in FP8, and the float32 values they stand for."""
    parts = ("experts", "shared_expert.", "q_proj", "o_proj", "out_proj", "in_proj_qkvz")
    stored, meaning = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if any(part in name for part in parts) and "shared_expert_gate" not in name:
            w8, scale, meaning[name] = quantise(tensor, block)
            stored[name], stored[name + "_scale_inv"] = w8, scale
    assert len(stored) > len(tensors) + 10
    return stored, meaning


class TestFp8:
    @pytest.mark.parametrize("shards", [1, 5])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_blocks_are_multiplied_by_their_scales(self, shards, dtype, tmp_path):
        """With 5 shards most weights and scales lie in different files."""
        model = random_model(FP8_RAW)
        save_model(model, tmp_path / "m")
        stored, meaning = quantised_folder_content(read_tensors(tmp_path / "m"))
        folder = write_folder(tmp_path / "fp8", FP8_RAW, stored, shards=shards)
        model = load_model(folder, dtype=dtype)
        save_model(model, tmp_path / "back")
        back = read_tensors(tmp_path / "back")
        want = {
            name: t if back[name].dtype == torch.float32 else t.to(getattr(torch, dtype))
            for name, t in meaning.items()
        }
        assert_same_bits(back, want)
        # What is saved is not quantised and must not say so.
        assert "quantization_config" not in ModelConfig.from_file(tmp_path / "back").to_dict()

    def test_scales_in_bfloat16_are_widened(self, tmp_path):
        save_model(random_model(FP8_RAW), tmp_path / "m")
        stored, _ = quantised_folder_content(read_tensors(tmp_path / "m"))
        name = "model.layers.0.mlp.experts.1.up_proj.weight"
        scale = stored[name + "_scale_inv"] = stored[name + "_scale_inv"].bfloat16()
        model = load_model(write_folder(tmp_path / "fp8", FP8_RAW, stored))
        full = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[:136, :160]
        got = model.model.layers[0].mlp.experts.gate_up_proj[1, 136:]
        assert torch.equal(got, stored[name].float() * full)

    def test_the_block_size_is_read_from_the_config(self, tmp_path):
        raw = {**FP8_RAW, "quantization_config": {"weight_block_size": [32, 32]}}
        save_model(random_model(raw), tmp_path / "m")
        stored, meaning = quantised_folder_content(read_tensors(tmp_path / "m"), block=32)
        save_model(load_model(write_folder(tmp_path / "fp8", raw, stored)), tmp_path / "back")
        assert_same_bits(read_tensors(tmp_path / "back"), meaning)

    def test_stacked_experts_have_stacked_scales(self, tmp_path):
        raw = {**FP8_RAW, "moe_intermediate_size": 128}
        save_model(random_model(raw), tmp_path / "m")
        stored, meaning = quantised_folder_content(read_tensors(tmp_path / "m"))
        folder = write_folder(tmp_path / "fp8", raw, stack(stack(stored), "_scale_inv"))
        save_model(load_model(folder), tmp_path / "back")
        assert_same_bits(read_tensors(tmp_path / "back"), meaning)
        turned = write_folder(
            tmp_path / "turned", raw, transpose(stack(stack(stored), "_scale_inv"))
        )
        save_model(load_model(turned), tmp_path / "back2")
        assert_same_bits(read_tensors(tmp_path / "back2"), meaning)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("no scale", r"stored as F8_E4M3; 8-bit floats need the tensor .*weight_scale_inv"),
            ("wrong scale", r"wrong shape for blocks of 128 x 128: expected \[2, 2\], found \[1\]"),
            ("scale of bf16", r"has block scales but is stored as BF16; expected F8_E4M3"),
            ("integer scale", r"weight_scale_inv is stored as I32; expected BF16, F16, F32"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, change, message, tmp_path):
        save_model(random_model(FP8_RAW), tmp_path / "m")
        stored, _ = quantised_folder_content(read_tensors(tmp_path / "m"))
        name = "model.layers.1.mlp.experts.0.gate_proj.weight"
        if change == "no scale":
            del stored[name + "_scale_inv"]
        elif change == "wrong scale":
            stored[name + "_scale_inv"] = torch.ones(1)
        elif change == "scale of bf16":
            stored[name] = stored[name].bfloat16()
        else:
            stored[name + "_scale_inv"] = torch.ones(2, 2, dtype=torch.int32)
        with pytest.raises(CheckpointError, match=message):
            load_model(write_folder(tmp_path / "fp8", FP8_RAW, stored))

    def test_a_senseless_block_size_is_refused(self, tmp_path):
        raw = {**NEXT, "quantization_config": {"weight_block_size": [128, 0]}}
        save_model(random_model(NEXT), tmp_path / "m")
        folder = write_folder(tmp_path / "n", raw, read_tensors(tmp_path / "m"))
        with pytest.raises(CheckpointError, match="two positive integers, found"):
            load_model(folder)


# -- stacked experts ---------------------------------------------------------------------------


def stack(tensors: Tensors, end: str = "", suffix: str = "") -> Tensors:
    """Per-expert tensors put together per layer, gate rows above up rows."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        prefix, middle, rest = name.partition(".experts.")
        if not middle or not rest.endswith("weight" + end) or not rest[0].isdigit():
            out[name] = tensor
        elif rest == "0.gate_proj.weight" + end:
            at = prefix + middle
            count = sum(n.startswith(at) and n.endswith("up_proj.weight" + end) for n in tensors)
            gate, up, down = (
                [tensors[f"{at}{e}.{part}_proj.weight{end}"] for e in range(count)]
                for part in ("gate", "up", "down")
            )
            pairs = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
            out[f"{at}gate_up_proj{suffix}{end}"] = torch.stack(pairs)
            out[f"{at}down_proj{suffix}{end}"] = torch.stack(down)
    return out


def transpose(tensors: Tensors) -> Tensors:
    """Stacked experts as factors from the right: [E, in, out]."""
    return {
        name: t.transpose(1, 2) if "_proj" in name and t.ndim == 3 else t
        for name, t in tensors.items()
    }


class TestStackedExperts:
    @pytest.mark.parametrize("suffix", ["", ".weight"])
    @pytest.mark.parametrize("turned", [False, True])
    @pytest.mark.parametrize(
        "sizes",
        [
            {},
            {"moe_intermediate_size": 16},  # gate_up is square: 32 x 32
            {"moe_intermediate_size": 32},  # down is square: 32 x 32
        ],
        ids=["plain", "square gate_up", "square down"],
    )
    def test_both_orientations_load(self, sizes, turned, suffix, tmp_path):
        raw = {**NEXT, **sizes}
        model = random_model(raw)
        save_model(model, tmp_path / "m")
        tensors = stack(read_tensors(tmp_path / "m"), suffix=suffix)
        assert f"mtp.layers.0.mlp.experts.gate_up_proj{suffix}" in tensors
        folder = write_folder(tmp_path / "n", raw, transpose(tensors) if turned else tensors)
        assert_same_bits(load_model(folder).state_dict(), model.state_dict())

    def test_layers_may_differ(self, tmp_path):
        """Main layers stacked and the MTP layer one by one, and the other way round."""
        model = random_model(NEXT)
        save_model(model, tmp_path / "m")
        single = read_tensors(tmp_path / "m")
        for kind in (True, False):
            some = {n: t for n, t in single.items() if n.startswith("mtp.") == kind}
            rest = {n: t for n, t in single.items() if n not in some}
            folder = write_folder(tmp_path / str(kind), NEXT, {**stack(some), **rest})
            assert_same_bits(load_model(folder).state_dict(), model.state_dict())

    def test_a_square_matrix_without_its_partner_is_ambiguous(self, tmp_path):
        raw = {**NEXT, "moe_intermediate_size": 16}
        save_model(random_model(raw), tmp_path / "m")
        single = read_tensors(tmp_path / "m")
        tensors = stack(single)
        at = "model.layers.0.mlp.experts."
        del tensors[at + "down_proj"]
        tensors.update({n: t for n, t in single.items() if n.startswith(at) and "down" in n})
        with pytest.raises(CheckpointError, match=r"square matrices \[6, 32, 32\].*no such tensor"):
            load_model(write_folder(tmp_path / "n", raw, tensors))

    def test_a_wrong_shape_is_named(self, tmp_path):
        save_model(random_model(NEXT), tmp_path / "m")
        tensors = stack(read_tensors(tmp_path / "m"))
        name = "model.layers.2.mlp.experts.down_proj"
        tensors[name] = tensors[name][:5]
        message = (
            r"2\.mlp\.experts\.down_proj .*asks for \[6, 32, 24\] or transposed, "
            r"\[6, 24, 32\], found \[5, 32, 24\]"
        )
        with pytest.raises(CheckpointError, match=message):
            load_model(write_folder(tmp_path / "n", NEXT, tensors))

    def test_both_layouts_of_one_layer_are_refused(self, tmp_path):
        save_model(random_model(NEXT), tmp_path / "m")
        single = read_tensors(tmp_path / "m")
        with pytest.raises(CheckpointError, match="is stored twice"):
            load_model(write_folder(tmp_path / "n", NEXT, {**single, **stack(single)}))
