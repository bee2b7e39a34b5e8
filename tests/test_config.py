"""ModelConfig reads what the published files say, writes it back verbatim, and refuses nonsense."""

import dataclasses
import json
from typing import Any

import pytest
from transformers import Qwen3Config, Qwen3MoeConfig, Qwen3NextConfig

from qnext.config import ModelConfig, RopeConfig
from qnext.errors import ConfigError

OFFICIAL: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
"""The published settings of the 80B instruct model, key for key."""

NESTED_DEFAULT = {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25}


def read(**changes: Any) -> ModelConfig:
    """The official configuration with some keys changed; None deletes a key."""
    raw = {**OFFICIAL, **changes}
    return ModelConfig.from_dict({k: v for k, v in raw.items() if v is not None})


class TestOfficial:
    def test_values(self):
        config = ModelConfig.from_dict(OFFICIAL)
        assert config.model_type == "qwen3_next"
        assert (config.vocab_size, config.hidden_size) == (151936, 2048)
        assert (config.num_attention_heads, config.num_key_value_heads) == (16, 2)
        assert (config.num_experts, config.num_experts_per_tok) == (512, 10)
        assert config.dtype == "bfloat16"
        assert config.num_mtp_layers == 1
        assert config.rope == RopeConfig(rope_theta=1e7, partial_rotary_factor=0.25)
        assert config.norm_topk_prob is True
        assert config.tie_word_embeddings is False
        assert config.attention_bias is False

    def test_derived_values(self):
        config = ModelConfig.from_dict(OFFICIAL)
        assert config.is_hybrid
        assert config.rotary_dim == 64
        assert (config.delta_key_dim, config.delta_value_dim) == (2048, 4096)
        assert config.conv_channels == 8192
        assert config.attention_layers == tuple(range(3, 48, 4))
        assert len(config.delta_layers) == 36
        assert set(config.attention_layers) | set(config.delta_layers) == set(range(48))
        assert all(config.is_sparse(i) for i in range(48))
        assert config.eos_ids == (151645,)

    def test_written_back_verbatim(self):
        config = ModelConfig.from_dict(OFFICIAL)
        assert config.to_dict() == OFFICIAL
        assert list(config.to_dict()) == list(OFFICIAL)

    def test_reading_what_was_written_gives_the_same(self):
        config = ModelConfig.from_dict(OFFICIAL)
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    def test_it_cannot_be_changed(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            ModelConfig.from_dict(OFFICIAL).hidden_size = 1


class TestSpellings:
    def test_nested_rope_equals_flat(self):
        nested = read(
            rope_theta=None, partial_rotary_factor=None, rope_parameters=dict(NESTED_DEFAULT)
        )
        assert nested == ModelConfig.from_dict(OFFICIAL)

    def test_nested_values_win_over_flat_ones(self):
        config = read(rope_theta=5, rope_parameters=dict(NESTED_DEFAULT))
        assert config.rope.rope_theta == 1e7

    @pytest.mark.parametrize("key", ["rope_type", "type"])
    def test_yarn_flat_equals_nested(self, key):
        yarn = {key: "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
        flat = read(rope_scaling=yarn)
        nested = read(
            rope_theta=None, partial_rotary_factor=None, rope_parameters={**NESTED_DEFAULT, **yarn,
                                                                          "rope_type": "yarn"}
        )  # fmt: skip
        assert flat == nested
        assert flat.rope == RopeConfig(
            rope_type="yarn", rope_theta=1e7, partial_rotary_factor=0.25, factor=4.0,
            original_max_position_embeddings=262144,
        )  # fmt: skip

    def test_yarn_takes_its_trained_length_from_the_context_length(self):
        config = read(rope_scaling={"rope_type": "yarn", "factor": 4.0})
        assert config.rope.original_max_position_embeddings == 262144

    def test_yarn_without_a_factor_takes_the_ratio_of_lengths(self):
        config = read(
            rope_scaling={
                "rope_type": "yarn", "factor": None, "original_max_position_embeddings": 65536,
            }
        )  # fmt: skip
        assert config.rope.factor == 4.0

    def test_all_yarn_settings_are_read(self):
        settings = {
            "factor": 8.0, "original_max_position_embeddings": 1000, "attention_factor": 1.5,
            "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9,
            "truncate": False,
        }  # fmt: skip
        rope = read(rope_scaling={"rope_type": "yarn", **settings}).rope
        assert {name: getattr(rope, name) for name in settings} == settings

    def test_two_rope_objects_that_disagree(self):
        """One of them would be ignored silently, for instance YaRN that was added by hand."""
        with pytest.raises(ConfigError) as caught:
            read(
                rope_scaling={"rope_type": "yarn", "factor": 4.0},
                rope_parameters=dict(NESTED_DEFAULT),
            )
        assert str(caught.value) == (
            "config.json: rope_scaling says rope_type 'yarn', rope_parameters says 'default'. "
            "Keep one of the two objects."
        )

    def test_layer_types_equal_the_interval(self):
        types = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 12
        assert read(full_attention_interval=None, layer_types=types) == read()

    def test_layer_types_win_over_the_interval(self):
        types = ["full_attention"] * 48
        assert read(layer_types=types).attention_layers == tuple(range(48))

    def test_dtype_by_either_key(self):
        assert read(torch_dtype=None, dtype="bfloat16") == read()
        assert read(torch_dtype="torch.float16").dtype == "float16"
        assert read(torch_dtype="float32", dtype="bfloat16").dtype == "bfloat16"

    @pytest.mark.parametrize("key", ["num_nextn_predict_layers", "mtp_num_hidden_layers"])
    def test_mtp_layers_by_either_key(self, key):
        assert read(**{key: 0}).num_mtp_layers == 0

    def test_architecture_instead_of_model_type(self):
        assert read(model_type=None) == read()

    def test_several_end_tokens(self):
        config = read(eos_token_id=[151645, 151643])
        assert config.eos_ids == (151645, 151643)
        assert config.to_dict()["eos_token_id"] == [151645, 151643]
        assert read(eos_token_id=None).eos_ids == ()

    def test_defaults_of_the_family(self):
        needed = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
        config = ModelConfig.from_dict(
            {name: OFFICIAL[name] for name in needed} | {"num_attention_heads": 16}
        )
        theirs = Qwen3NextConfig(**{name: OFFICIAL[name] for name in needed[1:]})
        assert config.rope.partial_rotary_factor == 0.25
        for name in (
            "head_dim", "num_key_value_heads", "intermediate_size", "linear_conv_kernel_dim",
            "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads",
            "linear_num_value_heads", "decoder_sparse_step", "moe_intermediate_size",
            "shared_expert_intermediate_size", "num_experts_per_tok", "num_experts",
            "norm_topk_prob", "max_position_embeddings", "rms_norm_eps", "initializer_range",
            "attention_bias", "router_aux_loss_coef", "tie_word_embeddings",
        ):  # fmt: skip
            assert getattr(config, name) == getattr(theirs, name), name
        assert list(config.layer_types) == theirs.layer_types


class TestTransformersFiles:
    """What transformers writes reads to the same configuration as the official spelling."""

    def test_saved_by_transformers(self, tmp_path):
        Qwen3NextConfig(**OFFICIAL).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert "rope_theta" not in written
        assert "full_attention_interval" not in written
        assert ModelConfig.from_file(tmp_path) == ModelConfig.from_dict(OFFICIAL)

    def test_saved_by_transformers_with_yarn(self, tmp_path):
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
        Qwen3NextConfig(**{**OFFICIAL, "rope_scaling": dict(yarn)}).save_pretrained(tmp_path)
        assert ModelConfig.from_file(tmp_path) == read(rope_scaling=yarn)

    @pytest.mark.parametrize("config_class", [Qwen3NextConfig, Qwen3Config, Qwen3MoeConfig])
    def test_defaults_of_every_family(self, config_class, tmp_path):
        theirs = config_class(num_hidden_layers=4)
        theirs.save_pretrained(tmp_path)
        ours = ModelConfig.from_file(tmp_path)
        expected_dim = getattr(theirs, "head_dim", None) or (
            theirs.hidden_size // theirs.num_attention_heads
        )
        assert ours.head_dim == expected_dim
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "attention_bias",
            "tie_word_embeddings",
        ):  # fmt: skip
            assert getattr(ours, name) == getattr(theirs, name), name
        if hasattr(theirs, "num_experts"):
            assert ours.num_experts == theirs.num_experts
            assert ours.num_experts_per_tok == theirs.num_experts_per_tok
            assert ours.norm_topk_prob == theirs.norm_topk_prob

    def test_what_we_write_is_read_by_transformers(self, tmp_path):
        """Also a configuration that came from no file."""
        config = dataclasses.replace(
            read(rope_scaling={"rope_type": "yarn", "factor": 2.0}), source={}
        )
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        theirs = Qwen3NextConfig.from_pretrained(tmp_path)
        assert theirs.rope_parameters["rope_type"] == "yarn"
        assert theirs.rope_parameters["rope_theta"] == 1e7
        assert theirs.rope_parameters["partial_rotary_factor"] == 0.25
        assert theirs.layer_types == list(config.layer_types)
        theirs.save_pretrained(tmp_path)
        again = ModelConfig.from_file(tmp_path)
        assert again == config


class TestWriting:
    def test_unknown_keys_are_kept(self):
        raw = {**OFFICIAL, "quantization_config": {"quant_method": "fp8"}, "my_key": [1, {"a": 2}]}
        assert ModelConfig.from_dict(raw).to_dict() == raw

    def test_only_changes_are_written(self):
        config = dataclasses.replace(
            read(), vocab_size=100, tie_word_embeddings=True, num_mtp_layers=0
        )
        assert config.to_dict() == {
            **{k: v for k, v in OFFICIAL.items() if v is not None},
            "vocab_size": 100,
            "tie_word_embeddings": True,
            "num_nextn_predict_layers": 0,
        }

    def test_a_changed_rope_replaces_the_nested_object(self):
        config = read(rope_parameters=dict(NESTED_DEFAULT))
        changed = dataclasses.replace(config, rope=dataclasses.replace(config.rope, rope_theta=5e6))
        written = changed.to_dict()
        assert "rope_parameters" not in written
        assert written["rope_theta"] == 5e6
        assert ModelConfig.from_dict(written) == changed

    def test_changed_keys_do_not_leave_their_old_spelling_behind(self):
        config = read(mtp_num_hidden_layers=1)
        changed = dataclasses.replace(config, dtype="float32", num_mtp_layers=0)
        written = changed.to_dict()
        assert "torch_dtype" not in written
        assert "mtp_num_hidden_layers" not in written
        assert ModelConfig.from_dict(written) == changed

    def test_without_a_file_every_key_is_written(self):
        config = dataclasses.replace(read(), source={})
        written = config.to_dict()
        assert written["architectures"] == ["Qwen3NextForCausalLM"]
        assert ModelConfig.from_dict(written) == config

    @pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe"])
    def test_other_families_without_a_file(self, model_type):
        config = dataclasses.replace(read(model_type=model_type), source={})
        assert ModelConfig.from_dict(config.to_dict()) == config

    def test_the_given_dictionary_is_not_modified(self):
        raw = json.loads(json.dumps({**OFFICIAL, "rope_scaling": {"type": "yarn", "factor": 2.0}}))
        before = json.loads(json.dumps(raw))
        ModelConfig.from_dict(raw).to_dict()["vocab_size"] = 0
        assert raw == before


class TestOtherFamilies:
    def test_dense(self):
        config = read(model_type="qwen3")
        assert not config.is_hybrid
        assert config.layer_types == ("full_attention",) * 48
        assert config.num_experts == 0
        assert not any(config.is_sparse(i) for i in range(48))
        assert config.num_mtp_layers == 0

    def test_sparse(self):
        config = read(model_type="qwen3_moe", num_experts=None, num_local_experts=128)
        assert config.num_experts == 128
        assert config.shared_expert_intermediate_size == 0

    def test_their_defaults_differ(self):
        dense = read(model_type="qwen3", head_dim=None, partial_rotary_factor=None)
        assert dense.head_dim == 128
        assert dense.rope.partial_rotary_factor == 1.0
        sparse = read(model_type="qwen3_moe", head_dim=None, norm_topk_prob=None)
        assert sparse.head_dim == 2048 // 16
        assert sparse.norm_topk_prob is False
        narrow = read(model_type="qwen3_moe", head_dim=None, num_attention_heads=32)
        assert narrow.head_dim == 64

    def test_dense_and_sparse_layers_mixed(self):
        config = read(mlp_only_layers=[1], decoder_sparse_step=2, num_hidden_layers=6)
        assert [config.is_sparse(i) for i in range(6)] == [False, False, False, True, False, True]


CONTRADICTIONS = {
    "delta heads": (
        {"linear_num_key_heads": 12},
        "linear_num_value_heads (32) is not a multiple of linear_num_key_heads (12)",
    ),
    "attention heads": (
        {"num_key_value_heads": 3},
        "num_attention_heads (16) is not a multiple of num_key_value_heads (3)",
    ),
    "layer count": (
        {"layer_types": ["full_attention"] * 3},
        "layer_types has 3 entries, num_hidden_layers says 48",
    ),
    "experts per token": (
        {"num_experts_per_tok": 513},
        "num_experts_per_tok (513) must lie between 1 and num_experts (512)",
    ),
    "no expert per token": (
        {"num_experts_per_tok": 0},
        "num_experts_per_tok (0) must lie between 1 and num_experts (512)",
    ),
    "odd rotary width": (
        {"head_dim": 12},
        "head_dim (12) times partial_rotary_factor (0.25) must give an even number of rotated "
        "dimensions, found 3",
    ),
    "no rotary width": (
        {"partial_rotary_factor": 0.001},
        "head_dim (256) times partial_rotary_factor (0.001) must give an even number",
    ),
}
REFUSALS = {
    "layer type": (
        {"layer_types": ["full_attention"] * 47 + ["sliding_attention"]},
        "layer_types[47] is 'sliding_attention'; expected one of linear_attention, full_attention",
    ),
    "delta layer in a dense model": (
        {"model_type": "qwen3", "layer_types": ["linear_attention"] * 48},
        "layer_types[0] is linear_attention, which model_type qwen3 does not have",
    ),
    "model type": (
        {"model_type": "llama"},
        "model_type 'llama' (architectures ['Qwen3NextForCausalLM']) is not supported; "
        "expected one of qwen3_next, qwen3, qwen3_moe",
    ),
    "rope type": (
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        "rope_type 'longrope' is not supported; expected one of default, linear, yarn",
    ),
    "rotary share": (
        {"partial_rotary_factor": 1.5},
        "partial_rotary_factor must lie in (0, 1], found 1.5",
    ),
    "rope factor": (
        {"rope_scaling": {"rope_type": "linear", "factor": -2.0}},
        "must be positive, found 10000000.0 and -2.0",
    ),
    "rope factor type": (
        {"rope_scaling": {"rope_type": "linear", "factor": "two"}},
        "factor must be a finite number, found 'two'",
    ),
    "rope attention factor": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": "x"}},
        "attention_factor must be a finite number, found 'x'",
    ),
    "trained length": (
        {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 0}},
        "original_max_position_embeddings must be at least 1, found 0",
    ),
    "trained length type": (
        {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": "4k"}},
        "original_max_position_embeddings must be an integer, found '4k'",
    ),
    "rope object": ({"rope_scaling": "yarn"}, "rope_scaling must be an object, found 'yarn'"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; expected 'silu'"),
    "dtype": (
        {"torch_dtype": "int8"},
        "dtype 'int8' is not supported; expected one of bfloat16, float16, float32",
    ),
    "mtp layers": (
        {"num_nextn_predict_layers": 2},
        "2 multi-token-prediction layers are not supported; expected 0 or 1",
    ),
    "convolution": (
        {"linear_conv_kernel_dim": 1},
        "linear_conv_kernel_dim must be at least 2, found 1",
    ),
    "zero": ({"hidden_size": 0}, "hidden_size must be at least 1, found 0"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, found 0"),
    "no delta heads": (
        {"linear_num_key_heads": 0},
        "linear_num_key_heads must be at least 1, found 0",
    ),
    "no heads": (
        {"model_type": "qwen3_moe", "num_attention_heads": 0, "head_dim": None},
        "num_attention_heads must be at least 1, found 0",
    ),
    "no expert width": (
        {"moe_intermediate_size": 0},
        "moe_intermediate_size must be at least 1, found 0",
    ),
    "no shared expert": (
        {"shared_expert_intermediate_size": 0},
        "shared_expert_intermediate_size must be at least 1, found 0",
    ),
    "interval": (
        {"full_attention_interval": 0},
        "full_attention_interval must be at least 1, found 0",
    ),
    "sparse step": ({"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1, found 0"),
    "missing key": ({"hidden_size": None}, "hidden_size is missing; expected an integer"),
    "integer": ({"vocab_size": 1.5}, "vocab_size must be an integer, found 1.5"),
    "integer, not a truth value": ({"vocab_size": True}, "vocab_size must be an integer"),
    "number": ({"rms_norm_eps": "small"}, "rms_norm_eps must be a finite number, found 'small'"),
    "finite number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
    "truth value": ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false, found 1"),
    "list": ({"mlp_only_layers": "0"}, "mlp_only_layers must be a list of integers, found '0'"),
    "layer list": ({"layer_types": "full"}, "layer_types must be a list, found 'full'"),
    "token id": ({"eos_token_id": "<|im_end|>"}, "eos_token_id must be a token id"),
    "sliding window": (
        {"model_type": "qwen3", "use_sliding_window": True},
        "sliding-window attention is not supported",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("name", [*CONTRADICTIONS, *REFUSALS])
    def test_one_clear_message(self, name):
        """It names the file, the key, what was found, and what would be right."""
        changes, words = {**CONTRADICTIONS, **REFUSALS}[name]
        with pytest.raises(ConfigError) as caught:
            read(**changes)
        message = str(caught.value)
        assert message.startswith("config.json: ")
        assert words in message
        assert message.endswith(".")
        assert "\n" not in message

    def test_a_change_in_code_is_checked_as_well(self):
        with pytest.raises(ConfigError, match=r"\(32\) is not a multiple of .* \(5\)"):
            dataclasses.replace(read(), linear_num_key_heads=5)


class TestFiles:
    def test_file_or_folder(self, tmp_path):
        file = tmp_path / "config.json"
        file.write_text(json.dumps(OFFICIAL))
        assert ModelConfig.from_file(file) == ModelConfig.from_file(str(tmp_path)) == read()

    def test_missing(self, tmp_path):
        with pytest.raises(ConfigError, match=r"config\.json is not there\. Give a model folder"):
            ModelConfig.from_file(tmp_path)

    @pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}"])
    def test_not_json(self, tmp_path, content):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match="is not valid JSON"):
            ModelConfig.from_file(tmp_path)

    def test_not_an_object(self, tmp_path):
        (tmp_path / "config.json").write_text("[1]")
        with pytest.raises(ConfigError, match="expected a JSON object, found list"):
            ModelConfig.from_file(tmp_path)
