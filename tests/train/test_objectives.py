"""Objectives: the right targets, one denominator, and the same gradients however a batch is cut.

The training ops run everywhere here (``OpSpec(grad=True)``), against transformers, against plain
enumeration, and against themselves on documents one by one.
"""

import math

import pytest
import torch
from tests.model.parity import NEXT
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from qnext.config import ModelConfig
from qnext.errors import ConfigError
from qnext.model.batch import TokenBatch
from qnext.model.model import CausalLM, initialise
from qnext.ops import OpSpec, select
from qnext.ops.delta_training import CHUNK
from qnext.train.batch import TrainBatch
from qnext.train.forward import main_rows, mtp_index, mtp_lengths, mtp_rows
from qnext.train.losses import Denominators, Losses, fractions, objectives, router_count

RAW = {**NEXT, "vocab_size": 61, "num_nextn_predict_layers": 1}
WEIGHTS = {"mtp_weights": (0.3, 0.2, 0.1), "balance": 0.05, "z": 0.01}


def make(**changes) -> CausalLM:
    """A model with training ops whose parameters are all away from their starting values."""
    config = ModelConfig.from_dict({**RAW, **changes})
    model = CausalLM(config, ops=select(OpSpec(grad=True)))
    initialise(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                parameter.uniform_(-6.0, 1.0, generator=generator)
            elif parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.3)
            if name.endswith("embed_tokens.weight"):
                parameter.copy_(noise)
    return model


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return make()


