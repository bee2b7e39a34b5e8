"""``quantize``: files that are used in place, interruptions, refusals, and loading the result."""

import json
import logging
from pathlib import Path

import pytest
import torch
from tests.weights.tiny_checkpoints import DENSE, MOE, NEXT, random_model, read_tensors

from qnext.errors import CheckpointError
from qnext.quantization import Bits
from qnext.weights import quantize as quantize_module
from qnext.weights.checkpoint import load_model, save_model
from qnext.weights.formats import PackedExperts, PackedMatrix, pack, unpack
from qnext.weights.packed import PackedModel, open_packed, pack_model
from qnext.weights.quantize import finish, quantize
from qnext.weights.safetensors_file import read_header
from qnext.weights.shards import PROGRESS_FILE

SMALL_SHARDS = 20_000


def saved(folder: Path, raw: dict) -> Path:
    save_model(random_model(raw), folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "next"
    return saved(folder, {**NEXT, "num_nextn_predict_layers": 1})


def assert_equal_weights(one: PackedModel, other: PackedModel) -> None:
    assert list(one.weights) == list(other.weights)
    for name, weight in one.weights.items():
        a, b = (w if isinstance(w, torch.Tensor) else w.data for w in (weight, other.weights[name]))
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("raw", "bits"),
    [
        ({**NEXT, "num_nextn_predict_layers": 1}, Bits.all(4)),
        ({**NEXT, "num_nextn_predict_layers": 0}, Bits.all(8, embedding=8, head=4)),
        (MOE, Bits.all(4, attention=16)),
        ({**DENSE, "tie_word_embeddings": True}, Bits.all(8)),
    ],
)
def test_a_written_folder_is_what_packing_in_memory_gives(tmp_path, raw, bits) -> None:
    folder = saved(tmp_path / "source", raw)
    written = quantize(folder, tmp_path / "packed", bits, shard_bytes=SMALL_SHARDS)
    assert len(written.checksums) > 1
    assert_equal_weights(written.model, pack_model(folder, bits))
    again = open_packed(tmp_path / "packed")
    assert (again.bits, again.config) == (bits, pack_model(folder, bits).config)


def test_packed_tensors_are_aligned_in_the_file(source, tmp_path) -> None:
    written = quantize(source, tmp_path / "packed", 4, shard_bytes=SMALL_SHARDS)
    starts = {"experts": 4096, "other": 64}
    seen = set()
    for file in written.checksums:
        for name, info in read_header(tmp_path / "packed" / file).items():
            if name.endswith((".q4", ".q8")):
                kind = "experts" if ".experts." in name else "other"
                assert info.start % starts[kind] == 0, name
                seen.add(kind)
    assert seen == set(starts)
    for weight in written.model.weights.values():
        if isinstance(weight, PackedMatrix | PackedExperts):
            assert weight.data.data_ptr() % 64 == 0


def test_what_is_not_packed_is_kept_bit_for_bit(source, tmp_path) -> None:
    quantize(source, tmp_path / "packed", Bits.all(4, attention=16))
    before, after = read_tensors(source), read_tensors(tmp_path / "packed")
    kept = [name for name in after if not name.endswith(".q4")]
    assert "model.layers.0.linear_attn.in_proj_ba.weight" in kept
    assert "model.layers.0.mlp.gate.weight" in kept
    assert "model.layers.3.self_attn.q_proj.weight" in kept
    for name in kept:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])


def test_an_interrupted_run_continues(source, tmp_path, monkeypatch) -> None:
    target = tmp_path / "packed"
    plain, written = quantize_module.write_shard, []

    def breaks_off(file, entries, pieces):
        if len(written) == 2:
            # In the middle of a shard, as a lost connection or a full disk would.
            def interrupted(part):
                yield from list(pieces(part))[:1]
                raise KeyboardInterrupt

            return plain(file, entries, interrupted)
        written.append(file.name)
        return plain(file, entries, pieces)

    monkeypatch.setattr(quantize_module, "write_shard", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, target, 4, shard_bytes=SMALL_SHARDS)
    assert not (target / "config.json").exists()
    files = {path.name for path in target.glob("*.safetensors")}
    assert files == set(written)
    assert not list(target.glob(".*"))
    with pytest.raises(CheckpointError, match="holds an unfinished run of other work"):
        quantize(source, target, 8, shard_bytes=SMALL_SHARDS)
    # One of the finished shards is damaged meanwhile: it is not trusted.
    damaged = target / written[0]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    monkeypatch.setattr(quantize_module, "write_shard", plain)
    done = quantize(source, target, 4, shard_bytes=SMALL_SHARDS)
    assert done.reused == (written[1],)
    assert_equal_weights(done.model, pack_model(source, 4))
    assert (target / PROGRESS_FILE).exists()
    finish(target)
    with pytest.raises(CheckpointError, match="is not empty"):
        quantize(source, target, 4)


