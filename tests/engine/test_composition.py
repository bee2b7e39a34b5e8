"""Every feature with every other: tokens and log-probabilities are those of the plain run.

In path-independent mode they are equal bit by bit; in the ordinary mode they may part at near-ties
(``qnext.engine.ties``). The rows are a covering array: any two settings meet in one of them (any
three with ``-m slow``). A failing row is printed and can be run alone.
"""

import itertools
from dataclasses import replace

import pytest
from composition import (
    FACTORS,
    RULED_OUT,
    TOKENS,
    Answer,
    Composed,
    Plain,
    Subject,
    Tally,
    ask_of,
    assert_it_happened,
    compare_under_tie_rule,
    composed_run,
)
from covering import Row, covering_array, is_ruled_out

from qnext.engine import engine as engine_module
from qnext.engine.engine import Engine
from qnext.engine.invariance import check_path_independence
from qnext.engine.request import SamplingParams, TokenLogprobs
from qnext.engine.runner import Runner
from qnext.errors import BackendError
from qnext.model.cache import HybridCache

PAIRS = covering_array(FACTORS, ruled_out=RULED_OUT)

STORY = (
    "Once upon a time there was a cat who lived in an old mill by the river. Every morning she "
    "walked down to the water and counted the ducks. One day there was one duck more than the day "
    "before. It was small and grey, and it did not know how to swim. The cat sat down in the grass "
    "and thought about it for a long while. Then she said to the little duck: come with me, and I "
    "will show you"
)
TALK = [
    {"role": "system", "content": "You tell short stories to children who cannot sleep."},
    {"role": "user", "content": "Tell me a story about a dog and a boat."},
    {"role": "assistant", "content": "Once there was a dog named Max. He found a boat."},
    {"role": "user", "content": "That was nice. Now tell me a longer story about a little robot "
     "who lives in a house near the park and likes to count the stars."},
]  # fmt: skip
COMPANY = (
    "The sun was",
    "Hello! What is the name of the little boy who went to the garden with his sister?",
    "One day, a bird",
    "x",
    "In the morning the farmer went out to look for his lost sheep. He walked and walked, over "
    "the hill and through the wood, until",
)


@pytest.fixture(scope="module")
def tiny(tiny_folder) -> Subject:
    return Subject(
        folder=tiny_folder, text=STORY[-150:], messages=TALK[-1:], company=COMPANY,
        drafts_known=True, options={"batch_invariant": True},
    )  # fmt: skip


@pytest.fixture(scope="module")
def mini() -> Subject:
    return Subject(
        folder="qnext-mini", text=STORY, messages=TALK, company=COMPANY, drafts_known=False,
        options={"batch_invariant": True, "dtype": "float32"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def ordinary() -> dict[str, Subject]:
    """The embedded model in the ordinary mode, by dtype."""
    return {
        dtype: Subject(
            folder="qnext-mini", text=STORY, messages=TALK, company=COMPANY, drafts_known=False,
            options={"dtype": dtype},
        )
        for dtype in ("float32", "bfloat16")
    }  # fmt: skip


@pytest.fixture
def checked_once(monkeypatch):
    """Every row opens its model anew; that its ops are independent is a test of its own."""
    monkeypatch.setattr(engine_module, "check_path_independence", lambda model: None)


def check(subject: Subject, row: Row):
    """Bit by bit."""
    plain = subject.plain(ask_of(row))
    composed = composed_run(subject, row, plain)
    assert composed.answers == plain.answers, row
    assert_it_happened(row, plain, composed)
    return composed


def short(row: Row) -> str:
    return "-".join(str(value) for value in row.values())


# -- path-independent ----------------------------------------------------------------------------


@pytest.mark.parametrize("row", PAIRS, ids=short)
@pytest.mark.usefixtures("checked_once")
def test_any_two_features_together_change_no_bit_of_a_random_model(tiny, row):
    check(tiny, row)


@pytest.mark.parametrize("row", PAIRS, ids=short)
@pytest.mark.usefixtures("checked_once")
def test_any_two_features_together_change_no_bit_of_the_embedded_model(mini, row):
    check(mini, row)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "mini"])
