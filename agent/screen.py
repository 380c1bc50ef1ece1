"""What a person sees of an audit: a bar on a terminal, one plain line a run, the time that is left.

trial  seed  outcome         val_bpb then        now  title
    0     1  identical         1.65801234 1.65801234  baseline
"""

import sys
import time

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agent.replays import OUTCOMES, Replay
from agent.view import minutes

HEAD = f"{'trial':>5}  {'seed':>4}  {'outcome':14} {'val_bpb then':>13} {'now':>13}  title"


class Screen:
    """Shows an audit while it runs. Stands where a study has its View."""

    def __init__(self):
        self.live: Live | None = None
        self.doing, self.usual_s, self.done, self.before = "starting", [], 0, 0
        self.started = time.monotonic()

    def begin(self, usual_s: list[float], num_done: int) -> None:
        """`usual_s`: what each run took when it was made; `num_done` were replayed before."""
        self.usual_s, self.before, self.started = usual_s, num_done, time.monotonic()
        if num_done:
            print(f"{num_done} of {num_done + len(usual_s)} runs are on record already")
        print(HEAD, flush=True)
        if sys.stdout.isatty():
            self.live = Live(get_renderable=self._bar, console=Console(), refresh_per_second=2)
            self.live.start()

    def note(self, text: str) -> None:
        print(text, flush=True)

    def show(self, doing: str) -> None:
        self.doing = doing

    def end(self, replay: Replay, title: str) -> None:
        self.done += 1
        print(replay_line(replay, title) + ("" if self.live else self._left()), flush=True)
        if replay.outcome != OUTCOMES[0]:
            print(f"{'':13}{replay.why}", flush=True)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def seconds_left(self) -> float:
        """From what the runs took when they were made, and what they take today."""
        spent, usual = time.monotonic() - self.started, sum(self.usual_s[: self.done])
        pace = spent / usual if usual else 1.0
        return pace * sum(self.usual_s[self.done :])

    def _left(self) -> str:
        if self.done == len(self.usual_s):
            return ""
        return f"  [{self.done} of {len(self.usual_s)}, about {minutes(self.seconds_left())} left]"

    def _bar(self) -> Table:
        row = Table.grid(padding=(0, 1))
        total, done = len(self.usual_s) + self.before, self.done + self.before
        text = f"{done} of {total}, about {minutes(self.seconds_left())} left ({self.doing})"
        row.add_row(ProgressBar(total=max(1, total), completed=done, width=30), Text(text))
        return row


def replay_line(replay: Replay, title: str) -> str:
    then = replay.status_then if replay.val_bpb_then is None else f"{replay.val_bpb_then:.9f}"
    now = replay.status_now or "-"
    now = now if replay.val_bpb_now is None else f"{replay.val_bpb_now:.9f}"
    seed = "-" if replay.seed is None else replay.seed
    title += {"parent": " (its parent)", "short": " (its short run)"}.get(replay.what, "")
    return f"{replay.trial:>5}  {seed:>4}  {replay.outcome:14} {then:>13} {now:>13}  {title}"
