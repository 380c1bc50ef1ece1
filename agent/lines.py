"""Files of JSON lines that are only ever appended to, by processes that can be killed at any byte.

A line that was cut short is left out when read, and the next one starts on a line of its own. The
journal has its own rules (agent/journal.py): there a line that is no trial is damage.
"""

import json
import os
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """[] where there is no file."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append_line(path: Path, value: dict[str, Any], sync: bool = True) -> None:
    """In one write, so that two processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        start = b"" if not end or file.read() == b"\n" else b"\n"
        file.write(start + json.dumps(value).encode() + b"\n")
        file.flush()
        if sync:
            os.fsync(file.fileno())
