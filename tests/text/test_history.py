"""What of a prompt is still there in the next turn, and how that turn begins."""

import pytest

from qnext.text.chat import ChatTemplate
from qnext.text.history import beginning_after, stable_lengths
from qnext.text.tokenizer import Tokenizer

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
CALL = {"function": {"name": "look", "arguments": {"where": "here"}}}
QUESTION = {"role": "user", "content": "Where is the fox?"}
THOUGHT = {"role": "assistant", "content": "There.", "reasoning_content": "It must be somewhere."}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["The fox sat by the river."] * 20, vocab_size=400)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate.builtin()


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"tools": TOOLS}])
@pytest.mark.parametrize("text", ["And now?", "zebra", "\n\nWhy"])
def test_the_next_prompt_begins_as_foretold(template, tokenizer, options, text):
    options = {"tools": None, **options}
    found = beginning_after(template, tokenizer, [QUESTION], THOUGHT, options)[:-1]
    later = [QUESTION, THOUGHT, {"role": "user", "content": text}]
    ids = template.encode(later, tokenizer, **options)
    assert ids[: len(found)] == found
    # Nothing is left but the new words and the start of the answer.
    assert tokenizer.decode(found).endswith("There.<|im_end|>\n<|im_start|>user\n")
    assert "somewhere" not in tokenizer.decode(found)


def test_calls_and_their_results_lose_their_reasoning_too(template, tokenizer):
    loop = [
        QUESTION,
        {**THOUGHT, "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "by the river"},
    ]
    options = {"tools": TOOLS}
    now = tokenizer.decode(template.encode(loop, tokenizer, **options))
    later = tokenizer.decode(beginning_after(template, tokenizer, loop, THOUGHT, options)[:-1])
    assert "somewhere" in now
    assert "somewhere" not in later
    assert "by the river" in later


def test_an_answer_that_cannot_be_followed_foretells_nothing(tokenizer):
    lonely = ChatTemplate(
        "{%- if messages | length > 1 -%}{{- raise_exception('one only') -}}{%- endif -%}"
        "{{- messages[0].content -}}"
    )
    options = {"tools": None}
    assert beginning_after(lonely, tokenizer, [QUESTION], THOUGHT, options) == []
    assert stable_lengths(lonely, tokenizer, [QUESTION], [1, 2], options) == ()


def test_while_tools_are_called_the_whole_prompt_stays(template, tokenizer):
    loop = [
        QUESTION,
        {**THOUGHT, "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "by the river"},
    ]
    options = {"tools": TOOLS}
    ids = template.encode(loop, tokenizer, **options)
    hints = {why: n for n, why in stable_lengths(template, tokenizer, loop, ids, options)}
    assert hints["loop"] == len(ids)
    assert hints["system"] < hints["stable"] < hints["loop"]  # reasoning follows the question
    without = stable_lengths(template, tokenizer, [QUESTION], ids, {"tools": None})
    assert "loop" not in dict(map(reversed, without))
