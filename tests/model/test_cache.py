"""The cache remembers exactly what was kept: not more after a rejected draft, not less after reuse.

Every test runs with NaN in all free pages and pages in random order (``stepping.py``), so a read of
anything that was not written shows.
"""

import itertools
import random

import pytest
import torch
from parity import BOUND, CASES, Pair
from stepping import Stepper
from torch import Tensor

from qnext.config import ModelConfig
from qnext.model.batch import TokenBatch
from qnext.model.cache import PAGE_SIZE, HybridCache, Saved
from qnext.model.model import CausalLM, initialise
from qnext.model.view import Capture
from qnext.ops import Segments
from qnext.ops.gated_delta import CHUNK

HYBRID = ("explicit_layer_types", "delta_ratio_4", "wide_delta_keys", "conv_2_taps")
DRAFT = 5
STATE_BOUND = 1e-5


@pytest.fixture(params=HYBRID)
def hybrid(request, pair_named) -> Pair:
    return pair_named(request.param)


@pytest.fixture
def pair_of(pair_named):
    return pair_named("explicit_layer_types")


def assert_same_state(assert_close, claim: str, got: Stepper, want: Stepper, row: int = 0) -> None:
    """Recurrent state, convolution window, last hidden row and length agree."""
    *tensors, length = got.state(row)
    *expected, expected_length = want.state(row)
    assert length == expected_length
    for x, y in zip(tensors, expected, strict=True):
        assert_close(claim, x, y, STATE_BOUND * max(1.0, float(y.abs().max())))


