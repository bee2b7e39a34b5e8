"""Tiny models and folders for the tests of weights.

Folders are written and read with the safetensors library, which knows nothing of our code.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qnext.config import ModelConfig
from qnext.model.model import CausalLM

NEXT: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "vocab_size": 71,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "full_attention_interval": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 71,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
MOE: dict[str, Any] = {
    **DENSE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

Tensors = dict[str, Tensor]


@torch.no_grad()
def random_model(raw: Mapping[str, Any], *, seed: int = 0) -> CausalLM:
    """A model of this config in its dtype, every parameter random; it has what the config says."""
    config = ModelConfig.from_dict(raw)
    model = CausalLM(config).to(getattr(torch, config.dtype))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            parameter.data = parameter.data.float()
        value = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(value * (0.2 if parameter.ndim > 1 else 0.5))
    return model.eval()


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of every safetensors file of a folder."""
    out: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            out.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return out


def write_folder(
    folder: Path, raw: Mapping[str, Any], tensors: Tensors, *, shards: int = 1
) -> Path:
    """A model folder of these tensors, dealt out over so many shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = dict(list(tensors.items())[number::shards])
        save_file(mine, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(mine, file))
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Mapping[str, Any]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_same_bits(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Equal names, dtypes, shapes and bytes."""
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        other = got[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        a, b = (t.detach().contiguous().flatten().view(torch.uint8) for t in (other, tensor))
        assert torch.equal(a, b), name
