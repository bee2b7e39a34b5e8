"""Around the forward: packing and padding, refusals, starting values, and the choice of kernels."""

import pytest
import torch
from parity import CASES, build
from stepping import Stepper

from qnext.config import ModelConfig
from qnext.errors import QnextError, RequestError
from qnext.model.batch import Rectangle, TokenBatch
from qnext.model.model import CausalLM, initialise
from qnext.ops import select


@pytest.fixture
def pair(pair_named):
    return pair_named("explicit_layer_types")


class TestPacking:
    def test_sequences_lie_end_to_end(self):
        batch = TokenBatch.pack([torch.tensor([5, 6, 7]), torch.tensor([8])])
        assert batch.ids.tolist() == [5, 6, 7, 8]
        assert batch.positions.tolist() == [0, 1, 2, 0]
        assert batch.segments.lengths == (3, 1)

    def test_first_positions_continue_cached_sequences(self):
        batch = TokenBatch.pack(
            [torch.tensor([5, 6]), torch.tensor([], dtype=torch.int64), torch.tensor([8])],
            first_positions=[10, 3, 0],
        )
        assert batch.positions.tolist() == [10, 11, 0]

    def test_ids_of_other_integer_types(self):
        assert TokenBatch.pack([torch.tensor([1, 2], dtype=torch.int32)]).ids.dtype == torch.int64

    def test_a_rectangle_with_padding_on_both_sides(self):
        ids = torch.arange(10).view(2, 5)
        mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
        batch, rectangle = Rectangle.pack(ids, mask)
        assert batch.ids.tolist() == [1, 2, 3, 5, 6]
        assert batch.positions.tolist() == [0, 1, 2, 0, 1]
        back = rectangle.unpack(torch.arange(1.0, 6.0)[:, None])[..., 0]
        assert back.tolist() == [[0, 1, 2, 3, 0], [4, 5, 0, 0, 0]]

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
    def test_masks_of_any_type(self, pair, dtype):
        ids = pair.ids[:6].view(2, 3)
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        with torch.no_grad():
            want = pair.ours(ids, attention_mask=mask).logits
            assert torch.equal(pair.ours(ids, attention_mask=mask.to(dtype)).logits, want)

    def test_a_mask_of_ones_changes_nothing(self, pair):
        ids = pair.ids[:6].view(2, 3)
        with torch.no_grad():
            want = pair.ours(ids).logits
            assert torch.equal(pair.ours(ids, attention_mask=torch.ones_like(ids)).logits, want)


class TestRefusals:
    @pytest.mark.parametrize(
        ("ids", "mask", "words"),
        [
            ([1, 2], None, "expected a non-empty tensor [batch, tokens], found shape [2]"),
            ([[]], None, "expected a non-empty tensor [batch, tokens], found shape [1, 0]"),
            ([[1, 2]], [[1]], "attention_mask: expected shape [1, 2] like input_ids, found [1, 1]"),
            ([[1, 2], [3, 4]], [[1, 1], [0, 0]], "attention_mask[1]: every token is padding"),
            ([[1, 2, 3]], [[1, 0, 1]], "attention_mask[0]: padding stands between tokens"),
            ([[1, 97]], None, "token id 97 is outside the vocabulary (0 ... 96)"),
            ([[1, -1]], None, "token id -1 is outside the vocabulary (0 ... 96)"),
            ([[1.0, 2.0]], None, "input_ids: expected integers, found torch.float32"),
            ([[True, False]], None, "input_ids: expected integers, found torch.bool"),
        ],
    )
    def test_one_clear_message(self, pair, ids, mask, words):
        ids = torch.tensor(ids, dtype=torch.int64) if ids == [[]] else torch.tensor(ids)
        mask = None if mask is None else torch.tensor(mask)
        for call in (pair.ours, pair.ours.mtp_logits):
            with pytest.raises(RequestError) as caught:
                call(ids, attention_mask=mask)
            assert words in str(caught.value)
        assert isinstance(caught.value, QnextError)
        assert isinstance(caught.value, ValueError)

    def test_ids_in_padding_are_checked_too(self, pair):
        """They are usually a tokenizer's pad id, which may lie outside a small vocabulary."""
        with pytest.raises(RequestError, match="token id 97 is outside"):
            pair.ours(torch.tensor([[97, 1]]), attention_mask=torch.tensor([[0, 1]]))


