"""Thinking budgets, exact to the token: checked on the tokens alone, by a walk of its own."""

import random

import pytest

from qnext import LLM, SamplingParams
from qnext.errors import RequestError
from qnext.text.parse import STOP_THINKING

SLICE, MANY = 64, 1_000
BATCH = 16


@pytest.fixture(scope="module")
def llms(tiny_folder):
    """The same model without drafts and with two."""
    some = [
        LLM(tiny_folder, speculative_tokens=k, memory="64MiB", batch_invariant=True, threads=1,
            max_chunk_tokens=chunk)
        for k, chunk in ((0, None), (2, 9))
    ]  # fmt: skip
    yield some
    for llm in some:
        llm.close()


def request(llm: LLM, number: int) -> tuple[list[int], SamplingParams]:
    """A random prompt inside the reasoning, and a random budget."""
    generator = random.Random(number)
    ids = [generator.randrange(300) for _ in range(generator.randrange(1, 30))]
    prompt = [*ids, *llm.tokenizer.encode("<think>\n")]
    bias = {}
    if generator.random() < 0.5:
        bias[llm.tokenizer.id_of("</think>")] = generator.choice([3.0, 6.0])
    if generator.random() < 0.3:
        bias[llm.tokenizer.id_of("<tool_call>")] = 6.0
    return prompt, SamplingParams(
        temperature=generator.choice([0.0, 1.0]), seed=number, logit_bias=bias,
        max_tokens=generator.randrange(1, 140), ignore_eos=generator.random() < 0.7,
        thinking_budget=generator.choice([0, 1, 2, 3, 5, 8, 13, 40, 64]),
        logprobs=generator.choice([None, 0]), stop=generator.choice([(), ("giv",)]),
    )  # fmt: skip


def walk(llm: LLM, ids: tuple[int, ...], budget: int) -> tuple[int, bool]:
    """(sampled tokens of reasoning, whether they were cut off), or an AssertionError."""
    inserted = tuple(llm.tokenizer.encode(STOP_THINKING))
    ends = {llm.tokenizer.id_of("</think>"), llm.tokenizer.id_of("<tool_call>")}
    length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    if length < budget or (length == budget and (length == len(ids) or ids[length] in ends)):
        # It ended by itself, so nothing is inserted anywhere: in no answer, in no call.
        places = range(len(ids))
        assert not any(ids[i : i + len(inserted)] == inserted for i in places)
        return length, False
    assert ids[budget : budget + len(inserted)] == inserted[: len(ids) - budget]
    return budget, True


def check(llms: list[LLM], numbers: range) -> int:
    pairs = [request(llms[0], number) for number in numbers]
    prompts, params = [prompt for prompt, _ in pairs], [one for _, one in pairs]
    plain, drafted = (llm.generate(prompts, params) for llm in llms)
    cut = 0
    for one, other, wanted in zip(plain, drafted, params, strict=True):
        assert other.token_ids == one.token_ids
        assert (other.text, other.ended_by) == (one.text, one.ended_by)
        assert other.logprobs == one.logprobs
        assert other.usage.forced_tokens == one.usage.forced_tokens
        assert wanted.thinking_budget is not None
        length, was_cut = walk(llms[0], one.token_ids, wanted.thinking_budget)
        assert length <= wanted.thinking_budget
        cut += was_cut
        if one.finish_reason != "stop" or not wanted.stop:
            assert one.usage.reasoning_was_cut == was_cut
            assert one.usage.completion_tokens == len(one.token_ids)
    return cut


def test_budgets_are_exact(llms):
    cut = sum(check(llms, range(n, n + BATCH)) for n in range(0, SLICE, BATCH))
    assert SLICE // 4 < cut < SLICE


@pytest.mark.slow
def test_budgets_of_a_thousand_requests_are_exact(llms):
    cut = sum(check(llms, range(n, n + BATCH)) for n in range(SLICE, MANY + SLICE, BATCH))
    assert MANY // 4 < cut < MANY


def test_an_answer_that_opens_its_block_is_counted_from_there(llms):
    """A hybrid model writes ``<think>`` itself."""
    llm = llms[1]
    opening = llm.tokenizer.id_of("<think>")
    rules = SamplingParams(temperature=0.0, max_tokens=140, thinking_budget=3,
                           logit_bias={opening: 60.0}, ignore_eos=True)  # fmt: skip
    [one] = llm.generate("x", rules)
    inserted = tuple(llm.tokenizer.encode(STOP_THINKING))
    assert one.token_ids[0] == opening
    assert one.token_ids[4 : 4 + len(inserted)] == inserted
    assert one.usage.forced_tokens == len(inserted)
    assert one.usage.reasoning_tokens == 3 + inserted.index(llm.tokenizer.id_of("</think>"))


def test_the_inserted_text_is_the_published_one():
    assert STOP_THINKING.startswith("\n\nConsidering the limited time by the user, I have to give ")
    assert STOP_THINKING.endswith("directly now.\n</think>\n\n")


@pytest.mark.parametrize("budget", [-1, 2.5, True, "8"])
def test_impossible_budgets_are_refused(budget):
    with pytest.raises(RequestError, match="thinking_budget"):
        SamplingParams(thinking_budget=budget)
