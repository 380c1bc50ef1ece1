"""What a person sees: a live table on a terminal, one plain line a trial in a log.

trial  status      val_bpb     gain  decision  title
    0  ok           2.1034        -  keep      baseline
    1  ok           2.0921  +0.0113  keep      matrix_lr 0.02 -> 0.031
"""

import math
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agent import strategy
from agent.costs import in_words, of_trials
from agent.end import End
from agent.journal import Journal, Trial, counted
from agent.target import VAL, Target
from nightshift.fixed.config import flatten

HEAD = "{:>5}  {:8} {:>9} {:>8}  {:8}  {}"
MAX_ROWS = 30  # of the live table: the last ones


class View:
    """Shows a study while it runs."""

    def __init__(self, journal: Journal, end: End, target: Target = VAL):
        self.journal, self.study_end = journal, end
        self.columns = ("trial", "status", target.name, "gain", "decision", "title")
        self.started, self.doing = time.monotonic(), "starting"
        self.number, self.title, self.trial_started = len(journal), "", time.monotonic()
        self.live: Live | None = None
        if sys.stdout.isatty():
            self.live = Live(get_renderable=self._table, console=Console(), refresh_per_second=2)
            self.live.start()
        else:
            print(HEAD.format(*self.columns), flush=True)
            for trial in journal.trials:
                print(trial_line(trial), flush=True)

    def note(self, text: str) -> None:
        """One line for the person, above the table."""
        print(text, flush=True)

    def begin(self, number: int, title: str) -> None:
        self.number, self.title, self.trial_started = number, title, time.monotonic()
        self.doing = "starting"

    def show(self, doing: str) -> None:
        self.doing = doing

    def end(self, trial: Trial) -> None:
        if self.live is None:
            print(trial_line(trial), flush=True)

    def close(self) -> None:
        if self.live is not None:
            self.title = ""
            self.live.stop()

    def _table(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in self.columns:
            right = name not in ("status", "decision", "title")
            table.add_column(name, justify="right" if right else "left", no_wrap=name != "title")
        for trial in self.journal.trials[-MAX_ROWS:]:
            style = "green" if trial.decision == "keep" else "red" if trial.failed else ""
            table.add_row(*map(Text, _cells(trial)), style=style)
        if self.title:
            title = Text(f"{self.title} ({self.doing})")
            table.add_row(str(self.number), "running", "", "", "", title, style="yellow")
        return Group(table, Text(self._clock(), style="dim"))

    def _clock(self) -> str:
        elapsed = f"{minutes(time.monotonic() - self.started)} elapsed"
        left_s = self.seconds_left()
        left = "" if left_s is None else f", about {minutes(left_s)} left"
        usage = of_trials(self.journal.trials)
        return elapsed + left + (f"; model: {in_words(usage)}" if usage else "")

    def seconds_left(self) -> float | None:
        """By the study's hours, and by the mean time of the trials so far once there is one."""
        walls = [t.wall_s for t in self.journal.trials[1:] if t.wall_s is not None]
        mean, running = sum(walls) / max(1, len(walls)), time.monotonic() - self.trial_started
        left = self.study_end.left_s(self.journal.trials) - running
        if walls:
            trials = self.study_end.trials + 1 - len(self.journal)
            left = min(left, trials * mean - min(mean, running))
        return None if left == math.inf else max(0.0, left)


def trial_line(trial: Trial) -> str:
    return HEAD.format(*_cells(trial))


def _cells(trial: Trial) -> list[str]:
    message = next((run.message for run in trial.runs if run.status != "ok"), None)
    if trial.status != "ok":
        message = message or trial.reason
    return [
        str(trial.number),
        trial.status,
        "-" if trial.score is None else f"{trial.score:.4f}",
        "-" if trial.gain is None else f"{trial.gain:+.4f}",
        trial.decision,
        trial.proposal.heading + (f" ({message})" if message else ""),
    ]


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def summary(
    journal: Journal, folder: Path, name: str, report: Path | None, target: Target = VAL
) -> str:
    """The block at the end: the best against the baseline, where to look, how to repeat it."""
    baseline, best = journal.trials[0], journal.incumbent
    kept = [trial for trial in journal.lineage if trial.number]
    numbers = f"{best.score:.4f} (baseline {baseline.score:.4f})"
    lines = ["---", f"{target.name + ':':12} {numbers}"]
    lines.append("{:12} {}, {} kept".format("trials:", *counted(journal.trials)))
    what = [
        f"{key} {before} -> {after}"
        for key, before, after in changes(_values(folder, baseline), _values(folder, best))
    ]
    what += [f"code: {t.proposal.heading} (trial {t.number})" for t in kept if t.proposal.edits]
    what = what or ["the baseline's configuration: nothing was better"]
    lines += [f"{'best:' if not i else '':12} {change}" for i, change in enumerate(what)]
    if ahead := strategy.unproven(journal.trials):
        lines.append(
            f"{'ahead:':12} trial {ahead.number} by {ahead.differences[0]:+.4f} on one seed, not "
            f"proven: study.trials={len(journal)} study.hours=null puts it to the proof"
        )
    if usage := of_trials(journal.trials):
        lines.append(f"{'model:':12} {in_words(usage)}")
    if report:
        lines.append(f"{'report:':12} {report}")
    lines.append(f"{'look:':12} nightshift ui")
    lines.append(f"{'reproduce:':12} git checkout study/{name} && dvc repro {target.stage}")
    return "\n".join(lines)


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    old, new = flatten(before), flatten(after)
    return [(key, old.get(key), new[key]) for key in new if old.get(key) != new[key]]


def _values(folder: Path, trial: Trial) -> dict[str, Any]:
    path = folder / "trials" / f"{trial.number:03d}" / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
