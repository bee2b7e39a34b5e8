"""Calls as the published templates write them, with arguments from real dialogues, read back."""

import json
import lzma

import pytest

from qnext.text.calls.schema import declared, parameters_of, types_of
from qnext.text.chat import ChatTemplate
from qnext.text.output import parse_output

TEMPLATES = ("qwen3", "qwen3_instruct_2507", "qwen3_thinking_2507", "qwen3_coder_30b_a3b_instruct")
CALLS = 100
KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array",
         dict: "object"}  # fmt: skip


def dialogues(shared_dir):
    """(calls, tools) of real turns."""
    path = shared_dir / "data" / "tool_calling" / "glaive_toolcall_en_300.jsonl.xz"
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            tools = row["tools"] if isinstance(row["tools"], list) else json.loads(row["tools"])
            for turn in row["conversations"]:
                if turn["from"] == "function_call":
                    call = json.loads(turn["value"])
                    arguments = call["arguments"]
                    if isinstance(arguments, str):
                        arguments = json.loads(arguments)
                    yield (call["name"], arguments), tools


def fits(arguments, tools, function) -> bool:
    """Whether the arguments are what the tool declares, as a model's should be."""
    schema = parameters_of(tools, function)

    def fits_one(key, value) -> bool:
        types = types_of(schema, key)
        return KINDS[type(value)] in types or (type(value) is int and "number" in types)

    return all(key in declared(schema) and fits_one(key, arguments[key]) for key in arguments)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_published_template_writes_is_read_back(shared_dir, name) -> None:
    folder = shared_dir / "data" / "qwen_tokenizer" / "chat_templates"
    template = ChatTemplate((folder / f"{name}.jinja").read_text(encoding="utf-8"))
    read = 0
    for (function, arguments), tools in dialogues(shared_dir):
        if read == CALLS:
            break
        if not fits(arguments, tools, function):
            continue
        offered = [{"type": "function", "function": tool} for tool in tools]
        calls = [{"type": "function", "function": {"name": function, "arguments": arguments}}] * 2
        messages = [
            {"role": "user", "content": "Please."},
            {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
        ]
        whole = template.render(messages, tools=offered, add_generation_prompt=False)
        turn = whole[whole.rindex("<|im_start|>assistant\n") + len("<|im_start|>assistant\n") :]
        output = parse_output(
            turn.removesuffix("\n").removesuffix("<|im_end|>"),
            format=template.tool_format,
            tools=offered,
        )
        found = [(call.name, json.loads(call.arguments)) for call in output.tool_calls]
        assert found == [(function, arguments)] * 2, (turn, found)
        assert output.content == "Let me see."
        read += 1
    assert read == CALLS