def test_a_packed_folder_loads_by_unpacking(source, tmp_path, caplog) -> None:
    target = tmp_path / "packed"
    quantize(source, target, Bits.all(8, embedding=8), shard_bytes=SMALL_SHARDS)
    with caplog.at_level(logging.WARNING):
        model = load_model(target)
    assert "is packed; it is unpacked to float32" in caplog.text
    tensors = read_tensors(source)
    for name, want in {
        "model.layers.3.self_attn.k_proj.weight": "model.layers.3.self_attn.k_proj.weight",
        "model.layers.0.mlp.shared_expert.up_proj.weight":
            "model.layers.0.mlp.shared_expert.up_proj.weight",
        "lm_head.weight": "lm_head.weight",
        "model.embed_tokens.weight": "model.embed_tokens.weight",
        "mtp.fc.weight": "mtp.fc.weight",
    }.items():  # fmt: skip
        assert torch.equal(model.get_parameter(name), unpack(pack("q8", tensors[want]))), name
    prefix = "model.layers.2.mlp.experts"
    up = unpack(pack("q8", tensors[f"{prefix}.4.up_proj.weight"]))
    stack = model.get_parameter(f"{prefix}.gate_up_proj")
    assert torch.equal(stack[4, stack.shape[1] // 2 :], up)
    ids = torch.randint(71, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        near, exact = model(ids).logits, load_model(source)(ids).logits
    # A tiny random model: a router that sees another input may choose another expert.
    assert (near - exact).norm() < 0.25 * exact.norm()
    # Saved again it is a plain folder, and nothing says otherwise.
    save_model(model, tmp_path / "plain")
    raw = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in raw
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "plain")(ids).logits, near)


def test_other_writers_cost_a_copy_not_the_folder(source, tmp_path, caplog) -> None:
    from safetensors.torch import save_file

    target = tmp_path / "packed"
    written = quantize(source, target, 4)
    tensors = read_tensors(target)
    want = {name: tensor.clone() for name, tensor in tensors.items()}
    # Written by a library that does not pad its header, an odd tensor first.
    save_file(want, target / "model.safetensors", metadata={"format": "pt", "x": "y" * 9})
    with caplog.at_level(logging.WARNING):
        found = open_packed(target)
    assert_equal_weights(found, written.model)
    for weight in found.weights.values():
        if isinstance(weight, PackedMatrix | PackedExperts):
            assert weight.data.data_ptr() % 64 == 0


def test_folders_that_do_not_fit_are_refused(source, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="is not packed"):
        open_packed(source)
    target = tmp_path / "packed"
    quantize(source, target, 4)
    finish(target)
    with pytest.raises(CheckpointError, match="is packed already"):
        pack_model(target, 4)
    with pytest.raises(CheckpointError, match="source and target"):
        quantize(source, source, 4)
    config = target / "config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, "quantization_config": Bits.all(8).as_config()}))
    with pytest.raises(CheckpointError, match=r"are missing .*unknown"):
        open_packed(target)
    config.write_text(json.dumps({**raw, "moe_intermediate_size": 96}))
    with pytest.raises(CheckpointError, match="has the wrong shape: expected U8"):
        load_model(target)


def test_disks_that_are_too_small_are_noticed_first(source, tmp_path, monkeypatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(quantize_module.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(CheckpointError, match=r"GB are to be written and 0\.0 GB are free"):
        quantize(source, tmp_path / "packed", 4)
    assert not list((tmp_path / "packed").glob("*.safetensors"))