@pytest.mark.parametrize("rollback", ["snapshots", "replay"])
class TestDrafts:
    """``keep(n)`` after a speculative step equals a run that only ever saw those n tokens."""

    @pytest.mark.parametrize("accepted", range(DRAFT + 1))
    @pytest.mark.parametrize("past", [0, 1, 2, 30])
    def test_dropping_equals_never_having_drafted(
        self, hybrid, rollback, past, accepted, assert_close
    ):
        ids = hybrid.ids[: past + accepted]
        drafted, later = hybrid.sequences[3][:DRAFT].clone(), hybrid.sequences[3][DRAFT : DRAFT + 9]
        drafted[:accepted] = ids[past:]
        clean, drafting = Stepper(hybrid.ours), Stepper(hybrid.ours, seed=1, rollback=rollback)
        for stepper in (clean, drafting):
            if past:
                stepper.step({0: ids[:past]})
        if accepted:
            clean.step({0: ids[past:]})
        drafting.step({0: drafted}, keep=[accepted], speculative=True)
        assert_same_state(assert_close, "state after a draft", drafting, clean)
        for piece in (later[:1], later[1:]):
            got, want = drafting.step({0: piece})[0], clean.step({0: piece})[0]
            assert_close("logits after a draft", got, want, BOUND)

    def test_verified_logits_are_those_of_single_steps(self, hybrid, rollback, assert_close):
        """A speculative step over T tokens predicts what T plain steps predict."""
        plain, drafting = Stepper(hybrid.ours), Stepper(hybrid.ours, rollback=rollback)
        for stepper in (plain, drafting):
            stepper.step({0: hybrid.ids[:40]})
        want = [plain.step({0: hybrid.ids[t : t + 1]})[0] for t in range(40, 46)]
        (got,) = drafting.step({0: hybrid.ids[40:46]}, keep=[6], speculative=True)
        assert_close("verification", got, torch.cat(want), BOUND)

    def test_mixed_batch(self, hybrid, rollback, assert_close):
        """Four sequences of different lengths draft together and keep different counts."""
        ids = torch.cat((hybrid.ids, hybrid.sequences[3]))
        counts, drafts = (0, 1, 3, 4), (4, 1, 5, 4)
        pasts = (3, 0, 65, 17)
        together = Stepper(hybrid.ours, sequences=4, rollback=rollback)
        together.step({row: ids[:past] for row, past in enumerate(pasts) if past})
        pieces = {
            row: ids[past : past + draft]
            for row, (past, draft) in enumerate(zip(pasts, drafts, strict=True))
        }
        together.step(pieces, keep=counts, speculative=True)
        for row, (past, count) in enumerate(zip(pasts, counts, strict=True)):
            alone = Stepper(hybrid.ours)
            if past:
                alone.step({0: ids[:past]})
            if count:
                alone.step({0: ids[past : past + count]})
            *tensors, length = together.state(row)
            *expected, expected_length = alone.state()
            assert length == expected_length == past + count
            for x, y in zip(tensors, expected, strict=True):
                assert_close("mixed batch", x, y, STATE_BOUND * max(1.0, float(y.abs().max())))
            token = hybrid.sequences[1]
            got, want = together.step({row: token})[0], alone.step({0: token})[0]
            assert_close("mixed batch, next logits", got, want, BOUND)

    def test_many_rounds_of_drafts(self, hybrid, rollback, assert_close):
        """Every acceptance count in turn, over and over, gives the text of plain decoding."""
        drafting, junk = Stepper(hybrid.ours, page_size=8, rollback=rollback), hybrid.sequences[3]
        got, done = [], 0
        for accepted in itertools.cycle((0, 3, 1, 4, 2, 4)):
            accepted = min(accepted, len(hybrid.ids) - done)
            draft = torch.cat((hybrid.ids[done : done + accepted], junk[: 4 - accepted]))
            (logits,) = drafting.step({0: draft}, keep=[accepted], speculative=True)
            got.append(logits[:accepted])
            done += accepted
            if done == len(hybrid.ids):
                break
        assert_close("rounds of drafts", torch.cat(got), hybrid.want, BOUND)

    def test_long_draft_in_chunks(self, hybrid, rollback, assert_close):
        """A draft may be longer than a chunk; what is kept is replayed token by token."""
        clean, drafting = Stepper(hybrid.ours), Stepper(hybrid.ours, rollback=rollback)
        kept = min(47, len(hybrid.ids))
        clean.step({0: hybrid.ids[:kept]})
        drafting.step({0: hybrid.ids}, keep=[kept], speculative=True)
        assert_same_state(assert_close, "long draft", drafting, clean)

    def test_only_some_sequences_draft(self, hybrid, rollback, assert_close):
        """Prefill, plain decoding and drafts share a step; only drafts may lose tokens."""
        ids = torch.cat((hybrid.ids, hybrid.sequences[3]))
        pasts, news = (0, 20, 7, 33), (40, 1, 5, 5)
        stepper = Stepper(hybrid.ours, sequences=4, rollback=rollback)
        stepper.step({row: ids[:past] for row, past in enumerate(pasts) if past})
        pieces = {row: ids[a : a + n] for row, (a, n) in enumerate(zip(pasts, news, strict=True))}
        kept = (40, 1, 2, 0)
        stepper.step(pieces, keep=kept, speculative=[False, False, True, True])
        for row, (past, count) in enumerate(zip(pasts, kept, strict=True)):
            alone = Stepper(hybrid.ours)
            for piece in (ids[:past], ids[past : past + count]):
                if len(piece):
                    alone.step({0: piece})
            *tensors, length = stepper.state(row)
            *expected, expected_length = alone.state()
            assert length == expected_length == past + count
            for x, y in zip(tensors, expected, strict=True):
                assert_close("some draft", x, y, STATE_BOUND * max(1.0, float(y.abs().max())))


