"""The multi-token-prediction head agrees with two references that were written independently."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from mtp_reference import ByTransformers, Wrong, by_equations
from parity import BOUND, CASES, Pair
from stepping import Stepper
from torch import Tensor

from qnext.config import ModelConfig
from qnext.errors import ConfigError, RequestError
from qnext.model.batch import TokenBatch
from qnext.model.model import CausalLM, initialise
from qnext.ops import Segments

NAMES = (
    "three_to_one",
    "three_attention_layers",
    "attention_ratio_4",
    "raw_topk_probabilities",
    "one_expert_per_token",
    "no_experts",
    "tied_head",
    "attention_bias",
    "rotary_half",
    "rotary_whole",
    "wider_model",
)
TOKENS = 34


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A prompt, and what transformers' main model makes of it."""

    pair: Pair
    ids: Tensor
    hidden: Tensor
    """[n, D] after the final norm."""
    before_norm: Tensor
    """[n, D] before it."""

    def equations(self, tokens: Tensor, hidden: Tensor, **wrong: bool) -> tuple[Tensor, Tensor]:
        tensors = {name: value.numpy() for name, value in self.pair.ours.state_dict().items()}
        rows, logits = by_equations(
            tensors, self.pair.case.raw, tokens.tolist(), hidden.numpy(), Wrong(**wrong)
        )
        return torch.from_numpy(rows), torch.from_numpy(logits)


def situation(pair: Pair) -> Situation:
    ids = pair.sequences[3][:TOKENS]
    caught: list[Tensor] = []
    hook = pair.theirs.model.norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        hidden = pair.theirs.model(ids[None]).last_hidden_state[0]
    hook.remove()
    return Situation(pair=pair, ids=ids, hidden=hidden, before_norm=caught[0][0])


@pytest.fixture(params=NAMES)
def case(request, pair_named) -> Situation:
    return situation(pair_named(request.param))


@pytest.fixture
def plain(pair_named) -> Situation:
    return situation(pair_named("attention_ratio_4"))


@torch.no_grad()
def test_both_references_and_the_model_agree(case, assert_close):
    tokens, hidden = case.ids[1:], case.hidden[:-1]
    _, equations = case.equations(tokens, hidden)
    _, generic = ByTransformers(case.pair.theirs, case.pair.ours.state_dict()).step(tokens, hidden)
    ours = case.pair.ours.mtp_logits(case.ids[None])[0]
    assert ours.shape == (TOKENS - 1, case.pair.config.vocab_size)
    assert_close("MTP: equations and generic classes", generic, equations, BOUND)
    assert_close("MTP: model and equations", ours, equations, BOUND)
    assert_close("MTP: model and generic classes", ours, generic, BOUND)


class TestWrongVariants:
    """Each known mistake gives clearly different logits, so agreement above excludes it."""

    @pytest.fixture
    def right(self, plain) -> Tensor:
        return plain.pair.ours.mtp_logits(plain.ids[None])[0].detach()

    def far(self, logits: Tensor, right: Tensor) -> bool:
        return bool(((logits - right).abs().amax(-1) > 100 * BOUND).all())

    def test_hidden_rows_before_the_final_norm(self, plain, right):
        _, logits = plain.equations(plain.ids[1:], plain.before_norm[:-1])
        assert self.far(logits, right)

    def test_hidden_half_first(self, plain, right):
        _, logits = plain.equations(plain.ids[1:], plain.hidden[:-1], hidden_first=True)
        assert self.far(logits, right)

    def test_token_of_the_hidden_row_itself(self, plain, right):
        _, logits = plain.equations(plain.ids[:-1], plain.hidden[:-1])
        assert self.far(logits, right)

    def test_token_too_far_ahead(self, plain, right):
        _, logits = plain.equations(plain.ids[2:], plain.hidden[:-2])
        assert self.far(logits, right[:-1])

    def test_output_norm_missing(self, plain, right):
        _, logits = plain.equations(plain.ids[1:], plain.hidden[:-1], output_norm_missing=True)
        assert self.far(logits, right)


