"""Notes of a person for the model that proposes: `nightshift tell first "try a longer warm-up"`.

Appended to notes.jsonl in the study's folder, whether it runs or not. The next proposal that the
model begins with sees them, and the journal says which ones it was shown. One that it thinks of
while a trial runs (study.llm.ahead) was begun with that trial.
"""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.lines import append_line, read_lines
from agent.quote import plain
from nightshift.fixed.config import ConfigError

NOTES_FILE = "notes.jsonl"
MAX_NOTE_CHARS = 2_000
MAX_NOTES = 20  # shown: the last ones

USAGE = """usage: nightshift tell <study> "<note>"

Leaves a note for the model that proposes in a study; its next proposal sees it.
Without a note: lists those that there are."""


def main(argv: list[str]) -> int:
    from agent.report import STUDIES, find_study

    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    try:
        folder = STUDIES / argv[0]
        if not (folder / "settings.json").is_file():  # one in its baseline has no journal yet
            folder = find_study(argv[0], STUDIES)
        if len(argv) == 1:
            print("\n".join(f"{note['number']:>3}  {note['text']}" for note in read_notes(folder)))
            return 0
        note = tell(folder, " ".join(argv[1:]))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"note {note['number']}: the next proposal that the model begins with sees it")
    return 0


def tell(folder: Path, text: str) -> dict[str, Any]:
    """Raises ConfigError for a note that is empty or too long."""
    text = " ".join(plain(text).split())
    if not 0 < len(text) <= MAX_NOTE_CHARS:
        raise ConfigError(
            f"the note has {len(text)} characters; it must have 1 to {MAX_NOTE_CHARS}. Shorten it, "
            "or write it into agent/program.md"
        )
    note = {"number": len(read_notes(folder)) + 1, "time": _now(), "text": text}
    append_line(folder / NOTES_FILE, note)
    return note


def read_notes(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / NOTES_FILE)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
