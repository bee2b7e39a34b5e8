"""The model computes what transformers computes: logits, gradients and recorded outputs.

Both sides have equal, randomly perturbed weights (``parity.py``) and run in float32. Whatever way
the tokens come in, at once, one by one, in pieces, packed or padded, the logits must be those of
one plain forward by transformers.
"""

import random
import zlib

import pytest
import torch
from parity import BOUND, CASES, Pair
from stepping import Stepper
from torch import Tensor
from torch.nn import functional as F

from qnext.model.batch import TokenBatch
from qnext.model.model import CausalLM
from qnext.ops import OpSpec, select

CHUNK_SPLITS = (1, 2, 3, 4, 16, 17, 63, 64, 65, 128)


def run_packed(pair: Pair, sequences: list[Tensor]) -> list[Tensor]:
    """Logits [T, V] of each sequence, from one packed batch."""
    batch = TokenBatch.pack(sequences)
    logits = pair.ours.lm_logits(pair.ours.run(batch))
    return list(logits.split(batch.segments.lengths))


def pad(rows: list[Tensor], width: int, side: str, filler: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, width]; padding holds random ids, which nothing may read."""
    ids = filler[: len(rows) * width].view(len(rows), width).clone()
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[b, start : start + len(row)] = row
        mask[b, start : start + len(row)] = 1
    return ids, mask


class TestLogits:
    def test_full_forward(self, pair, assert_close):
        with torch.no_grad():
            got = pair.ours(pair.ids[None]).logits[0]
        assert_close("full forward", got, pair.want, BOUND)

    def test_token_by_token_decoding(self, pair, assert_close):
        got = Stepper(pair.ours).feed(pair.ids, range(1, len(pair.ids)))
        assert_close("token by token", got, pair.want, BOUND)

    def test_prefill_in_two_pieces(self, pair, assert_close):
        for split in CHUNK_SPLITS:
            if split < len(pair.ids):
                got = Stepper(pair.ours).feed(pair.ids, [split])
                assert_close("prefill in two pieces", got, pair.want, BOUND)

    def test_prefill_in_many_pieces(self, pair, assert_close):
        rng = random.Random(zlib.crc32(pair.case.name.encode()))
        inner = range(1, len(pair.ids))
        for count in (2, 3, 6, 12):
            splits = sorted(rng.sample(inner, min(count, len(inner))))
            got = Stepper(pair.ours, seed=count).feed(pair.ids, splits)
            assert_close("prefill in many pieces", got, pair.want, BOUND)

    def test_prefill_then_decoding_in_one_ragged_batch(self, pair, assert_close):
        """Four sequences at four stages share every step: long, short and one-token pieces."""
        rng = random.Random(1 + zlib.crc32(pair.case.name.encode()))
        stepper = Stepper(pair.ours, sequences=4)
        done = [0] * 4
        got: list[list[Tensor]] = [[] for _ in range(4)]
        while any(n < len(ids) for n, ids in zip(done, pair.sequences, strict=True)):
            pieces = {}
            for row, ids in enumerate(pair.sequences):
                size = rng.choice((0, 1, 1, 2, 5, 33, 70))
                if size and done[row] < len(ids):
                    pieces[row] = ids[done[row] : done[row] + size]
            if not pieces:
                continue
            for row, logits in zip(pieces, stepper.step(pieces), strict=True):
                got[row].append(logits)
                done[row] += len(logits)
        for row, want in enumerate(pair.wanted):
            assert_close("ragged steps with a cache", torch.cat(got[row]), want, BOUND)

    def test_packed_ragged_batch(self, pair, assert_close):
        with torch.no_grad():
            rows = run_packed(pair, list(pair.sequences))
        for got, want in zip(rows, pair.wanted, strict=True):
            assert_close("packed ragged batch", got, want, BOUND)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, pair, side, assert_close):
        width = max(map(len, pair.sequences)) + 3
        ids, mask = pad(list(pair.sequences), width, side, torch.cat(pair.labels * 20))
        with torch.no_grad():
            logits = pair.ours(ids, attention_mask=mask).logits
        assert (logits[mask == 0] == 0).all()
        for b, want in enumerate(pair.wanted):
            assert_close(f"{side} padding", logits[b][mask[b] == 1], want, BOUND)

    def test_padded_batch_by_transformers(self, pair, assert_close):
        """The same rectangle goes through both, theirs with its own masks."""
        width = max(map(len, pair.sequences))
        for side in ("left", "right"):
            ids, mask = pad(list(pair.sequences), width, side, torch.cat(pair.labels * 20))
            with torch.no_grad():
                want = pair.theirs(ids, attention_mask=mask).logits
                got = pair.ours(ids, attention_mask=mask).logits
            real = mask == 1
            assert_close("padded by both", got[real], want[real], BOUND)


class TestEverySplit:
    """Cutting a prompt anywhere changes nothing."""

    @pytest.mark.parametrize("name", ["explicit_layer_types", "delta_ratio_4"])
    def test_every_position_of_a_prompt(self, pair_named, name, assert_close):
        pair = pair_named(name)
        for split in range(1, len(pair.ids)):
            got = Stepper(pair.ours).feed(pair.ids, [split])
            assert_close("every split", got, pair.want, BOUND)

    @pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 63, 64, 65])
    def test_pieces_of_equal_size(self, pair_named, size, assert_close):
        pair = pair_named("three_to_one")
        got = Stepper(pair.ours, page_size=64).feed(pair.ids, range(size, len(pair.ids), size))
        assert_close("pieces of equal size", got, pair.want, BOUND)


class TestOutputs:
    """What can be asked for beside the logits has the values and shapes of transformers."""

    @pytest.fixture
    def outputs(self, pair):
        ids = torch.stack([pair.sequences[3][:20], pair.sequences[3][20:40]])
        flags = {"output_attentions": True, "output_hidden_states": True}
        want_router = any(map(pair.config.is_sparse, range(pair.config.num_hidden_layers)))
        if want_router:
            flags["output_router_logits"] = True
        with torch.no_grad():
            return pair.ours(ids, **flags), pair.theirs(ids, **flags), want_router

    def test_recorded_outputs(self, outputs, assert_close):
        got, want, has_router = outputs
        assert len(got.hidden_states) == len(want.hidden_states)
        for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
            assert_close("hidden states", ours, theirs, BOUND)
        assert len(got.attentions) == len(want.attentions or ())
        for ours, theirs in zip(got.attentions, want.attentions or (), strict=True):
            assert_close("attention weights", ours, theirs, BOUND)
        if has_router:
            assert len(got.router_logits) == len(want.router_logits)
            for ours, theirs in zip(got.router_logits, want.router_logits, strict=True):
                assert_close("router logits", ours, theirs, BOUND)

    def test_nothing_is_recorded_unasked(self, pair_named):
        pair = pair_named("three_to_one")
        with torch.no_grad():
            got = pair.ours(pair.ids[None, :5])
        assert got.hidden_states is None
        assert got.attentions is None
        assert got.router_logits is None

    @pytest.mark.parametrize("name", ["three_to_one", "qwen3_moe_plain"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_recorded_outputs_of_padded_rows(self, pair_named, name, side, assert_close):
        """At real positions they are those of the row alone, and zero elsewhere."""
        pair = pair_named(name)
        rows = [pair.sequences[1], pair.sequences[2], pair.sequences[3][:9]]
        ids, mask = pad(rows, 20, side, torch.cat(pair.labels * 20))
        flags = dict.fromkeys(
            ("output_attentions", "output_hidden_states", "output_router_logits"), True
        )
        with torch.no_grad():
            got = pair.ours(ids, attention_mask=mask, **flags)
            for b, row in enumerate(rows):
                want = pair.theirs(row[None], **flags)
                real = mask[b] == 1
                for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
                    assert_close("padded outputs", ours[b][real], theirs[0], BOUND)
                for ours, theirs in zip(got.attentions, want.attentions, strict=True):
                    square = ours[b][:, real][:, :, real]
                    assert_close("padded outputs", square, theirs[0], BOUND)
                    assert float(ours[b].abs().sum()) == pytest.approx(float(square.sum()))
                for ours, theirs in zip(got.router_logits, want.router_logits, strict=True):
                    by_row = ours.unflatten(0, ids.shape)[b]
                    assert_close("padded outputs", by_row[real], theirs, BOUND)
                    assert (by_row[~real] == 0).all()


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradient of every parameter by name; zero where the loss does not depend on it."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(named.items(), found, strict=True)
    }


def relative_errors(
    got: dict[str, Tensor], want: dict[str, Tensor], floor: float = 1e-4
) -> dict[str, float]:
    """Norm of the difference over the norm, per parameter.

    A gradient that is zero but for rounding has no meaningful ratio: norms below ``floor`` times
    the norm of the whole gradient count as that much.
    """
    whole = float(torch.stack([grad.norm() for grad in want.values()]).norm())
    return {
        name: float((got[name] - grad).norm() / max(float(grad.norm()), floor * whole))
        for name, grad in want.items()
    }


class TestGradients:
    def test_gradients_of_all_parameters(self, pair, assert_close):
        want = gradients(
            F.cross_entropy(pair.theirs(pair.ids[None]).logits[0], pair.labels[0]), pair.theirs
        )
        got = gradients(
            F.cross_entropy(pair.ours(pair.ids[None]).logits[0], pair.labels[0]), pair.ours
        )
        extra = set(got) - set(want)
        assert all(name.startswith("mtp.") for name in extra), extra
        assert set(want) <= set(got)
        for name, error in relative_errors(got, want).items():
            assert_close.note("gradient, relative", error)
            assert error <= 1e-3, f"{name}: relative error {error:.1e}"

    def test_gradients_by_the_training_ops(self, pair, assert_close):
        """Backward passes written by hand, the same bound; packed with strangers at that."""
        trained = CausalLM(pair.config, ops=select(OpSpec(grad=True)))
        trained.load_state_dict(pair.ours.state_dict())
        logits = pair.theirs(pair.ids[None]).logits[0]
        want = gradients(F.cross_entropy(logits, pair.labels[0]), pair.theirs)
        batch = TokenBatch.pack(list(pair.sequences))
        rows = trained.lm_logits(trained.run(batch)[: len(pair.ids)])
        assert_close("training ops", rows.detach(), pair.want, BOUND)
        got = gradients(F.cross_entropy(rows, pair.labels[0]), trained)
        for name, error in relative_errors(got, want).items():
            assert_close.note("gradient of the training ops, relative", error)
            assert error <= 1e-3, f"{name}: relative error {error:.1e}"

    def test_no_gradient_is_missing(self, pair_named):
        """Every parameter but the MTP head's reaches the loss, with a gradient that is not zero."""
        for name in ("explicit_layer_types", "attention_bias", "qwen3_plain", "qwen3_moe_plain"):
            pair = pair_named(name)
            loss = F.cross_entropy(pair.ours(pair.ids[None]).logits[0], pair.labels[0])
            for parameter, grad in gradients(loss, pair.ours).items():
                if not parameter.startswith("mtp."):
                    assert grad.abs().max() > 0, (name, parameter)

    @pytest.mark.parametrize(
        "name",
        [
            "three_to_one",
            "explicit_layer_types",
            "conv_2_taps",
            "attention_bias",
            "qwen3_tied_ratio_4",
            "qwen3_moe_plain",
        ],
    )
    def test_packed_documents_give_the_sum_of_separate_gradients(
        self, pair_named, name, assert_close
    ):
        pair = pair_named(name)
        documents, labels = list(pair.sequences), torch.cat(pair.labels)
        packed = torch.cat(run_packed(pair, documents))
        got = gradients(F.cross_entropy(packed, labels, reduction="sum"), pair.ours)
        want = {key: torch.zeros_like(grad) for key, grad in got.items()}
        for ids, targets in zip(documents, pair.labels, strict=True):
            logits = pair.ours(ids[None]).logits[0]
            loss = F.cross_entropy(logits, targets, reduction="sum")
            for key, grad in gradients(loss, pair.ours).items():
                want[key] += grad
        for key, error in relative_errors(got, want, floor=1e-2).items():
            assert_close.note("packed gradient, relative", error)
            assert error <= 1e-5, f"{key}: relative error {error:.1e}"

    @pytest.mark.parametrize(
        "name", ["three_to_one", "conv_3_taps", "five_delta_layers", "qwen3_moe_plain"]
    )
    def test_documents_do_not_leak_into_each_other(self, pair_named, name):
        """The loss of one document has exactly no gradient at the embeddings of the others."""
        pair = pair_named(name)
        batch = TokenBatch.pack(list(pair.sequences))
        seen: list[Tensor] = []

        def keep(module: torch.nn.Module, args: object, output: Tensor) -> None:
            output.retain_grad()
            seen.append(output)

        for document in range(len(pair.sequences)):
            seen.clear()
            hook = pair.ours.model.embed_tokens.register_forward_hook(keep)
            logits = pair.ours.lm_logits(pair.ours.run(batch))
            hook.remove()
            inside = batch.segments.ids() == document
            loss = F.cross_entropy(logits[inside], pair.labels[document])
            (grad,) = torch.autograd.grad(loss, seen)
            assert (grad[~inside] == 0).all()
            assert (grad[inside].abs().amax(-1) > 0).all()

    def test_training_works_after_serving(self, pair_named, assert_close):
        """Tables that were made while serving, without autograd, are no obstacle to training."""
        pair = pair_named("yarn_not_truncated")
        Stepper(pair.ours).feed(pair.ids[:40], [20])
        loss = F.cross_entropy(pair.ours(pair.ids[None, :40]).logits[0], pair.labels[0][:40])
        found = gradients(loss, pair.ours)
        assert all(torch.isfinite(grad).all() for grad in found.values())


def test_the_table_covers_what_it_claims():
    raws = [case.raw for case in CASES]
    hybrid = [raw for raw in raws if raw["model_type"] == "qwen3_next"]
    assert len(hybrid) >= 24
    assert len(CASES) == len({case.name for case in CASES})
    assert sum(raw["model_type"] == "qwen3" for raw in raws) >= 4
    assert sum(raw["model_type"] == "qwen3_moe" for raw in raws) >= 4
    lengths = {case.tokens for case in CASES}
    assert {1, 2, 3, 63, 64, 65, 127, 130, 150} <= lengths
    assert {raw["linear_num_value_heads"] // raw["linear_num_key_heads"] for raw in hybrid} == {
        1,
        2,
        4,
    }
    assert {raw["num_attention_heads"] // raw["num_key_value_heads"] for raw in raws} >= {1, 2, 4}
    assert {raw["num_hidden_layers"] for raw in hybrid} == {1, 2, 3, 4, 5, 6}
    assert {raw.get("partial_rotary_factor", 0.25) for raw in hybrid} >= {0.25, 0.5, 1.0}
    assert {raw.get("linear_conv_kernel_dim", 4) for raw in hybrid} == {2, 3, 4}
