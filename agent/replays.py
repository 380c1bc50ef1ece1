"""The record of replays: replays.jsonl beside the journal, one line a run that was made again.

A line counts while the journal's line of its trial is the one that it was compared with. What was
replayed already is not replayed again, so an audit that was cut off goes on where it ended; lines
of one audit share a number, and `again=true` begins the next one.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from nightshift.fixed.config import ConfigError

REPLAYS_FILE = "replays.jsonl"
OUTCOMES = ("identical", "within noise", "not reproduced")  # best first


class Key(NamedTuple):
    """Names one run of a study."""

    trial: int
    what: str  # run | parent | short | preflight | refusal
    seed: int | None  # None: the trial failed before its first run
    clock: str  # recorded | again


@dataclass(kw_only=True)
class Replay:
    """One run made again: what the record said, what came out, and what that means."""

    trial: int
    # run | parent (of the parent, made for this trial) | short (ladder.py) | preflight | refusal
    what: str
    seed: int | None
    clock: str  # recorded: step for step; again: on the clock, which decides how many steps
    outcome: str
    why: str  # one line
    status_then: str
    status_now: str | None = None  # None: it could not be made again
    val_bpb_then: float | None = None
    val_bpb_now: float | None = None
    low: float | None = None  # stated interval of val_bpb_now
    high: float | None = None
    sigmas: float | None = None  # |now - then| over sigma of a seed
    pair_sigmas: float | None = None  # and over that of a paired difference
    weights_then: str | None = None
    weights_now: str | None = None
    steps_then: int | None = None
    steps_now: int | None = None
    differs: dict[str, list[Any]] = field(default_factory=dict)  # of the machine: [then, now]
    journal: str = ""  # digest of the trial's line in the journal
    audit: int = 1
    at: str = ""  # UTC, ISO 8601
    wall_s: float | None = None

    @property
    def key(self) -> Key:
        return Key(self.trial, self.what, self.seed, self.clock)


def line_digests(journal: Path) -> list[str]:
    """Twelve hex digits of each line of the journal, as it lies on disk."""
    lines = journal.read_bytes().splitlines()
    return [hashlib.sha256(line).hexdigest()[:12] for line in lines]


def read_replays(study_folder: Path) -> list[Replay]:
    """All lines, oldest first; one that a kill cut short never was. Raises ConfigError."""
    path = study_folder / REPLAYS_FILE
    known = {f.name for f in fields(Replay)}
    found = []
    for number, line in enumerate(_whole(path).splitlines(), 1):
        try:
            values = json.loads(line)
            found.append(Replay(**{name: values[name] for name in values if name in known}))
        except (ValueError, TypeError):
            raise ConfigError(
                f"{path}: line {number} is damaged. Remove it; its run is then replayed again"
            ) from None
    return found


def append(study_folder: Path, replay: Replay) -> None:
    """Synced to disk: from then on the run is replayed."""
    path = study_folder / REPLAYS_FILE
    whole = len(_whole(path))
    line = json.dumps(asdict(replay), ensure_ascii=False, allow_nan=False) + "\n"
    with open(path, "ab") as file:
        file.truncate(whole)
        file.write(line.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def _whole(path: Path) -> bytes:
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def valid(replays: Iterable[Replay], digests: Sequence[str]) -> list[Replay]:
    """Those that were compared with what the journal says today."""
    return [r for r in replays if r.trial < len(digests) and digests[r.trial] == r.journal]


def on_record(study_folder: Path, journal: Path) -> list[Replay]:
    if not (study_folder / REPLAYS_FILE).exists():
        return []
    return valid(read_replays(study_folder), line_digests(journal))


def left_to_do(wanted: Sequence[Key], replays: Sequence[Replay], again: bool) -> tuple:
    """(audit number, keys to replay) of a call that wants these keys.

    Audit 1 is what nobody asked to do again; `again` goes on with a later one that was cut off, or
    begins the next.
    """
    last = max((r.audit for r in replays), default=1)
    if not again:
        done = {r.key for r in replays}
        return last, [key for key in wanted if key not in done]
    done = {r.key for r in replays if r.audit == last}
    if last == 1 or done >= set(wanted):
        return last + 1, list(wanted)
    return last, [key for key in wanted if key not in done]


def newest(replays: Iterable[Replay]) -> list[Replay]:
    """The last word on each run, in the order of trials."""
    last = {replay.key: replay for replay in replays}
    return sorted(last.values(), key=lambda r: (r.trial, r.what != "run", r.seed or 0, r.clock))


def counts(replays: Sequence[Replay]) -> str:
    """'5 runs of 4 trials: 4 identical, 1 within noise, 0 not reproduced'."""
    number = Counter(replay.outcome for replay in replays)
    trials = len({replay.trial for replay in replays})
    each = ", ".join(f"{number[outcome]} {outcome}" for outcome in OUTCOMES)
    runs = "1 run" if len(replays) == 1 else f"{len(replays)} runs"
    return f"{runs} of {trials} trial{'' if trials == 1 else 's'}: {each}"


def on_the_clock(replays: Sequence[Replay]) -> str | None:
    """Of the runs on the clock that have a number: how many lie in their stated interval."""
    asked = [r for r in replays if r.clock == "again" and r.low is not None and r.val_bpb_now]
    inside = sum(r.low <= r.val_bpb_now <= r.high for r in asked)
    share = f"{inside} of {len(asked)} ({inside / len(asked):.0%})" if asked else None
    return share and f"on the clock, inside the stated interval: {share}"


def word_on(replays: Sequence[Replay]) -> str | None:
    """One trial's replays in a few words, e.g. for a tag; None if there is none."""
    if not replays:
        return None
    worst = max(replays, key=lambda r: OUTCOMES.index(r.outcome))
    same = sum(r.outcome == worst.outcome for r in replays)
    return f"{worst.outcome} ({same} of {len(replays)} runs)"


def section(study_folder: Path, journal: Path) -> str | None:
    """The report's section; None where nothing was replayed."""
    try:
        replays = newest(on_record(study_folder, journal))
    except ConfigError as error:
        return f"## Replayed\n\n{error}."
    if not replays:
        return None
    lines = ["## Replayed", "", f"{counts(replays)}."]
    if inside := on_the_clock(replays):
        lines.append(f"{inside[0].upper()}{inside[1:]}.")
    bad = [r for r in replays if r.outcome == OUTCOMES[-1]]
    lines += [""] * bool(bad) + [f"- {name_of(r)}: {r.outcome}. {r.why}" for r in bad]
    return "\n".join(lines)


def name_of(replay: Replay) -> str:
    seed = "" if replay.seed is None else f", seed {replay.seed}"
    whose = {"parent": " of its parent", "short": " of its short run"}.get(replay.what, "")
    clock = ", on the clock" if replay.clock == "again" else ""
    return f"{replay.trial:03d}{seed}{whose}{clock}"