def documents(*lengths: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Random ids with weights, some of them 0."""
    generator = torch.Generator().manual_seed(seed + sum(lengths))
    made = []
    for length in lengths:
        ids = torch.randint(RAW["vocab_size"], (length,), generator=generator)
        weights = torch.rand(length, generator=generator)
        made.append((ids, torch.where(weights < 0.2, 0.0, weights)))
    return made


def some_fractions(model: CausalLM) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(router_count(model), 8, generator=generator).softmax(-1)


def step(model: CausalLM, batches: list[TrainBatch], **settings) -> tuple[list[Losses], dict]:
    """Losses of all micro-batches of a step, and the summed gradients by name."""
    settings = {**WEIGHTS, "balance_fractions": some_fractions(model), **settings}
    depths = len(settings["mtp_weights"])
    denominators = Denominators.of(batches, depths)
    model.zero_grad(set_to_none=True)
    found = []
    for batch in batches:
        losses = objectives(model, batch, denominators=denominators, **settings)
        losses.total.backward()
        found.append(losses)
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    return found, grads


def relative_errors(got: dict, want: dict, floor: float = 1e-2) -> dict[str, float]:
    """Norm of the difference over the norm; small norms count as a share of the whole."""
    whole = float(torch.stack([grad.norm() for grad in want.values()]).norm())
    return {
        name: float((got[name] - grad).norm() / max(float(grad.norm()), floor * whole))
        for name, grad in want.items()
    }


def assert_same_gradients(got: dict, want: dict, bound: float) -> None:
    for name, error in relative_errors(got, want).items():
        assert error <= bound, f"{name}: relative error {error:.1e}"


class TestAgainstTransformers:
    def test_gradients_of_an_unpacked_batch(self, model):
        config = {k: v for k, v in RAW.items() if k != "num_nextn_predict_layers"}
        theirs = Qwen3NextForCausalLM(
            Qwen3NextConfig(**config, attn_implementation="eager", experts_implementation="eager")
        )
        state = {k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")}
        theirs.load_state_dict(state)
        generator = torch.Generator().manual_seed(5)
        rows = torch.randint(61, (3, 70), generator=generator)
        loss = theirs(rows, labels=rows).loss
        loss.backward()
        batch = TrainBatch.pack([(row, torch.ones(70)) for row in rows])
        found, got = step(model, [batch], mtp_weights=(), balance=0.0, z=0.0)
        assert found[0].total.item() == pytest.approx(loss.item(), rel=1e-5)
        want = {name: p.grad for name, p in theirs.named_parameters()}
        assert len(want) > 60
        assert_same_gradients(got, want, 1e-3)


class TestPacking:
    LENGTHS = (1, 2, 3, 2 * CHUNK, 1, CHUNK - 1, CHUNK + 1, 40, 3)

    def test_packed_gradients_are_the_sum_of_the_separate_ones(self, model):
        """All objectives on, documents of 1 to 3 tokens, borders on chunk edges."""
        made = documents(*self.LENGTHS)
        together, got = step(model, [TrainBatch.pack(made)])
        apart, want = step(model, [TrainBatch.pack([one]) for one in made])
        assert_same_gradients(got, want, 1e-5)
        for name, value in together[0].parts.items():
            assert float(value) == pytest.approx(float(sum(one.parts[name] for one in apart)))
        assert torch.equal(together[0].counts_LE, sum(one.counts_LE for one in apart))

    def test_padding_changes_nothing(self, model):
        made = documents(17, 5, 33)
        plain, want = step(model, [TrainBatch.pack(made)])
        padded, got = step(model, [TrainBatch.pack(made, length=90)])
        assert_same_gradients(got, want, 1e-5)
        assert torch.equal(plain[0].counts_LE, padded[0].counts_LE)
        for name, value in plain[0].parts.items():
            assert float(padded[0].parts[name]) == pytest.approx(float(value)), name

    @pytest.mark.parametrize("parts", [2, 4])
    def test_micro_batches_are_summed(self, model, parts):
        made = documents(*self.LENGTHS)
        whole, want = step(model, [TrainBatch.pack(made)])
        cut, got = step(model, [TrainBatch.pack(made[i::parts]) for i in range(parts)])
        assert_same_gradients(got, want, 1e-5)
        total = float(sum(one.total.detach() for one in cut))
        assert total == pytest.approx(float(whole[0].total.detach()), rel=1e-6)
        for name in whole[0].hits:
            share = sum(one.terms[name] for one in cut)
            assert share == pytest.approx(whole[0].terms[name], rel=1e-6)

    def test_nothing_leaks_between_documents(self, model):
        """Main and MTP losses of a document: exactly no gradient at the others' embeddings."""
        made = documents(3, 33, 2, 40, seed=3)
        ids = TrainBatch.pack(made).tokens.segments.ids()
        seen: list[Tensor] = []

        def keep(module, args, output):
            output.retain_grad()
            seen.append(output)

        for document in range(4):
            masked = [(i, w + 0.1 if n == document else w * 0) for n, (i, w) in enumerate(made)]
            batch = TrainBatch.pack(masked)
            seen.clear()
            hook = model.model.embed_tokens.register_forward_hook(keep)
            losses = objectives(
                model, batch, denominators=Denominators.of([batch], 2), mtp_weights=(0.5, 0.5)
            )
            hook.remove()
            losses.total.backward()
            main, *later = (rows.grad for rows in seen)
            assert (main[ids != document] == 0).all()
            assert (main[ids == document] != 0).any()
            for depth, rows in enumerate(later, 1):
                of = ids[mtp_index(batch.tokens.segments, depth)]
                assert (rows[of != document] == 0).all()


def enumerated(lengths: tuple[int, ...], depth: int) -> list[tuple[int, int, int]]:
    """(row, input, target) of every MTP term, each packed position, document by document."""
    found, start = [], 0
    for length in lengths:
        for t in range(length):
            if t + depth + 1 <= length - 1:
                found.append((start + t, start + t + depth, start + t + depth + 1))
        start += length
    return found


class TestMtp:
    CASES = ((1,), (2,), (3,), (4,), (1, 2, 3, 4), (4, 4), (2, 1, 4, 3, 1), (3, 4, 2))

    @pytest.mark.parametrize("depth", [0, 1, 2, 3])
    @pytest.mark.parametrize("lengths", CASES, ids=str)
    def test_targets_equal_an_enumeration(self, lengths, depth):
        ids = [torch.arange(n) + 10 * b for b, n in enumerate(lengths)]
        batch = TrainBatch.pack([(i, torch.ones(len(i))) for i in ids])
        want = enumerated(lengths, depth)
        assert mtp_index(batch.tokens.segments, depth).tolist() == [row for row, _, _ in want]
        assert sum(mtp_lengths(batch.tokens.segments, depth)) == len(want)
        targets = batch.targets(depth)
        assert targets.rows.tolist() == [row for row, _, _ in want]
        assert targets.inputs.tolist() == [int(batch.ids[i]) for _, i, _ in want]
        assert targets.labels.tolist() == [int(batch.ids[i]) for _, _, i in want]

    def test_losses_equal_those_of_every_document_spelled_out(self, model):
        """Depth by depth through ``run_mtp``, on one document at a time, nothing shared."""
        made = [(ids, torch.ones(len(ids))) for ids, _ in documents(1, 2, 3, 4, 40)]
        batch = TrainBatch.pack(made)
        losses = objectives(
            model, batch, denominators=Denominators.of([batch], 3), mtp_weights=(1.0, 1.0, 1.0)
        )
        sums = [0.0] * 4
        with torch.no_grad():
            for ids, _ in made:
                hidden = model.run(TokenBatch.pack([ids]))
                for depth in range(4):
                    rows = len(ids) - 1 - depth
                    if rows < 1:
                        break
                    if depth:
                        part = TokenBatch.pack([ids[:rows]])
                        hidden = model.run_mtp(part, ids[depth : depth + rows], hidden[:rows])
                    logits = model.lm_logits(hidden[:rows])
                    sums[depth] += float(F.cross_entropy(logits, ids[depth + 1 :], reduction="sum"))
        names = ("main", "mtp_1", "mtp_2", "mtp_3")
        terms = sum(len(ids) - 1 for ids, _ in made)
        for name, want in zip(names, sums, strict=True):
            assert float(losses.parts[name]) == pytest.approx(want / terms, rel=1e-5), name

    def test_weight_belongs_to_the_target(self, model):
        """Fine-tuning: a question's tokens are predicted by nobody, at no depth."""
        (ids, _), *_ = documents(12)
        weights = torch.zeros(12)
        weights[7] = 1.0
        batch = TrainBatch.pack([(ids, weights)])
        for depth, row in ((0, 6), (1, 5), (2, 4), (3, 3)):
            assert batch.targets(depth).rows.tolist() == [row]
            assert batch.targets(depth).labels.tolist() == [int(ids[7])]

    def test_without_a_head_is_a_clear_error(self):
        plain = make(num_nextn_predict_layers=0)
        batch = TrainBatch.pack(documents(5))
        with pytest.raises(ConfigError, match="has no MTP head"):
            objectives(plain, batch, denominators=Denominators.of([batch], 1), mtp_weights=(0.1,))

    @pytest.mark.slow
    def test_wrong_heads_predict_worse(self):
        """A trained head is hurt by each of the mistakes that have been made with such heads."""
        model = make(num_hidden_layers=2, full_attention_interval=2)
        initialise(model, 0)
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        generator = torch.Generator().manual_seed(0)
        pattern = torch.randint(61, (61, 2), generator=generator)

        def text(length: int) -> Tensor:
            """The next token follows from the last one and a bit of the one before."""
            ids = [int(torch.randint(61, (), generator=generator)) for _ in range(2)]
            while len(ids) < length:
                ids.append(int(pattern[ids[-1], ids[-2] % 2]))
            return torch.tensor(ids)

        for _ in range(150):
            batch = TrainBatch.pack([(text(n), torch.ones(n)) for n in (9, 12, 15, 20, 9, 30)])
            losses = objectives(
                model, batch, denominators=Denominators.of([batch], 1), mtp_weights=(1.0,)
            )
            optimiser.zero_grad()
            losses.total.backward()
            optimiser.step()
        batch = TrainBatch.pack([(text(n), torch.ones(n)) for n in (9, 12, 15, 20) * 5])
        targets = batch.targets(1)
        with torch.no_grad():
            main = main_rows(model, batch.tokens)
            right = mtp_rows(model, batch.tokens, main, 1).hidden

            def hits(hidden: Tensor, labels: Tensor = targets.labels) -> float:
                return float((model.lm_logits(hidden).argmax(-1) == labels).float().mean())

            best = hits(right)
            assert model.mtp is not None
            shifted = torch.roll(targets.labels, 1)
            weight = model.mtp.fc.weight.clone()
            model.mtp.fc.weight.copy_(torch.roll(weight, weight.shape[1] // 2, dims=1))
            swapped = hits(mtp_rows(model, batch.tokens, main, 1).hidden)
            model.mtp.fc.weight.copy_(weight)
            late = TrainBatch(tokens=batch.tokens, weight_P=batch.weight_P)
            early = mtp_rows(
                model,
                TokenBatch(
                    ids=torch.roll(late.ids, 1),
                    positions=batch.tokens.positions,
                    segments=batch.tokens.segments,
                ),
                main,
                1,
            ).hidden
            assert best > 0.5
            for name, wrong in {
                "labels one off": hits(right, shifted),
                "halves swapped": swapped,
                "inputs one off": hits(early),
            }.items():
                assert wrong < best - 0.2, (name, wrong, best)


class TestRouting:
    def test_balance_is_one_when_the_load_is_even(self):
        model = make()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("mlp.gate.weight"):
                    parameter.zero_()
        batch = TrainBatch.pack(documents(30, 7))
        for scope in ("lagged", "micro"):
            losses = objectives(
                model, batch, denominators=Denominators.of([batch], 1), mtp_weights=(0.1,),
                balance=1.0, scope=scope,
            )  # fmt: skip
            assert float(losses.parts["balance"]) == pytest.approx(1.0, rel=1e-5)
        assert float(losses.entropy_L[0]) == pytest.approx(37 * math.log(8), rel=1e-5)
        assert float(losses.parts["z"]) == pytest.approx(math.log(8) ** 2, rel=1e-5)

    def test_balance_equals_its_definition(self, model):
        batch = TrainBatch.pack(documents(30, 7))
        with torch.no_grad():
            recorded = main_rows(model, batch.tokens).router_logits
        shares = some_fractions(model)
        want, own = 0.0, 0.0
        for layer, logits in enumerate(recorded):
            p = logits.softmax(-1)
            want += 8 * float((shares[layer] * p.mean(0)).sum()) / len(recorded)
            chosen = torch.bincount(p.topk(3).indices.flatten(), minlength=8) / (37 * 3)
            own += 8 * float((chosen * p.mean(0)).sum()) / len(recorded)
        denominators = Denominators.of([batch])
        lagged = objectives(
            model, batch, denominators=denominators, balance=1.0, balance_fractions=shares
        )
        micro = objectives(model, batch, denominators=denominators, balance=1.0, scope="micro")
        assert float(lagged.parts["balance"]) == pytest.approx(want, rel=1e-5)
        assert float(micro.parts["balance"]) == pytest.approx(own, rel=1e-5)

    def test_the_first_step_has_no_balance_gradient(self, model):
        batch = [TrainBatch.pack(documents(30, 7))]
        _, want = step(model, batch, balance=0.0, z=0.0)
        _, got = step(model, batch, balance=1.0, z=0.0, balance_fractions=None)
        assert_same_gradients(got, want, 1e-5)

    def test_lagged_shares_come_from_the_counts_of_a_step(self):
        counts = torch.tensor([[3, 1, 0, 0], [0, 0, 0, 0]])
        assert fractions(counts).tolist() == [[0.75, 0.25, 0, 0], [0.25] * 4]

    def test_counts_are_slots_of_real_tokens(self, model):
        batch = TrainBatch.pack(documents(30, 7), length=64)
        losses = objectives(
            model, batch, denominators=Denominators.of([batch], 1), mtp_weights=(0.1,)
        )
        assert losses.counts_LE.sum(-1).tolist() == [3 * 37] * 4 + [3 * (28 + 5)]

    def test_a_dense_model_has_no_routers(self):
        dense = make(num_experts=0)
        batch = TrainBatch.pack(documents(30, 7))
        losses = objectives(
            dense, batch, denominators=Denominators.of([batch], 1), mtp_weights=(0.1,), balance=0.1
        )
        losses.total.backward()
        assert losses.counts_LE.numel() == 0


class TestRecompute:
    def test_the_same_gradients_and_counts(self, model):
        batch = [TrainBatch.pack(documents(40, 3, 33))]
        kept, want = step(model, batch)
        again, got = step(model, batch, recompute=True)
        assert torch.equal(kept[0].counts_LE, again[0].counts_LE)
        for name in want:
            assert torch.allclose(got[name], want[name], atol=1e-6), name

    def test_less_is_kept(self, model):
        batch = TrainBatch.pack(documents(200, 100))
        sizes = {}
        for recompute in (False, True):
            kept: dict[int, int] = {}

            def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                losses = objectives(
                    model, batch, denominators=Denominators.of([batch]), recompute=recompute
                )
            sizes[recompute] = sum(kept.values())
            del losses
        assert sizes[True] < 0.5 * sizes[False]
