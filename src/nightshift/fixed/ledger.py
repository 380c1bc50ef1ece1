"""The test split is read once for each winner; each reading is written down before it happens.

outputs/test_ledger.jsonl of the main checkout, whichever git worktree the reader runs in; one JSON
line a reading: synced first, then the text is opened. A second
reading of the same weights, or of another checkpoint of the same code, configuration and seed, is
refused and told the first one's number. A reading that failed counts: looking is what is limited.

Covered: repeated looks by this program, from any process of this checkout, several at once.
Not covered: a person who deletes the ledger, and code of one's own outside the sandbox.
"""

import fcntl
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nightshift.fixed.checkpoint import weights_sha256
from nightshift.fixed.config import ROOT, Config, ConfigError, config_digest
from nightshift.fixed.result import CHECKPOINT_FOLDER, TRAINING_FILE, Result, read_training

LEDGER = "outputs/test_ledger.jsonl"


def read_test_once(
    run: Path, config: Config, read: Callable[[], Result], ledger: Path | None = None
) -> Result:
    """`read()` if nobody has read test for this winner yet. Raises ConfigError."""
    ledger = ledger or main_checkout() / LEDGER
    winner = name_of(run, config)
    ledger.parent.mkdir(parents=True, exist_ok=True)
    with open(ledger, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        entries = [json.loads(line) for line in file.read().splitlines()]
        for entry in entries:
            if "winner" in entry and _is_same(entry["winner"], winner):
                raise ConfigError(_refusal(entry, entries))
        number = sum("winner" in entry for entry in entries)
        _append(file, {"reading": number, "winner": winner, "at": _now(), "run": str(run)})
    result = read()
    with open(ledger, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _append(file, {"of": number, "status": result.status, "test_bpb": result.val_bpb})
    return result


def main_checkout(root: Path = ROOT) -> Path:
    """The checkout that `root` is a git worktree of; `root` itself where it is none."""
    link = root / ".git"
    if not link.is_file():
        return root
    place = root / link.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
    common = place / "commondir"
    if not common.is_file():  # a submodule
        return root
    return (place / common.read_text(encoding="utf-8").strip()).resolve().parent


def name_of(run: Path, config: Config) -> dict[str, Any]:
    """What identifies a winner: its weights; its code, configuration and seed."""
    path = run / TRAINING_FILE
    training = read_training(path) if path.is_file() else None
    return {
        "weights": weights_sha256(run / CHECKPOINT_FOLDER),
        "code": training and training.editable_code,
        "config": config_digest(config),
    }


def _is_same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    same_recipe = a["code"] is not None and (a["code"], a["config"]) == (b["code"], b["config"])
    return a["weights"] == b["weights"] or same_recipe


def _refusal(entry: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    number = entry["reading"]
    outcome = next((e for e in entries if e.get("of") == number), None)
    said = "no number: it did not finish"
    if outcome is not None:
        said = f"test_bpb {outcome['test_bpb']}" if outcome["test_bpb"] else outcome["status"]
    return (
        f"test was read for this winner at {entry['at']} ({said}); a second reading is refused, "
        "for what is looked at twice is tuned to. Use val, or promote another winner"
    )


def _append(file, values: dict[str, Any]) -> None:
    file.write(json.dumps(values) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