class TestKeep:
    def test_both_ways_back_give_the_same_bits(self, hybrid):
        """Picking a state and applying the kept tokens again must not drift apart."""
        results = []
        for rollback in ("snapshots", "replay"):
            stepper = Stepper(hybrid.ours, sequences=2, rollback=rollback)
            stepper.step({0: hybrid.ids[:21], 1: hybrid.ids[:3]})
            draft = {0: hybrid.sequences[3][:5], 1: hybrid.sequences[3][5:9]}
            stepper.step(draft, keep=[3, 4], speculative=True)
            results.append((stepper.state(0), stepper.state(1)))
        for first, second in zip(*results, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(first[:3], second[:3], strict=True))

    def test_settled_sequences_of_a_mixed_step_cannot_drop_tokens(self, pair_of):
        stepper = Stepper(pair_of.ours, sequences=2)
        pieces = {0: pair_of.ids[:3], 1: pair_of.ids[:3]}
        with pytest.raises(AssertionError, match="only be dropped from a speculative view"):
            stepper.step(pieces, keep=[3, 2], speculative=[True, False])

    def test_a_plain_step_cannot_drop_tokens(self, pair_of):
        stepper = Stepper(pair_of.ours)
        with pytest.raises(AssertionError, match="only be dropped from a speculative view"):
            stepper.step({0: pair_of.ids[:3]}, keep=[2])

    @pytest.mark.parametrize("counts", [[-1], [4], [1, 1]])
    def test_impossible_counts(self, pair_of, counts):
        stepper = Stepper(pair_of.ours)
        with pytest.raises(AssertionError):
            stepper.step({0: pair_of.ids[:3]}, keep=counts, speculative=True)

    def test_a_view_must_be_closed_before_the_next(self, pair_of):
        stepper = Stepper(pair_of.ours)
        stepper.prepare({0: pair_of.ids[:3]})
        with pytest.raises(AssertionError, match="has not been called"):
            stepper.prepare({0: pair_of.ids[:3]})
        with pytest.raises(AssertionError, match="has not been called"):
            stepper.cache.save(stepper.slots[0])

    def test_keep_without_a_view(self, pair_of):
        with pytest.raises(AssertionError, match="without a view"):
            Stepper(pair_of.ours).cache.keep()

    def test_a_speculative_view_leaves_the_state_alone_until_keep(self, pair_of):
        stepper = Stepper(pair_of.ours)
        stepper.step({0: pair_of.ids[:9]})
        recurrent, conv = stepper.cache.recurrent.clone(), stepper.cache.conv.clone()
        with torch.inference_mode():
            batch, view = stepper.prepare({0: pair_of.ids[9:14]}, speculative=True)
            pair_of.ours.run(batch, view)
        assert torch.equal(stepper.cache.recurrent, recurrent)
        assert torch.equal(stepper.cache.conv, conv)
        stepper.cache.keep([5])
        assert not torch.equal(stepper.cache.recurrent, recurrent)


class TestNotedStates:
    """With ``keeps_first`` a picked state is copied when it is asked for, not by ``keep``."""

    @pytest.mark.parametrize("seed", range(4))
    def test_they_are_the_states_that_keep_would_have_copied(self, pair_of, seed):
        dice = random.Random(seed)
        lazy, eager = (Stepper(pair_of.ours, sequences=3) for _ in range(2))
        ids = pair_of.sequences[3]
        for _ in range(40):
            rows = sorted(dice.sample(range(3), dice.choice((1, 2, 3, 3, 3, 3))))
            pieces, flags, kept = {}, [], []
            for row in rows:
                count, first = dice.randint(1, 4), dice.randrange(len(ids) - 4)
                pieces[row] = ids[first : first + count]
                flags.append(dice.random() < 0.8)
                kept.append(dice.randint(1, count) if flags[-1] else count)
            options = {"keep": kept, "speculative": flags}
            got = lazy.step(pieces, keeps_first=True, **options)
            assert all(map(torch.equal, got, eager.step(pieces, **options)))
            row = dice.randrange(3)
            what = dice.choice(("nothing", "nothing", "look", "bytes", "copy", "load"))
            if what == "look":
                *states, length = lazy.state(row)
                *expected, expected_length = eager.state(row)
                assert length == expected_length
                assert all(map(torch.equal, states, expected))
            for cache in (lazy.cache, eager.cache):
                source, spare = lazy.slots[row], lazy.cache.num_slots - 1
                if what == "bytes":
                    cache.load_slot(spare, cache.length(source), cache.slot_bytes(source))
                elif what == "copy":
                    cache.copy_slot(source, spare)
                elif what == "load":  # and the same again, so that its pages stay its own
                    cache.load(source, cache.save(source))
            if what in ("bytes", "copy"):
                spare = lazy.cache.num_slots - 1
                found = (cache.recurrent[:, spare] for cache in (lazy.cache, eager.cache))
                assert torch.equal(*found)
        for slot in lazy.slots:
            lazy.cache.close(slot)
        assert not lazy.cache._noted

    def test_nothing_is_copied_from_step_to_step(self, pair_of):
        stepper = Stepper(pair_of.ours, sequences=2)
        before = stepper.cache.recurrent.clone()
        for _ in range(3):
            pieces = {0: pair_of.ids[:3], 1: pair_of.ids[3:6]}
            stepper.step(pieces, keep=[1, 2], speculative=True, keeps_first=True)
        assert torch.equal(stepper.cache.recurrent, before)
        stepper.cache.settle(stepper.slots[1])
        changed = stepper.cache.recurrent != before
        assert changed[:, stepper.slots[1]].any()
        assert not changed[:, stepper.slots[0]].any()

    def test_a_promise_is_held(self, pair_of):
        stepper = Stepper(pair_of.ours)
        with pytest.raises(AssertionError, match="the first token was to stay"):
            stepper.step({0: pair_of.ids[:3]}, keep=[0], speculative=True, keeps_first=True)


