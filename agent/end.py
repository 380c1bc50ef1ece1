"""When a study ends: after so many trials, or with the trial in which its hours run out."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from agent.journal import Trial

RECENT = 10  # trials by which the time of the next one is told


class End(NamedTuple):
    trials: float = math.inf  # after the baseline
    seconds: float = math.inf  # of all trials, the baseline's too; pauses of the study do not count

    @staticmethod
    def of(trials: int | None, hours: float | None) -> "End":
        return End(
            math.inf if trials is None else trials, math.inf if hours is None else 3600 * hours
        )

    def left_s(self, trials: Sequence[Trial]) -> float:
        return self.seconds - sum(map(seconds_of, trials))

    def is_reached(self, trials: Sequence[Trial]) -> bool:
        """By these trials, the baseline first. A study has its baseline at least."""
        return bool(trials) and (len(trials) > self.trials or self.left_s(trials) <= 0)

    @property
    def later(self) -> str:
        """Settings with which it ends later."""
        trials = [] if self.trials == math.inf else [f"study.trials={2 * max(1, self.trials)}"]
        hours = [] if self.seconds == math.inf else [f"study.hours={2 * self.seconds / 3600:g}"]
        return " ".join(trials + hours)

    def __str__(self) -> str:
        trials = [] if self.trials == math.inf else [f"{self.trials} trials"]
        hours = [] if self.seconds == math.inf else [f"{self.seconds / 3600:g} hours"]
        return " or ".join(trials + hours)


def seconds_of(trial: Trial) -> float:
    """From its proposal to its judgement, and what was waited for the model before. Of one that
    runs still: of its runs."""
    return trial.cost_s if trial.wall_s is None else trial.waited_s + trial.wall_s


def usual_s(trials: Sequence[Trial]) -> float:
    """Median of the newest."""
    seconds = [seconds_of(trial) for trial in trials[1:][-RECENT:]]
    return statistics.median(seconds) if seconds else 0.0
