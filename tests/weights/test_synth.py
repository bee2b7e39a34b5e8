"""``synth``: random checkpoints that load, compute, and differ from expert to expert."""

import pytest
import torch
from tests.weights.tiny_checkpoints import DENSE, MOE, NEXT

from qnext.config import ModelConfig
from qnext.errors import CheckpointError, ConfigError
from qnext.quantization import Bits
from qnext.weights.checkpoint import load_model
from qnext.weights.formats import PackedExperts, q8_integers, unpack
from qnext.weights.packed import open_packed
from qnext.weights.synth import cut_config, popularity, synthesise


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("raw", [NEXT, DENSE, MOE], ids=["next", "dense", "moe"])
def test_every_config_and_format_runs(tmp_path, raw, bits) -> None:
    folder = synthesise(raw, tmp_path / "model", bits)
    model = load_model(folder)
    ids = torch.randint(71, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.isfinite().all()
    assert logits.std() > 0
    head = model.get_parameter("lm_head.weight")
    assert float(head.detach().std()) == pytest.approx(0.02, rel=0.15)
    assert (model.mtp is not None) == (raw is NEXT)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_experts_are_valid_and_all_different(tmp_path, bits) -> None:
    folder = synthesise({**NEXT, "num_experts": 40, "hidden_size": 320}, tmp_path / "m", bits)
    stack = open_packed(folder)["model.layers.0.mlp.experts.gate_up_proj"]
    assert isinstance(stack, PackedExperts)
    assert len({bytes(row.tolist()) for row in stack.data}) == 40
    values = unpack(stack)
    assert values.isfinite().all()
    assert float(values.std()) == pytest.approx(0.02, rel=0.05)
    if bits == 8:
        _, codes = q8_integers(stack.data[0].contiguous(), 320)
        assert codes.min() >= -127


def test_the_same_seed_gives_the_same_files(tmp_path) -> None:
    one, two, other = (
        (synthesise(NEXT, tmp_path / str(i), 4, seed=seed) / "model.safetensors").read_bytes()
        for i, seed in enumerate((3, 3, 4))
    )
    assert one == two != other


def test_configs_are_cut() -> None:
    cut = ModelConfig.from_dict(cut_config(NEXT, layers=2, experts=1, vocab_size=50, mtp=False))
    assert (cut.num_hidden_layers, cut.vocab_size, cut.num_mtp_layers) == (2, 50, 0)
    assert (cut.num_experts, cut.num_experts_per_tok, cut.mlp_only_layers) == (1, 1, (1,))
    assert cut.layer_types == ("linear_attention",) * 2
    tokens = cut_config({**NEXT, "eos_token_id": [3, 60], "pad_token_id": 4}, vocab_size=50)
    assert (tokens["eos_token_id"], tokens["pad_token_id"]) == (None, 4)
    with pytest.raises(ConfigError, match="layers: the config has 4, expected 1 to 4, found 5"):
        cut_config(NEXT, layers=5)


def test_skewed_routers_choose_some_experts_often(tmp_path) -> None:
    raw = {**NEXT, "num_experts": 64, "num_experts_per_tok": 4, "hidden_size": 128}
    ids = torch.randint(71, (8, 60), generator=torch.Generator().manual_seed(0))
    shares = {}
    for skew in (0.0, 1.5):
        model = load_model(synthesise(raw, tmp_path / str(skew), 16, router_skew=skew))
        with torch.no_grad():
            logits = model(ids, output_router_logits=True).router_logits
        assert logits is not None
        counts = torch.bincount(logits[0].topk(4).indices.flatten(), minlength=64)
        shares[skew] = counts.sort(descending=True).values[:8].sum() / counts.sum()
    assert shares[1.5] > 1.5 * shares[0.0]


def test_popularity_adds_up() -> None:
    for count, chosen, skew in ((512, 10, 0.7), (512, 10, 1.0), (64, 4, 0.0)):
        found = popularity(count, chosen, skew)
        assert sum(found) == pytest.approx(chosen)
        assert max(found) <= 0.45
        free = [share for share in found if share < 0.45]
        first = count - len(free)
        assert free[-1] / free[0] == pytest.approx((count / (first + 1)) ** -skew)


def test_targets_in_the_way_are_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is not empty"):
        synthesise(NEXT, tmp_path, Bits.all(4))
    with pytest.raises(ConfigError, match="router skew: expected 0 or more"):
        synthesise(NEXT, tmp_path / "new", 4, router_skew=-1)
