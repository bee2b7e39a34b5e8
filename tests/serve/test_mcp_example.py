"""The agent of ``examples/`` whose tools come from an MCP server."""

import asyncio
import sys
from pathlib import Path
from typing import Literal

import pytest
from openai import AsyncOpenAI

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
mcp = pytest.importorskip("mcp", reason="needs the package mcp")


def test_tools_of_an_mcp_server_are_called(mini_live) -> None:
    import mcp_agent
    from mcp.server.mcpserver import MCPServer

    server = MCPServer("animals")

    @server.tool()
    def count(animal: Literal["fox", "hen"]) -> str:
        """How many there are."""
        return f"there are 3 of {animal}"

    async def talk() -> tuple[list[dict], str]:
        url = f"{mini_live.url}/v1"
        async with mcp.Client(server) as tools, AsyncOpenAI(base_url=url, api_key="none") as client:
            create, rounds = client.chat.completions.create, []

            async def ask(**fields):
                rounds.append(fields)
                choice = "required" if len(rounds) == 1 else "none"
                return await create(**{**fields, "tool_choice": choice})

            client.chat.completions.create = ask
            found = await mcp_agent.run(
                client, "qnext-mini", tools, "How many foxes?", temperature=0, max_tokens=400,
                parallel_tool_calls=False,
            )  # fmt: skip
            return found[1], await mcp_agent.call(tools, "count", "no json")

    messages, failed = asyncio.run(talk())
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[2]["content"].startswith("there are 3 of ")
    assert failed.startswith("error: the arguments are not JSON")
