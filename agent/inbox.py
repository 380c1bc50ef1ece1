"""Proposals from outside: one file each, in outputs/studies/<study>/inbox/.

    p0001.json            as it was submitted; never changed
    p0001.refused.json    why it got no trial: {"reason": ...}

Whoever submits makes the first, the study's process alone makes the second. A proposal waits until
the journal has a trial with its id, or it was refused; so nothing is lost and nothing runs twice,
whichever process is killed when. A name is taken by a hard link, which fails if it exists: files
are whole from their first moment, and two who submit at once get two names, in order.
"""

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

from agent.journal import Journal
from nightshift.fixed.result import write_json

FOLDER = "inbox"  # in the study's folder
NAME = re.compile(r"p(\d{4,})")
MAX_WAITING = 50  # a loop that only submits is stopped here
MAX_BYTES = 1_000_000


class Full(ValueError):
    """Too many proposals wait."""


class Inbox:
    def __init__(self, study_folder: Path):
        self.study_folder, self.folder = study_folder, study_folder / FOLDER

    def submit(self, values: dict[str, Any], journal: Journal) -> str:
        """Its id, once it is safe on disk. Raises Full."""
        if len(self.waiting(journal)) >= MAX_WAITING:
            raise Full(
                f"{MAX_WAITING} proposals wait already, the limit. Ask for their outcome first."
            )
        own = self.folder / f".{os.getpid()}-{threading.get_ident()}.json"
        write_json(own, values)
        try:
            number = max(map(_number, self.ids()), default=0) + 1
            while not _link(own, self.folder / f"p{number:04d}.json"):
                number += 1
            return f"p{number:04d}"
        finally:
            own.unlink()

    def ids(self) -> list[str]:
        """All that were submitted, in order."""
        names = os.listdir(self.folder) if self.folder.is_dir() else ()
        found = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        return sorted((name for name in found if NAME.fullmatch(name)), key=_number)

    def waiting(self, journal: Journal) -> list[str]:
        """Without a trial and not refused, in order. The one whose trial runs is among them."""
        done = {trial.proposal.id for trial in journal.trials}
        return [name for name in self.ids() if name not in done and self.refusal(name) is None]

    def read(self, name: str) -> Any:
        """The values as submitted. Anyone can write here: ValueError for what is not JSON."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            raise ValueError(f"{path.name} is not a file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.name} has more than {MAX_BYTES} bytes")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except RecursionError:
            raise ValueError(f"{path.name} is nested too deeply") from None

    def refuse(self, name: str, reason: str) -> None:
        write_json(self._refusal(name), {"reason": reason})

    def refusal(self, name: str) -> str | None:
        path = self._refusal(name)
        if not path.exists():
            return None
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["reason"])
        except (ValueError, TypeError, LookupError, OSError, RecursionError):
            return f"{path.name} cannot be read"

    def running(self, journal: Journal) -> str | None:
        """The id of the proposal that the next trial was given; None if that is another's."""
        path = self.study_folder / f"trials/{len(journal):03d}/proposal.json"
        return json.loads(path.read_text(encoding="utf-8")).get("id") if path.exists() else None

    def _refusal(self, name: str) -> Path:
        return self.folder / f"{name}.refused.json"


def _number(name: str) -> int:
    return int(NAME.fullmatch(name)[1])


def _link(own: Path, path: Path) -> bool:
    try:
        os.link(own, path)
        return True
    except FileExistsError:
        return False
