"""Masks found beside the forward are those found in the step, and so is everything else."""

import pytest
from schemas import schema

from qnext import LLM, SamplingParams, StructuredOutputs
from qnext.engine.guide import Guide
from qnext.engine.masks_ahead import FEWEST, MasksAhead

pytest.importorskip("llguidance")

FORMS = [
    {"json_schema": schema(3)},
    {"regex": r"(abc|abd){2}[0-9]{3}"},
    {"choice": ["red", "green", "greenish"]},
    {"json_schema": {"type": "object", "properties": {"name": {"enum": ["Ann", "Ben"]}},
                     "required": ["name"], "additionalProperties": False}},
]  # fmt: skip


def answers(folder, *, ahead: bool, drafts: int | str, logprobs: int | None):
    """Answers and usages, and how often masks were found ahead."""
    begun = 0
    with LLM(
        folder, speculative_tokens=drafts, memory="64MiB", batch_invariant=True, threads=1
    ) as llm:
        masks = llm.engine.masks_ahead = MasksAhead(fewest=1, cores=2 if ahead else 1)
        begin = masks.begin

        def counted(wanted):
            nonlocal begun
            found = begin(wanted)
            begun += found is not None
            return found

        masks.begin = counted
        ids = [llm.tokenizer.id_of(text) for text in ('"', "}", "]", ",")]
        closing = {token: 9.0 for token in ids if token is not None}
        params = [
            SamplingParams(
                # A filter needs the mask before anything is chosen.
                temperature=1.0, top_p=0.99, seed=seed, max_tokens=60, logit_bias=closing,
                logprobs=logprobs,
                structured_outputs=StructuredOutputs(**form),
            )
            for seed, form in enumerate(FORMS)
        ]  # fmt: skip
        found = llm.generate(["Go on.\n"] * len(params), params)
    return [
        (one.token_ids, one.finish_reason, one.usage.forced_tokens, one.logprobs) for one in found
    ], begun


@pytest.mark.parametrize(("drafts", "logprobs"), [(0, None), (0, 1), (2, None)])
def test_nothing_but_time_depends_on_where_masks_are_found(tiny_folder, drafts, logprobs):
    wanted, none = answers(tiny_folder, ahead=False, drafts=drafts, logprobs=logprobs)
    found, begun = answers(tiny_folder, ahead=True, drafts=drafts, logprobs=logprobs)
    assert found == wanted
    assert none == 0 < begun
    assert sum(forced for _, _, forced, _ in wanted) > 5


def test_few_masks_and_a_single_core_stay_in_the_step():
    assert not MasksAhead(cores=1).is_worth(100)
    assert not MasksAhead(cores=2).is_worth(FEWEST - 1)
    assert MasksAhead(cores=2).is_worth(FEWEST)
    assert MasksAhead(cores=2).begin([]) is None


def test_what_goes_wrong_in_the_thread_is_raised():
    class Broken(Guide):
        def mask(self, drafts=()):
            raise ZeroDivisionError

    masks = MasksAhead(fewest=1, cores=2)
    found = masks.begin([(Broken.__new__(Broken), ())])
    assert found is not None
    with pytest.raises(ZeroDivisionError):
        found.result()
    masks.close()
