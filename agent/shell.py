"""The tools of an outside agent on the command line: JSON in, JSON out.

    nightshift agent first status
    nightshift agent first propose '{"title": ..., "hypothesis": ..., "overrides": {...}}'
    nightshift agent first propose - < proposal.json

Standard output is one JSON object and nothing else; what happens meanwhile is on standard error.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from agent import outside
from nightshift.fixed.config import ROOT

MAX_CHARS = 1_000_000  # of the arguments


def main(argv: list[str], repo: Path = ROOT) -> int:
    """Exit status: 0 with an answer, 2 with {"error": ...}."""
    if not argv or "--help" in argv or "-h" in argv:
        print(usage())
        return 0
    answer = ask(argv, repo)
    try:
        print(json.dumps(answer, ensure_ascii=False, allow_nan=False), flush=True)
    except BrokenPipeError:  # `| head`: what was asked for is done all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 2 if "error" in answer else 0


def usage() -> str:
    lines = [
        "usage: nightshift agent <study> <tool> ['<arguments as JSON>' | -]",
        "",
        "With - the arguments are read from standard input. The answer is one JSON object; a",
        'mistake is {"error": ...} with exit status 2. The tools:',
    ]
    for name, tool in outside.TOOLS.items():
        lines += ["", f"{name}: {tool.description}"]
        schema = tool.arguments.model_json_schema()
        for key, field in schema.get("properties", {}).items():
            needed = " (needed)" if key in schema.get("required", []) else ""
            lines.append(f"    {key}{needed}: {field.get('description', field.get('type', ''))}")
    return "\n".join(lines)


def ask(argv: list[str], repo: Path) -> dict[str, Any]:
    if len(argv) not in (2, 3):
        return {"error": "give a study, a tool and its arguments as one JSON object; see --help"}
    study, tool, text = [*argv, "{}"][:3]
    text = sys.stdin.read(MAX_CHARS + 1) if text == "-" else text
    if len(text) > MAX_CHARS:
        return {"error": f"the arguments have more than {MAX_CHARS} characters; propose less"}
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {"error": f"the arguments are not JSON: {error}. Write one object, in quotes"}
    return outside.call(repo, study, tool, arguments, lambda now: print(now, file=sys.stderr))
