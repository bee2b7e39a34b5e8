"""Which weights are packed, under which names; packed folders and packing in memory."""

from math import prod
from pathlib import Path

import pytest
import torch
from tests.weights.tiny_checkpoints import DENSE, MOE, NEXT, random_model, read_tensors

from qnext import cost
from qnext.config import ModelConfig
from qnext.errors import CheckpointError
from qnext.quantization import Bits, expert_bytes, read_bits
from qnext.weights.checkpoint import save_model
from qnext.weights.formats import PackedExperts, PackedMatrix, pack, unpack
from qnext.weights.packed import Part, pack_model, parts

NEVER = (
    "mlp.gate.weight",
    "shared_expert_gate",
    "norm",
    "conv1d",
    "A_log",
    "dt_bias",
    "in_proj_ba",
)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "hybrid"
    save_model(random_model({**NEXT, "num_nextn_predict_layers": 1}), folder)
    return folder


def part_of(name: str, found: list[Part]) -> Part:
    [part] = [part for part in found if name in part.inputs]
    return part


def test_every_published_tensor_is_in_one_part() -> None:
    for raw in (NEXT, DENSE, MOE):
        config = ModelConfig.from_dict(raw)
        plain = parts(config, Bits.all(16))
        names = [name for part in plain for name in part.inputs]
        assert all(part.format is None for part in plain)
        packed = parts(config, Bits.all(4, embedding=8))
        assert sorted(name for part in packed for name in part.inputs) == sorted(names)
        for part in packed:
            if any(word in part.name for word in NEVER):
                assert part.format is None, part.name
            else:
                assert part.format == ("q8" if "embed" in part.name else "q4"), part.name


def test_every_part_has_its_own_setting() -> None:
    config = ModelConfig.from_dict({**NEXT, "num_nextn_predict_layers": 1})
    found = parts(config, Bits(experts=4, shared=8, attention=16, head=8, embedding=4, mtp=8))
    layer = "model.layers.0"
    for name, format in {
        f"{layer}.mlp.experts.3.up_proj.weight": "q4",
        f"{layer}.mlp.shared_expert.up_proj.weight": "q8",
        "model.layers.1.mlp.down_proj.weight": "q8",
        f"{layer}.linear_attn.in_proj_qkvz.weight": None,
        "model.layers.3.self_attn.o_proj.weight": None,
        "lm_head.weight": "q8",
        "model.embed_tokens.weight": "q4",
        "mtp.fc.weight": "q8",
        "mtp.layers.0.self_attn.q_proj.weight": "q8",
        "mtp.layers.0.mlp.experts.0.gate_proj.weight": "q8",
        "mtp.layers.0.mlp.gate.weight": None,
        "mtp.norm.weight": None,
    }.items():
        assert part_of(name, found).format == format, name
    tied = parts(ModelConfig.from_dict({**DENSE, "tie_word_embeddings": True}), Bits(head=8))
    assert part_of("model.embed_tokens.weight", tied).format == "q8"


def test_packing_in_memory_packs_each_tensor(hybrid) -> None:
    model = pack_model(hybrid, Bits.all(4, head=8, attention=16))
    tensors = read_tensors(hybrid)
    head = model["lm_head.weight"]
    assert isinstance(head, PackedMatrix)
    assert torch.equal(head.data, pack("q8", tensors["lm_head.weight"]).data)
    prefix = "model.layers.0.mlp"
    gate_up, down = (model[f"{prefix}.experts.{n}_proj"] for n in ("gate_up", "down"))
    assert isinstance(gate_up, PackedExperts)
    assert isinstance(down, PackedExperts)
    for e in range(6):
        own = [tensors[f"{prefix}.experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")]
        want = [unpack(pack("q4", one)) for one in own]
        assert torch.equal(unpack(gate_up)[e], torch.cat(want[:2]))
        assert torch.equal(unpack(down)[e], want[2])
    shared = model[f"{prefix}.shared_expert.gate_up_proj.weight"]
    assert isinstance(shared, PackedExperts)
    up = tensors[f"{prefix}.shared_expert.up_proj.weight"]
    assert torch.equal(unpack(shared)[0].chunk(2)[1], unpack(pack("q4", up)))
    for name in ("model.norm.weight", "model.layers.0.linear_attn.in_proj_qkvz.weight"):
        kept = model[name]
        assert isinstance(kept, torch.Tensor)
        assert torch.equal(kept, tensors[name])
    assert model.config.num_mtp_layers == 1
    assert model.num_bytes < 0.8 * sum(t.nbytes for t in tensors.values())


def test_sixteen_bits_leave_every_tensor_as_it_is(hybrid) -> None:
    model, tensors = pack_model(hybrid, 16), read_tensors(hybrid)
    assert sorted(model.weights) == sorted(tensors)
    for name, tensor in tensors.items():
        found = model[name]
        assert isinstance(found, torch.Tensor)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"bits of head: expected one of 4, 8, 16, found 5"):
        Bits(head=5)
    assert read_bits({"quantization_config": {"quant_method": "fp8"}}) is None
    bits = Bits.all(8, mtp=4)
    assert read_bits({"quantization_config": bits.as_config()}) == bits
    with pytest.raises(CheckpointError, match="format_version 2; this version of qnext reads 1"):
        read_bits({"quantization_config": {**bits.as_config(), "format_version": 2}})
    with pytest.raises(CheckpointError, match="must give attention, embedding"):
        read_bits({"quantization_config": {**bits.as_config(), "bits": {"head": 4}}})


@pytest.mark.parametrize(
    "raw",
    [
        {**NEXT, "num_nextn_predict_layers": 1},
        {**DENSE, "tie_word_embeddings": True},
        {**MOE, "hidden_size": 64},
    ],
    ids=["next", "tied", "moe"],
)
@pytest.mark.parametrize("bits", [Bits.all(4), Bits(experts=8, attention=16, embedding=8, mtp=8)])
def test_cost_counts_the_bytes_of_packed_weights(raw, bits) -> None:
    config = ModelConfig.from_dict({**raw, "torch_dtype": "bfloat16"})
    stored = sum(
        prod(part.stored_shape) * (2 if part.format is None else 1) for part in parts(config, bits)
    )
    # Experts on file are padded to 4,096 bytes each; the kernels do not read that.
    padding = 0
    for part in parts(config, bits):
        if part.kind == "experts" and part.format is not None:
            _, used, stride = expert_bytes(part.format, part.shape[1], part.shape[2])
            padding += part.shape[0] * (stride - used)
    assert cost.weight_bytes(config, bits) == stored - padding
