"""Stop a trial that is hopeless while it still trains: by the study's own history, or not at all.

Compared is dev_bpb, which fixed/recorder.py measures the same way in every run, at each measurement
but the last (a check): the trial's minus its parent's on the same seed at equal progress, as a
share of what the parent still learned from there to its end. The share is comparable between
checks, parents and budgets; at 1 the trial has to learn twice as much from there. The training loss
is no measure, for an edit may add a term to it.

**Hopeless** is a trial that decide.py would discard after this one run. So a stop changes no
decision unless the trial would have recovered.

**Limit.** The furthest that any earlier trial that was not hopeless ever was behind, at any check.
If the next trial with hope is one more of their kind, the chance that it falls further behind than
all N of them is 1/(N + 1): each of N + 1 exchangeable numbers is the largest with the same chance
(conformal prediction; Vovk, Gammerman and Shafer 2005). That is the stated false-stop rate: the
share of trials with hope that are stopped. Until it is at most study.early_stop nothing is stopped.
Who had hope is asked anew for each trial, for the bar of decide.py moves. Trials with no difference
at any check (the same weights; a schedule that differs only at the end) are left out: they can
never be stopped, and would make the rate look better.

**Check.** What is stopped is not in the history, so the rate would never be seen again. Of the
trials that pass the limit the first and then every EVERYth run on to the end. One of them with hope
raises the limit for good. That also bounds what a kept trial can do whose curve looks better than
it is: after at most EVERY - 1 of its children one runs on and ends it.

Covered: the curve is the candidate's word, read while it runs: no link, pipe or growing file of
more than MAX_BYTES is followed, only finite numbers with rising progress count. Not covered: a
candidate that writes another curve than it measured keeps its own run alive, or ends it.
"""

import json
import math
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agent.journal import Journal, Run, Trial
from nightshift.fixed.result import CURVE_FILE, CURVE_KEYS, SCRATCH_FOLDER, read_curve

EVERY = 5  # of so many that pass the limit, one runs on
NEAR = 0.05  # of progress: a parent's curve is not continued further than that
MAX_BYTES, MAX_LINE = 16 << 20, 4096  # of a live curve; a longer one is not looked at
CHUNK = 1 << 20  # bytes that are read at once

Points = list[tuple[float, float]]  # (progress, dev_bpb), progress rising


class Past(NamedTuple):
    """An earlier trial that ran to its end."""

    behind: tuple[float, ...]  # share at each check
    gain: float  # its parent's score minus its own, on the same seed


class Limit(NamedTuple):
    behind: float  # share
    trials: int  # N, with hope, none of which was further behind

    @property
    def rate(self) -> float:
        """False stops to expect: the share of trials with hope that is stopped."""
        return 1 / (self.trials + 1)


class Passed(NamedTuple):
    """How a run passed the limit."""

    progress: float
    bpb: float  # that it was behind
    behind: float  # share

    def __str__(self) -> str:
        return (
            f"at {self.progress:.0%} its dev_bpb was {self.bpb:.4f} behind its parent's, "
            f"{self.behind:.2f} times what that still learned from there"
        )


# ---- numbers ----


def limit_of(
    history: Sequence[Past], hopeless: Callable[[float], bool], rate: float
) -> Limit | None:
    """None while too little is known. `hopeless`: would decide.py discard a trial of this gain?"""
    hopeful = [past.behind for past in history if any(past.behind) and not hopeless(past.gain)]
    if not rate or 1 / (len(hopeful) + 1) > rate + 1e-9:  # rounding
        return None
    return Limit(max(0.0, *map(max, hopeful)), len(hopeful))


def compared(points: Points, parent: Points) -> list[tuple[float, float]]:
    """At each point dev_bpb minus the parent's at equal progress (on the straight line between two
    of its points), and that as a share of what the parent still learned. Both are nan where the
    parent's curve does not reach or falls no more."""
    if not parent:
        return [(math.nan, math.nan)] * len(points)
    at, values = zip(*parent, strict=True)
    found = []
    for progress, bpb in points:
        there = float(np.interp(progress, at, values))
        left = there - values[-1]
        known = left > 0 and at[0] - NEAR <= progress
        found.append((bpb - there, (bpb - there) / left) if known else (math.nan, math.nan))
    return found


def dev_points(curve: Sequence[Any]) -> Points:
    """Of a curve's points those with a dev_bpb, as long as they make sense."""
    found: Points = []
    for point in curve:
        values = point if isinstance(point, dict) else {}
        progress, bpb = _number(values.get("progress")), _number(values.get("dev_bpb"))
        if progress is None or bpb is None:
            continue
        if 0 < progress <= 1 and (not found or progress > found[-1][0]):
            found.append((progress, bpb))
    return found


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


# ---- a study's history ----