@pytest.mark.usefixtures("checked_once")
def test_any_three_features_together_change_no_bit(request, name):
    subject = request.getfixturevalue(name)
    drafted = accepted = 0
    for row in covering_array(FACTORS, strength=3, ruled_out=RULED_OUT):
        composed = check(subject, row)
        drafted, accepted = drafted + composed.drafted, accepted + composed.accepted
    assert 0 < accepted < drafted


@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_the_rows_are_run_with_independent_ops(request, name):
    check_path_independence(request.getfixturevalue(name).open().model)


def test_the_array_covers_every_pair():
    for one, other in itertools.combinations(FACTORS, 2):
        found = {(row[one], row[other]) for row in PAIRS}
        for values in itertools.product(FACTORS[one], FACTORS[other]):
            pair = dict(zip((one, other), values, strict=True))
            assert (values in found) != is_ruled_out(pair, RULED_OUT), pair
    assert not any(is_ruled_out(row, RULED_OUT) for row in PAIRS)
    # What is refused elsewhere needs its other value to be there.
    assert all(len(rule) == 2 for rule in RULED_OUT)


def test_what_the_rows_are_about_does_happen(mini):
    """Drafts of the real head are accepted and rejected; two stops end an answer early."""
    ends = set()
    drafted = accepted = 0
    for drafts, stop in ((2, "token"), (4, "string"), (1, None)):
        row = {**{name: values[0] for name, values in FACTORS.items()},
               "drafts": drafts, "stop": stop}  # fmt: skip
        composed = check(mini, row)
        drafted, accepted = drafted + composed.drafted, accepted + composed.accepted
        answer = composed.answers[0]
        ends.add((stop, answer.finish_reason))
        assert (len(answer.token_ids) < TOKENS) == (stop is not None)
    assert 0 < accepted < drafted
    assert ends == {("token", "stop"), ("string", "stop"), (None, "length")}


# -- the ordinary mode ---------------------------------------------------------------------------


def compare_all(subject: Subject, rows: list[Row]) -> Tally:
    tally = Tally()
    for row in rows:
        plain = subject.plain(ask_of(row))
        composed = composed_run(subject, row, plain)
        try:
            compare_under_tie_rule(plain, composed, tally)
        except AssertionError as error:
            raise AssertionError(f"{row}: {error}") from None
        assert_it_happened(row, plain, composed)
    return tally


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_ordinary_mode_any_two_features_differ_at_near_ties_only(ordinary, dtype):
    tally = compare_all(ordinary[dtype], PAIRS)
    print(f"\nordinary mode, {dtype}, {len(PAIRS)} rows: {tally}")
    assert tally.positions > 400
    # The rule excuses little: most positions have no rival at all.
    assert tally.near_ties < tally.positions * {"float32": 0.01, "bfloat16": 0.3}[dtype]
    assert 0 < tally.accepted < tally.drafted
    assert tally.furthest > 0.0  # another path was taken, or nothing would have been shown


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_ordinary_mode_any_three_features_differ_at_near_ties_only(ordinary, dtype):
    rows = covering_array(FACTORS, strength=3, ruled_out=RULED_OUT)
    print(f"\nordinary mode, {dtype}, {len(rows)} rows: {compare_all(ordinary[dtype], rows)}")


# -- would the arrays notice? --------------------------------------------------------------------


def a_state_is_resumed_without_its_window(patch):
    copy = HybridCache.copy_slot

    def half(self, source, target):
        copy(self, source, target)
        self.conv[:, target] = 0.0

    patch.setattr(HybridCache, "copy_slot", half)


def rejected_drafts_stay_in_the_state(patch):
    pick = HybridCache._pick

    def everything(self, view, live, kept):
        pick(self, view, live, view.segments.lengths)

    patch.setattr(HybridCache, "_pick", everything)


def a_shared_page_is_not_copied(patch):
    patch.setattr(Runner, "copy_page", lambda self, source, target: None)