class TestDrafting:
    @torch.inference_mode()
    def test_three_steps_of_a_draft(self, case, assert_close):
        """The head's own output takes the place of the main hidden row, and its cache grows.

        The first step runs over the whole prompt with the main model's rows; the second and third
        append one row each: the token drafted before and the row that drafted it.
        """
        pair, ids = case.pair, case.ids
        tokens = torch.cat((ids[1:], case.pair.want.argmax(-1)[:1]))
        stepper = Stepper(pair.ours, page_size=8)
        batch, view = stepper.prepare({0: ids})
        hidden = pair.ours.run(batch, view)
        rows = pair.ours.run_mtp(batch, tokens, hidden, view)
        stepper.cache.keep()

        generic = ByTransformers(pair.theirs, pair.ours.state_dict())
        their_rows, their_logits = generic.step(tokens, case.hidden)
        inputs = case.hidden
        for depth in range(3):
            ours = pair.ours.lm_logits(rows[-1:])
            equation_rows, equations = case.equations(tokens, inputs)
            claim = f"MTP draft, step {depth + 1}"
            assert_close(claim, ours, equations[-1:], BOUND)
            assert_close(claim, their_logits[-1:], equations[-1:], BOUND)
            drafted = equations[-1:].argmax(-1)
            if depth == 2:
                break
            tokens = torch.cat((tokens, drafted))
            inputs = torch.cat((inputs, equation_rows[-1:].float()))
            their_rows, their_logits = generic.step(drafted, their_rows[-1:])
            # The main model's cache stays where it is: positions beyond it are written into the
            # head's pages and forgotten with keep([0]).
            ahead = torch.zeros(depth + 1, dtype=torch.int64)
            batch, view = stepper.prepare({0: ahead}, speculative=True)
            rows = pair.ours.run_mtp(batch, tokens[TOKENS:], inputs[TOKENS:], view)
            stepper.cache.keep([0])
            assert stepper.cache.length(stepper.slots[0]) == TOKENS

    @torch.inference_mode()
    def test_prompt_in_pieces_equals_prompt_at_once(self, plain, assert_close):
        """The head's own keys and values survive from step to step."""
        want = plain.pair.ours.mtp_logits(plain.ids[None])[0]
        stepper = Stepper(plain.pair.ours, page_size=8)
        got = []
        for start, end in ((0, 1), (1, 18), (18, 19), (19, TOKENS - 1)):
            batch, view = stepper.prepare({0: plain.ids[start:end]})
            hidden = plain.pair.ours.run(batch, view)
            next_ids = plain.ids[start + 1 : end + 1]
            rows = plain.pair.ours.run_mtp(batch, next_ids, hidden, view)
            stepper.cache.keep()
            got.append(plain.pair.ours.lm_logits(rows))
        assert_close("MTP with a cache", torch.cat(got), want, BOUND)


class TestOwnView:
    """``mtp_view``: the head's rows at the positions of the tokens they embed, in several steps."""

    @torch.inference_mode()
    @pytest.mark.parametrize("pieces", [(33,), (1, 32), (10, 1, 22), (16, 17)])
    def test_rows_at_the_positions_of_their_tokens(self, case, pieces, assert_close):
        ours = case.pair.ours
        want = ours.mtp_logits(case.ids[None])[0]
        stepper = Stepper(ours, page_size=8)
        got, done = [], 0
        for count in pieces:
            segments = Segments.of([count])
            view = stepper.cache.mtp_view(
                stepper.slots, stepper.page_table, segments, starts=[done + 1], firsts=[1]
            )
            next_ids = case.ids[done + 1 : done + 1 + count]
            batch = TokenBatch.pack([next_ids], first_positions=[done + 1])
            rows = ours.run_mtp(batch, next_ids, case.hidden[done : done + count], view)
            got.append(ours.lm_logits(rows))
            done += count
        assert_close("MTP with its own view", torch.cat(got), want, BOUND)

    @torch.inference_mode()
    def test_rows_before_the_first_are_not_seen(self, plain, assert_close):
        """After a reused prefix the head may begin in the middle: as if the text began there."""
        ours, skip = plain.pair.ours, 12
        stepper = Stepper(ours, page_size=8)
        tokens, hidden = plain.ids[skip + 1 :], plain.hidden[skip:-1]
        view = stepper.cache.mtp_view(
            stepper.slots,
            stepper.page_table,
            Segments.of([len(tokens)]),
            starts=[skip + 1],
            firsts=[skip + 1],
        )
        batch = TokenBatch.pack([tokens], first_positions=[skip + 1])
        got = ours.lm_logits(ours.run_mtp(batch, tokens, hidden, view))
        _, want = plain.equations(tokens, hidden)
        assert_close("MTP from the middle", got, want, BOUND)


