"""The GGUF writer: every value back out of the file, and llama.cpp's logits if it is installed."""

import numpy as np
import pytest
import torch
from tests.conftest import TINY

from qnext.bench.gguf_file import published, tensors_of, write_gguf
from qnext.config import ModelConfig
from qnext.errors import RequestError
from qnext.model.model import CausalLM, initialise

gguf = pytest.importorskip("gguf", reason="writing GGUF needs the package gguf")

RAW = {**TINY, "linear_value_head_dim": 8, "hidden_size": 64, "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from qnext import save_model

    model = CausalLM(ModelConfig.from_dict(RAW)).bfloat16()
    initialise(model, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    where = tmp_path_factory.mktemp("gguf") / "model"
    save_model(model, where)
    return where


@pytest.fixture(scope="module")
def stored(folder):
    return gguf.GGUFReader(write_gguf(folder, folder.parent / "model.gguf"))


def _values(tensor) -> torch.Tensor:
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        raw = torch.from_numpy(np.array(tensor.data).view(np.uint8).reshape(-1).copy())
        return raw.view(torch.bfloat16).view(shape).float()
    return torch.from_numpy(np.array(tensor.data)).view(shape)


def test_every_tensor_comes_back(folder, stored):
    read, config = published(folder)
    expected = {t.name: torch.cat(list(t.values())) for t in tensors_of(config, read)}
    assert {tensor.name for tensor in stored.tensors} == set(expected)
    for tensor in stored.tensors:
        want = expected[tensor.name].float()
        torch.testing.assert_close(_values(tensor).reshape(-1), want.reshape(-1), rtol=0, atol=0)


def test_rows_and_signs_are_those_llama_cpp_wants(folder, stored):
    read, config = published(folder)
    found = {tensor.name: _values(tensor) for tensor in stored.tensors}
    mixer = "model.layers.0.linear_attn."
    K, own = config.linear_key_head_dim, 2 * config.linear_value_head_dim
    grouped = read(f"{mixer}in_proj_qkvz.weight").float().view(2, 2 * K + 2 * own, -1)
    # The key of the second key head, the first gate row of the second.
    torch.testing.assert_close(found["blk.0.attn_qkv.weight"][3 * K], grouped[1, K])
    torch.testing.assert_close(found["blk.0.attn_gate.weight"][own], grouped[1, 2 * K + own])
    torch.testing.assert_close(found["blk.0.ssm_a"], -read(f"{mixer}A_log").float().exp())
    norm = read("model.layers.0.input_layernorm.weight").float() + 1
    torch.testing.assert_close(found["blk.0.attn_norm.weight"], norm)
    down = read("model.layers.2.mlp.experts.5.down_proj.weight").float()
    torch.testing.assert_close(found["blk.2.ffn_down_exps.weight"][5], down)


def test_a_packed_folder_gives_the_values_it_stands_for(folder, tmp_path):
    from qnext.bench import gguf_file
    from qnext.quantization import Bits
    from qnext.weights.formats import unpack
    from qnext.weights.packed import pack_model

    packed = pack_model(folder, Bits.all(4))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    both = unpack(packed["model.layers.1.mlp.experts.gate_up_proj"])
    torch.testing.assert_close(gguf_file._unpacked(packed, name), both[3, 16:])
    shared = "model.layers.1.mlp.shared_expert."
    gate = unpack(packed[f"{shared}gate_up_proj.weight"])[0, :24]
    torch.testing.assert_close(gguf_file._unpacked(packed, f"{shared}gate_proj.weight"), gate)


def test_what_llama_cpp_cannot_hold_is_refused(tiny_folder, tmp_path):
    with pytest.raises(RequestError, match="linear_key_head_dim and linear_value_head_dim differ"):
        write_gguf(tiny_folder, tmp_path / "no.gguf")
    assert not list(tmp_path.iterdir())


def test_llama_cpp_reads_it_and_gives_the_same_logits(folder):
    pytest.importorskip("llama_cpp", reason="needs the package llama-cpp-python")
    from qnext import load_model
    from qnext.bench.llama_cpp import LlamaModel

    path = write_gguf(folder, folder.parent / "again.gguf")
    ids = torch.randint(0, 512, (33,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours = load_model(folder, dtype="float32")(ids[None]).logits[0]
    theirs = LlamaModel(path, threads=1)
    try:
        logits = theirs.logits(ids.tolist())
    finally:
        theirs.close()
    # llama.cpp rounds activations to bfloat16 in front of bfloat16 weights, and now and then that
    # chooses another expert. A row in the wrong place gives an error of about 1.
    error = (torch.from_numpy(logits) - ours).square().mean().sqrt() / ours.square().mean().sqrt()
    assert error < 0.1


def test_a_state_of_llama_cpp_is_stretched(folder):
    pytest.importorskip("llama_cpp", reason="needs the package llama-cpp-python")
    from qnext.bench.llama_cpp import LlamaModel, stretch

    model = LlamaModel(write_gguf(folder, folder.parent / "third.gguf"), threads=1)
    try:
        for flash in (0, 1):
            context = model.context(300, sequences=2, flash=flash)
            context.run([(7 * i % 512, i, 0) for i in range(64)], [])
            state = context.state()
            assert stretch(state, 64) == state
            context.clear()
            for sequence in range(2):
                context.load(stretch(state, 200), sequence)
                assert context.length(sequence) == 200
            rows = context.run([(3, 200, 0), (3, 200, 1)], range(2))
            assert np.isfinite(rows).all()
            np.testing.assert_allclose(rows[0], rows[1], atol=1e-2)
    finally:
        model.close()


def test_llama_cpp_runs_every_kind_of_case(folder):
    pytest.importorskip("llama_cpp", reason="needs the package llama-cpp-python")
    from qnext.bench.cases import Case
    from qnext.bench.llama_cpp import LlamaPeer

    peer = LlamaPeer("BF16", write_gguf(folder, folder.parent / "fourth.gguf"), threads=1)
    cases = {
        Case(kind="decode", steps=2): 1,
        Case(kind="decode", context=100, steps=2): 2,
        Case(kind="batch", sequences=3, context=70, steps=2): 2,
        Case(kind="prefill", rows=600, steps=1): 1,
    }
    try:
        for case, settings in cases.items():
            sessions = peer.open(case)
            assert len(sessions) == settings
            for session in sessions.values():
                for _ in range(2):
                    session.reset()
                    for _ in range(case.steps):
                        session.step()
                    ends = {session.context.length(s) for s in range(case.sequences)}
                    assert ends == {case.length}
        size = peer.bytes_per_step(Case(kind="decode", steps=1), experts=8)
        assert size is not None
        # All but the experts and the embedding, and 8 of 24 experts of 3 matrices of 64 x 16.
        assert 8 * 3 * 64 * 16 * 2 < size < peer.model.path.stat().st_size
    finally:
        peer.close()
