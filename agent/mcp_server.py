"""An outside agent's tools as an MCP server on standard input and output.

    nightshift mcp first

An MCP client (Claude Code, Codex, any other) starts it; docs/agents.md has the lines for its
configuration. It offers outside.TOOLS and keeps nothing: killed at any moment, it loses nothing,
and several may serve one study. A call that waits for a decision reports progress; one that its
client cancels stops waiting, and the proposal stays.
"""

import json
import sys
from functools import partial
from itertools import count
from pathlib import Path

from agent import outside
from nightshift.fixed.config import ROOT

MISSING = "nightshift mcp needs the package mcp: pip install -e '.[agents]'"
INSTRUCTIONS = (
    "You are the researcher of one study of a small language model's training. Read `program` "
    "first: goal, rules, taste. Then `status`, `editable`, `list_trials`; and for each trial "
    "`propose`, whose answer is the decision. Trials take minutes: with wait=false `propose` "
    "answers at once and `outcome` later."
)


def main(argv: list[str], repo: Path = ROOT) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: nightshift mcp <study>", file=sys.stderr)
        return 0 if argv in (["--help"], ["-h"]) else 2
    try:
        import anyio
        import mcp  # noqa: F401
    except ImportError:
        print(MISSING, file=sys.stderr)
        return 2
    anyio.run(serve, repo, argv[0])
    return 0


async def serve(repo: Path, study: str) -> None:
    """Until standard input ends."""
    from mcp.server.lowlevel import Server
    from mcp.server.stdio import stdio_server

    server = Server(
        "nightshift",
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=partial(call_tool, repo, study),
    )
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


async def list_tools(context, params):
    from mcp import ListToolsResult, Tool

    return ListToolsResult(
        tools=[
            Tool(
                name=name,
                description=tool.description,
                input_schema=tool.arguments.model_json_schema(),
            )
            for name, tool in outside.TOOLS.items()
        ]
    )


async def call_tool(repo: Path, study: str, context, params):
    """The same JSON as on the command line, as text and as structured content."""
    from anyio import from_thread, to_thread
    from mcp.types import CallToolResult, TextContent

    steps = count(1)

    def tell(now: str) -> None:
        from_thread.run(context.session.report_progress, float(next(steps)), None, now)

    call = partial(outside.call, repo, study, params.name, params.arguments or {}, tell)
    answer = await to_thread.run_sync(call, abandon_on_cancel=True)
    text = json.dumps(answer, ensure_ascii=False, allow_nan=False)
    return CallToolResult(
        content=[TextContent(type="text", text=text)],
        structured_content=answer,
        is_error="error" in answer,
    )
