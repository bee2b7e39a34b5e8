"""Questions with one right answer: arithmetic, word problems, needles, tool calls, budgets."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from qnext.answers import Completion
from qnext.data.generate import arithmetic, reasoning
from qnext.data.generate.exercise import Exercise, is_held_out
from qnext.data.generate.tools import tool_task
from qnext.engine.request import SamplingParams
from qnext.eval.needles import DEPTHS, SEED, needle_prompt
from qnext.eval.scores import share
from qnext.llm import LLM

MODES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("thinking", {}), ("direct", {"enable_thinking": False}),
)  # fmt: skip
LONGEST = 400
"""Tokens an answer may take, its reasoning included."""
BUDGETS = (0, 16, 32, 64, 128, 256)


def ask(
    llm: LLM, questions: Sequence[str], *, tokens: int = LONGEST, **options: Any
) -> list[Completion]:
    """Greedy answers to single questions through the chat template."""
    prompts = [
        llm.template.encode([{"role": "user", "content": question}], llm.tokenizer, **options)
        for question in questions
    ]
    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    return llm.generate(prompts, params, progress=False)


def said(answer: Completion) -> str:
    """The text after the think block; empty if the block was never closed."""
    text = answer.text
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    return "" if "<think>" in text else text.strip()


def well_formed(answer: Completion, *, thinks: bool) -> bool:
    """Whether an answer ended by itself, with one closed think block where one is due."""
    opened, closed = answer.text.count("<think>"), answer.text.count("</think>")
    wanted = 1 if thinks else 0
    return answer.finish_reason == "stop" and opened == closed == wanted and bool(said(answer))


def held_out_sums(kind: str, digits: tuple[int, int], count: int) -> list[Exercise]:
    """Questions with operands never trained on; single digits are all there are, so any."""
    rng = Random(f"{SEED}/{kind}/{digits}")
    made = []
    for _ in range(count):
        a, b = arithmetic.operands(rng, kind, digits, held_out=True)
        made.append(arithmetic.exercise(kind, a, b))
    return made


def graded(
    llm: LLM, groups: dict[str, list[Exercise]], watch: Callable[[int], None] = lambda n: None
) -> tuple[dict[str, Any], dict[str, list[bool]]]:
    """Accuracy per group and mode, and per mode whether each answer was well formed."""
    found: dict[str, Any] = {}
    formed: dict[str, list[bool]] = {mode: [] for mode, _ in MODES}
    for name, made in groups.items():
        found[name] = {}
        for mode, options in MODES:
            answers = ask(llm, [one.question for one in made], **options)
            right = [e.right(said(a)) for e, a in zip(made, answers, strict=True)]
            lengths = sorted(len(a.token_ids) for a in answers)
            found[name][mode] = {**share(right), "median_tokens": lengths[len(lengths) // 2]}
            formed[mode] += [well_formed(a, thinks=mode == "thinking") for a in answers]
            watch(len(made))
    return found, formed


def sums(count: int) -> dict[str, list[Exercise]]:
    """All operations by digits."""
    return {
        f"{kind}, {'x'.join(map(str, digits))} digits": held_out_sums(kind, digits, count)
        for kind, digits, _ in arithmetic.LEVELS
        if digits != (2, 1) or kind == "multiply"
        if digits != (3, 2)
    }


def problems(count: int) -> dict[str, list[Exercise]]:
    """Two-step word problems by kind, and the small kinds."""
    groups = {}
    for kind in reasoning.WORD_PROBLEMS:
        rng = Random(f"{SEED}/{kind}")
        made = [reasoning.word_problem(rng, kind, held_out=True) for _ in range(count)]
        groups[f"word problem: {kind}"] = made
    for make, _ in reasoning.SMALL:
        rng = Random(f"{SEED}/{make.__name__}")
        groups[make.__name__] = [make(rng, held_out=True) for _ in range(count)]
    return groups


def budget_curve(llm: LLM, count: int) -> dict[str, Any]:
    """Accuracy when thinking may take so many tokens; the engine ends it there."""
    rng = Random(f"{SEED}/budget")
    made = [
        *held_out_sums("add", (3, 3), count), *held_out_sums("subtract", (3, 3), count),
        *held_out_sums("multiply", (2, 2), count),
        *(reasoning.word_problem(rng, held_out=True) for _ in range(count)),
    ]  # fmt: skip
    points = []
    for budget in (*BUDGETS, None):
        params = SamplingParams(temperature=0.0, max_tokens=LONGEST, thinking_budget=budget)
        asked = [[{"role": "user", "content": one.question}] for one in made]
        answers = llm.chat(asked, params, enable_thinking=True, progress=False)
        right = [one.right(answer.text) for one, answer in zip(made, answers, strict=True)]
        cut = sum(answer.usage.reasoning_was_cut for answer in answers)
        points.append({"budget": budget, "cut": cut, **share(right)})
    return {"points": points, "items": len(made)}


def needle_grid(
    llm: LLM, lengths: Sequence[int], per_cell: int, *, distractors: int = 0,
    depths: Sequence[float] = DEPTHS, watch: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:  # fmt: skip
    """Exact retrieval of a four-digit number by length of the prompt in tokens and depth."""
    cells: dict[str, dict[str, Any]] = {}
    for length in lengths:
        cells[str(length)] = {}
        everything: list[bool] = []
        for depth in depths:
            rng = Random(f"{SEED}/needle/{length}/{depth}/{distractors}")
            made = [
                needle_prompt(llm.tokenizer, llm.template, rng, length, depth, distractors)
                for _ in range(per_cell)
            ]
            answers = [
                answer
                for _, prompt in made
                for answer in llm.generate(
                    [prompt], SamplingParams(temperature=0.0, max_tokens=24), progress=False
                )
            ]
            marks = [one.right(a.text) for (one, _), a in zip(made, answers, strict=True)]
            cells[str(length)][f"{depth:.1f}"] = share(marks)["share"]
            everything += marks
            watch(per_cell)
        cells[str(length)]["all"] = share(everything)
    return {"per_cell": per_cell, "distractors": distractors, "lengths": cells}


def tool_calls(llm: LLM, count: int) -> dict[str, Any]:
    """Requests that ask for one call: whether it parses, and whether it is the expected one."""
    rng = Random(f"{SEED}/tools")
    parsed, right = [], []
    for _ in range(count):
        task = tool_task(rng, is_held_out)
        params = SamplingParams(temperature=0.0, max_tokens=120)
        answer = llm.chat(
            list(task.chat.messages[:1]), params, enable_thinking=False,
            tools=list(task.chat.tools),
        )  # fmt: skip
        calls = [_plain(call) for call in answer.tool_calls]
        parsed.append(len(calls) == 1)
        right.append(task.right(calls))
    return {"one_call": share(parsed), "right_call": share(right)}


def _plain(call: Any) -> dict[str, Any]:
    import json

    arguments = call.arguments
    return {
        "name": call.name,
        "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments,
    }


PROMPTS = (
    "Hello!", "Who are you?", "What can you do?", "Tell me a story about a cat.",
    "Tell me a story about a little robot.", "What is the capital of France?",
    "What is the capital of Japan?", "What does umbrella mean?", "What is 7 + 5?",
    "What is 48 + 27?", "What is 47 × 36?", "Count from 1 to 10.",
    "Tom has 35 apples. Anna gives Tom 13 more. Then Tom loses 9. How many apples does Tom have "
    "now?", "Which number is larger, 508 or 327?", "What color is the sky?", "Why do we sleep?",
    "I feel sad today.", "What is your favorite movie?",
    "Write a Python program that sorts a list.", "Thank you! /no_think",
)  # fmt: skip


def samples(llm: LLM) -> dict[str, Any]:
    """Greedy answers to a fixed list of prompts, and how varied their words are."""
    answers = ask(llm, PROMPTS, tokens=300)
    found = []
    triples: list[tuple[int, ...]] = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = answer.token_ids
        triples += [tuple(ids[n : n + 3]) for n in range(len(ids) - 2)]
        found.append({"prompt": prompt, "text": answer.text, "finish_reason": answer.finish_reason})
    return {"answers": found, "distinct_3": round(len(set(triples)) / max(1, len(triples)), 4)}