class TestInitialise:
    def model(self, name: str, seed: int) -> CausalLM:
        config = ModelConfig.from_dict(next(case.raw for case in CASES if case.name == name))
        model = CausalLM(config)
        initialise(model, seed=seed)
        return model

    def test_the_same_seed_gives_the_same_model(self):
        first, second = (self.model("three_to_one", 5).state_dict() for _ in range(2))
        other = self.model("three_to_one", 6).state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])

    def test_table_of_starting_values(self):
        for name, value in self.model("attention_bias", 0).state_dict().items():
            if name.endswith("A_log"):
                assert value.exp().min() >= 0.01
                assert value.exp().max() <= 16
                assert value.dtype == torch.float32
            elif name.endswith(("dt_bias", "linear_attn.norm.weight")):
                assert (value == 1).all(), name
            elif name.endswith("bias") or value.ndim == 1:
                assert (value == 0).all(), name
            elif name.endswith("conv1d.weight"):
                assert value.abs().max() <= 0.5
                assert value.std() == pytest.approx(0.5 / 3**0.5, rel=0.2)
            else:
                assert value.std() == pytest.approx(0.02, rel=0.25), name
                assert abs(float(value.mean())) < 0.01, name

    def test_plain_norms_start_at_one(self):
        state = self.model("qwen3_moe_plain", 0).state_dict()
        assert (state["model.norm.weight"] == 1).all()
        assert (state["model.layers.0.self_attn.q_norm.weight"] == 1).all()

    def test_every_parameter_gets_a_value(self):
        config = ModelConfig.from_dict(CASES[4].raw)
        model = CausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        initialise(model, seed=0)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())

    def test_a_fresh_model_predicts_nearly_uniformly(self):
        model = self.model("three_to_one", 0)
        with torch.no_grad():
            logits = model(torch.arange(40)[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(1, 41))
        assert float(loss) == pytest.approx(float(torch.tensor(97.0).log()), rel=0.05)


class TestStructure:
    def test_names_are_those_of_transformers(self):
        for case in CASES:
            pair = build(case)
            theirs = set(pair.theirs.state_dict())
            if pair.config.tie_word_embeddings:
                theirs -= {"lm_head.weight"}
            ours = {name for name in pair.ours.state_dict() if not name.startswith("mtp.")}
            assert ours == theirs, case.name

    def test_reference_kernels_give_the_same_logits(self, pair):
        slow = CausalLM(pair.config, ops=select(prefer={"all": "reference"}))
        slow.load_state_dict(pair.ours.state_dict())
        with torch.no_grad():
            got, want = slow(pair.ids[None]).logits, pair.ours(pair.ids[None]).logits
        assert (got - want).abs().max() < 1e-4

    def test_a_cache_and_its_model_use_the_same_kernels(self, pair):
        """Or a replay after a draft would not be what the model computes."""
        slow = CausalLM(pair.config, ops=select(prefer={"all": "reference"}))
        slow.load_state_dict(pair.ours.state_dict())
        stepper = Stepper(slow)
        assert stepper.cache.ops is slow.ops

    def test_half_precision_forward(self, pair):
        model = CausalLM(pair.config)
        model.load_state_dict(pair.ours.state_dict())
        model.to(torch.bfloat16)
        with torch.no_grad():
            logits = model(pair.ids[None]).logits[0]
        assert logits.dtype == model.dtype == torch.bfloat16
        assert (logits.float() - pair.want).pow(2).mean().sqrt() < 0.2
