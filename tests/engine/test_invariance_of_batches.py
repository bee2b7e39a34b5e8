"""Path-independent mode: prompts alone, in batches of any size, shuffled, drafted, cached."""

import random

import pytest

from qnext import LLM, SamplingParams, StructuredOutputs, native

FEW, MANY = 10, 200
SIZES = (2, 3, 8, 64)


def ask(number: int) -> tuple[list[int], SamplingParams]:
    """A random prompt; every feature that a request can ask for is in some."""
    generator = random.Random(number)
    ids = [generator.randrange(250) for _ in range(generator.randrange(1, 90))]
    form = StructuredOutputs(regex="[a-z]{1,5}(-[0-9]{1,3})*") if number % 5 == 1 else None
    return ids, SamplingParams(
        temperature=0.0 if number % 3 else 1.0, seed=number, max_tokens=generator.randrange(2, 14),
        logprobs=2, ignore_eos=True, structured_outputs=form,
        thinking_budget=3 if number % 7 == 2 else None,
        repetition_penalty=1.2 if number % 4 == 3 else 1.0,
    )  # fmt: skip


def check(folder, count: int, **options) -> None:
    asked = [ask(number) for number in range(count)]
    settings = {"memory": "64MiB", "batch_invariant": True, "threads": 1, **options}

    def run(llm: LLM, some: list[int]):
        found = llm.generate([asked[i][0] for i in some], [asked[i][1] for i in some])
        return {i: (one.token_ids, one.logprobs) for i, one in zip(some, found, strict=True)}

    with LLM(folder, prefix_cache=False, **settings) as alone:
        plain = {i: run(alone, [i])[i] for i in range(count)}
    generator = random.Random(0)
    for drafts in (0, 2):
        with LLM(folder, speculative_tokens=drafts, max_num_seqs=64, **settings) as llm:
            for size in SIZES:
                order = generator.sample(range(count), count)
                for start in range(0, count, size):
                    some = order[start : start + size]
                    assert run(llm, some) == {i: plain[i] for i in some}, (drafts, size)


KINDS = [("torch", "float32"), ("torch", "bfloat16"), ("native", "float32"), ("native", "bfloat16")]


def fits(backend: str) -> None:
    if backend == "native" and native.unfit() is not None:
        pytest.skip(native.unfit() or "")


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
def test_company_changes_no_bit(tiny_folder, backend, dtype):
    fits(backend)
    check(tiny_folder, FEW, backend=backend, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype"), KINDS)
def test_company_changes_no_bit_of_many_answers(tiny_folder, backend, dtype):
    fits(backend)
    check(tiny_folder, MANY, backend=backend, dtype=dtype)
