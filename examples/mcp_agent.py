"""An agent whose tools come from an MCP server, through the clients ``openai`` and ``mcp``.

    qnext serve MODEL &
    pip install mcp
    python examples/mcp_agent.py "What is in this folder?" -- npx some-mcp-server .

What follows ``--`` is the command of the MCP server, or its URL.
"""

import argparse
import asyncio
import json
from typing import Any

from mcp import Client, StdioServerParameters
from openai import AsyncOpenAI

MAX_ROUNDS = 8


async def declared(tools: Client) -> list[dict[str, Any]]:
    """The tools of the MCP server as OpenAI lists them."""
    found = (await tools.list_tools()).tools
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                # Servers seldom say so, and take no other arguments than they name.
                "parameters": {"additionalProperties": False, **tool.input_schema},
            },
        }
        for tool in found
    ]


async def call(tools: Client, name: str, arguments: str) -> str:
    """The text a tool gives back, or what went wrong, for the model to read."""
    try:
        given = json.loads(arguments)
    except json.JSONDecodeError as error:
        return f"error: the arguments are not JSON ({error})"
    result = await tools.call_tool(name, given)
    text = "\n".join(part.text for part in result.content if part.type == "text")
    return f"error: {text}" if result.is_error else text


async def run(
    client: AsyncOpenAI, model: str, tools: Client, task: str, **options: Any
) -> tuple[str, list[dict[str, Any]]]:
    """(the answer, all messages): tools are called until the model answers without one."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": task}]
    known = await declared(tools)
    for left in reversed(range(MAX_ROUNDS)):
        choice = {} if left else {"tool_choice": "none"}
        answer = await client.chat.completions.create(
            model=model, messages=messages, tools=known, **{**options, **choice}
        )  # type: ignore[call-overload]
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content or "", messages
        for one in message.tool_calls:
            result = await call(tools, one.function.name, one.function.arguments)
            messages.append({"role": "tool", "tool_call_id": one.id, "content": result})
    raise AssertionError("the last round has no tools")


async def main() -> None:
    """Carry out one task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task")
    parser.add_argument("server", nargs="+", metavar="COMMAND", help="command or URL")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none")
    arguments = parser.parse_args()
    first, *rest = arguments.server
    server = first if "://" in first else StdioServerParameters(command=first, args=rest)
    client = AsyncOpenAI(base_url=arguments.url, api_key=arguments.key)
    model = (await client.models.list()).data[0].id
    async with Client(server) as tools:
        print((await run(client, model, tools, arguments.task))[0])


if __name__ == "__main__":
    asyncio.run(main())