def positions_of_a_chunk_start_over(patch):
    work = Engine._work

    def again(self, item):
        found = work(self, item)
        return replace(found, start=found.start % 64)

    patch.setattr(Engine, "_work", again)


def noise_goes_by_steps_instead_of_tokens(patch):
    row = Engine._row

    def by_steps(self, sequence, drafts):
        found = row(self, sequence, drafts)
        found.index = self.steps
        return found

    patch.setattr(Engine, "_row", by_steps)


def penalties_count_rejected_drafts(patch):
    row = Engine._row

    def counting(self, sequence, drafts):
        sequence.counts.update(drafts)
        return row(self, sequence, drafts)

    patch.setattr(Engine, "_row", counting)


MISTAKES = {
    a_state_is_resumed_without_its_window: {"cache": ("exact", "partial", "branch")},
    rejected_drafts_stay_in_the_state: {"drafts": (3, 4), "rollback": ("snapshots",)},
    a_shared_page_is_not_copied: {"cache": ("exact", "partial", "branch")},
    positions_of_a_chunk_start_over: {"chunk": (7, 64)},
    noise_goes_by_steps_instead_of_tokens: {"sampling": ("seeded", "penalised")},
    penalties_count_rejected_drafts: {"sampling": ("penalised",), "drafts": (2, 3, 4)},
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
@pytest.mark.parametrize("mode", ["independent", "float32", "bfloat16"])
@pytest.mark.usefixtures("checked_once")
def test_the_arrays_notice(mini, ordinary, monkeypatch, mode, mistake):
    """Positive controls: with a mistake in the engine some of the rows it concerns fail."""
    subject = mini if mode == "independent" else ordinary[mode]
    concerned = [
        row for row in PAIRS if all(row[f] in values for f, values in MISTAKES[mistake].items())
    ]
    assert concerned
    for row in concerned:
        plain = subject.plain(ask_of(row))
        with monkeypatch.context() as patch:
            mistake(patch)
            composed = composed_run(subject, row, plain)
        if mode == "independent":
            if composed.answers != plain.answers:
                return
            continue
        try:
            compare_under_tie_rule(plain, composed, Tally())
        except AssertionError:
            return
    pytest.fail(f"{len(concerned)} rows with the mistake passed")


def answer(ids: tuple[int, ...], logprob: float) -> Answer:
    return Answer(
        token_ids=ids, text="", reasoning="", finish_reason="length", prompt_tokens=1,
        completion_tokens=len(ids), prompt_logprobs=(),
        logprobs=tuple(TokenLogprobs(token_id=i, logprob=logprob, top=()) for i in ids),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (answer((1, 2, 3), -1.0), None),
        (answer((1, 5, 9), -1.05), None),
        (answer((1, 6, 3), -1.0), "token 1 is 6 instead of 2"),
        (answer((1, 2, 4), -1.0), "token 2 is 4 instead of 3"),
        (answer((1, 2), -1.0), "answers of 3 and 2 equal tokens"),
        (answer((1, 2, 3), -1.2), "further apart than 0.1"),
    ],
)
def test_the_tie_rule_excuses_rivals_and_nothing_else(other, complaint):
    plain = Plain(
        params=SamplingParams(), prompt_ids=(), answers=[answer((1, 2, 3), -1.0)],
        rivals=[[(), (5,), ()]], slacks=[[0.1, 0.1, 0.1]],
    )  # fmt: skip
    tally = Tally()
    composed = Composed(answers=[other], cached=[0], drafted=0, accepted=0, parkings=0)
    if complaint is None:
        compare_under_tie_rule(plain, composed, tally)
        assert tally.differences == (other.token_ids != (1, 2, 3))
        assert tally.near_ties == 1
    else:
        with pytest.raises(AssertionError, match=complaint):
            compare_under_tie_rule(plain, composed, tally)


# -- the promise ---------------------------------------------------------------------------------


def test_a_model_without_independent_rows_is_refused(tiny_model):
    with pytest.raises(BackendError, match="gives other bits when a prompt is split"):
        Engine(tiny_model, batch_invariant=True)
