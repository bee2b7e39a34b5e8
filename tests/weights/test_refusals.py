"""Unusable folders: each gives one message that names the thing and the remedy."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import (
    DENSE,
    NEXT,
    Tensors,
    random_model,
    read_tensors,
    write_folder,
    write_index,
)

from qnext.errors import BackendError, CheckpointError, ConfigError
from qnext.weights.checkpoint import checkpoint_index, load_model, resolve_model, save_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def tensors(tmp_path) -> Tensors:
    save_model(random_model(NEXT), tmp_path / "whole")
    return read_tensors(tmp_path / "whole")


@pytest.fixture
def sharded(tmp_path, tensors) -> Path:
    return write_folder(tmp_path / "sharded", NEXT, tensors, shards=4)


def refusal(folder, **options) -> str:
    """The message, which is one line that stands for itself."""
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


class TestFiles:
    def test_missing_config(self, tmp_path):
        (tmp_path / "m").mkdir()
        with pytest.raises(ConfigError, match=r"m/config\.json is not there"):
            load_model(tmp_path / "m")

    def test_missing_shards(self, sharded):
        (sharded / "model-00002-of-00004.safetensors").unlink()
        (sharded / "model-00004-of-00004.safetensors").unlink()
        message = refusal(sharded)
        assert "2 of 4 weight files are missing: model-00002-of-00004.safetensors, " in message
        assert "download or copy them again" in message

    @pytest.mark.parametrize("left", [0, 5, 100, -1])
    def test_truncated_shard(self, sharded, left):
        file = sharded / "model-00003-of-00004.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:left])
        message = refusal(sharded)
        assert str(file) in message
        if left in (100, -1):
            assert "is truncated" in message
            assert f"the file has {len(data[:left])}" in message

    def test_a_git_lfs_pointer(self, sharded):
        file = sharded / "model-00001-of-00004.safetensors"
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
        assert f"{file} is a Git LFS pointer" in refusal(sharded)

    def test_no_weights_at_all(self, tmp_path):
        folder = write_folder(tmp_path / "m", NEXT, {})
        (folder / "model.safetensors").unlink()
        assert "holds no weights: expected model.safetensors, or" in refusal(folder)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
    def test_pickle_files(self, name, tmp_path):
        folder = write_folder(tmp_path / "m", NEXT, {})
        (folder / "model.safetensors").rename(folder / name)
        message = refusal(folder)
        assert f"pickle files ({name})" in message
        assert "Convert them with the safetensors library" in message
        with pytest.raises(CheckpointError, match="Convert them"):
            resolve_model(folder / name)

    def test_an_index_of_pickle_files(self, sharded):
        write_index(sharded, {"model.norm.weight": "pytorch_model-00001-of-00002.bin"})
        assert "pickle files (pytorch_model-00001-of-00002.bin)" in refusal(sharded)

    def test_gguf(self, tmp_path):
        folder = write_folder(tmp_path / "m", NEXT, {})
        (folder / "model.safetensors").rename(folder / "model-q4_k_m.gguf")
        assert "GGUF weights, which are not supported yet" in refusal(folder)

    def test_shards_without_their_index(self, sharded):
        (sharded / INDEX).unlink()
        assert f"4 safetensors files but no {INDEX}" in refusal(sharded)

    def test_one_file_of_any_name_is_fine(self, tmp_path, tensors):
        folder = write_folder(tmp_path / "m", NEXT, tensors)
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        load_model(folder)


class TestIndex:
    @pytest.mark.parametrize(
        "target",
        ["../whole/model.safetensors", "/etc/model.safetensors", "..", "", "a\\b.safetensors", 7],
    )
    def test_files_outside_the_folder(self, sharded, target):
        write_index(sharded, {"model.norm.weight": target})
        message = refusal(sharded)
        assert f"weight_map puts model.norm.weight into {target!r}; expected" in message

    def test_other_files(self, sharded):
        write_index(sharded, {"model.norm.weight": "config.json"})
        assert "expected a *.safetensors file" in refusal(sharded)

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', "\xff"])
    def test_damaged(self, sharded, content):
        (sharded / INDEX).write_text(content, encoding="latin-1")
        message = refusal(sharded)
        assert str(sharded / INDEX) in message

    def test_a_tensor_that_is_not_in_its_file(self, sharded):
        weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
        file = weight_map["model.embed_tokens.weight"]
        write_index(sharded, {**weight_map, "model.extra": file})
        assert f"model.extra (in {file})" in refusal(sharded)

    def test_a_tensor_that_is_not_in_the_index(self, sharded):
        weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
        file = weight_map.pop("model.embed_tokens.weight")
        write_index(sharded, weight_map)
        message = refusal(sharded)
        assert f"{file} holds 1 tensors that {INDEX} does not place there" in message
        assert "model.embed_tokens.weight" in message


class TestTensors:
    def test_missing_ones_are_named_with_their_shard(self, tmp_path, tensors):
        lost = "model.layers.2.linear_attn.A_log"
        del tensors[lost]
        folder = write_folder(tmp_path / "m", NEXT, tensors, shards=2)
        message = refusal(folder)
        assert f"1 tensors are missing: {lost} (its neighbours are in model-00001-of" in message

    def test_many_missing_ones_are_counted(self, tmp_path, tensors):
        kept = {n: t for n, t in tensors.items() if ".layers.1." not in n}
        count = len(tensors) - len(kept)
        message = refusal(write_folder(tmp_path / "m", NEXT, kept))
        assert f"{count} tensors are missing: model.layers.1." in message
        assert f", and {count - 5} more" in message

    def test_unknown_ones_are_named(self, tmp_path, tensors):
        for i in range(7):
            tensors[f"model.visual.block{i}.weight"] = torch.zeros(3, i + 1)
        message = refusal(write_folder(tmp_path / "m", NEXT, tensors))
        assert "7 tensors are not part of the model that config.json describes" in message
        assert "model.visual.block4.weight (F32 [3, 5]), and 2 more" in message

    def test_renamed_ones_are_shown_together(self, tmp_path, tensors):
        tensors["model.final.weight"] = tensors.pop("model.norm.weight")
        message = refusal(write_folder(tmp_path / "m", NEXT, tensors))
        assert "1 tensors are missing: model.norm.weight." in message
        assert "In their place stand unknown ones: model.final.weight" in message

    def test_harmless_ones_are_left_out(self, tmp_path, tensors):
        tensors["model.layers.3.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        load_model(write_folder(tmp_path / "m", NEXT, tensors))

    @pytest.mark.parametrize(
        "name",
        [
            "model.embed_tokens.weight",
            "model.layers.0.linear_attn.conv1d.weight",
            "mtp.layers.0.mlp.experts.5.down_proj.weight",
        ],
    )
    def test_wrong_shapes_are_named(self, name, tmp_path, tensors):
        want = list(tensors[name].shape)
        tensors[name] = tensors[name][1:]
        message = refusal(write_folder(tmp_path / "m", NEXT, tensors))
        assert f"{name} has the wrong shape: config.json asks for {want}, found" in message
        assert str([want[0] - 1, *want[1:]]) in message

    def test_a_config_of_another_size(self, tmp_path, tensors):
        folder = write_folder(tmp_path / "m", {**NEXT, "hidden_size": 64}, tensors)
        assert "config.json and the weights do not belong together" in refusal(folder)

    def test_integers_are_no_weights(self, tmp_path, tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].int()
        message = refusal(write_folder(tmp_path / "m", NEXT, tensors))
        assert "model.norm.weight is stored as I32; expected BF16, F16, F32" in message

    @pytest.mark.parametrize(
        ("suffixes", "format_name"),
        [
            (("qweight", "qzeros", "scales"), "AWQ or GPTQ (int4)"),
            (("qweight", "qzeros", "scales", "g_idx"), "GPTQ (int4)"),
            (("weight_packed", "weight_scale", "weight_shape"), "compressed-tensors"),
            (("weight", "weight.absmax", "weight.quant_map"), "bitsandbytes"),
            (("weight", "scales", "biases"), "MLX (int4)"),
            (("weight", "weight_scale", "weight_scale_2"), "ModelOpt"),
        ],
    )
    def test_other_quantised_formats(self, suffixes, format_name, tmp_path, tensors):
        module = "model.layers.0.mlp.experts.0.gate_proj"
        del tensors[f"{module}.weight"]
        for suffix in suffixes:
            tensors[f"{module}.{suffix}"] = torch.zeros(4, 4, dtype=torch.int32)
        message = refusal(write_folder(tmp_path / "m", NEXT, tensors))
        assert format_name in message
        assert "not supported yet. Use the model's BF16 or block FP8 folder" in message

    @pytest.mark.parametrize(
        ("part", "value", "message"),
        [
            ("A_log", float("nan"), "A_log holds values that are not finite"),
            ("A_log", float("-inf"), "A_log holds values that are not finite"),
            ("A_log", 100.0, r"must be positive and finite, but .* lies between 0\..* and 100"),
            ("A_log", -200.0, "must be positive and finite, but .* lies between -200 and"),
            ("dt_bias", float("inf"), "dt_bias holds values that are not finite"),
            ("norm.weight", float("nan"), r"linear_attn\.norm\.weight holds values that are"),
        ],
    )
    def test_values_that_can_only_give_nan(self, part, value, message, tmp_path, tensors):
        tensors[f"model.layers.0.linear_attn.{part}"][1] = value
        with pytest.raises(CheckpointError, match=message):
            load_model(write_folder(tmp_path / "m", NEXT, tensors))


class TestArguments:
    def test_dtypes(self, sharded):
        for dtype in ("int8", torch.float64, "nonsense"):
            message = refusal(sharded, dtype=dtype)
            assert "is not supported for loading; expected auto or one of bfloat16" in message

    def test_devices(self, sharded):
        with pytest.raises(BackendError, match="device 'gpu' is unknown; expected cpu, cuda"):
            load_model(sharded, device="gpu")
        with pytest.raises(BackendError, match=r"device cuda:99: torch sees \d+ CUDA devices"):
            load_model(sharded, device="cuda:99")


def test_the_index_can_be_read_without_a_fitting_config(tmp_path):
    save_model(random_model(DENSE), tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    save_file({"x": torch.zeros(2, 3).bfloat16()}, tmp_path / "m" / "model.safetensors")
    (info,) = checkpoint_index(tmp_path / "m").values()
    assert (info.dtype, info.shape, info.num_bytes) == ("BF16", (2, 3), 12)