class TestBatches:
    @torch.no_grad()
    def test_padded_rows_equal_single_rows(self, plain, assert_close):
        ours, width = plain.pair.ours, 20
        lengths = (20, 7, 2, 1)
        for side in ("left", "right"):
            ids = torch.zeros(len(lengths), width, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for b, length in enumerate(lengths):
                start = width - length if side == "left" else 0
                ids[b, start : start + length] = plain.ids[b : b + length]
                mask[b, start : start + length] = 1
            logits = ours.mtp_logits(ids, attention_mask=mask)
            assert logits.shape == (len(lengths), width - 1, ours.config.vocab_size)
            for b, length in enumerate(lengths):
                start = width - length if side == "left" else 0
                got = logits[b, start : start + length - 1]
                if length > 1:
                    want = ours.mtp_logits(plain.ids[b : b + length][None])[0]
                    assert_close("MTP, padded rows", got, want, BOUND)
                elsewhere = torch.ones(width - 1, dtype=torch.bool)
                elsewhere[start : start + length - 1] = False
                assert (logits[b, elsewhere] == 0).all()

    def test_gradients_stay_inside_their_document(self, plain):
        """Nothing of a neighbour reaches the head's loss, the shifted tokens included."""
        ours = plain.pair.ours
        documents = [plain.ids[:9], plain.ids[9:15], plain.ids[15:]]
        batch = TokenBatch.pack(documents)
        seen: list[Tensor] = []

        def keep(module: torch.nn.Module, args: object, output: Tensor) -> None:
            output.retain_grad()
            seen.append(output)

        hook = ours.model.embed_tokens.register_forward_hook(keep)
        hidden = ours.run(batch)
        next_ids = torch.cat((batch.ids[1:], batch.ids.new_zeros(1)))
        rows = ours.run_mtp(batch, next_ids, hidden)
        hook.remove()
        inner = slice(9, 14)  # rows of the second document that have a successor
        main, shifted = torch.autograd.grad(ours.lm_logits(rows[inner]).pow(2).sum(), seen)
        assert (main[:9] == 0).all()
        assert (main[15:] == 0).all()
        assert (shifted[:9] == 0).all()
        assert (shifted[14:] == 0).all()
        assert (main[9:14].abs().amax(-1) > 0).all()
        assert (shifted[9:14].abs().amax(-1) > 0).all()

    def test_every_tensor_of_the_head_gets_a_gradient(self, plain):
        ours = plain.pair.ours
        loss = ours.mtp_logits(plain.ids[None]).pow(2).mean()
        head = {name: p for name, p in ours.named_parameters() if name.startswith("mtp.")}
        grads = torch.autograd.grad(loss, list(head.values()))
        for name, grad in zip(head, grads, strict=True):
            assert grad.abs().max() > 0, name


class TestRefusals:
    def test_model_without_a_head(self):
        raw = {**CASES[0].raw, "num_nextn_predict_layers": 0}
        model = CausalLM(ModelConfig.from_dict(raw))
        initialise(model, seed=0)
        assert model.mtp is None
        with pytest.raises(ConfigError, match="no multi-token-prediction head"):
            model.mtp_logits(torch.tensor([[1, 2, 3]]))

    def test_a_single_token(self, plain):
        with pytest.raises(RequestError, match=r"at least 2 tokens per row.*found 1"):
            plain.pair.ours.mtp_logits(torch.tensor([[1]]))

    def test_published_tensor_names(self, plain):
        names = {name for name in plain.pair.ours.state_dict() if name.startswith("mtp.")}
        attention = {f"self_attn.{x}_proj.weight" for x in "qkvo"} | {
            "self_attn.q_norm.weight", "self_attn.k_norm.weight",
        }  # fmt: skip
        moe = {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}
        moe |= {"shared_expert_gate.weight"}
        moe |= {f"shared_expert.{x}_proj.weight" for x in ("gate", "up", "down")}
        norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
        inside = attention | norms | {f"mlp.{name}" for name in moe}
        assert names == {f"mtp.layers.0.{name}" for name in inside} | {
            "mtp.fc.weight",
            "mtp.norm.weight",
            "mtp.pre_fc_norm_embedding.weight",
            "mtp.pre_fc_norm_hidden.weight",
        }


def test_numpy_is_float64_inside(plain):
    """The equations are evaluated in double precision, so their own rounding does not count."""
    rows, logits = plain.equations(plain.ids[1:3], plain.hidden[:2])
    assert rows.numpy().dtype == logits.numpy().dtype == np.float64
