"""An agent: the model calls tools until it has its answer, through the official ``openai`` client.

    qnext serve MODEL &
    python examples/agent.py "What is 17 * 23, and what day is it?"

Works with any server that speaks OpenAI's chat completions; ``--url`` and ``--model`` choose it.
"""

import argparse
import ast
import json
import operator
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from openai import OpenAI

MAX_ROUNDS = 8
OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.USub: operator.neg,
}  # fmt: skip


def calculate(expression: str) -> str:
    """The value of an arithmetic expression with + - * / and parentheses."""

    def value(node: ast.AST) -> float:
        match node:
            case ast.Expression(body):
                return value(body)
            case ast.Constant(int() | float() as number):
                return number
            case ast.BinOp(left, op, right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(operand))
        raise ValueError(f"cannot calculate {expression!r}")

    return f"{value(ast.parse(expression, mode='eval')):g}"


def today() -> str:
    """Today's date in UTC."""
    return datetime.now(UTC).strftime("%A, %Y-%m-%d")


TOOLS: dict[str, Callable[..., str]] = {"calculate": calculate, "today": today}
DECLARED = [
    {
        "type": "function",
        "function": {
            "name": "calculate",
            "description": "Value of an arithmetic expression",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string"}},
                "required": ["expression"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "today",
            "description": "Today's date",
            "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
        },
    },
]


def call(name: str, arguments: str) -> str:
    """The result of a tool, or what went wrong, for the model to read."""
    try:
        return TOOLS[name](**json.loads(arguments))
    except (KeyError, TypeError, ValueError, SyntaxError, ArithmeticError) as error:
        return f"error: {error}"


def run(client: OpenAI, model: str, task: str, **options: Any) -> tuple[str, list[dict[str, Any]]]:
    """(the answer, all messages): tools are called until the model answers without one.

    ``options`` are further fields of the requests; those of the last round forbid tools, so that
    there is an answer.
    """
    messages: list[dict[str, Any]] = [{"role": "user", "content": task}]
    for left in reversed(range(MAX_ROUNDS)):
        choice = {} if left else {"tool_choice": "none"}
        answer = client.chat.completions.create(
            model=model, messages=messages, tools=DECLARED, **{**options, **choice}
        )  # type: ignore[call-overload]
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content or "", messages
        for one in message.tool_calls:
            result = call(one.function.name, one.function.arguments)
            print(f"{one.function.name}({one.function.arguments}) -> {result}")
            messages.append({"role": "tool", "tool_call_id": one.id, "content": result})
    raise AssertionError("the last round has no tools")


def main() -> None:
    """Carry out one task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="default: the first the server has")
    parser.add_argument("--key", default="none")
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.url, api_key=arguments.key)
    model = arguments.model or next(iter(client.models.list())).id
    print(run(client, model, arguments.task)[0])


if __name__ == "__main__":
    main()
