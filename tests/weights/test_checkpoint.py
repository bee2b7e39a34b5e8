"""Folders written by transformers load here, ours load there, and a round trip changes no bit."""

import json
import logging
import resource
import shutil
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import (
    DENSE,
    MOE,
    NEXT,
    assert_same_bits,
    random_model,
    read_tensors,
    write_folder,
)
from transformers import AutoConfig, AutoModelForCausalLM

import qnext
from qnext.config import ModelConfig
from qnext.errors import CheckpointError, ConfigError
from qnext.weights.checkpoint import (
    checkpoint_index,
    embedded_models,
    load_model,
    resolve_model,
    save_model,
)

BOUND = 2e-4
FAMILIES = {
    "next": NEXT,
    "next tied": {**NEXT, "tie_word_embeddings": True},
    "dense": DENSE,
    "dense tied": {**DENSE, "tie_word_embeddings": True},
    "moe": MOE,
}
IDS = torch.tensor([[3, 70, 1, 0, 25, 25, 8, 41, 66]])


@torch.no_grad()
def their_model(raw, tmp_path, seed=0):
    """A random model of transformers, no parameter at its starting value."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(raw))
    config = AutoConfig.from_pretrained(tmp_path / "bare")
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * (0.2 if parameter.ndim > 1 else 0.5))
    return model


@pytest.mark.parametrize("shard_size", ["30KB", "5GB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folders_of_transformers_load_with_equal_logits(family, shard_size, tmp_path):
    theirs = their_model(FAMILIES[family], tmp_path)
    theirs.save_pretrained(tmp_path / "folder", max_shard_size=shard_size)
    assert (len(list((tmp_path / "folder").glob("*.safetensors"))) > 1) == (shard_size == "30KB")
    ours = load_model(tmp_path / "folder")
    with torch.no_grad():
        want, got = theirs(IDS).logits, ours(IDS).logits
    assert (got - want).abs().max() <= BOUND
    assert ours.mtp is None


@pytest.mark.parametrize("max_shard_bytes", [30_000, 5 * 10**9])
@pytest.mark.parametrize("family", FAMILIES)
def test_our_folders_load_in_transformers_with_equal_logits(family, max_shard_bytes, tmp_path):
    ours = random_model(FAMILIES[family])
    save_model(ours, tmp_path / "folder", max_shard_bytes=max_shard_bytes)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        want, got = theirs.eval()(IDS).logits, ours(IDS).logits
    assert (got - want).abs().max() <= BOUND


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_load_and_save_reproduce_every_bit(family, dtype, tmp_path):
    raw = {**FAMILIES[family], "torch_dtype": dtype}
    model = random_model(raw)
    save_model(model, tmp_path / "one", max_shard_bytes=50_000)
    loaded = load_model(tmp_path / "one")
    assert_same_bits(loaded.state_dict(), model.state_dict())
    save_model(loaded, tmp_path / "two", max_shard_bytes=20_000)
    assert_same_bits(read_tensors(tmp_path / "two"), read_tensors(tmp_path / "one"))
    assert_same_bits(load_model(tmp_path / "two").state_dict(), model.state_dict())


def test_a_published_bfloat16_folder_comes_back_byte_for_byte(tmp_path):
    """All tensors bfloat16, A_log and dt_bias too, as in the official files; float32 in memory."""
    raw = {**NEXT, "torch_dtype": "bfloat16"}
    save_model(random_model(raw), tmp_path / "model")
    tensors = {name: t.bfloat16() for name, t in read_tensors(tmp_path / "model").items()}
    folder = write_folder(tmp_path / "official", raw, tensors, shards=3)
    model = load_model(folder)
    delta = model.model.layers[0].linear_attn
    assert delta.A_log.dtype == delta.dt_bias.dtype == torch.float32
    assert delta.conv1d.weight.dtype == torch.bfloat16
    save_model(model, tmp_path / "again")
    assert_same_bits(read_tensors(tmp_path / "again"), tensors)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == raw


def test_trained_decay_terms_are_never_rounded(tmp_path):
    raw = {**NEXT, "torch_dtype": "bfloat16"}
    model = random_model(raw)
    value = torch.tensor([0.1, 0.2, 0.3, 0.4])  # none of them is a bfloat16
    model.model.layers[0].linear_attn.A_log.data.copy_(value)
    model.model.layers[0].linear_attn.dt_bias.data.fill_(1.0)
    save_model(model, tmp_path / "m")
    stored = read_tensors(tmp_path / "m")
    assert stored["model.layers.0.linear_attn.A_log"].dtype == torch.float32
    assert stored["model.layers.0.linear_attn.dt_bias"].dtype == torch.bfloat16
    assert torch.equal(load_model(tmp_path / "m").model.layers[0].linear_attn.A_log, value)


class TestMtp:
    def test_survives_a_round_trip_and_gives_equal_logits(self, tmp_path):
        model = random_model(NEXT)
        save_model(model, tmp_path / "m", max_shard_bytes=30_000)
        names = [name for name in read_tensors(tmp_path / "m") if name.startswith("mtp.")]
        # Norms, fc; attention; layer norms, router, shared expert and its gate; six experts.
        assert len(names) == 4 + 6 + 2 + 1 + 4 + 6 * 3
        loaded = load_model(tmp_path / "m", ops=model.ops)
        with torch.no_grad():
            assert torch.equal(loaded.mtp_logits(IDS), model.mtp_logits(IDS))

    def test_is_decided_by_the_tensors_not_the_config(self, tmp_path, caplog):
        save_model(random_model(NEXT), tmp_path / "with")
        tensors = read_tensors(tmp_path / "with")
        says_none = {**NEXT, "num_nextn_predict_layers": 0}
        with caplog.at_level(logging.WARNING):
            model = load_model(write_folder(tmp_path / "a", says_none, tensors))
        assert model.mtp is not None
        assert model.config.num_mtp_layers == 1
        assert "num_nextn_predict_layers = 0, the weights have 1" in caplog.text

        main = {name: t for name, t in tensors.items() if not name.startswith("mtp.")}
        says_one = {**NEXT, "mtp_num_hidden_layers": 1}
        with caplog.at_level(logging.WARNING):
            model = load_model(write_folder(tmp_path / "b", says_one, main))
        assert model.mtp is None
        assert "mtp_num_hidden_layers = 1, the weights have 0" in caplog.text
        save_model(model, tmp_path / "c")
        assert ModelConfig.from_file(tmp_path / "c").num_mtp_layers == 0

    def test_a_lost_tensor_is_named(self, tmp_path):
        save_model(random_model(NEXT), tmp_path / "m")
        tensors = read_tensors(tmp_path / "m")
        del tensors["mtp.layers.0.mlp.shared_expert_gate.weight"]
        folder = write_folder(tmp_path / "n", NEXT, tensors)
        with pytest.raises(
            CheckpointError, match=r"1 tensors are missing: mtp\.layers\.0\.mlp\.sh"
        ):
            load_model(folder)


class TestConfig:
    def test_unknown_keys_are_kept(self, tmp_path):
        raw = {**NEXT, "my_note": {"deep": [1, None]}, "transformers_version": "4.57.0.dev0"}
        save_model(random_model(raw), tmp_path / "m")
        save_model(load_model(tmp_path / "m"), tmp_path / "n")
        assert json.loads((tmp_path / "n" / "config.json").read_text()) == raw

    def test_another_dtype_is_written_as_such(self, tmp_path):
        save_model(random_model(NEXT), tmp_path / "m")
        half = load_model(tmp_path / "m", dtype="bfloat16")
        save_model(half, tmp_path / "n")
        assert load_model(tmp_path / "n").dtype == torch.bfloat16
        tensors = read_tensors(tmp_path / "n")
        assert tensors["model.norm.weight"].dtype == torch.bfloat16


class TestDtype:
    @pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("wanted", ["float32", torch.bfloat16, "torch.float16"])
    def test_every_stored_dtype_loads_in_every_dtype(self, stored, wanted, tmp_path):
        model = random_model({**NEXT, "torch_dtype": stored})
        save_model(model, tmp_path / "m")
        loaded = load_model(tmp_path / "m", dtype=wanted)
        dtype = getattr(torch, str(wanted).removeprefix("torch."))
        want = {
            name: t if name.endswith(("A_log", "dt_bias")) else t.to(dtype)
            for name, t in model.state_dict().items()
        }
        assert_same_bits(loaded.state_dict(), want)
        assert loaded.config.dtype == str(dtype).removeprefix("torch.")

    def test_rounding_that_nobody_asked_for_is_said(self, tmp_path, caplog):
        raw = {**DENSE, "torch_dtype": "bfloat16"}
        save_model(random_model(raw), tmp_path / "m")
        tensors = read_tensors(tmp_path / "m")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        folder = write_folder(tmp_path / "n", raw, tensors)
        with caplog.at_level(logging.WARNING):
            load_model(folder)
        assert "1 tensors are stored with more precision than torch.bfloat16" in caplog.text
        assert "model.norm.weight" in caplog.text
        caplog.clear()
        load_model(folder, dtype="bfloat16")
        load_model(tmp_path / "m")
        assert not caplog.text

    def test_values_beyond_float16_are_refused(self, tmp_path):
        model = random_model(DENSE)
        model.model.layers[1].mlp.up_proj.weight.data[5, 5] = 1e6
        save_model(model, tmp_path / "m")
        with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.weight holds 1000000\.0, which"):
            load_model(tmp_path / "m", dtype="float16")


class TestTiedHead:
    RAW = {**DENSE, "tie_word_embeddings": True}  # noqa: RUF012

    @pytest.mark.parametrize("shards", [1, 3])
    def test_a_stored_copy_is_accepted(self, shards, tmp_path, caplog):
        save_model(random_model(self.RAW), tmp_path / "m")
        tensors = read_tensors(tmp_path / "m")
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        folder = write_folder(tmp_path / "n", self.RAW, tensors, shards=shards)
        with caplog.at_level(logging.WARNING):
            model = load_model(folder)
        assert model.lm_head is None
        assert not caplog.text
        save_model(model, tmp_path / "again")
        assert "lm_head.weight" not in read_tensors(tmp_path / "again")

    def test_a_different_one_is_used_and_said(self, tmp_path, caplog):
        """As in transformers: what is stored wins over what the config says."""
        save_model(random_model(self.RAW), tmp_path / "m")
        tensors = read_tensors(tmp_path / "m")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
        folder = write_folder(tmp_path / "n", self.RAW, tensors, shards=2)
        with caplog.at_level(logging.WARNING):
            model = load_model(folder)
        assert "the stored one is used and the model is not tied" in caplog.text
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            assert (model(IDS).logits - theirs(IDS).logits).abs().max() <= BOUND
        save_model(model, tmp_path / "again")
        assert_same_bits(read_tensors(tmp_path / "again"), tensors)
        assert not ModelConfig.from_file(tmp_path / "again").tie_word_embeddings


class TestFilesBesideTheWeights:
    FILES = {  # noqa: RUF012
        "tokenizer.json": b'{"version": "1.0"}\r\n',
        "tokenizer_config.json": b"{}",
        "vocab.json": b"{}",
        "merges.txt": b"#version\n",
        "chat_template.jinja": "{{ 'ä' }}".encode(),
        "generation_config.json": b'{"top_k":20}',
        "special_tokens_map.json": b"{}",
        "added_tokens.json": b"{}",
        "LICENSE": b"\xff\x00 not even text",
    }

    def test_are_copied_byte_for_byte(self, tmp_path):
        save_model(random_model(DENSE), tmp_path / "m")
        for name, content in self.FILES.items():
            (tmp_path / "m" / name).write_bytes(content)
        for left_out in ("pytorch_model.bin", "model-q4.gguf", ".gitattributes"):
            (tmp_path / "m" / left_out).write_bytes(b"x")
        (tmp_path / "m" / "figures").mkdir()
        (tmp_path / "n").mkdir()
        (tmp_path / "n" / "vocab.json").write_bytes(b"mine")
        save_model(load_model(tmp_path / "m"), tmp_path / "n")
        found = {file.name: file.read_bytes() for file in (tmp_path / "n").iterdir()}
        del found["model.safetensors"], found["config.json"]
        assert found == {**self.FILES, "vocab.json": b"mine"}

    def test_a_source_that_is_gone_is_no_hindrance(self, tmp_path):
        save_model(random_model(DENSE), tmp_path / "m")
        model = load_model(tmp_path / "m")
        shutil.rmtree(tmp_path / "m")
        save_model(model, tmp_path / "n")
        assert_same_bits(load_model(tmp_path / "n").state_dict(), model.state_dict())


class TestSaving:
    def test_the_index_is_complete(self, tmp_path):
        model = random_model(NEXT)
        save_model(model, tmp_path / "m", max_shard_bytes=20_000)
        index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
        infos = checkpoint_index(tmp_path / "m")
        assert {n: i.file.name for n, i in infos.items()} == index["weight_map"]
        assert index["metadata"]["total_size"] == sum(i.num_bytes for i in infos.values())
        assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
        sizes: dict[str, int] = {}
        for info in infos.values():
            sizes[info.file.name] = sizes.get(info.file.name, 0) + info.num_bytes
        assert max(sizes.values()) <= 20_000
        last = f"of-{len(sizes):05d}.safetensors"
        assert all(name.endswith(last) for name in sizes)

    def test_a_tensor_larger_than_a_shard_gets_its_own(self, tmp_path):
        model = random_model(DENSE)
        save_model(model, tmp_path / "m", max_shard_bytes=1)
        assert len(list((tmp_path / "m").glob("*.safetensors"))) == len(list(model.parameters()))
        assert_same_bits(load_model(tmp_path / "m").state_dict(), model.state_dict())

    def test_overwriting_leaves_nothing_of_the_old_model(self, tmp_path):
        save_model(random_model(NEXT), tmp_path / "m", max_shard_bytes=20_000)
        (tmp_path / "m" / "notes.md").write_text("mine")
        model = random_model(DENSE, seed=1)
        save_model(model, tmp_path / "m")
        names = sorted(file.name for file in (tmp_path / "m").iterdir())
        assert names == ["config.json", "model.safetensors", "notes.md"]
        assert_same_bits(load_model(tmp_path / "m").state_dict(), model.state_dict())

    def test_onto_the_folder_it_came_from(self, tmp_path):
        save_model(random_model(NEXT), tmp_path / "m")
        (tmp_path / "m" / "merges.txt").write_text("kept")
        model = load_model(tmp_path / "m")
        model.model.norm.weight.data.add_(1)
        save_model(model, tmp_path / "m", max_shard_bytes=30_000)
        assert not (tmp_path / "m" / "model.safetensors").exists()
        assert (tmp_path / "m" / "merges.txt").read_text() == "kept"
        assert_same_bits(load_model(tmp_path / "m").state_dict(), model.state_dict())

    @pytest.mark.parametrize("exists", [False, True])
    def test_a_full_disk_leaves_the_target_as_it_was(self, exists, tmp_path):
        old = random_model(DENSE, seed=1)
        if exists:
            save_model(old, tmp_path / "m")
        before = sorted(tmp_path.rglob("*"))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, hard))
        try:
            with pytest.raises(CheckpointError, match="m could not be written: File too large"):
                save_model(random_model(NEXT), tmp_path / "m", max_shard_bytes=10_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(tmp_path.rglob("*")) == before
        if exists:
            assert_same_bits(load_model(tmp_path / "m").state_dict(), old.state_dict())

    def test_a_save_that_stops_halfway_does_not_look_like_a_model(self, tmp_path):
        """Its new config.json would come last, and the old one is gone."""
        save_model(random_model(DENSE, seed=1), tmp_path / "m", max_shard_bytes=20_000)
        (tmp_path / "m" / "model.safetensors").mkdir()  # cannot be replaced by a file
        with pytest.raises(CheckpointError, match="m could not be written: Is a directory"):
            save_model(random_model(DENSE), tmp_path / "m")
        with pytest.raises(ConfigError, match=r"config\.json is not there"):
            load_model(tmp_path / "m")

    def test_bad_targets_are_refused(self, tmp_path):
        (tmp_path / "file").write_text("")
        model = random_model(DENSE)
        with pytest.raises(CheckpointError, match="is a file; expected a folder"):
            save_model(model, tmp_path / "file")
        with pytest.raises(CheckpointError, match="could not be written"):
            save_model(model, tmp_path / "file" / "below")
        with pytest.raises(CheckpointError, match="max_shard_bytes must be positive, found 0"):
            save_model(model, tmp_path / "m", max_shard_bytes=0)


class TestLoadedModel:
    def test_is_ready_to_run_and_to_train(self, tmp_path):
        save_model(random_model(NEXT), tmp_path / "m")
        model = qnext.load_model(str(tmp_path / "m"))
        assert not model.training
        assert all(p.requires_grad for p in model.parameters())
        assert model.source_folder == tmp_path / "m"
        model(IDS).logits.sum().backward()

    def test_does_not_depend_on_its_files(self, tmp_path):
        save_model(random_model(NEXT), tmp_path / "m")
        model = load_model(tmp_path / "m")
        with torch.no_grad():
            want = model(IDS).logits
            (tmp_path / "m" / "model.safetensors").write_bytes(b"")
            assert torch.equal(model(IDS).logits, want)
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()

    def test_uses_the_ops_it_is_given(self, tmp_path):
        from qnext.ops import select

        save_model(random_model(NEXT), tmp_path / "m")
        ops = select(prefer={"all": "reference"})
        assert load_model(tmp_path / "m", ops=ops).ops is ops


class TestNames:
    def test_a_path_stands_for_itself(self, tmp_path):
        (tmp_path / "qnext-mini").mkdir()
        assert resolve_model(tmp_path) == tmp_path
        assert resolve_model(str(tmp_path / "qnext-mini")) == tmp_path / "qnext-mini"

    def test_embedded_models_have_names(self):
        folders = embedded_models()
        for name, folder in folders.items():
            assert resolve_model(name) == folder
            assert (folder / "config.json").is_file()

    def test_unknown_names_are_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match="no model 'Qwen/nothing': there is no such file"):
            resolve_model("Qwen/nothing")
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="is a file, not a model folder"):
            resolve_model(tmp_path / "config.json")
