"""Every feature with every other: tokens and log-probabilities are those of the plain run.

On the native kernels and in path-independent mode they are equal bit by bit; in the ordinary mode
of PyTorch they may part at near-ties (``qnext.engine.ties``). The rows are a covering array: any
two settings meet in one of them (any three with ``-m slow``). A failing row is printed and can be
run alone.
"""

import itertools

import pytest
import torch
from composition import (
    NATIVE_FACTORS,
    RULED_OUT,
    TOKENS,
    TORCH_FACTORS,
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
from planted import OF_NATIVE, OF_PYTORCH
from routers import break_ties_as_in, chooser_of, following_routes, noting_routes

from qnext import load_model, native, save_model
from qnext.engine import engine as engine_module
from qnext.engine.engine import Engine
from qnext.engine.invariance import check_path_independence
from qnext.engine.request import SamplingParams, TokenLogprobs
from qnext.errors import BackendError
from qnext.ops.route import route_reference

PAIRS = covering_array(NATIVE_FACTORS, ruled_out=RULED_OUT)
TORCH_PAIRS = covering_array(TORCH_FACTORS, ruled_out=RULED_OUT)
QUIET_PAIRS = covering_array(
    {name: values for name, values in NATIVE_FACTORS.items() if name != "threads"},
    ruled_out=RULED_OUT,
)
"""With one thread: how work is shared out does not depend on the model."""
SINGLES = covering_array(NATIVE_FACTORS, strength=1, ruled_out=RULED_OUT)
QUIET_SINGLES = covering_array(
    {name: values for name, values in NATIVE_FACTORS.items() if name != "threads"},
    strength=1,
    ruled_out=RULED_OUT,
)
"""Not every pair, but every value of every factor."""

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


MODELS: dict[str, dict[str, object]] = {
    "torch": {"backend": "torch", "dtype": "float32"},
    "torch bfloat16": {"backend": "torch", "dtype": "bfloat16"},
    "float32": {"backend": "native", "dtype": "float32"},
    "bfloat16": {"backend": "native", "dtype": "bfloat16"},
    "int8": {"backend": "native"},
    "int4": {"backend": "native", "quantization": "int4"},
}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The embedded model, which ships in 8 bits, in bfloat16."""
    folder = tmp_path_factory.mktemp("models") / "qnext-mini"
    save_model(load_model("qnext-mini", dtype="bfloat16"), folder)
    return folder


@pytest.fixture(scope="module")
def subjects(tiny_folder, unpacked):
    """By name: "tiny" is a random model, "mini" the embedded one; by mode."""
    made: dict[tuple[str, ...], Subject] = {}

    def find(name: str, kind: str, mode: str = "independent") -> Subject:
        options = {**MODELS[kind], "batch_invariant": mode == "independent"}
        if (name, kind, mode) not in made:
            made[name, kind, mode] = (
                Subject(
                    folder="qnext-mini" if kind == "int8" else unpacked, text=STORY, messages=TALK,
                    company=COMPANY, drafts_known=False, options=options,
                )
                if name == "mini"
                else Subject(
                    folder=tiny_folder, text=STORY[-150:], messages=TALK[-1:], company=COMPANY,
                    drafts_known=True, options=options,
                )
            )  # fmt: skip
        return made[name, kind, mode]

    yield find
    native.load().set_threads(torch.get_num_threads())


@pytest.fixture
def checked_once(monkeypatch):
    """Every row opens its model anew; that its rows are independent is a test of its own."""
    monkeypatch.setattr(engine_module, "check_path_independence", lambda model: None)


def check(subject: Subject, row: Row, plain_of: Subject | None = None):
    """Bit by bit, beside the plain run of the same subject or of another."""
    plain = (plain_of or subject).plain(ask_of(row))
    composed = composed_run(subject, row, plain)
    assert composed.answers == plain.answers, row
    assert_it_happened(row, plain, composed)
    return composed


def short(row: Row) -> str:
    return "-".join(str(value) for value in row.values())


# -- path-independent ----------------------------------------------------------------------------


@pytest.mark.parametrize("row", TORCH_PAIRS, ids=short)
@pytest.mark.usefixtures("checked_once")
def test_any_two_features_together_change_no_bit_on_pytorch(subjects, row):
    check(subjects("tiny", "torch"), row)


@pytest.mark.slow
@pytest.mark.parametrize("row", TORCH_PAIRS, ids=short)
@pytest.mark.usefixtures("checked_once")
def test_any_two_features_together_change_no_bit_of_the_embedded_model_on_pytorch(subjects, row):
    check(subjects("mini", "torch"), row)


@pytest.mark.slow
@pytest.mark.parametrize("row", QUIET_PAIRS, ids=short)
@pytest.mark.usefixtures("checked_once")
def test_any_two_features_together_change_no_bit_of_a_random_model(subjects, row):
    check(subjects("tiny", "float32"), row)


@pytest.mark.parametrize("row", PAIRS, ids=short)
@pytest.mark.usefixtures("checked_once")
def test_any_two_features_together_change_no_bit_of_the_embedded_model(subjects, row):
    check(subjects("mini", "float32"), row)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("row", SINGLES, ids=short)
@pytest.mark.usefixtures("checked_once")
def test_features_together_change_no_bit_of_other_weights(subjects, kind, row):
    check(subjects("mini", kind), row)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("row", PAIRS, ids=short)
@pytest.mark.usefixtures("checked_once")
def test_any_two_features_together_change_no_bit_of_other_weights(subjects, kind, row):
    check(subjects("mini", kind), row)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [("tiny", "torch"), ("mini", "torch"), ("tiny", "float32"),
     *(("mini", kind) for kind in MODELS if "torch" not in kind)],
)  # fmt: skip
@pytest.mark.usefixtures("checked_once")
def test_any_three_features_together_change_no_bit(subjects, name, kind):
    subject = subjects(name, kind)
    drafted = accepted = 0
    rows = covering_array(subject.factors, strength=3, ruled_out=RULED_OUT)
    for number, row in enumerate(rows):
        # On the native kernels every other row does not even ask for it.
        is_asked = number % 2 == 0 or not subject.is_native
        mode = "independent" if is_asked else "ordinary"
        composed = check(subjects(name, kind, mode), row, plain_of=subject)
        drafted, accepted = drafted + composed.drafted, accepted + composed.accepted
    assert 0 < accepted < drafted


@pytest.mark.parametrize(
    ("name", "kind"),
    [("tiny", "torch"), ("tiny", "float32"), *(("mini", kind) for kind in MODELS)],
)
def test_the_rows_are_run_with_independent_kernels(subjects, name, kind):
    check_path_independence(subjects(name, kind).alone.model)


@pytest.mark.parametrize(
    ("factors", "pairs"),
    [(NATIVE_FACTORS, PAIRS), (TORCH_FACTORS, TORCH_PAIRS)],
    ids=["native", "pytorch"],
)
def test_the_array_covers_every_pair(factors, pairs):
    for one, other in itertools.combinations(factors, 2):
        found = {(row[one], row[other]) for row in pairs}
        for values in itertools.product(factors[one], factors[other]):
            pair = dict(zip((one, other), values, strict=True))
            assert (values in found) != is_ruled_out(pair, RULED_OUT), pair
    assert not any(is_ruled_out(row, RULED_OUT) for row in pairs)
    # What is refused elsewhere needs its other value to be there.
    assert all(len(rule) == 2 for rule in RULED_OUT)


@pytest.mark.parametrize("kind", ["float32", "int4"])
def test_what_the_rows_are_about_does_happen(subjects, kind):
    """Drafts of the real head are accepted and rejected; two stops end an answer early."""
    ends, mini = set(), subjects("mini", kind)
    drafted = accepted = 0
    for drafts, stop in ((2, "token"), (4, "string"), (1, None)):
        row = {**{name: values[0] for name, values in mini.factors.items()},
               "drafts": drafts, "stop": stop}  # fmt: skip
        composed = check(mini, row)
        drafted, accepted = drafted + composed.drafted, accepted + composed.accepted
        answer = composed.answers[0]
        ends.add((stop, answer.finish_reason))
        assert (len(answer.token_ids) < TOKENS) == (stop is not None)
    assert 0 < accepted < drafted
    assert ends == {("token", "stop"), ("string", "stop"), (None, "length")}


# -- the ordinary mode ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tallies(subjects):
    """What the rows of PyTorch's ordinary mode differ in, by dtype and strength; run once."""
    made: dict[tuple[str, int], Tally] = {}

    def find(kind: str, strength: int) -> Tally:
        if (kind, strength) not in made:
            tally, subject = Tally(), subjects("mini", kind, "ordinary")
            rows = covering_array(TORCH_FACTORS, strength=strength, ruled_out=RULED_OUT)
            for row in rows:
                plain = subject.plain(ask_of(row))
                composed = composed_run(subject, row, plain)
                try:
                    compare_under_tie_rule(plain, composed, tally)
                except AssertionError as error:
                    raise AssertionError(f"{row}: {error}") from None
                assert_it_happened(row, plain, composed)
            print(f"\nordinary mode, {kind}, {len(rows)} rows: {tally}")
            made[kind, strength] = tally
        return made[kind, strength]

    return find


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("row", QUIET_SINGLES, ids=short)
def test_in_ordinary_mode_features_change_no_bit_on_the_native_kernels(subjects, kind, row):
    check(subjects("mini", kind, "ordinary"), row, plain_of=subjects("mini", kind))


STRENGTHS = [1, *(pytest.param(strength, marks=pytest.mark.slow) for strength in (2, 3))]


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", ["torch", "torch bfloat16"])
def test_in_ordinary_mode_features_differ_at_near_ties_only_on_pytorch(tallies, kind, strength):
    tally = tallies(kind, strength)
    assert tally.positions > 60 * strength**2
    assert 0 < tally.accepted < tally.drafted
    assert tally.furthest > 0.0  # another path was taken, or nothing would have been shown
    # The rule excuses little: most positions have no rival at all.
    assert tally.near_ties < tally.positions * (0.3 if "bfloat16" in kind else 0.01)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", ["torch", "torch bfloat16"])
def test_in_ordinary_mode_log_probabilities_of_pytorch_move_within_the_bound(
    request, tallies, kind, strength
):
    tally = tallies(kind, strength)
    # So few, and so far, in float32: measured, and missed (docs/numerics.md).
    assert len(tally.beyond) <= tally.logprobs * 0.001
    assert tally.furthest < 3.0
    if kind == "torch" and strength > 1:
        # The bound is too small for some tokens, and is not made larger so that this passes.
        reason = "float32 rounding reaches beyond the bound at some tokens: docs/numerics.md"
        request.applymarker(pytest.mark.xfail(reason=reason))
    assert not tally.beyond


# -- would the arrays notice? --------------------------------------------------------------------


def notices(subject: Subject, mistake, rows: list[Row], monkeypatch) -> bool:
    """Whether one of the rows fails with the mistake."""
    for row in rows:
        plain = subject.plain(ask_of(row))
        with monkeypatch.context() as patch:
            mistake(patch)
            composed = composed_run(subject, row, plain)
        if subject.is_exact:
            if composed.answers != plain.answers:
                return True
            continue
        tally, clean = Tally(), Tally()
        try:
            compare_under_tie_rule(plain, composed, tally)
        except AssertionError:
            return True
        if tally.beyond:
            # Rounding does that, too: not in this row.
            compare_under_tie_rule(plain, composed_run(subject, row, plain), clean)
            if not clean.beyond:
                return True
    return False


def concerned(rows: list[Row], settings) -> list[Row]:
    found = [row for row in rows if all(row[f] in values for f, values in settings.items())]
    assert found, settings
    return found


@pytest.mark.parametrize("mistake", OF_NATIVE, ids=lambda mistake: mistake.__name__)
@pytest.mark.parametrize(
    ("kind", "mode"),
    [("float32", "independent"), ("bfloat16", "ordinary"),
     pytest.param("int4", "independent", marks=pytest.mark.slow)],
)  # fmt: skip
@pytest.mark.usefixtures("checked_once")
def test_the_arrays_notice(subjects, monkeypatch, kind, mode, mistake):
    """Positive controls: with a mistake in the engine some of the rows it concerns fail."""
    rows = concerned(PAIRS, OF_NATIVE[mistake])
    assert notices(subjects("mini", kind, mode), mistake, rows, monkeypatch), len(rows)


@pytest.mark.parametrize("mistake", OF_PYTORCH, ids=lambda mistake: mistake.__name__)
@pytest.mark.parametrize(
    ("name", "kind", "mode"),
    [("tiny", "torch", "independent"), ("mini", "torch", "ordinary"),
     ("mini", "torch bfloat16", "ordinary")],
)  # fmt: skip
@pytest.mark.usefixtures("checked_once")
def test_the_arrays_notice_on_pytorch(subjects, monkeypatch, name, kind, mode, mistake):
    rows = concerned(TORCH_PAIRS, OF_PYTORCH[mistake])
    assert notices(subjects(name, kind, mode), mistake, rows, monkeypatch), len(rows)


def answer(ids: tuple[int, ...], logprob: float) -> Answer:
    return Answer(
        token_ids=ids, text="", reasoning="", finish_reason="length", prompt_tokens=1,
        completion_tokens=len(ids), prompt_logprobs=(), reasoning_tokens=0, forced_tokens=0,
        reasoning_was_cut=False, near_ties=0, ended_by="max_tokens",
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
    assert tally.furthest <= 0.5 + 1e-6
    assert not tally.beyond


def test_log_probabilities_beyond_the_bound_are_noted():
    plain = Plain(
        params=SamplingParams(), prompt_ids=(), answers=[answer((1, 2), -1.0)],
        rivals=[[(), ()]], slacks=[[0.1, 0.1]],
    )  # fmt: skip
    tally = Tally()
    composed = Composed(
        answers=[answer((1, 2), -1.2)], cached=[0], drafted=0, accepted=0, parkings=0
    )
    compare_under_tie_rule(plain, composed, tally)
    assert len(tally.beyond) == tally.logprobs == 2
    assert "log-probabilities -1.0 and -1.2 are further apart than 0.1" in tally.beyond[0]


def test_near_ties_of_routers_are_broken_alike_and_nothing_else():
    choose = chooser_of(route_reference, 3)

    def chosen(logits):
        return choose(logits[None])[0].tolist()

    def followed(one, other, bound=1e-3):
        one_E, other_E = torch.tensor(one), torch.tensor(other)
        broken = break_ties_as_in(one_E, other_E, choose=choose, bound=bound)
        assert chosen(other_E) == chosen(one_E)
        return broken, other_E.tolist()

    one = [3.0, 2.0, 1.0002, 1.0, -1.0]
    assert followed(one, [3.0, 2.0, 1.5, 1.0, -1.0]) == (0, [3.0, 2.0, 1.5, 1.0, -1.0])
    broken, other = followed(one, [3.1, 2.1, 1.0, 1.0003, -1.0])
    assert broken == 1
    assert other == pytest.approx([3.1, 2.1, 1.0003, 1.0, -1.0])
    # Two that are equal, or become so as probabilities, are apart afterwards.
    assert followed([3.0, 2.0, 1.0, 1.0001, -1.0], [3.0, 2.0, 1.0, 1.0, -1.0])[0] == 1
    tiny = [90.0, 80.0, -30.00001, -30.0, -90.0]
    assert followed(tiny, [90.0, 80.0, -30.0, -30.00001, -90.0], bound=1e-2)[0] <= 1
    for one, other, bound in (
        ([3.0, 2.0, 1.0002, 1.0, -1.0], [3.0, 2.0, 1.0, 1.1, -1.0], 1e-5),
        # What changes places must be close in the run that is followed, and in the other one.
        ([3.0, 2.0, 1.0002, 1.0, -1.0], [3.0, 2.0, 0.0, 0.5, 1.1], 1e-3),
        ([3.0, 2.0, 1.0001, 1.0, -1.0], [3.0, 2.0, -40.0, 50.0, -1.0], 1e-3),
    ):
        other_E = torch.tensor(other)
        with pytest.raises(ValueError, match="other experts, at a margin of"):
            break_ties_as_in(torch.tensor(one), other_E, choose=choose, bound=bound)
        assert torch.equal(other_E, torch.tensor(other))


def test_the_routers_of_every_token_are_followed(subjects):
    """Of prompts in pieces and of decoding steps, whatever else runs; and then they decide."""
    subject = subjects("mini", "torch", "ordinary")
    wish = SamplingParams(temperature=0.0, max_tokens=20)
    with noting_routes(subject.alone.engine) as routes:
        [answer] = subject.alone.generate(STORY, wish)
    tokens = (*subject.alone.tokenizer.encode(STORY), *answer.token_ids)
    assert {len(context) for context in routes} == set(range(1, len(tokens)))
    assert all(context == tokens[: len(context)] for context in routes)
    config = subject.alone.config
    shapes = {tuple(torch.stack(layers).shape) for layers in routes.values()}
    assert shapes == {(config.num_hidden_layers, config.num_experts)}
    for changed in (False, True):
        # Experts are numbered from the other end: no rounding does that.
        wanted = {c: [x.flip(0) for x in layers] for c, layers in routes.items()}
        llm = subject.open(max_batch_tokens=40, max_num_seqs=4)
        others = [llm.stream(text) for text in COMPANY[:2]]
        with following_routes(llm.engine, wanted if changed else routes, 1e-5) as followed:
            [again] = llm.generate(STORY, wish)
            assert all(list(other) for other in others)
        llm.close()
        assert again.token_ids == answer.token_ids
        places = len(routes) * config.num_hidden_layers
        assert places * 0.95 < len(followed.complaints) <= places if changed else (
            not followed.complaints
        )  # fmt: skip
    # A bound as wide as the logits lets the other run decide everything.
    with following_routes(subject.alone.engine, wanted, 100.0) as followed:
        [other] = subject.alone.generate(STORY, wish)
    assert not followed.complaints
    assert followed.broken_alike > places
    assert other.token_ids != answer.token_ids


# -- the promise ---------------------------------------------------------------------------------


def test_a_model_without_independent_rows_is_refused(tiny_model):
    with pytest.raises(BackendError, match="gives other bits when a prompt is split"):
        Engine(tiny_model, batch_invariant=True)


def test_two_engines_of_one_native_model_do_not_meet(subjects):
    """The model is shared, caches are not: steps of the two alternate."""
    subject = subjects("mini", "float32")
    wishes = [SamplingParams(temperature=1.0, seed=seed, max_tokens=12) for seed in (1, 2)]
    alone = [subject.open().generate(STORY, wish)[0].token_ids for wish in wishes]
    engines = [subject.open(speculative_tokens=2) for _ in wishes]
    streams = [llm.stream(STORY, wish) for llm, wish in zip(engines, wishes, strict=True)]
    found: list[list[int]] = [[], []]
    for pieces in itertools.zip_longest(*streams):
        for tokens, piece in zip(found, pieces, strict=True):
            tokens.extend(piece.token_ids if piece else ())
    assert [list(tokens) for tokens in alone] == found
    assert alone[0] != alone[1]