class TestSlots:
    def test_a_reused_slot_is_clean(self, hybrid, assert_close):
        stepper = Stepper(hybrid.ours, sequences=2)
        stepper.step({0: hybrid.sequences[3], 1: hybrid.sequences[2]})
        used = stepper.slots[0]
        stepper.cache.close(used)
        stepper.slots[0] = stepper.cache.open()
        assert stepper.slots[0] == used
        assert stepper.cache.length(used) == 0
        got = stepper.feed(hybrid.ids, [20, 21])
        assert_close("reused slot", got, hybrid.want, BOUND)

    def test_a_step_touches_only_its_own_slots(self, pair_of):
        stepper = Stepper(pair_of.ours, sequences=3)
        stepper.step({0: pair_of.ids[:5], 1: pair_of.ids[:40], 2: pair_of.ids[:2]})
        before = [stepper.state(row) for row in range(3)]
        stepper.step({1: pair_of.ids[40:70]})
        for row in (0, 2):
            *tensors, length = stepper.state(row)
            *expected, expected_length = before[row]
            assert length == expected_length
            assert all(torch.equal(x, y) for x, y in zip(tensors, expected, strict=True))

    def test_slots_are_counted(self, pair_of):
        cache = HybridCache(pair_of.config, num_slots=2, num_pages=1)
        first, second = cache.open(), cache.open()
        assert {first, second} == {0, 1}
        assert cache.slots_free == 0
        with pytest.raises(AssertionError, match="no free slot"):
            cache.open()
        cache.close(first)
        assert cache.slots_free == 1
        with pytest.raises(AssertionError):
            cache.close(first)

    def test_order_of_slots_in_a_view_is_free(self, hybrid, assert_close):
        stepper = Stepper(hybrid.ours, sequences=3)
        for row in (2, 0, 1):
            stepper.step({row: hybrid.ids[: 10 + row]})
        pieces = {row: hybrid.ids[10 + row : 20 + row] for row in (1, 2, 0)}
        rows = stepper.step(pieces)
        for row, logits in zip(pieces, rows, strict=True):
            want = hybrid.want[10 + row : 20 + row]
            assert_close("order of slots", logits, want, BOUND)