def past_of(folder: Path, journal: Journal, trial: Trial, checks: int) -> Past | None:
    """Its first run against the parent's of that time. `folder`: the study's. None where there are
    no two whole curves."""
    if trial.parent is None or not trial.runs:
        return None
    run = trial.runs[0]
    parents = journal.before(trial).runs_of(journal.trials[trial.parent], trial)
    parent = parents.get(run.seed)
    if parent is None or {run.status, parent.status} != {"ok"}:
        return None
    seen = compared(curve_of(folder, run), curve_of(folder, parent))[:checks]
    shares = tuple(share for _, share in seen)
    if len(shares) < checks or not all(map(math.isfinite, shares)):
        return None
    return Past(shares, parent.score - run.score)


def curve_of(folder: Path, run: Run) -> Points:
    return dev_points(read_curve(folder / run.folder / CURVE_FILE)) if run.folder else []


def history_of(folder: Path, journal: Journal, checks: int) -> list[Past]:
    """Of each trial that ran to its end."""
    found = (past_of(folder, journal, trial, checks) for trial in journal.trials)
    return [past for past in found if past]


def runs_on(num_passed: int) -> bool:
    """Is the next trial that passes the limit, after so many, one that is checked?"""
    return num_passed % EVERY == 0


def ran_on(trial: Trial) -> str:
    """Of one that passed the limit and was not stopped."""
    end = "was hopeless" if was_hopeless(trial) else "had hope: a false stop"
    is_short = trial.rung is not None and trial.rung.behind == trial.behind
    where = "in its short run" if is_short else "on dev"
    return f"early stopping would have ended it ({trial.behind:.4f} behind {where}), and it {end}"


def was_hopeless(trial: Trial) -> bool:
    return trial.decision == "discard" and len(trial.runs) == 1


def in_words(passed: Sequence[Trial]) -> str:
    """Of the trials that passed the limit: what was stopped, and what the check says of it."""
    stopped = [trial for trial in passed if trial.status == "stopped"]
    checked = [trial for trial in passed if trial.status == "ok"]
    false = sum(not was_hopeless(trial) for trial in checked)
    return (
        f"{len(stopped)} trials were stopped, far behind their parents. Of such trials "
        f"{len(checked)} ran on as a check: {false} of them had hope (false stops)."
    )


# ---- while it runs ----


class Watch:
    """Looks at one run while it trains. Called now and then; says why the run should end."""

    def __init__(self, parent: Points, known: Limit, checks: int, runs_on: bool):
        self.parent, self.known, self.checks, self.runs_on = parent, known, checks, runs_on
        self.tail: Tail | None = None
        self.passed: Passed | None = None

    def __call__(self, folder: Path) -> str | None:
        """`folder`: the run's."""
        self.tail = self.tail or Tail(folder / SCRATCH_FOLDER / CURVE_FILE)
        if self.tail.read() and self.passed is None:
            self.passed = self._look()
        if self.passed is None or self.runs_on:
            return None
        self._keep(folder / CURVE_FILE)
        return self.why

    def _look(self) -> Passed | None:
        points = dev_points(self.tail.points)[: self.checks]
        for (progress, _), (bpb, share) in zip(points, compared(points, self.parent), strict=True):
            if share > self.known.behind:
                return Passed(progress, bpb, share)
        return None

    def _keep(self, path: Path) -> None:
        """What the run showed until then, rebuilt from its numbers as a whole run's curve is."""
        points = [p for p in self.tail.points if isinstance(p, dict)]
        kept = [{k: p[k] for k in CURVE_KEYS if _number(p.get(k)) is not None} for p in points]
        lines = [json.dumps(point) + "\n" for point in kept if "step" in point]
        path.write_text("".join(lines), encoding="utf-8")

    @property
    def why(self) -> str:
        return (
            f"{self.passed}; none of {self.known.trials} earlier trials that were worth another "
            f"seed fell behind by more than {self.known.behind:.2f} times (false stops: "
            f"{self.known.rate:.1%} of such trials)"
        )


class Tail:
    """The points of a curve that a candidate still writes; never more than MAX_BYTES of it."""

    def __init__(self, path: Path):
        self.path, self.points = path, []
        self.offset, self.unread = 0, b""

    def read(self) -> bool:
        """Is there anything new?"""
        new = self._new_bytes()
        *lines, self.unread = (self.unread + new).split(b"\n")
        if len(self.unread) > MAX_LINE:
            self.offset = MAX_BYTES  # it is no curve
        self.points += [point for line in lines if (point := _parsed(line)) is not None]
        return bool(lines)

    def _new_bytes(self) -> bytes:
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return b""
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                return b""
            new = os.pread(file, min(CHUNK, max(0, MAX_BYTES - self.offset)), self.offset)
        finally:
            os.close(file)
        self.offset += len(new)
        return new


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line) if len(line) <= MAX_LINE else None
    except (ValueError, RecursionError):
        return None