class TestSaved:
    def test_a_saved_sequence_continues_exactly(self, hybrid):
        """Save, disturb, load: the very same bits come out as without the disturbance."""
        stepper = Stepper(hybrid.ours)
        stepper.step({0: hybrid.ids[:37]})
        saved = stepper.cache.save(stepper.slots[0])
        want = [stepper.step({0: hybrid.ids[37:50]})[0], stepper.step({0: hybrid.ids[50:51]})[0]]
        stepper.cache.load(stepper.slots[0], saved)
        assert stepper.cache.length(stepper.slots[0]) == 37
        got = [stepper.step({0: hybrid.ids[37:50]})[0], stepper.step({0: hybrid.ids[50:51]})[0]]
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))

    def test_a_saved_copy_does_not_change_later(self, pair_of):
        stepper = Stepper(pair_of.ours)
        stepper.step({0: pair_of.ids[:9]})
        saved = stepper.cache.save(stepper.slots[0])
        copy = Saved(
            length=saved.length,
            recurrent=saved.recurrent.clone(),
            conv=saved.conv.clone(),
            last_hidden=saved.last_hidden.clone(),
        )
        stepper.step({0: pair_of.ids[9:20]})
        assert torch.equal(saved.recurrent, copy.recurrent)
        assert torch.equal(saved.conv, copy.conv)
        assert torch.equal(saved.last_hidden, copy.last_hidden)

    def test_two_sequences_share_the_pages_of_a_prefix(self, hybrid, assert_close):
        """The prefix is computed once; both continue in pages of their own."""
        prefix, page = 32, 16
        stepper = Stepper(hybrid.ours, sequences=2, page_size=page)
        stepper.step({0: hybrid.ids[:prefix]})
        stepper.cache.load(stepper.slots[1], stepper.cache.save(stepper.slots[0]))
        stepper.page_table[1, : prefix // page] = stepper.page_table[0, : prefix // page]
        other = torch.cat((hybrid.ids[:prefix], hybrid.sequences[2]))
        with torch.no_grad():
            want = hybrid.theirs(other[None]).logits[0]
        both = stepper.step({0: hybrid.ids[prefix:], 1: hybrid.sequences[2]})
        assert_close("shared prefix", both[0], hybrid.want[prefix:], BOUND)
        assert_close("shared prefix", both[1], want[prefix:], 2 * BOUND)

    def test_last_hidden_row_is_that_of_the_last_kept_token(self, pair_of):
        stepper = Stepper(pair_of.ours)
        stepper.step({0: pair_of.ids[:9]})
        assert torch.equal(stepper.state()[2], stepper.hidden[8])
        stepper.step({0: pair_of.ids[9:14]}, keep=[2], speculative=True)
        kept = stepper.hidden[1].clone()
        assert torch.equal(stepper.state()[2], kept)
        stepper.step({0: pair_of.ids[:3]}, keep=[0], speculative=True)
        assert torch.equal(stepper.state()[2], kept)


class TestCaptures:
    """A state in the middle of a step's tokens, copied to another slot while the step runs."""

    @pytest.mark.parametrize("count", [1, 2, 16, 17, 40, 64])
    @pytest.mark.parametrize("past", [0, 5])
    def test_equals_stopping_there(self, hybrid, past, count, assert_close):
        ids = torch.cat((hybrid.ids, hybrid.sequences[3]))
        stepper = Stepper(hybrid.ours)
        if past:
            stepper.step({0: ids[:past]})
        spare = stepper.cache.open()
        (logits,) = stepper.step(
            {0: ids[past : past + 70]}, captures=[Capture(sequence=0, count=count, slot=spare)]
        )
        stopped = Stepper(hybrid.ours)
        if past:
            stopped.step({0: ids[:past]})
        (before,) = stopped.step({0: ids[past : past + count]})
        captured, want = stepper.cache.save(spare), stopped.cache.save(stopped.slots[0])
        assert captured.length == want.length == past + count
        for name in ("recurrent", "conv", "last_hidden"):
            x, y = getattr(captured, name), getattr(want, name)
            assert_close("captured state", x, y, STATE_BOUND * max(1.0, float(y.abs().max())))
        (after,) = stopped.step({0: ids[past + count : past + 70]})
        assert_close("logits of a capturing step", logits, torch.cat((before, after)), BOUND)

    def test_several_captures_of_several_sequences(self, hybrid, assert_close):
        stepper = Stepper(hybrid.ours, sequences=2)
        spares = [stepper.cache.open() for _ in range(2)]
        captures = [Capture(1, 20, spares[0]), Capture(0, 3, spares[1])]
        both = stepper.step({0: hybrid.ids[:9], 1: hybrid.ids[:50]}, captures=captures)
        for logits in both:
            assert_close("several captures", logits, hybrid.want[: len(logits)], BOUND)
        for count, spare in ((20, spares[0]), (3, spares[1])):
            alone = Stepper(hybrid.ours)
            alone.step({0: hybrid.ids[:count]})
            want = alone.state()
            assert stepper.cache.length(spare) == count
            for x, y in zip(
                (stepper.cache.recurrent[:, spare], stepper.cache.conv[:, spare]),
                want[:2],
                strict=True,
            ):
                assert_close("several captures", x, y, STATE_BOUND * max(1.0, float(y.abs().max())))

    def test_a_capture_needs_a_token(self, pair_of):
        stepper = Stepper(pair_of.ours)
        for count in (0, 10):
            with pytest.raises(AssertionError):
                stepper.step({0: pair_of.ids[:9]}, captures=[Capture(0, count, 1)])


class TestCopies:
    def test_a_copied_slot_continues_like_its_source(self, hybrid):
        stepper = Stepper(hybrid.ours, sequences=2)
        stepper.step({0: hybrid.ids[:37]})
        stepper.cache.copy_slot(stepper.slots[0], stepper.slots[1])
        for a, b in zip(
            stepper.page_table[0].tolist(), stepper.page_table[1].tolist(), strict=True
        ):
            stepper.cache.copy_page(a, b)
        assert stepper.cache.length(stepper.slots[1]) == 37
        first, second = stepper.step({0: hybrid.ids[37:45], 1: hybrid.ids[37:45]})
        assert torch.allclose(first, second, atol=1e-6)
        alone = stepper.step({1: hybrid.ids[45:46]})[0]
        assert torch.isfinite(alone).all()


class TestPages:
    @pytest.mark.parametrize("page_size", [1, 7, 16, PAGE_SIZE])
    def test_page_size_and_order_do_not_matter(self, pair_of, page_size, assert_close):
        for seed in range(3):
            stepper = Stepper(pair_of.ours, page_size=page_size, seed=seed)
            got = stepper.feed(pair_of.ids, [1, 5, 70])
            assert_close("pages", got, pair_of.want, BOUND)

    def test_only_the_pages_of_the_new_tokens_are_written(self, pair_of):
        stepper = Stepper(pair_of.ours, page_size=16)
        stepper.step({0: pair_of.ids[:20]})
        written = ~stepper.cache.kv.isnan().all(dim=-1).all(dim=-1)  # [pages, layers, 2, offset]
        used = stepper.page_table[0, :2].tolist()
        layers = len(pair_of.config.attention_layers)  # the MTP head did not run
        assert written[used[0], :layers].all()
        assert written[used[1], :layers, :, :4].all()
        assert not written[used[1], :, :, 4:].any()
        assert not written[:, layers:].any()
        free = [page for page in range(stepper.cache.num_pages) if page not in used]
        assert not written[free].any()

    def test_a_page_table_that_is_too_short(self, pair_of):
        cache = HybridCache(pair_of.config, num_slots=1, num_pages=4, page_size=8)
        table = torch.tensor([[0, 1]])
        with pytest.raises(AssertionError):
            cache.view([cache.open()], table, Segments.of([17]))

    def test_pages_for(self, pair_of):
        cache = HybridCache(pair_of.config, num_slots=1, num_pages=1, page_size=8)
        assert [cache.pages_for(n) for n in (0, 1, 8, 9, 64)] == [0, 1, 1, 2, 8]

    def test_page_size_equals_chunk_length(self):
        assert PAGE_SIZE == CHUNK


class TestStepsAndChunks:
    @pytest.mark.parametrize("tokens", [15, 16, 17, 18])
    def test_pieces_around_the_switch_to_chunks(self, hybrid, tokens, assert_close):
        """Up to 16 new tokens are walked one by one, more are solved in chunks: same numbers."""
        stepper = Stepper(hybrid.ours)
        got = stepper.feed(hybrid.ids[: 3 * tokens], [tokens, 2 * tokens])
        assert_close("around the switch", got, hybrid.want[: 3 * tokens], BOUND)

    def test_empty_pieces_in_a_batch(self, hybrid, assert_close):
        """A sequence may take part in a step without a new token; nothing of it changes."""
        stepper = Stepper(hybrid.ours, sequences=3)
        stepper.step(dict.fromkeys(range(3), hybrid.ids[:11]))
        before = stepper.state(1)
        none = hybrid.ids[:0]
        for end in (12, 60):
            start = 11 if end == 12 else 12
            piece = hybrid.ids[start:end]
            first, empty, last = stepper.step({0: piece, 1: none, 2: piece})
            assert_close("beside an empty piece", first, hybrid.want[start:end], BOUND)
            assert_close("beside an empty piece", last, hybrid.want[start:end], BOUND)
            assert empty.shape[0] == 0
        assert all(torch.equal(x, y) for x, y in zip(stepper.state(1)[:3], before[:3], strict=True))


def half_precision(pair: Pair) -> CausalLM:
    """The same model in bfloat16, its decay terms still float32."""
    model = CausalLM(pair.config)
    model.load_state_dict(pair.ours.state_dict())
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias")):
            parameter.data = parameter.data.bfloat16()
    return model


class TestHalfPrecision:
    def test_the_recurrent_state_stays_float32(self, pair_of):
        model = half_precision(pair_of)
        stepper = Stepper(model, sequences=2)
        stepper.step({0: pair_of.ids[:70], 1: pair_of.ids[:3]})
        stepper.step({0: pair_of.ids[70:71], 1: pair_of.ids[3:4]})
        stepper.step({0: pair_of.ids[71:75], 1: pair_of.ids[4:7]}, keep=[2, 0], speculative=True)
        cache = stepper.cache
        assert cache.recurrent.dtype == torch.float32
        assert stepper.state()[0].dtype == torch.float32
        # Not merely stored so: the numbers are finer than bfloat16.
        used = cache.recurrent[:, stepper.slots]
        assert (used != used.bfloat16().float()).float().mean() > 0.9
        assert cache.kv.dtype == cache.conv.dtype == cache.last_hidden.dtype == torch.bfloat16

    @pytest.mark.parametrize("name", ["three_to_one", "attention_ratio_4"])
    def test_512_decode_steps_stay_within_the_stated_drift(self, pair_named, name, assert_close):
        """Decoding in bfloat16 is as good as the full forward in bfloat16, at the end as well.

        Stated drift: logits (of unit size) of 512 steps differ from those of the full forward by
        less than 0.03 root mean square, and the last 128 are not more than a tenth further from
        the float32 model than the full forward's.
        """
        pair = pair_named(name)
        model = half_precision(pair)
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(pair.config.vocab_size, (512,), generator=generator)
        with torch.no_grad():
            full = model(ids[None]).logits[0].float()
            exact = pair.ours(ids[None]).logits[0]
        got = Stepper(model, capacity=512, page_size=64).feed(ids, range(1, 512)).float()
        drift, late = rms(got - full), slice(-128, None)
        assert_close.note("512 bfloat16 steps, RMS to the full forward", drift)
        assert_close.note("512 bfloat16 steps, RMS to float32", rms(got - exact))
        assert_close.note("bfloat16 full forward, RMS to float32", rms(full - exact))
        assert drift < 0.03
        assert rms(got[late] - exact[late]) < 1.1 * rms(full[late] - exact[late])

    def test_512_steps_would_show_a_state_in_half_precision(self, pair_named, assert_close):
        """With its float32 state a float32 model stays within the bound; rounded, it leaves it."""
        pair = pair_named("three_to_one")
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(pair.config.vocab_size, (512,), generator=generator)
        with torch.no_grad():
            want = pair.theirs(ids[None]).logits[0]
        got = Stepper(pair.ours, capacity=512).feed(ids, range(1, 512))
        assert_close("512 float32 steps", got, want, BOUND)
        rounding = Stepper(pair.ours, capacity=512)
        outs = []
        for t in range(512):
            outs.append(rounding.step({0: ids[t : t + 1]})[0])
            rounding.cache.recurrent.copy_(rounding.cache.recurrent.bfloat16())
        assert (torch.cat(outs) - want).abs().max() > 10 * BOUND


def rms(x: Tensor) -> float:
    """Root mean square of all entries."""
    return float(x.pow(2).mean().sqrt())


class TestShapes:
    def test_tensors_and_bytes(self, pair_of):
        config = pair_of.config
        cache = HybridCache(config, num_slots=3, num_pages=5, page_size=8, dtype=torch.bfloat16)
        assert cache.kv.shape == (5, 2 + 1, 2, 8, 2, 16)
        assert cache.recurrent.shape == (3, 3, 4, 8, 12)
        assert cache.conv.shape == (3, 3, 3, 2 * 16 + 48)
        assert cache.last_hidden.shape == (3, 32)
        kv, conv, hidden = 5 * 3 * 2 * 8 * 2 * 16, 3 * 3 * 3 * 80, 3 * 32
        assert cache.nbytes == 2 * (kv + conv + hidden) + 4 * (3 * 3 * 4 * 8 * 12)

    def test_models_without_one_kind_of_layer(self, pair_named):
        delta = HybridCache(pair_named("one_delta_layer").config, num_slots=1, num_pages=1)
        assert delta.kv.shape[1] == 1  # the MTP head only
        dense = HybridCache(pair_named("qwen3_plain").config, num_slots=1, num_pages=1)
        assert dense.recurrent.numel() == dense.conv.numel() == 0

    def test_a_fresh_cache_of_a_model_with_random_weights_runs(self):
        """Without the harness of the other tests: zeros in the pages, default page size."""
        config = ModelConfig.from_dict(CASES[4].raw)
        model = CausalLM(config)
        initialise(model, seed=3)
        cache = HybridCache(config, num_slots=1, num_pages=2)
        slot = cache.open()
        table = torch.tensor([[1, 0]])
        ids = torch.arange(70) % config.vocab_size
        outs: list[Tensor] = []
        with torch.no_grad():
            for piece in (ids[:66], ids[66:]):
                batch = TokenBatch.pack([piece], first_positions=[cache.length(slot)])
                outs.append(model.run(batch, cache.view([slot], table, batch.segments)))
                cache.keep()
            want = model.run(TokenBatch.pack([ids]))
        assert torch.allclose(torch.cat(outs), want, atol=1e-4)
